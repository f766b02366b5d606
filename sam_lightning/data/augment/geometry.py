"""Crops and mirror images. A chain of them is one copy of windows."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from sam_lightning.data.augment.base import BatchTransform
from sam_lightning.data.augment.draws import Draws, Integers, on_device


@dataclass
class Placement:
    """A window: row r is the image's r + top, column c its c + left; it may be mirrored afterwards.

    Pixels that come from up to ``margin`` outside of the image are black.
    """

    top: Integers | int = 0
    left: Integers | int = 0
    mirrored: NDArray[np.bool_] | bool = False
    margin: int = 0


class Geometry(BatchTransform):
    """A transform that only moves pixels."""

    def place(self, at: Placement, draws: Draws) -> None:
        """Change where the pixels come from."""
        raise NotImplementedError

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Move the pixels of uint8 N x C x H x W."""
        self.place(at := Placement(), draws)
        return moved(images, at)


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

    def place(self, at: Placement, draws: Draws) -> None:
        """Draw one of the windows, with equal chances."""
        top, left = draws.integers(2, 2 * self.padding + 1) - self.padding
        at.top, at.left = at.top + top, at.left + np.where(at.mirrored, -left, left)
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

    def place(self, at: Placement, draws: Draws) -> None:
        """Mirror what is there now."""
        at.mirrored = at.mirrored ^ (draws.uniform(1)[0] < self.p)


def check_size(key: str, value: int, shape: tuple[int, int, int]) -> None:
    """Refuse a length in pixels above an image's own."""
    _, height, width = shape
    if value > min(height, width):
        raise ValueError(
            f"{key}={value}: must be <= {min(height, width)} for images of {width} x {height} "
            "pixels"
        )


def moved(images: Tensor, at: Placement) -> Tensor:
    """The windows of uint8 N x C x H x W, as a copy."""
    each = np.arange(len(images))
    padded = pad(images, (at.margin,) * 4)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    top, left = at.top + at.margin, at.left + at.margin
    if images.device.type == "cpu":  # NumPy copies row by row, torch pixel by pixel
        out = windows.numpy()[each, :, top, left]
        some = np.flatnonzero(at.mirrored)
        out[some] = torch.from_numpy(out[some]).flip(3).numpy()
        return torch.from_numpy(out)
    mirrored = each + len(images) * at.mirrored
    places = np.stack(np.broadcast_arrays(each, top, left, mirrored))
    image, down, across, chosen = on_device(places, images.device)
    seen = windows[image, :, down, across]
    return torch.cat([seen, seen.flip(3)]).index_select(0, chosen)
