"""Images made worse step by step, to see how far a classifier can be trusted.

Kinds and strengths are after those for small images of Hendrycks and Dietterich 2019 (arXiv
1903.12261). The operations are torch's and torchvision's, so that accuracies compare models
evaluated here, and not with those on the published files.
"""

import math
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional


class Corruption(Protocol):
    """Corrupts uint8 images N x C x H x W."""

    def __call__(self, images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
        """The same number of images, uint8 of the same shape."""


def gaussian_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add normal noise of standard deviation ``strength``, in units of 255."""
    # One draw per image, so that noise does not depend on how images are batched.
    noise = torch.stack([torch.randn(i.shape, generator=generator) for i in images])
    return _bytes(images + 255 * strength * noise)


def impulse_noise(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Replace this fraction (``strength``) of all values by 0 or 255, equally often."""
    drawn = torch.stack([torch.rand(i.shape, generator=generator) for i in images])
    return images.masked_fill(drawn < strength, 255).masked_fill(drawn < strength / 2, 0)


def gaussian_blur(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Blur with standard deviation ``strength`` in pixels, cut off at three of them."""
    # Reflected at the border, an image can be no smaller than half of the kernel.
    radius = min(math.ceil(3 * strength), min(images.shape[-2:]) - 1)
    return functional.gaussian_blur(images, [2 * radius + 1] * 2, [strength] * 2)


def brightness(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Add ``strength``, in units of 255."""
    return _bytes(images + 255 * strength)


def contrast(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Multiply the distance of each channel from its mean by ``strength``."""
    mean = images.float().mean((2, 3), keepdim=True)
    return _bytes(mean + strength * (images - mean))


def pixelate(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Shrink to ``strength`` times the size by averaging, and enlarge by repetition."""
    size = images.shape[-2:]
    small = [max(1, int(side * strength)) for side in size]
    return _bytes(interpolate(interpolate(images.float(), small, mode="area"), size))


def jpeg(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Compress with quality ``strength``, out of 100, and decompress."""
    return functional.jpeg(images, int(strength))


# What is done at severities 1 to 5.
CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg": (jpeg, (80, 65, 58, 50, 40)),
}


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)
