"""Rectangles of the mean colour over parts of the image."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sam_lightning.data.augment.base import BatchTransform
from sam_lightning.data.augment.draws import Draws, Integers
from sam_lightning.data.augment.geometry import check_size

ATTEMPTS = 10  # at a rectangle that fits into the image, as in torchvision


class Cutout(BatchTransform):
    """A square around a uniformly drawn pixel, cut off at the borders (DeVries & Taylor 2017).

    arXiv 1708.04552.

    Args:
        side: of the square, in pixels; 0: none.
    """

    normalized = True

    def __init__(self, side: int = 16) -> None:
        if side < 0:
            raise ValueError(f"side={side}: must be an integer >= 0")
        self.side = side
        self.active = side > 0

    def check(self, shape: tuple[int, int, int]) -> None:
        """Refuse a square that would leave little of an image."""
        check_size("side", self.side, shape)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Cover a square of each image."""
        size = np.array(images.shape[-2:])[:, None]
        first = (draws.uniform(2) * size).astype(np.int64) - self.side // 2
        return covered(images, first, first + self.side, draws)


class RandomErasing(BatchTransform):
    """A rectangle anywhere in the image (Zhong et al. 2020, arXiv 1708.04896).

    Drawn as torchvision does: area and logarithm of the aspect ratio are uniform, and after 10
    rectangles that do not fit, the image stays whole.

    Args:
        p: chance that an image gets one.
        scale: smallest and largest area, as parts of the image.
        ratio: smallest and largest height / width.
    """

    normalized = True

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
    ) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p={p}: must be a number from 0 to 1")
        if not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"scale={[*scale]}: must be two numbers in (0, 1], smaller first")
        if not (len(ratio) == 2 and 0 < ratio[0] <= ratio[1] < math.inf):
            raise ValueError(f"ratio={[*ratio]}: must be two numbers > 0, smaller first")
        self.p, self.scale, self.ratio = p, tuple(scale), tuple(ratio)
        self.active = p > 0

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Cover a rectangle of each image, or nothing of it."""
        size = np.array(images.shape[-2:], dtype=np.float64)[:, None]
        open_ = draws.uniform(1)[0] < self.p
        first = np.zeros((2, len(images)), np.int64)
        last = np.zeros_like(first)
        low, high = np.log(self.ratio)
        for _ in range(ATTEMPTS):
            area, aspect, *place = draws.uniform(4)
            area = size.prod() * (self.scale[0] + area * (self.scale[1] - self.scale[0]))
            aspect = np.exp(low + aspect * (high - low))
            sides = np.round(np.sqrt([area * aspect, area / aspect]))
            chosen = open_ & (sides < size).all(0)
            begin = np.floor(np.stack(place) * (size - sides + 1))
            first[:, chosen] = begin[:, chosen]
            last[:, chosen] = (begin + sides)[:, chosen]
            open_ &= ~chosen
            if not open_.any():
                break
        return covered(images, first, last, draws)


def covered(images: Tensor, first: Integers, last: Integers, draws: Draws) -> Tensor:
    """Set rows and columns from ``first`` to before ``last``, each 2 x N, to 0, in place."""
    height, width = images.shape[-2:]
    bounds = draws.to(np.stack([first, last]).astype(np.float64)[..., None])
    pixels = torch.arange(max(height, width), device=images.device)
    outside = ((pixels < bounds[0]) | (pixels >= bounds[1])).to(images.dtype)  # 1.0 or 0.0
    rows, columns = outside[0, :, None, :height, None], outside[1, :, None, None, :width]
    # Zeros are multiplied in: to fill by a mask is not vectorised, and 4 times as slow.
    return images.mul_(torch.maximum(rows, columns))
