"""Brightness, contrast, saturation and hue."""

from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_lightning.data.augment.base import BatchTransform
from sam_lightning.data.augment.draws import Draws, Integers

NAMES = ("brightness", "contrast", "saturation", "hue")
GREY = (0.2989, 0.587, 0.114)  # of red, green, blue, in torchvision


class ColorJitter(BatchTransform):
    """torchvision's ``ColorJitter``: factors and the order of the four changes by image.

    Args:
        brightness, contrast, saturation: the factor is uniform in [max(0, 1 - it), 1 + it].
        hue: the shift is uniform in [-hue, hue], as part of the circle of hues; at most 0.5.
    """

    def __init__(
        self,
        brightness: float = 0.4,
        contrast: float = 0.4,
        saturation: float = 0.4,
        hue: float = 0.0,
    ) -> None:
        self.strengths = dict(zip(NAMES, (brightness, contrast, saturation, hue), strict=True))
        for name, value in self.strengths.items():
            if not 0 <= value <= (0.5 if name == "hue" else float("inf")):
                allowed = "from 0 to 0.5" if name == "hue" else ">= 0"
                raise ValueError(f"{name}={value}: must be a number {allowed}")
        self.active = any(self.strengths.values())

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse images that are neither grey nor red, green and blue."""
        if shape[0] not in (1, 3):
            key, value = next(iter(self.strengths.items()))
            raise ValueError(f"{key}={value}: needs images of 1 or 3 channels, not {shape[0]}")

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Change the colours of uint8 N x C x H x W."""
        grey = images.shape[1] == 1  # which has neither saturation nor hue
        active = [n for n in NAMES if self.strengths[n] and not (grey and n in NAMES[2:])]
        orders = np.array([*permutations(range(len(active)))])
        uniform = draws.uniform(1 + len(NAMES))
        factors = {name: u for name, u in zip(NAMES, uniform[1:], strict=True) if name in active}
        order = orders[(uniform[0] * len(orders)).astype(np.int64)]  # N x changes
        out = images.float()
        for place in range(len(active)):
            for i, name in enumerate(active):  # every image is changed once by each
                chosen: Integers = np.flatnonzero(order[:, place] == i)
                if len(chosen):
                    which = draws.to(chosen)
                    factor = draws.to(self._factor(name, factors[name][chosen]))
                    part = out.index_select(0, which)  # indexing copies pixel by pixel
                    out[which] = _CHANGES[name](part, factor[:, None, None, None])
        return out.to(torch.uint8)

    def _factor(self, name: str, uniform: NDArray[np.float64]) -> NDArray[np.float64]:
        strength = self.strengths[name]
        low = -strength if name == "hue" else max(0.0, 1 - strength)
        high = strength if name == "hue" else 1 + strength
        return low + uniform * (high - low)


# From whole numbers 0..255 as float32 to such: each rounds down, as torchvision's do on bytes.


def _blend(images: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + others * (1 - factor)).clamp_(0, 255).floor_()


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    r, g, b = images.split(1, 1)
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2]).floor_()


def _brightness(images: Tensor, factor: Tensor) -> Tensor:
    return (images * factor).clamp_(0, 255).floor_()


def _contrast(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factor)


def _saturation(images: Tensor, factor: Tensor) -> Tensor:
    return _blend(images, _grey(images), factor)


def _hue(images: Tensor, shift: Tensor) -> Tensor:
    """By the colour hexagon: hue from the two smaller channels, as in PIL."""
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    spread = value - low
    r, g, b = ((value - images) / spread.clamp(min=1)).split(1, 1)
    red, green, _ = (images == value).split(1, 1)
    hue = torch.where(red, b - g, torch.where(green, 2 + r - b, 4 + g - r))
    hue = (hue / 6 + shift).remainder_(1) * 6
    # Each channel falls from the largest value to the smallest with its distance on the circle.
    phases = torch.arange(5.0, 0.0, -2.0, device=images.device).view(1, 3, 1, 1)
    distance = (hue + phases).remainder_(6)
    part = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return ((value - spread * part) * (255.999 / 255)).floor_()


_CHANGES = dict(zip(NAMES, (_brightness, _contrast, _saturation, _hue), strict=True))
