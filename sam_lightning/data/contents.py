"""Hashes of files' contents, remembered so that no file is read twice to hash it.

A file that has the device, inode, size and times of one that was hashed before has its content: no
program can set the time at which an inode changed, so unpacking an archive cannot fool it.
"""

import hashlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from sam_lightning.config.progress import progress
from sam_lightning.data.listing import Files, content_of, stamp_of

SIZE = 16  # bytes of a hash
SMALL = 8_000  # bytes of a file that is read without threads, which would wait for the GIL
SETTLED = 2 * 10**9  # ns after which another change to a file has another time for sure
_KNOWN = np.dtype([("stamp", np.int64), ("hash", np.uint8, SIZE)])


def hash_of(content: bytes | bytearray) -> bytes:
    """A hash of ``SIZE`` bytes."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()


def hashes(files: Files, folder: Path) -> np.ndarray:
    """Hashes of the contents of files, uint8 N x ``SIZE``, zeros where one cannot be read.

    Args:
        files: those to hash.
        folder: where hashes of earlier calls are, and new ones are kept if that works.
    """
    if (there := files.known()) is not None:
        return there
    base = os.fsencode(os.path.realpath(files.base))
    index = folder / f"contents-{hashlib.blake2b(base, digest_size=16).hexdigest()}.npy"
    known = _known(index)
    order = known["stamp"].argsort(kind="stable")
    places = known["stamp"][order].searchsorted(files.stamps, "right") - 1
    found = np.zeros(len(files.stamps), _KNOWN)
    if len(known):
        found[:] = known[order[places]]  # the one before, where there is none
    unknown = np.flatnonzero(found["stamp"] != files.stamps)
    found["hash"][unknown] = 0
    found["stamp"] = files.stamps
    now, settled = time.time_ns(), np.zeros(len(found), bool)

    def read(i: int) -> None:
        with suppress(OSError):  # it stays zero; who decodes it is told why
            content, status = content_of(files.path(i))
            found["hash"][i] = np.frombuffer(hash_of(content), np.uint8)
            changed = max(status.st_mtime_ns, status.st_ctime_ns)
            settled[i] = stamp_of(status) == files.stamps[i] and changed < now - SETTLED

    if len(unknown):
        with progress("reading", len(unknown)) as advance:
            for _ in each(read, unknown, files.size):
                advance()
    if settled.any():
        with suppress(OSError):  # else they are hashed again next time
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as new:
                np.save(Path(new, index.name), np.concatenate([known, found[settled]]))
                os.replace(Path(new, index.name), index)
    return found["hash"]


def each(call: Callable[[int], Any], indices: Iterable[int], size: float) -> Iterator[Any]:
    """``call`` with each of the indices of files, in several threads unless the files are tiny.

    Args:
        size: mean of the files' bytes.

    The results come in order, and only some are made in advance.
    """
    if size <= SMALL:
        yield from map(call, indices)
        return
    from joblib import cpu_count  # heeds affinity and the limits of containers

    count, waiting = cpu_count(), deque[Future[Any]]()
    pool = ThreadPoolExecutor(count)
    try:
        for i in indices:
            waiting.append(pool.submit(call, i))
            if len(waiting) > 4 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # maybe in one of its own threads, which must not wait for itself
        pool.shutdown(wait=False, cancel_futures=True)


def _known(index: Path) -> np.ndarray:
    """What was kept, as ``_KNOWN``; nothing if that is damaged."""
    with suppress(OSError, ValueError, EOFError):
        found: np.ndarray = np.load(index, allow_pickle=False)
        if found.dtype == _KNOWN and found.ndim == 1:
            return found
    return np.zeros(0, _KNOWN)
