"""One folder of images divided into training, validation and test images, the same everywhere."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.data.listing import SPLITS, WHOLE, Files, Listing
from sam_lightning.data.source import Names, stratified_split


def divided(listing: Listing, split: Any, seed: int) -> Listing:
    """A listing of one folder as training, (validation) and test images.

    Args:
        listing: with the split ``WHOLE``.
        split, seed: as ``image_folder`` takes them.

    Raises:
        ConfigError: ``split`` is out of its range, or leaves a part or a class empty; its file
            cannot be read, or names images that are not there.
    """
    files, left_out = listing.splits[WHOLE], Counter(listing.left_out)
    if isinstance(split, str):
        indices = _as_stored(files.names, split, left_out)
    else:
        indices = _drawn(files, split, seed)
    for label, cls in enumerate(listing.classes):
        if not (files.labels[indices["train"]] == label).any():
            count = int((files.labels == label).sum())
            raise ConfigError(
                f"data.split={split}: leaves no training image of class {cls!r}, which has {count}"
            )
    splits = {name: files.take(chosen) for name, chosen in indices.items() if len(chosen)}
    return Listing(splits, listing.classes, dict(left_out.most_common()))


def _drawn(files: Files, split: Any, seed: int) -> dict[str, Tensor]:
    """Draw by the names and the seed alone: the same files anywhere, in any order."""
    parts = [float(part) for part in split] if isinstance(split, Sequence) else [1 - split, split]
    if len(parts) not in (2, 3) or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-6:
        raise ConfigError(
            f"data.split={split}: must be the fraction of test images, or the fractions of "
            "training, (validation) and test images, which are 1 together, or a file split.json"
        )
    hashed = bytearray()
    for name in files.names:
        named = f"{seed}:{_text(_nfc(name))}"
        hashed += hashlib.blake2b(named.encode(), digest_size=8).digest()
    keys = torch.from_numpy((np.frombuffer(hashed, ">u8") >> 1).astype(np.int64))
    total, sizes = len(keys), [0] + [round(len(keys) * part) for part in parts[1:]]
    if min(sizes[1:]) < 1 or sum(sizes) >= total:
        raise ConfigError(f"data.split={split}: leaves a part of the {total} images empty")
    test, rest = stratified_split(files.labels, sizes[-1], keys)
    if len(parts) == 2:
        return {"train": rest, "test": test}
    val, train = stratified_split(files.labels[rest], sizes[1], keys[rest])
    return {"train": rest[train], "test": test, "val": rest[val]}


def _as_stored(names: Names, file: str, left_out: Counter[str]) -> dict[str, Tensor]:
    """The split that a run has written to its ``split.json``."""
    try:
        path = Path(os.path.expanduser(file))
        if path.exists() and not path.is_file():  # a pipe would wait
            raise OSError("is no ordinary file")
        stored = json.loads(path.read_bytes())
        wanted = {split: [str(name) for name in stored.get(split, [])] for split in SPLITS}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"data.split={file}: cannot be read ({one_line(error)})") from error
    all_wanted = Counter(name for split in wanted.values() for name in split)
    for name in (name for name, count in all_wanted.items() if count > 1):
        raise ConfigError(f"data.split={file}: has {name!r} more than once")
    there = {_text(name): i for i, name in enumerate(names)}
    # A copy on another system may have all names in another form of Unicode.
    left = {_nfc(name): i for name, i in there.items() if name not in all_wanted}
    where = {n: there[n] if n in there else left.pop(_nfc(n), -1) for n in all_wanted}
    missing = [name for name, i in where.items() if i < 0]
    if missing:
        some = ", ".join(map(repr, missing[:3]))
        raise ConfigError(
            f"data.split={file}: {len(missing):,} of its images are not there, such as {some}"
        )
    indices = {
        s: torch.tensor([where[n] for n in of], dtype=torch.int64) for s, of in wanted.items()
    }
    if others := len(names) - sum(map(len, indices.values())):
        left_out["not in data.split"] += others
    return {name: chosen.sort().values for name, chosen in indices.items()}


def split_names(splits: dict[str, Any]) -> dict[str, list[str]]:
    """What ``split.json`` has: the names of each split's images."""
    return {name: [*map(_text, of)] for name, of in splits.items() if of is not None}


def _nfc(name: str) -> str:
    """The same on systems that keep names in other forms of Unicode."""
    return unicodedata.normalize("NFC", name)


def _text(name: str) -> str:
    """A name that may have bytes that are not UTF-8, as text that JSON can have."""
    return name.encode("utf-8", "backslashreplace").decode()
