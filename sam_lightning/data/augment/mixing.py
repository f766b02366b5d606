"""Mixtures of two images, and their two labels."""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from sam_lightning.data.augment.base import BatchMix


@dataclass(eq=False)  # Lightning moves no frozen ones to a device
class MixedLabels:
    """Labels of mixtures: two of them, not a row of probabilities for each class.

    Attributes:
        labels: int64 N, of the images themselves.
        other: int64 N, of their partners.
        share: float32 N in [0, 1], of ``labels``; ``other`` has the rest.
    """

    labels: Tensor
    other: Tensor
    share: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: "slice | Tensor") -> "MixedLabels":
        return MixedLabels(self.labels[part], self.other[part], self.share[part])


class _BetaMix(BatchMix):
    """A mixture whose share is drawn from Beta(alpha, alpha); with an alpha of 0 there is none."""

    def __init__(self, alpha: float, p: float) -> None:
        super().__init__(p)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha
        self.active = alpha > 0 and p > 0


class Mixup(_BetaMix):
    """share * image + (1 - share) * partner (Zhang et al. 2018, arXiv 1710.09412).

    Args:
        alpha: the share of a batch is drawn from Beta(alpha, alpha); 0: no mixing.
        p: chance that a batch is mixed.
    """

    def __init__(self, alpha: float = 0.2, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def __call__(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        """Blend all images by one share."""
        share = random.betavariate(self.alpha, self.alpha)
        return images.lerp(partners, 1 - share), share


class CutMix(_BetaMix):
    """A box of the partner in each image (Yun et al. 2019, arXiv 1905.04899).

    Args:
        alpha: the box would have the part 1 - s of the area, with s drawn from Beta(alpha, alpha),
            if it were not cut off at the borders; the share is that of the pixels; 0: no mixing.
        p: chance that a batch is mixed. The authors use 0.5 on CIFAR.
    """

    def __init__(self, alpha: float = 1.0, p: float = 1.0) -> None:
        super().__init__(alpha, p)

    def __call__(self, images: Tensor, partners: Tensor, random: Random) -> tuple[Tensor, float]:
        """Paste one box, at the same place of all images."""
        size = images.shape[-2:]
        side = math.sqrt(1 - random.betavariate(self.alpha, self.alpha))
        halves = [int(length * side) // 2 for length in size]
        centres = [random.randrange(length) for length in size]
        bounds = zip(size, centres, halves, strict=True)
        boxes = [slice(max(c - h, 0), min(c + h, length)) for length, c, h in bounds]
        mixed = images.clone()
        mixed[..., boxes[0], boxes[1]] = partners[..., boxes[0], boxes[1]]
        area = math.prod(box.stop - box.start for box in boxes)
        return mixed, 1 - area / math.prod(size)


def mixed(
    mixes: list[BatchMix],
    images: Tensor,
    labels: Tensor,
    partners: tuple[Tensor, Tensor],
    seed: int,
) -> tuple[Tensor, MixedLabels]:
    """Mix a batch with images and labels of its partners by one of ``mixes``, or not.

    All draws follow the seed.
    """
    random = Random(seed)
    chosen, share = mixes[random.randrange(len(mixes))], 1.0
    if random.random() < chosen.p:
        images, share = chosen(images, partners[0], random)
    shares = torch.full((len(labels),), share, device=labels.device)
    return images, MixedLabels(labels, partners[1], shares)
