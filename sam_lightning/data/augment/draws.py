"""Random numbers of an image: pure functions of (seed, epoch, image, entry, number of the draw).

A generator's numbers would depend on what was drawn before, so on batch size, ranks and workers.
Here each image has a SplitMix64 stream of its own (Steele et al. 2014, doi 10.1145/2660193.2660195)
and each entry of an augmentation its place in it. The host computes the numbers of a batch at once,
so they are the same on every device.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sam_lightning.data.seeding import draw_seed

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
_COPY = np.uint64(40)  # bits of an image's index, below the number of its copy
_TO_UNIT = np.float64(2.0**-53)  # of NumPy, for mypy: the type of a product
_ELEVEN = np.uint64(11)

Integers = NDArray[np.int64]
Streams = NDArray[np.uint64]


def _mixed(z: Streams) -> Streams:
    """SplitMix64's output function: a bijection of 64 bits, changed in place."""
    scratch = z >> _SHIFTS[0]
    for factor, shift in zip(_FACTORS, _SHIFTS[1:], strict=True):
        z ^= scratch
        z *= factor
        np.right_shift(z, shift, out=scratch)
    z ^= scratch
    return z


def streams(seed: int, epoch: int, indices: Integers, copies: Integers | int = 0) -> Streams:
    """The start of each image's stream in an epoch, by its index in the training set.

    Args:
        seed: of the augmentation.
        epoch: counted from 0.
        indices: int64 N, below 2^40.
        copies: which of its appearances in the epoch each is, from 0.
    """
    counters = indices.astype(np.uint64)
    if not (isinstance(copies, int) and copies == 0):
        counters |= np.asarray(copies).astype(np.uint64) << _COPY
    counters *= _GAMMA
    counters += np.uint64(draw_seed(seed, epoch))
    return _mixed(counters)


@cache
def _place(name: str) -> np.uint64:
    return np.uint64(draw_seed(*name.encode()))


@cache
def _steps(first: int, count: int) -> Streams:
    return (np.arange(first, first + count, dtype=np.uint64) * _GAMMA)[:, None]


class Draws:
    """The numbers that one entry of an augmentation draws for the N images of a batch.

    Each call of a method draws further ones.

    Args:
        starts: from ``streams``.
        name: of the entry: two entries draw independently.
        device: of the images.
    """

    def __init__(self, starts: Streams, name: str, device: torch.device) -> None:
        self.device = device
        self._state = starts + _place(name)
        self._done = 0

    def _bits(self, count: int) -> Streams:
        first, self._done = self._done + 1, self._done + count
        return _mixed(self._state + _steps(first, count))

    def uniform(self, count: int) -> NDArray[np.float64]:
        """``count`` x N numbers, uniform in [0, 1)."""
        return (self._bits(count) >> _ELEVEN) * _TO_UNIT

    def integers(self, count: int, below: int) -> Integers:
        """``count`` x N whole numbers, uniform in 0..below - 1, for ``below`` up to 2^32."""
        return (self.uniform(count) * below).astype(np.int64)

    def seeds(self) -> list[int]:
        """A seed in 0..2^63 - 1 for each image."""
        return (self._bits(1)[0] >> np.uint64(1)).tolist()

    def to(self, values: NDArray[Any]) -> Tensor:
        """An array on the images' device, float64 as float32."""
        return on_device(values, self.device)


def on_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A small array on a device, float64 as float32, without waiting for the device."""
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
