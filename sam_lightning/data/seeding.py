"""Seeds of independent random streams."""

import hashlib


def draw_seed(*parts: int) -> int:
    """Hash integers to a well mixed seed in 0..2^63 - 1; the same parts give the same seed.

    Seeds that are added up (seed + epoch) collide: run 0's epoch 1 would draw as run 1's epoch 0.
    """
    digest = hashlib.blake2b(repr(tuple(map(int, parts))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
