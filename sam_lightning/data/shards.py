"""Photographs in tar shards, read at random where they are."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.data.hugging_face import HUB, tables
from sam_lightning.data.imagenet import list_imagenet
from sam_lightning.data.index import BLOCK, FILE, Index, Shard, SplitIndex, first_blocks
from sam_lightning.data.listing import WHOLE, Files, Listing, list_images
from sam_lightning.data.prefetch import THREADS, Prefetcher
from sam_lightning.data.remote import index_of, is_address
from sam_lightning.data.source import Names
from sam_lightning.data.tars import find, indexed

UNFINISHED = "unfinished"  # the folder beside shards that are not all packed
MOST_OPEN = 256  # shards that a process has open at a time


class _Opened:
    """A file, open until nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if "descriptor" in self.__dict__:
            os.close(self.descriptor)


class Shards:
    """The shards of a split; each is opened when it is first read.

    Args:
        base: the folder that their names are relative to.
        files: the shards.
        copies: bring those that are not in the folder yet; None: all are there.

    Raises:
        ConfigError: one is not there, or has another size.
    """

    def __init__(self, base: str, files: Sequence[Shard], copies: Prefetcher | None = None) -> None:
        self.paths = [os.path.join(base, shard.name) for shard in files]
        self.files, self.first, self.copies = files, first_blocks(files), copies
        self._open: dict[int, _Opened] = {}
        for path, shard in zip(self.paths, files, strict=True):
            try:
                size = os.stat(path).st_size
            except OSError as error:
                if copies and isinstance(error, FileNotFoundError):
                    continue
                raise ConfigError(f"data.root: {path}: {one_line(error)}") from error
            if size != shard.size:
                raise ConfigError(
                    f"data.root: {path}: has {size:,} bytes and had {shard.size:,} when it was "
                    "packed; it was cut short or changed"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each process has its own

    def of(self, blocks: Any) -> np.ndarray:
        """The numbers of the shards that have these blocks."""
        return np.asarray(self.first.searchsorted(blocks, "right") - 1, np.int32)

    def read(self, block: int, length: int, crc: int) -> bytearray:
        """The bytes that begin at a block. Raises OSError if they have changed since packing."""
        number = int(self.of(block))
        file = self._open.get(number)
        if file is None:
            if len(self._open) >= MOST_OPEN:  # it is closed when no thread reads it any more
                self._open.pop(next(iter(self._open)), None)
            file = self._open[number] = self._opened(number)
        content = bytearray(length)
        os.preadv(file.descriptor, [content], (block - int(self.first[number])) * BLOCK)
        if zlib.crc32(content) != crc:
            raise OSError("is not what was packed; the shard was cut short or changed")
        return content

    def _opened(self, number: int) -> _Opened:
        while self.copies:
            try:
                return _Opened(str(self.copies.get(number)))
            except FileNotFoundError:
                pass  # another process has just removed it, to make room
        return _Opened(self.paths[number])


class Packed(Files):
    """The images of a split in shards.

    Args:
        shards: those of the split.
        split: their index.
        rows: which images, in which order; None: all of them.
    """

    def __init__(self, shards: Shards, split: SplitIndex, rows: Tensor | None = None) -> None:
        self.shards, self.split, self._rows = shards, split, rows
        self.names = Names(split.arrays, None if rows is None else rows.numpy())
        self.labels = torch.from_numpy(self._of("label").astype(np.int64))
        self.size, self.sizes = float(split.arrays["length"].mean()), split.sizes

    def _of(self, name: str) -> np.ndarray:
        array = self.split.arrays[name]
        return array if self._rows is None else array[self._rows.numpy()]

    def numbers(self) -> np.ndarray:
        """The number of each image's shard, int32."""
        return self.shards.of(self._of("block"))

    def path(self, index: int) -> str:
        """The shard that a file is in, and its name."""
        return f"{self.shards.paths[self.numbers()[index]]}: {self.names[index]}"

    def take(self, indices: Tensor) -> "Packed":
        """The files at these indices."""
        rows = indices if self._rows is None else self._rows[indices]
        return Packed(self.shards, self.split, rows)

    def content(self, index: int) -> bytearray:
        """The bytes of a file; a ConfigError if they are not those that were packed."""
        row = index if self._rows is None else int(self._rows[index])
        block, length, crc = (int(self.split.arrays[k][row]) for k in ("block", "length", "crc"))
        try:
            return self.shards.read(block, length, crc)
        except OSError as error:
            raise ConfigError(f"data.root: {self.path(index)}: {one_line(error)}") from error

    def known(self) -> np.ndarray:
        """Checksum and length of each image, and the begin of its shard's SHA-256."""
        own = np.stack([self._of("crc"), self._of("length")], 1).astype("<u4").view(np.uint8)
        of_shards = b"".join(bytes.fromhex(shard.sha256)[:8] for shard in self.shards.files)
        shared = np.frombuffer(of_shards, np.uint8).reshape(-1, 8)
        return np.concatenate([own, shared[self.numbers()]], 1)


def listed(
    root: str,
    split: Any,
    cache: Path,
    either: bool = False,
    limit: float | None = None,
    threads: int = THREADS,
) -> Listing:
    """The images of a folder, in shards or in folders of classes.

    Args:
        root: the folder, or the address of shards with their index.
        split: None: the folder has splits; else they are to be drawn by ``divided``.
        cache: for the index of shards of other tools, and for copies of those at an address.
        either: take the folder with its splits if it has any, and else as one.
        limit, threads: of shards at an address, as for ``Prefetcher``.

    Raises:
        ConfigError, OSError: as ``list_images``; or the shards are not as they were packed.
    """
    base, address = os.path.expanduser(root), None
    if is_address(root):
        base, address = str(index_of(root, cache)), root.rstrip("/")
    if root.startswith(HUB) or find(base, ".parquet"):
        return tables(root, split, cache, either)
    if os.path.isfile(os.path.join(base, FILE)):
        index = Index.read(Path(base))
    elif os.path.isdir(os.path.join(base, UNFINISHED)):
        raise ConfigError(f"data.root={root!r}: is not packed to its end; the same command goes on")
    elif split is None and (imagenet := list_imagenet(base)) is not None:
        return imagenet
    elif tars := find(base, ".tar"):
        index = indexed(base, tars, cache)
    else:
        return list_images(root, split, either)
    there = {*index.splits}
    if not either and split is None and "train" not in there:
        raise ConfigError(
            f"data.root={root!r}: no shards of a split train; give data.split=[0.8,0.1,0.1]"
        )
    if split is not None and there != {WHOLE}:
        raise ConfigError(
            f"data.split={split}: {base} has shards of {', '.join(sorted(there))} already; set "
            "data.split=null"
        )
    files = {}
    for name in ("train", "test", "val", WHOLE):
        if name in there:
            own, copies = index.splits[name].shards, None
            if address:
                most = limit if name in ("train", WHOLE) else None
                copies = Prefetcher(address, Path(base), own, most, threads)
            files[name] = Packed(Shards(base, own, copies), index.splits[name])
    return Listing(dict(files), index.classes, index.left_out)
