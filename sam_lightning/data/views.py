"""Views of a photograph: the part of it that the network sees, at the network's size.

Cutting and resizing work on uint8 and with antialiasing: the pixels are those of Pillow within one
level of 255.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
MOST_RESIZED = 2**26  # pixels of a whole image that is resized before it is cropped
CROP_MODES = ("center", "squash")
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
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check(self.size, self.interpolation)
        for key, pair, most in (("scale", self.scale, 1), ("ratio", self.ratio, math.inf)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= most or pair[1] == math.inf:
                below = " <= 1" if key == "scale" else ""
                raise ValueError(f"crop_{key}={[*pair]}: must be two numbers, 0 < a <= b{below}")

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
            area = height * width * draw.uniform(self.scale[0], self.scale[1])
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
    """The centre of the image, after it was resized until it covers size / fraction.

    For a square this is torchvision's Resize and CenterCrop.

    Args:
        size: height and width of what is cut out, in pixels.
        fraction: what is cut out over what is resized, in (0, 1].
        interpolation: one of ``INTERPOLATIONS``.
        mode: ``center`` keeps the shape of things; ``squash`` resizes height and width each to
            size / fraction, so that all of the image is seen, as some published models want it.

    Raises:
        ValueError: an argument is out of its range.
    """

    size: tuple[int, int]
    fraction: float = 1.0
    interpolation: str = "bilinear"
    mode: str = "center"

    def __post_init__(self) -> None:
        for side in self.size:
            _check(side, self.interpolation)
        if self.mode not in CROP_MODES:
            raise ValueError(f"crop_mode={self.mode}: allowed are {', '.join(CROP_MODES)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"crop_fraction={self.fraction}: must be a number in (0, 1]")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize and crop an image."""
        height, width = self.size
        tall, wide = (math.floor(side / self.fraction) for side in self.size)
        if self.mode == "center":
            if image.height * wide <= image.width * tall:
                wide = max(wide, int(tall * image.width / image.height))
            else:
                tall = max(tall, int(wide * image.height / image.width))
        top, left = round((tall - height) / 2), round((wide - width) / 2)
        method = INTERPOLATIONS[self.interpolation]
        if tall * wide > MOST_RESIZED:  # a thin line: resize no more of it than is kept
            down, across = image.height / tall, image.width / wide
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return image.resize((width, height), method, box)
        resized = image.resize((wide, tall), method)
        return resized.crop((left, top, left + width, top + height))


def evaluation_view(
    size: tuple[int, int],
    view: str = "resize",
    crop_fraction: float | None = None,
    interpolation: str | None = None,
    crop_mode: str | None = None,
    **others: Any,
) -> CenterCrop:
    """What evaluation sees where training sees ``view``; the arguments are keys of ``data``."""
    if view not in ("resize", "random_resized_crop"):
        raise ValueError(f"view={view}: allowed are resize, random_resized_crop")
    if crop_fraction is None:
        crop_fraction = 0.875 if view == "random_resized_crop" else 1.0
    return CenterCrop(size, crop_fraction, interpolation or "bilinear", crop_mode or "center")


def _check(size: int, interpolation: str) -> None:
    if size < 1:
        raise ValueError(f"image_size={size}: must be an integer >= 1")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation={interpolation}: allowed are {', '.join(INTERPOLATIONS)}")


def _resized(image: Tensor, height: int, width: int, interpolation: str) -> Tensor:
    if image.shape[-2:] == (height, width):
        return image
    # Copied by NumPy: for a copy of this size torch would start its threads and wait for them.
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    if interpolation == "bilinear":
        # torch resizes uint8 in channels_last, the memory order of decoded images, several times
        # faster than in planes, and faster than Pillow.
        part = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        return interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
    # torch's bicubic weights have 16 bits, which is up to two levels off.
    resized = Image.fromarray(pixels).resize((width, height), INTERPOLATIONS[interpolation])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
