"""A data set in memory: uint8 images and their labels.

A new data set is a function that returns an ``ImageSource``, here or in a package of your own, and
a YAML file in ``conf/data``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8, N x C x H x W, contiguous.
        labels: int64, N, each in 0..number of classes - 1.
        names: N texts, such as ``test/cat/1.png``, or None if the images have no names.
    """

    images: Tensor
    labels: Tensor
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> "Split":
        """A copy of the images at ``indices`` (int64, 1-D, on their device) with their labels."""
        # index_select copies image by image, indexing copies pixel by pixel: 8 times as slow.
        images, labels = (t.index_select(0, indices) for t in (self.images, self.labels))
        names = self.names and [self.names[i] for i in indices.tolist()]
        return Split(images, labels, names)

    def to(self, device: torch.device) -> "Split":
        """The same on ``device``: itself if it is there, or else a copy."""
        return Split(self.images.to(device), self.labels.to(device), self.names)


@dataclass(frozen=True, eq=False)
class ImageSource:
    """What a data set offers; ``val`` is None unless it has a validation set of its own.

    Raises:
        ConfigError: images and labels are not as ``Split`` says, or not of these classes.
    """

    train: Split
    test: Split
    classes: list[str]
    val: Split | None = None

    def __post_init__(self) -> None:
        for name in ("train", "test", "val"):
            split = getattr(self, name)
            if split is not None and (wrong := _misfit(split, len(self.classes))):
                raise ConfigError(f"data.source: {name} {wrong}")


def _misfit(split: Split, classes: int) -> str | None:
    images, labels = split.images, split.labels
    if images.dtype != torch.uint8 or images.ndim != 4:
        return f"images are {images.dtype} {tuple(images.shape)}, not uint8 N x C x H x W"
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        return f"labels are {labels.dtype} {tuple(labels.shape)} for {len(images)} images"
    if split.names is not None and len(split.names) != len(labels):
        return f"names are {len(split.names)} for {len(labels)} images"
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        return f"labels reach from {labels.min()} to {labels.max()}, with {classes} classes"
    return None


def stratified_split(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw ``count`` of N examples so that every class keeps its share, rounded either way.

    Returns:
        sorted int64 indices, of the ``count`` that ``seed`` alone draws and of the others.
    """
    sizes = torch.bincount(labels)
    shares = sizes * count  # in units of 1 / N, so the remainders below are exact
    quotas = shares // len(labels)
    order = torch.argsort(shares % len(labels), descending=True, stable=True)
    quotas[order[: count - int(quotas.sum())]] += 1
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    for cls, quota in enumerate(quotas.tolist()):
        members = (labels == cls).nonzero().squeeze(1)
        drawn[members[torch.randperm(len(members), generator=generator)[:quota]]] = True
    return drawn.nonzero().squeeze(1), (~drawn).nonzero().squeeze(1)
