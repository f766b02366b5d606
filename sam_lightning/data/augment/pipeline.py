"""A whole augmentation: its parts in order, and where each is done."""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sam_lightning.data.augment.base import BatchMix, BatchTransform
from sam_lightning.data.augment.draws import Draws, Integers, Streams, on_device, streams
from sam_lightning.data.augment.geometry import (
    Geometry,
    Placement,
    RandomCrop,
    RandomHorizontalFlip,
    moved,
)
from sam_lightning.data.augment.mixing import MixedLabels, mixed
from sam_lightning.data.augment.policies import Policy
from sam_lightning.data.seeding import draw_seed

# The first part of each stream's seed after the user's own.
_IMAGE, _MIX = range(2)

Entry = tuple[str, Any]


def crop_flip() -> dict[str, BatchTransform]:
    """The default: conf/augment/crop_flip.yaml."""
    return {"crop": RandomCrop(4), "flip": RandomHorizontalFlip(0.5)}


class BatchKey(NamedTuple):
    """Which images a batch has: all that its random numbers depend on, beside the seed.

    Attributes:
        epoch: counted from 0.
        batch: its number in the epoch, over all ranks together.
        indices: int64, of the images in the training set.
        copies: which of its appearances in the epoch each is; 0: the first one of all.
        partners: int64, the place in this batch of the partner of each of the first images; there
            may be further images, for this only. None: no mixing.
    """

    epoch: int
    batch: int
    indices: Integers
    copies: Integers | int = 0
    partners: Integers | None = None


class BatchAugment:
    """Augmentation of uint8 images, and their normalisation.

    The order: transforms of bytes, as they are listed; normalisation; transforms of normalised
    images; mixing. Up to the last transform that takes single images, the loading processes do it;
    what follows is done to whole batches on their device.

    Args:
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1; > 0.
        entries: the parts by name, of the kinds that ``sam_lightning.data.augment`` lists.
        seed: of all draws.

    Attributes:
        mixes: whether batches need the places of partners.
        loads: whether loading processes have something to do.

    Raises:
        ValueError: mean or std is out of its range.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        entries: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if not all(math.isfinite(m) for m in mean) or not mean:
            raise ValueError(f"mean={list(mean)}: must be one finite number per channel")
        if len(std) != len(mean) or not all(0 < s < math.inf for s in std):
            raise ValueError(f"std={list(std)}: must be {len(mean)} numbers > 0")
        active = [(n, e) for n, e in (entries or {}).items() if getattr(e, "active", True)]
        self._mixes = [e for _, e in active if isinstance(e, BatchMix)]
        self._normalized = [e for e in active if getattr(e[1], "normalized", False)]
        of_bytes = [
            (n, e)
            for n, e in active
            if not isinstance(e, BatchMix) and not getattr(e, "normalized", False)
        ]
        single = [i for i, (_, e) in enumerate(of_bytes) if not isinstance(e, BatchTransform)]
        split = single[-1] + 1 if single else 0
        self._in_loader, self._on_device = of_bytes[:split], of_bytes[split:]
        self.mixes, self.loads = bool(self._mixes), bool(single)
        self.seed, self._image_seed = seed, draw_seed(seed, _IMAGE)
        # (x / 255 - mean) / std = x * scale + shift, 2 x C x 1 x 1
        center, spread = torch.tensor([list(mean), list(std)], dtype=torch.float64)
        affine = torch.stack([1 / (255 * spread), -center / spread])[..., None, None]
        self._affine = {torch.device("cpu"): affine.float()}

    def check(self, images: Tensor) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each part's name with a check that it takes such images, uint8 N x C x H x W.

        The check raises a ValueError with the name of an argument, or says what is wrong.
        """
        shape = tuple(images.shape[1:])
        starts = streams(0, 0, np.arange(len(images)))
        for entry in (*self._in_loader, *self._on_device):

            def tried(entry: Entry = entry) -> None:
                getattr(entry[1], "check", lambda shape: None)(shape)
                given = images.clone()
                made = self._applied([entry], given, starts)
                if made.dtype != torch.uint8 or tuple(made.shape[1:]) != shape:
                    raise ValueError(
                        f"returns {made.dtype} {tuple(made.shape[1:])} for images of torch.uint8 "
                        f"{shape}; must return such"
                    )

            yield entry[0], tried
        for name, transform in self._normalized:
            yield name, partial(transform.check, shape)

    def view_seeds(self, key: BatchKey) -> list[int]:
        """A seed for each image, of the part of it that is seen."""
        return Draws(self._streams(key), "view", torch.device("cpu")).seeds()

    def in_loader(self, images: Tensor, key: BatchKey) -> Tensor:
        """What loading processes do, from uint8 to uint8."""
        return self._applied(self._in_loader, images, self._streams(key))

    def __call__(
        self, images: Tensor, labels: Tensor, key: BatchKey
    ) -> tuple[Tensor, Tensor | MixedLabels]:
        """The rest: from uint8 M x C x H x W to normalised float32, and labels, mixed or not.

        There may be more images than come out, as ``BatchKey`` says.
        """
        starts = self._streams(key)
        out = self.normalize(self._applied(self._on_device, images, starts))
        for name, transform in self._normalized:
            out = transform(out, Draws(starts, name, out.device))
        if key.partners is None:
            return out, labels
        partners = on_device(key.partners, out.device)
        seed = draw_seed(self.seed, _MIX, key.epoch, key.batch)
        n = len(key.partners)
        others = out.index_select(0, partners), labels.index_select(0, partners)
        return mixed(self._mixes, out[:n], labels[:n], others, seed)

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 N x C x H x W to the float32 (x / 255 - mean) / std, as evaluation does."""
        if images.device not in self._affine:  # copied to a device once, not for every batch
            self._affine[images.device] = self._affine[torch.device("cpu")].to(images.device)
        scale, shift = self._affine[images.device]
        return images.float().mul_(scale).add_(shift)

    def _streams(self, key: BatchKey) -> Streams:
        return streams(self._image_seed, key.epoch, key.indices, key.copies)

    def _applied(self, entries: list[Entry], images: Tensor, starts: Streams) -> Tensor:
        placed: Placement | None = None
        for name, transform in entries:
            draws = Draws(starts, name, images.device)
            if isinstance(transform, Geometry):
                if placed is not None and placed.margin and isinstance(transform, RandomCrop):
                    images, placed = moved(images, placed), None  # what is cut off is lost
                transform.place(placed := placed or Placement(), draws)
                continue
            if placed is not None:
                images, placed = moved(images, placed), None
            if isinstance(transform, BatchTransform):
                images = transform(images, draws)
            else:
                images = _one_by_one(transform, images, draws.seeds())
        return images if placed is None else moved(images, placed)


def _one_by_one(transform: Callable[[Tensor], Tensor], images: Tensor, seeds: list[int]) -> Tensor:
    """Transform each image by its own seed of torch's, Python's and NumPy's generators."""
    # A policy draws from torch's only and takes no gradient, so a fifth of its time can be saved.
    policy = isinstance(transform, Policy)
    of_python, of_numpy = random.getstate(), np.random.get_state()
    changed = []
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(policy):
            for image, seed in zip(images, seeds, strict=True):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
                if not policy:
                    random.seed(seed)
                    np.random.seed(seed % 2**32)
                changed.append(transform(image))
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
    return torch.stack(changed)
