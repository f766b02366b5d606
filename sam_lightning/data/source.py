"""A data set: its splits, whose images are in memory, or are read when they are needed.

A new data set is a function that returns an ``ImageSource``, here or in a package of your own, and
a YAML file in ``conf/data``.
"""

import hashlib
import math
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError

CHUNK = 2**24  # bytes of images looked at together
NAMES = ("text", "ends", "folders", "folder_ends", "starts")  # the arrays of ``Names``


class Names(Sequence[str]):
    """Names of files in arrays: a tenth of the memory of a list, and shared by processes.

    Args:
        arrays: ``text``, names without their folders, each with a zero byte behind it; ``ends``,
            where these bytes are; ``folders`` and ``folder_ends``, the same of folders, each once
            for all names that follow each other; ``starts``, the first name of each folder.
        index: which names, in which order; None: all of them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], index: np.ndarray | None = None) -> None:
        self.arrays, self._index = arrays, index

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """These names."""
        text, folders, starts, count = bytearray(), bytearray(), array("q"), 0
        for folder, some in groupby(names, lambda name: name[: name.rfind("/") + 1]):
            files = [name[len(folder) :] for name in some]
            starts.append(count)
            count += len(files)
            text += os.fsencode("\0".join([*files, ""]))
            folders += os.fsencode(f"{folder}\0")
        parts = (*_with_ends(text), *_with_ends(folders), smallest(starts))
        return cls(dict(zip(NAMES, parts, strict=True)))

    def __len__(self) -> int:
        return len(self.arrays["ends"] if self._index is None else self._index)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(len(self))[i]]
        at = range(len(self))[i] if self._index is None else int(self._index[i])
        text, ends, folders, folder_ends, starts = (self.arrays[key] for key in NAMES)
        folder = int(starts.searchsorted(at, "right")) - 1
        return os.fsdecode(_part(folders, folder_ends, folder) + _part(text, ends, at))

    def take(self, indices: Tensor) -> "Names":
        """The names at these indices."""
        index: Any = indices.cpu().numpy()
        index = index if self._index is None else self._index[index]
        return Names(self.arrays, index)

    def alone(self) -> dict[str, np.ndarray]:
        """Arrays that have these names and no others."""
        arrays = self.arrays if self._index is None else Names.of(self).arrays
        return {key: arrays[key] for key in NAMES}


def smallest(values: Any) -> np.ndarray:
    """Whole numbers, none below 0, in as few bytes as hold them."""
    found = np.asarray(values, np.int64)
    return found.astype(np.min_scalar_type(int(found.max(initial=0))))


def _with_ends(joined: bytearray) -> tuple[np.ndarray, np.ndarray]:
    text = np.frombuffer(joined, np.uint8)
    return text, smallest(np.flatnonzero(text == 0))


def _part(text: np.ndarray, ends: np.ndarray, at: int) -> bytes:
    return text[int(ends[at - 1]) + 1 if at else 0 : int(ends[at])].tobytes()


class Unread(Protocol):
    """Images of one size that are still in files, as the first argument of ``Split``.

    Attributes:
        contents: hashes of what was loaded, which are the same on any machine; or "".
    """

    contents: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N x C x H x W, of which the last two may have to be looked up in a file."""
        ...

    def __len__(self) -> int: ...

    def load(self, indices: Tensor, training: bool = False) -> tuple[Tensor | None, Tensor]:
        """The images at increasing indices, uint8, less those that are left out as broken.

        Returns:
            the images, None if they are to be decoded each time they are needed; and positions in
            ``indices`` of those that are not left out.
        """

    def read(self, indices: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """The images at indices, decoded now: random parts of them by their seeds, or always the
        same part.
        """


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, all of those that are stored or a part.

    Labels, names and ``shape`` are there before a pixel is read, and a part needs no copy of them.

    Attributes:
        stored: images as uint8 S x C x H x W, contiguous, or ``Unread``.
        labels: int64, N, each in 0..number of classes - 1.
        names: N texts, such as ``test/cat/1.png``, or None if the images have no names.
        index: int64, N: where the images are in ``stored``; None: they are all of those, in order.
        shards: N numbers of the shards that the images are in; None: they are in no shards.
    """

    stored: Tensor | Unread
    labels: Tensor
    names: Sequence[str] | None = None
    index: Tensor | None = None
    shards: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.stored.shape[1:])  # type: ignore[return-value]

    @cached_property
    def images(self) -> Tensor:
        """uint8, N x C x H x W; a copy, kept, if this is a part: for a batch ``take`` it first.

        Raises:
            ConfigError: images that are still in files cannot be read.
        """
        if isinstance(self.stored, Tensor):
            return self._gathered(self.stored)
        (found,) = read_splits(self)
        assert found is not None
        if len(found) < len(self):
            raise ConfigError(f"{len(self) - len(found)} images are broken; use read_splits")
        return found.seen()

    def seen(self, seeds: Sequence[int] | None = None) -> Tensor:
        """As ``images``, without keeping them; of unread images, a random part by each seed."""
        if isinstance(self.stored, Tensor):
            return self._gathered(self.stored)
        index = torch.arange(len(self)) if self.index is None else self.index
        return self.stored.read(index, seeds)

    def _gathered(self, stored: Tensor) -> Tensor:
        # index_select copies image by image, indexing copies pixel by pixel: 8 times as slow.
        return stored if self.index is None else stored.index_select(0, self.index)

    def take(self, indices: Tensor) -> "Split":
        """The part at ``indices`` (int64, 1-D, on the device of the labels), without a copy."""
        index = indices if self.index is None else self.index.index_select(0, indices)
        names = self.names
        if names is not None:
            names = names if isinstance(names, Names) else Names.of(names)
            names = names.take(indices)
        shards = None if self.shards is None else self.shards[indices.to(self.shards.device)]
        return Split(self.stored, self.labels.index_select(0, indices), names, index, shards)

    def to(self, device: torch.device) -> "Split":
        """The same on ``device``: itself if it is there, or else a copy of its images."""
        if self.labels.device == device:
            return self
        assert isinstance(self.stored, Tensor)
        return Split(self._gathered(self.stored).to(device), self.labels.to(device), self.names)

    def digest(self) -> str:
        """A hash of the labels and the images; of unread images, of their ``contents``."""
        found = hashlib.blake2b(self.labels.cpu().numpy().tobytes(), digest_size=6)
        if isinstance(self.stored, Tensor):
            for indices in self._chunks():
                found.update(self.take(indices).seen().cpu().numpy().data)
        else:
            found.update(self.stored.contents.encode())
        return found.hexdigest()

    def _chunks(self) -> Iterable[Tensor]:
        step = max(1, CHUNK // math.prod(self.shape))
        return torch.arange(len(self), device=self.labels.device).split(step)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel, in units of 255."""
        channels, height, width = self.shape
        counts = torch.zeros(channels, 256, dtype=torch.int64)
        for indices in self._chunks():
            part = self.take(indices).images
            for count, channel in zip(counts, part.unbind(1), strict=True):
                count += torch.bincount(channel.flatten(), minlength=256)
        values = torch.arange(256, dtype=torch.float64) / 255  # of a histogram: exact
        means, stds = [], []
        for count in counts:
            weights = count.double() / (len(self) * height * width)
            means.append((weights @ values).item())
            stds.append((weights @ (values - means[-1]).square()).sqrt().item())
        return tuple(means), tuple(stds)


def read_splits(*splits: Split | None, training: bool = False) -> list[Split | None]:
    """The splits with their images in memory, those that share files read together.

    Broken images, where their source leaves them out, are left out of all. Images that their source
    decodes when they are needed stay where they are.

    Args:
        splits: or None in their place.
        training: they are used to train.

    Raises:
        ConfigError: of the source, if it cannot read its images.
    """
    done = [*splits]
    for stored in {id(s.stored): s.stored for s in splits if s is not None}.values():
        if isinstance(stored, Tensor):
            continue
        mine = [i for i, s in enumerate(splits) if s is not None and s.stored is stored]
        indices = {i: _index(splits[i], stored) for i in mine}
        used = torch.cat([*indices.values()]).unique()
        images, kept = stored.load(used, training)
        places = torch.full((len(stored),), -1)
        places[used[kept]] = used[kept] if images is None else torch.arange(len(kept))
        for i, index in indices.items():
            split = splits[i]
            assert split is not None
            found = places[index]
            if (found < 0).any():
                left = (found >= 0).nonzero().squeeze(1)
                split, found = split.take(left), found[left]
            new = stored if images is None else images
            whole = torch.equal(found, torch.arange(len(new)))
            done[i] = replace(split, stored=new, index=None if whole else found)
    return done


def _index(split: Split | None, stored: Unread) -> Tensor:
    assert split is not None
    return torch.arange(len(stored)) if split.index is None else split.index


@dataclass(frozen=True, eq=False)
class ImageSource:
    """What a data set offers; ``val`` is None unless it has a validation set of its own.

    Attributes:
        train, test, val: ``Split``; test is None if there is none.
        classes: names, in the order of the labels.
        left_out: files that are not used: their number by kind, such as ``.txt``.
        drawn: the splits were drawn from one set, so a run has to note which image is in which.

    Raises:
        ConfigError: images and labels are not as ``Split`` says, or not of these classes.
    """

    train: Split
    test: Split | None
    classes: list[str]
    val: Split | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    drawn: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "test", "val"):
            split = getattr(self, name)
            if split is not None and (wrong := _misfit(split, len(self.classes))):
                raise ConfigError(f"data.source: {name} {wrong}")


def _misfit(split: Split, classes: int) -> str | None:
    images, labels = split.stored, split.labels
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.ndim != 4):
        return f"images are {images.dtype} {tuple(images.shape)}, not uint8 N x C x H x W"
    count = len(images) if split.index is None else len(split.index)
    if labels.dtype != torch.int64 or labels.shape != (count,) or not len(labels):
        return f"labels are {labels.dtype} {tuple(labels.shape)} for {count} images"
    if split.names is not None and len(split.names) != len(labels):
        return f"names are {len(split.names)} for {len(labels)} images"
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return f"labels reach from {labels.min()} to {labels.max()}, with {classes} classes"
    return None


def stratified_split(labels: Tensor, count: int, seed: int | Tensor) -> tuple[Tensor, Tensor]:
    """Draw ``count`` of N examples so that every class keeps its share, rounded either way.

    Args:
        labels: int64, N.
        count: 0 to N.
        seed: alone draws; or N numbers, of which the smallest of each class are drawn.

    Returns:
        sorted int64 indices, of the ``count`` that are drawn and of the others.
    """
    sizes = torch.bincount(labels)
    shares = sizes * count  # in units of 1 / N, so the remainders below are exact
    quotas = shares // len(labels)
    order = torch.argsort(shares % len(labels), descending=True, stable=True)
    quotas[order[: count - int(quotas.sum())]] += 1
    generator = None if isinstance(seed, Tensor) else torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for cls, quota in enumerate(quotas.tolist()):
        members = (labels == cls).nonzero().squeeze(1)
        if isinstance(seed, Tensor):
            order = seed[members].argsort(stable=True)
        else:
            order = torch.randperm(len(members), generator=generator)
        drawn[members[order[:quota]]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)
