"""Photographs to tar shards in the layout of WebDataset, with an index beside them."""

import hashlib
import io
import json
import logging
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Pillow

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.progress import progress
from sam_lightning.data.contents import each
from sam_lightning.data.index import BLOCK, FILE, ROW, Index, Shard, SplitIndex
from sam_lightning.data.listing import Files, Listing
from sam_lightning.data.mapped import alone
from sam_lightning.data.pixels import open_image
from sam_lightning.data.remote import digest
from sam_lightning.data.shards import UNFINISHED

log = logging.getLogger(__name__)

QUALITY = 90  # of JPEG
BROKEN = "broken, not packed"  # what such images are counted as

PACKED = [*ROW, ("width", np.int32), ("height", np.int32)]
Encoded = tuple[bytes | bytearray, str, tuple[int, int]]  # content, suffix, width and height


@dataclass(frozen=True)
class Packing:
    """How images are packed.

    Args:
        side: pixels that the shorter side of larger images is resized to; None: as they are.
        format: ``keep`` (the files as they are), ``jpeg`` or ``raw`` (PPM).
        shard_mb: most of a shard, in 10^6 bytes, if it has more than one image.
        skip_broken: leave out images that cannot be decoded.
    """

    side: int | None = None
    format: str = "keep"
    shard_mb: float = 256
    skip_broken: bool = False

    def encoded(self, files: Files, index: int) -> Encoded | str:
        """What of an image is packed, or why there is nothing."""
        try:
            content = files.content(index)
            image = open_image(content)
            if self.side is not None and (least := min(image.size)) > self.side:
                width, height = (round(length * self.side / least) for length in image.size)
                image = image.resize((width, height), Pillow.Resampling.BICUBIC)
            if self.format == "keep":
                suffix = os.path.splitext(files.names[index])[1].lower()
                suffix = suffix or f".{Pillow.open(io.BytesIO(content)).format}".lower()
                return content, suffix, image.size
            if self.format == "raw":
                head = b"P6\n%d %d\n255\n" % image.size
                return head + image.tobytes(), ".ppm", image.size
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=QUALITY)
            return buffer.getvalue(), ".jpg", image.size
        except ConfigError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
            return one_line(error)


def pack(listing: Listing, out: Path, how: Packing) -> Index:
    """Write shards and their index; go on with what an earlier call has not finished.

    Images are mixed, always in the same way, so that a part of the shards is a sample of all.

    Raises:
        ConfigError: ``out`` is not empty, or has shards of other images or settings; an image
            cannot be decoded; a class has no image for training.
        OSError: the disk is full. The shards that are complete stay.
    """
    begun = out / UNFINISHED
    with alone(out / "index"):
        _begin(listing, out, how)
        try:
            total = sum(len(files.names) for files in listing.splits.values())
            with progress("packing", total) as advance:
                splits, left_out = {}, dict(listing.left_out)
                for name, files in listing.splits.items():
                    splits[name], broken = _pack_split(name, files, out, how, advance)
                    if broken:
                        left_out[BROKEN] = left_out.get(BROKEN, 0) + broken
            first, *_ = splits.values()
            for label, cls in enumerate(listing.classes):
                if not (first.arrays["label"] == label).any():
                    raise ConfigError(f"skip_broken=true: no image of class {cls!r} can be decoded")
            index = Index(splits, listing.classes, left_out)
            index.write(out)
        except BaseException:
            for part in begun.glob("*.tar"):
                part.unlink()
            if not any(begun.glob("*.json")):
                shutil.rmtree(begun)
            raise
        shutil.rmtree(begun)
        return index


def _begin(listing: Listing, out: Path, how: Packing) -> None:
    """Refuse a folder that has anything but the begin of the same shards."""
    plan = hashlib.sha256(repr((how.side, how.format, how.shard_mb, listing.classes)).encode())
    for name, files in listing.splits.items():
        known = files.known()
        plan.update(name.encode())
        for of in files.names:
            plan.update(b"\0" + os.fsencode(of))
        plan.update(files.stamps.tobytes() if known is None else known.tobytes())
        plan.update(files.labels.numpy().tobytes())
    file = out / UNFINISHED / "plan"
    if file.is_file():
        if file.read_text() != plan.hexdigest():
            raise ConfigError(
                f"out={out}: has shards of other images or settings; finish these first, or give "
                "another folder"
            )
    elif (out / FILE).exists():
        raise ConfigError(f"out={out}: is packed already; give another folder")
    elif {path.name for path in out.iterdir()} - {"index.lock"}:
        raise ConfigError(f"out={out}: must be a new folder, or an empty one")
    else:
        file.parent.mkdir()
        _write_whole(file, plan.hexdigest())


def _pack_split(
    name: str, files: Files, out: Path, how: Packing, advance: Callable[[], None]
) -> tuple[SplitIndex, int]:
    """The shards of a split: its index, and how many images were broken."""
    # NumPy promises that this order never changes.
    order = np.random.RandomState(0).permutation(len(files.names))
    packed = np.zeros(len(order), PACKED)
    shards: list[Shard] = []
    place = begin = 0  # in the order: of the next image, and of the first one of its shard

    def add(note: dict[str, Any]) -> None:
        nonlocal begin
        for i, *row in note["rows"]:
            packed[i] = len(shards), *row
        shards.append(Shard(*note["shard"]))
        begin += note["taken"]

    while (note := _finished(out, f"{name}-{len(shards):06}")) is not None:
        add(note)
    place = begin
    for _ in range(begin):
        advance()
    shard = None
    found = each(lambda i: (i, how.encoded(files, i)), map(int, order[place:]), files.size)
    try:
        for i, encoded in found:
            if isinstance(encoded, str):
                if not how.skip_broken:
                    count = len(shards)
                    stay = f"; {count} shards stay, the same command goes on" if count else ""
                    raise ConfigError(
                        f"input: {files.path(i)}: cannot be packed ({encoded}); skip_broken=true "
                        f"leaves such images out{stay}"
                    )
                log.warning("left out: %s (%s)", files.path(i), encoded)
            else:
                if shard and not shard.has_room(encoded, how.shard_mb):
                    add(shard.close(place - begin))
                    shard = None
                shard = shard or _Writer(out, f"{name}-{len(shards):06}")
                shard.add(i, f"{place:06}", encoded, int(files.labels[i]))
            place += 1
            advance()
        if shard:
            add(shard.close(place - begin))
    finally:
        if shard:
            shard.file.close()
    kept = torch.from_numpy(np.flatnonzero(packed["width"]))
    if not len(kept):
        raise ConfigError(f"skip_broken=true: no image of {name} can be decoded")
    rows = packed[kept.numpy()]
    sizes = {
        side: [int(f(rows[side])) for f in (np.min, np.median, np.max)]
        for side in ("width", "height")
    }
    index = SplitIndex.of(shards, files.names.take(kept), files.labels[kept], rows, sizes=sizes)
    return index, len(order) - len(kept)


class _Writer:
    """A shard that is written, in the folder of what is unfinished until it is closed."""

    def __init__(self, out: Path, stem: str) -> None:
        self.out, self.stem = out, stem
        self.new = out / UNFINISHED / f"{stem}.tar"
        self.file = self.new.open("wb")
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        self.rows: list[list[int]] = []  # index, offset, length, CRC, width, height

    def has_room(self, encoded: Encoded, shard_mb: float) -> bool:
        """Whether an image fits in; the first one always does."""
        size = self.tar.offset + len(encoded[0]) + 6 * BLOCK  # with headers, label and the end
        return not self.rows or size <= shard_mb * 1e6 - tarfile.RECORDSIZE

    def add(self, index: int, key: str, encoded: Encoded, label: int) -> None:
        """Add an image and its label."""
        content, suffix, size = encoded
        self._add(f"{key}.cls", b"%d" % label)
        self.tar.members = []  # type: ignore[attr-defined]  # it would remember all
        where = self.tar.offset + BLOCK, len(content), zlib.crc32(content)
        self._add(f"{key}{suffix}", content)
        self.rows.append([index, *where, *size])

    def _add(self, name: str, content: bytes | bytearray) -> None:
        member = tarfile.TarInfo(name)  # of nobody, and of 1970
        member.size = len(content)
        self.tar.addfile(member, io.BytesIO(content))

    def close(self, taken: int) -> dict[str, Any]:
        """Put the shard in its place; note what it has, and how many images it took."""
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        name = self.new.name
        shard = Shard(name, self.new.stat().st_size, digest(self.new))
        os.replace(self.new, self.out / name)
        note = {"shard": shard, "taken": taken, "rows": self.rows}
        _write_whole(self.out / UNFINISHED / f"{self.stem}.json", json.dumps(note))
        return note


def _finished(out: Path, stem: str) -> dict[str, Any] | None:
    """What was noted of a shard, if it is whole."""
    with suppress(OSError, ValueError):
        note: dict[str, Any] = json.loads((out / UNFINISHED / f"{stem}.json").read_bytes())
        if digest(out / f"{stem}.tar") == note["shard"][2]:
            return note
    return None


def _write_whole(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    os.replace(new, path)
