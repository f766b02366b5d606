"""Views of a photograph: the part of it that the network sees, at the network's size.

Cutting and resizing work on uint8 and with antialiasing: the pixels are those of Pillow within one
level of 255.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

INTERPOLATIONS = ("bilinear", "bicubic")
ATTEMPTS = 10  # to draw a window that fits, as torchvision's RandomResizedCrop makes


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random window, resized to a square (Szegedy et al. 2015, arXiv 1409.4842, section 6).

    Args:
        size: of the square, in pixels.
        scale: smallest and largest area of the window, as parts of the image's.
        ratio: smallest and largest width over height of the window; log-uniform between them.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        ValueError: an argument is out of its range.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check(self.size, self.interpolation)
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale={[*self.scale]}: must be two numbers, 0 < a <= b <= 1")
        low, high = self.ratio
        if not 0 < low <= high < math.inf:
            raise ValueError(f"crop_ratio={[*self.ratio]}: must be two numbers, 0 < a <= b")

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """Cut uint8 C x H x W to C x size x size; the window depends on the seed alone."""
        top, left, height, width = self.window(image.shape[-2], image.shape[-1], seed)
        part = image[:, top : top + height, left : left + width]
        return _resized(part, self.size, self.size, self.interpolation)

    def window(self, height: int, width: int, seed: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of the window in an image of this size."""
        draw = random.Random(seed)
        low, high = map(math.log, self.ratio)
        for _ in range(ATTEMPTS):
            area = height * width * draw.uniform(*self.scale)
            ratio = math.exp(draw.uniform(low, high))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return draw.randint(0, height - h), draw.randint(0, width - w), h, w
        # The largest window of an allowed ratio, in the centre.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class CenterCrop:
    """The centre of the image, after its shorter side was resized to size / fraction.

    Args:
        size: of the square that is cut out, in pixels.
        fraction: of the shorter side that the square has, in (0, 1]; ImageNet's custom is 0.875.
        interpolation: one of ``INTERPOLATIONS``.

    Raises:
        ValueError: an argument is out of its range.
    """

    size: int
    fraction: float = 1.0
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check(self.size, self.interpolation)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"crop_fraction={self.fraction}: must be a number in (0, 1]")

    def __call__(self, image: Tensor) -> Tensor:
        """Cut uint8 C x H x W to C x size x size, as torchvision's Resize and CenterCrop do."""
        height, width = image.shape[-2:]
        side = math.floor(self.size / self.fraction)
        if height <= width:
            height, width = side, int(side * width / height)
        else:
            height, width = int(side * height / width), side
        image = _resized(image, height, width, self.interpolation)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        return image[:, top : top + self.size, left : left + self.size]


def _check(size: int, interpolation: str) -> None:
    if size < 1:
        raise ValueError(f"image_size={size}: must be an integer >= 1")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation}: allowed are {', '.join(INTERPOLATIONS)}")


def _resized(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    if interpolation == "bilinear":
        # torch resizes uint8 in channels_last, the memory order of decoded images, several times
        # faster than in planes, and faster than Pillow.
        return interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]
    # torch's bicubic weights have 16 bits, which is up to two levels off.
    pixels = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    resized = pixels.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
