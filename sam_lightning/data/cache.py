"""Image files, decoded once and kept for the next run under a hash of their contents."""

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.progress import progress
from sam_lightning.data.contents import each, hash_of, hashes
from sam_lightning.data.listing import Files
from sam_lightning.data.mapped import Notes, Write, made, opened
from sam_lightning.data.pixels import decode, open_image
from sam_lightning.data.prefetch import Prefetcher
from sam_lightning.data.shards import Packed
from sam_lightning.data.views import CenterCrop, RandomResizedCrop

VERSION = 2  # of what a file becomes; with another one all is decoded again
CHUNK = 2**25  # bytes that are decoded before they are written
THUMBNAIL = CenterCrop((4, 4))
NAMED = 10  # broken files that an error names

Decoded = tuple[np.ndarray, tuple[int, int]]  # pixels H x W x 3; width and height in the file


class StoredImages:
    """Image files as ``Unread`` images.

    Args:
        files: of one split.
        fixed: brings all images to one size; None: they must have one.
        cache_dir: where they are kept, decoded.
        skip_broken: leave out files that cannot be decoded.
        like: images whose size these must have without ``fixed``; None: those of the first.
        random: what training sees in place of ``fixed``; each time another part of an image.
        most_bytes: with more pixels than these, images are decoded each time they are needed.

    Attributes:
        broken: the names of files that were left out, and why; from ``load`` on.
        sizes: of the images in their files, (least, median, largest) by "width" and "height"; from
            ``load`` on.
        contents: as ``Unread`` has them.
    """

    def __init__(
        self,
        files: Files,
        fixed: CenterCrop | None,
        cache_dir: Path,
        skip_broken: bool = False,
        like: "StoredImages | None" = None,
        random: RandomResizedCrop | None = None,
        most_bytes: float = math.inf,
    ) -> None:
        self.files = files
        self.fixed = fixed
        self.random = random
        self.most_bytes = most_bytes
        self.cache_dir = cache_dir
        self.skip_broken = skip_broken
        self.like = like
        self.broken: dict[str, str] = {}
        self.sizes: dict[str, list[int]] = {}
        self.contents = ""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N x 3 x H x W."""
        return len(self), 3, *self._first[0]

    def __len__(self) -> int:
        return len(self.files.names)

    @cached_property
    def _first(self) -> tuple[tuple[int, int], str]:
        """Height and width, and without ``fixed`` a file that has them."""
        if self.fixed is not None:
            return self.fixed.size, ""
        if self.like is not None:
            return self.like._first
        reasons = []
        count = len(self.files.names)
        for i in range(count if self.skip_broken else min(NAMED, count)):
            decoded = _decode(self.files, i, None, None)
            if not isinstance(decoded, str):
                height, width, _ = decoded[0].shape
                return (height, width), self.files.path(i)
            reasons.append((i, decoded))
        raise ConfigError(_refusal(self.files, reasons))

    def load(self, indices: Tensor, training: bool = False) -> tuple[Tensor | None, Tensor]:
        """Read these images, decoded before or now, or find out which of them can be.

        Raises:
            ConfigError: files are broken, sizes differ without ``fixed``, all images are of one
                colour, or there is no memory for them.
        """
        files = self.files.take(indices)
        found = hashes(files, self.cache_dir)
        key = hashlib.blake2b(repr((VERSION, self.fixed)).encode(), digest_size=16)
        key.update(found.tobytes())
        self.contents += key.hexdigest() if files.portable else ""
        path = self.cache_dir / f"images-{key.hexdigest()}.u8"
        changing = training and self.random is not None
        kept = None if changing else opened(path)
        if kept is not None and self.fixed is None:
            self._check_size(kept[0].shape[2], kept[0].shape[3], files.path(0))
        if changing or (
            kept is None and len(indices) * math.prod(self.shape[1:]) > self.most_bytes
        ):
            return None, self._whole(indices)
        images, notes = kept or made(
            path, (len(indices), *self.shape[1:]), lambda write: self._decode(files, found, write)
        )
        self._check(files, notes)
        self.broken = {files.names[i]: reason for i, reason in notes["broken"]}
        self.sizes = notes["sizes"]
        good = torch.ones(len(indices), dtype=torch.bool)
        good[[i for i, _ in notes["broken"]]] = False
        return images, good.nonzero().squeeze(1)

    def _check_size(self, height: int, width: int, path: str) -> None:
        """Refuse an image of another size than the first one, which an earlier start may know."""
        if self.like is None and "_first" not in self.__dict__:
            self.__dict__["_first"] = (height, width), path
        (tall, wide), first = self._first
        if (height, width) != (tall, wide):
            raise ConfigError(
                f"data.image_size=null: {path} has {width} x {height} pixels and {first} has "
                f"{wide} x {tall}; set data.image_size to bring them to one size"
            )

    def _whole(self, indices: Tensor) -> Tensor:
        """Positions of the images whose files can be decoded, by decoding thumbnails, once."""
        if self.files.sizes is None:
            small = StoredImages(self.files, THUMBNAIL, self.cache_dir, self.skip_broken)
            _, positions = small.load(indices)
            self.broken, self.sizes = small.broken, small.sizes
        else:
            positions, self.sizes = torch.arange(len(indices)), self.files.sizes
        for side, length in zip(("height", "width"), self.shape[2:], strict=True):
            least, _, largest = self.sizes[side]
            if self.fixed is None and not least == length == largest:
                raise ConfigError(
                    f"data.image_size=null: {self._first[1]} has a {side} of {length} pixels, and "
                    f"others of {least} to {largest}; set data.image_size to bring them to one size"
                )
        return positions

    def read(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """Decode these images now; each sees its ``random`` part by the seed, if there are seeds.

        Raises:
            ConfigError: a file has changed and is broken now, or is of another size.
        """
        _, channels, height, width = self.shape
        # In the memory order of decoded images: to turn them would take a tenth of the time.
        images = np.empty((len(indices), height, width, channels), np.uint8)
        for place, i in enumerate(indices.tolist()):
            try:
                content = self.files.content(i)
                if seeds is None or self.random is None:
                    image = open_image(content)
                    seen = np.asarray(self.fixed(image) if self.fixed else image)
                else:
                    seen = self.random(decode(content), seeds[place]).permute(1, 2, 0).numpy()
                if seen.shape != images.shape[1:]:
                    raise ValueError(f"is not of {width} x {height} pixels any more")
                images[place] = seen
            except ConfigError:
                raise
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
                raise ConfigError(f"data.root: {self.files.path(i)}: {one_line(error)}") from error
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    @property
    def copies(self) -> Prefetcher | None:
        """Those of shards at an address."""
        return self.files.shards.copies if isinstance(self.files, Packed) else None

    def _check(self, files: Files, notes: Notes) -> None:
        """Refuse what was decoded, or is to be kept, if it is not what was asked for."""
        broken, count = notes["broken"], len(files.names)
        if broken and (not self.skip_broken or len(broken) == count):
            raise ConfigError(_refusal(files, broken))
        if notes["colour"] is not None:
            raise ConfigError(
                f"data.root: all {count - len(broken):,} images, such as {files.path(0)}, are of "
                f"one colour, {notes['colour']} in RGB: nothing can be learned from them"
            )

    def _decode(self, files: Files, found: np.ndarray, write: Write) -> Notes:
        """Decode files, write the good ones in their order, and tell about them."""
        _, channels, height, width = self.shape
        count = len(files.names)
        rows = max(1, min(count, CHUNK // (channels * height * width)))
        chunk = np.empty((rows, channels, height, width), np.uint8)
        sizes = np.zeros((count, 2), np.int32)
        broken: list[tuple[int, str]] = []
        to_compare = None if files.known() is not None else found
        lowest, highest = np.full(channels, 255), np.zeros(channels, int)

        def fill(i: int) -> str | None:
            known = None if to_compare is None else to_compare[i]
            decoded = _decode(files, i, self.fixed, known)
            if isinstance(decoded, str):
                return decoded
            pixels, sizes[i] = decoded
            self._check_size(pixels.shape[0], pixels.shape[1], files.path(i))
            chunk[i % rows] = pixels.transpose(2, 0, 1)
            return None

        with progress("decoding", count) as advance:
            for start in range(0, count, rows):
                these = range(start, min(start + rows, count))
                good = []
                for i, reason in zip(these, each(fill, these, files.size), strict=True):
                    advance()
                    if reason is None:
                        good.append(i % rows)
                    else:
                        broken.append((i, str(reason)))
                images = chunk[: len(these)] if len(good) == len(these) else chunk[good]
                if good:
                    lowest = np.minimum(lowest, images.min((0, 2, 3)))
                    highest = np.maximum(highest, images.max((0, 2, 3)))
                    write(images)
        seen = sizes[sizes[:, 0] > 0]
        by_side = zip(("width", "height"), seen.T, strict=True)
        notes = {
            "broken": broken,
            "sizes": {k: [int(f(of)) for f in (np.min, np.median, np.max)] for k, of in by_side}
            if len(seen)
            else {},
            "colour": lowest.tolist() if len(seen) and (lowest == highest).all() else None,
        }
        self._check(files, notes)
        return notes


def _decode(
    files: Files, index: int, view: CenterCrop | None, known: np.ndarray | None
) -> Decoded | str:
    """An image file, or why it is none. ``known`` is the hash of the content that it must have."""
    try:
        content = files.content(index)
        if known is not None and hash_of(content) != known.tobytes():
            return "it changed while it was read"
        image = open_image(content)
        return np.asarray(image if view is None else view(image)), image.size
    except ConfigError:  # what was packed is lost, which is no broken image
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and more
        return one_line(error)


def _refusal(files: Files, broken: list[tuple[int, str]]) -> str:
    named = ", ".join(f"{files.path(i)} ({reason})" for i, reason in broken[:NAMED])
    more = f" and {len(broken) - NAMED:,} more" if len(broken) > NAMED else ""
    return (
        f"data.root: {len(broken):,} of {len(files.names):,} images cannot be decoded: "
        f"{named}{more}; data.skip_broken=true leaves them out"
    )
