"""Folders listed once for all processes of a machine, which map one copy of the listing.

At each start the first rank on a machine lists and tells the others, through the store that
connects them, where its arrays are. So all see the same files, those that are there now.
"""

import json
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sam_lightning.config.cluster import number
from sam_lightning.data.index import Mapped, write_arrays
from sam_lightning.data.listing import Files, Listing
from sam_lightning.data.remote import digest
from sam_lightning.data.source import Names

SMALL = 2**20  # bytes of arrays that one process keeps in its memory


class MappedFiles(Files):
    """Files whose arrays are mapped, also by a loading process that gets them."""

    def __init__(self, base: str, size: float, arrays: Mapped) -> None:
        labels = torch.from_numpy(arrays["label"])
        super().__init__(base, Names(arrays), labels, arrays["stamp"], size)
        self.arrays = arrays

    def __reduce__(self) -> Any:
        return MappedFiles, (self.base, self.size, self.arrays)


def listed_once(make: Callable[[], Listing], question: str, cache: Path) -> Listing:
    """What ``make`` lists, or the first rank on this machine has listed before.

    Args:
        make: lists; nothing is shared of what other files than ``Files`` are in it.
        question: tells it from others.
        cache: a folder for the arrays, each file named by a hash of it. Where it cannot be written
            to, each process has its own.
    """
    store, key = None, f"{socket.gethostname()} {question}"
    if dist.is_available() and dist.is_initialized():
        store = dist.distributed_c10d._get_default_store()
    first = number("LOCAL_RANK", 0) == 0
    if store and first:
        store.set(key, "")
    elif store and store.check([key]) and (told := store.get(key)):
        with suppress(OSError):  # it was removed since
            return _opened(told)
    listing = make()
    if any(type(files) is not Files for files in listing.splits.values()):
        return listing
    arrays = {
        name: {**files.names.alone(), "label": files.labels.numpy(), "stamp": files.stamps}
        for name, files in listing.splits.items()
    }
    if not store and sum(a.nbytes for of in arrays.values() for a in of.values()) < SMALL:
        return listing
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            new = Path(folder, "listing")
            places, sha256 = write_arrays(new, arrays)
            path = cache / f"listing-{sha256[:32]}.bin"
            if not path.is_file() or digest(path) != sha256:
                os.replace(new, path)
        splits = {name: (f.base, f.size, places[name]) for name, f in listing.splits.items()}
        text = json.dumps([str(path), splits, listing.classes, listing.left_out])
        listing = _opened(text)
    except OSError:
        return listing
    if store and first:
        store.set(key, text)
    return listing


def _opened(text: Any) -> Listing:
    path, splits, classes, left_out = json.loads(text)
    files: dict[str, Files] = {
        name: MappedFiles(base, size, Mapped(Path(path), places))
        for name, (base, size, places) in splits.items()
    }
    return Listing(files, classes, left_out)
