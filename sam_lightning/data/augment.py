"""Augmentation of whole batches, on the device of the batch, with one draw per image.

A small network on a fast device would wait for a loader that augments image by image.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# By name, the class in torchvision's v2 and the member of ``AutoAugmentPolicy`` that it takes.
POLICIES = {
    "autoaugment": ("AutoAugment", "CIFAR10"),
    "autoaugment_svhn": ("AutoAugment", "SVHN"),
    "trivialaugment": ("TrivialAugmentWide", None),
    "randaugment": ("RandAugment", None),
}


class BatchAugment:
    """Random crop, flip, policy and cutout of uint8 images, and their normalisation.

    Args:
        mean: per channel, of pixels in 0..1.
        std: per channel, of pixels in 0..1; > 0.
        crop_padding: black pixels on every side before a window of the old size is cut; 0: none.
        flip: mirror every other image, left to right, on average.
        cutout: side in pixels of a square of the mean colour around a uniformly drawn pixel, cut
            off at the borders (DeVries & Taylor 2017, arXiv 1708.04552); 0: none.
        policy: one of ``POLICIES`` or None. It treats one image after the other, and is much
            slower than all the rest: best done on the CPU, by several processes.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        crop_padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        policy: str | None = None,
    ) -> None:
        if not all(math.isfinite(m) for m in mean) or not mean:
            raise ValueError(f"mean={list(mean)}: must be one finite number per channel")
        if len(std) != len(mean) or not all(0 < s < math.inf for s in std):
            raise ValueError(f"std={list(std)}: must be {len(mean)} numbers > 0")
        for key, value in (("crop_padding", crop_padding), ("cutout", cutout)):
            if value < 0:
                raise ValueError(f"{key}={value}: must be an integer >= 0")
        if policy is not None and policy not in POLICIES:
            raise ValueError(f"policy={policy!r}: must be null or one of {[*POLICIES]}")
        if policy is not None and len(mean) not in (1, 3):
            raise ValueError(f"policy={policy!r}: needs images of 1 or 3 channels")
        self.crop_padding = crop_padding
        self.flip = flip
        self.cutout = cutout
        self.policy = None if policy is None else _policy(policy)
        # (x / 255 - mean) / std = x * scale + shift, 2 x C x 1 x 1
        center, spread = torch.tensor([list(mean), list(std)], dtype=torch.float64)
        affine = torch.stack([1 / (255 * spread), -center / spread])[..., None, None]
        self._affine = {torch.device("cpu"): affine.float()}

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment and normalise uint8 N x C x H x W to a new float32 tensor of the same shape.

        The generator, on the device of ``images``, is the only source of randomness.
        """
        return self.finish(self.transform(images, generator), generator)

    def transform(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The first half: crop, flip and policy, from uint8 to uint8."""
        if self.crop_padding or self.flip:
            images = self._crop_and_flip(images, generator)
        return images if self.policy is None else self._apply_policy(images, generator)

    def finish(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """The second half: normalisation and cutout, from uint8 to float32."""
        out = self.normalize(images)
        return self._cut_out(out, generator) if self.cutout else out

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 N x C x H x W to the float32 (x / 255 - mean) / std, as evaluation does."""
        if images.device not in self._affine:  # copied to a device once, not for every batch
            self._affine[images.device] = self._affine[torch.device("cpu")].to(images.device)
        scale, shift = self._affine[images.device]
        return images.float().mul_(scale).add_(shift)

    def _crop_and_flip(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Cut a random window out of every padded image, mirrored or not, by one gather."""
        n, channels, height, width = images.shape
        padding = self.crop_padding
        # Half the bytes of int64 until the end, where gather asks for that.
        integers: dict[str, Any] = {"dtype": torch.int32, "device": images.device}
        draw = partial(torch.randint, generator=generator, **integers)
        top, left = draw(2 * padding + 1, (2, n, 1))
        rows = (top + torch.arange(height, **integers)) * (width + 2 * padding)
        columns = torch.arange(width, **integers)
        if self.flip:
            mirrored = draw(2, (n, 1)) == 1
            columns = torch.where(mirrored, columns.flip(0), columns)
        columns = left + columns
        # All channels of an image share one index into its padded plane.
        index = (rows[:, :, None] + columns[:, None, :]).long()
        planes = pad(images, (padding,) * 4).flatten(2)
        return planes.gather(2, index.view(n, 1, -1).expand(-1, channels, -1)).view_as(images)

    def _apply_policy(self, images: Tensor, generator: torch.Generator) -> Tensor:
        assert self.policy is not None
        # torchvision draws from torch's global generator. That one is put back afterwards, and
        # seeded from ours until then. Reading the seed waits for the device; so does the loop.
        seed = int(torch.randint(2**62, (), generator=generator, device=images.device))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
            return torch.stack([self.policy(image) for image in images])

    def _cut_out(self, images: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = images.shape
        drawn = images.new_empty(2, n, 1)
        drawn[0].random_(height, generator=generator)
        drawn[1].random_(width, generator=generator)
        # The middle of an even side is the edge between the drawn pixel and the one before it.
        first = 0.5 if self.cutout % 2 == 0 else 0.0
        pixels = torch.arange(first, first + max(height, width), device=images.device)
        outside = (pixels - drawn).abs_().gt_(self.cutout / 2)  # 1.0 or 0.0
        rows, columns = outside[0, :, None, :height, None], outside[1, :, None, None, :width]
        # Zeros are multiplied in: to fill by a mask is not vectorised, and 4 times as slow.
        return images.mul_(torch.maximum(rows, columns))


def _policy(name: str) -> Callable[[Tensor], Tensor]:
    from torchvision.transforms import v2  # slow to import, and seldom needed

    transform, member = POLICIES[name]
    return getattr(v2, transform)(*([v2.AutoAugmentPolicy[member]] if member else []))
