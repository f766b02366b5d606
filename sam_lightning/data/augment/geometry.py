"""Crops and mirror images. A chain of them is one gather of pixels."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sam_lightning.data.augment.base import BatchTransform
from sam_lightning.data.augment.draws import Draws, Integers, on_device


@dataclass
class Placement:
    """Where pixels come from: row r from r + top, column c from sign * c + left.

    Pixels that come from up to ``margin`` outside of the image are black.
    """

    top: Integers | int = 0
    left: Integers | int = 0
    sign: Integers | int = 1
    margin: int = 0


class Geometry(BatchTransform):
    """A transform that only moves pixels."""

    def place(self, at: Placement, draws: Draws, width: int) -> None:
        """Change where the pixels come from."""
        raise NotImplementedError

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Move the pixels of uint8 N x C x H x W."""
        self.place(at := Placement(), draws, images.shape[-1])
        return gathered(images, at)


class RandomCrop(Geometry):
    """A random window of the image's size out of the image with a black border.

    Args:
        padding: pixels of the border on every side; 0: no crop.
    """

    def __init__(self, padding: int = 4) -> None:
        if padding < 0:
            raise ValueError(f"padding={padding}: must be an integer >= 0")
        self.padding = padding
        self.active = padding > 0

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse a border that would leave little of an image."""
        check_size("padding", self.padding, shape)

    def place(self, at: Placement, draws: Draws, width: int) -> None:
        """Draw one of the windows, with equal chances."""
        top, left = draws.integers(2, 2 * self.padding + 1) - self.padding
        at.top, at.left = at.top + top, at.left + at.sign * left
        at.margin += self.padding


class RandomHorizontalFlip(Geometry):
    """Mirror an image, left to right.

    Args:
        p: chance that an image is mirrored.
    """

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}: must be a number from 0 to 1")
        self.p = p
        self.active = p > 0

    def place(self, at: Placement, draws: Draws, width: int) -> None:
        """Mirror what is there now."""
        mirrored = (draws.uniform(1)[0] < self.p).astype(np.int64)
        at.left = at.left + at.sign * mirrored * (width - 1)
        at.sign = at.sign * (1 - 2 * mirrored)


def check_size(key: str, value: int, shape: tuple[int, int, int]) -> None:
    """Refuse a length in pixels above an image's own."""
    _, height, width = shape
    if value > min(height, width):
        raise ValueError(
            f"{key}={value}: must be <= {min(height, width)} for images of {width} x {height} "
            "pixels"
        )


def gathered(images: Tensor, at: Placement) -> Tensor:
    """Move the pixels of uint8 N x C x H x W by one gather."""
    n, channels, height, width = images.shape
    padded_width = width + 2 * at.margin
    # Half the bytes of int64 until the end, where gather asks for that.
    host = np.empty((3, n, 1), np.int32)
    host[0, :, 0] = (np.asarray(at.top) + at.margin) * padded_width + at.margin
    host[1, :, 0], host[2, :, 0] = at.left, at.sign
    top, left, sign = on_device(host, images.device)
    integers: dict[str, Any] = {"dtype": torch.int32, "device": images.device}
    rows = top + torch.arange(height, **integers) * padded_width
    columns = torch.addcmul(left, sign, torch.arange(width, **integers))
    # All channels of an image share one index into its padded plane.
    index = (rows[:, :, None] + columns[:, None, :]).long()
    planes = (pad(images, (at.margin,) * 4) if at.margin else images).flatten(2)
    return planes.gather(2, index.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)
