"""A way around a fault of oneDNN, PyTorch's library for convolutions on x86 CPUs.

The weight gradient of a 1x1 convolution with a stride writes past its memory if the images are in
channels_last and have fewer channels than the kernel takes at a time: 8, on CPUs with AVX2 and
without AVX-512. One thread ends in a crash; several get wrong gradients, or wait for each other for
ever. ``torch.compile`` arranges images in channels_last by itself. It is oneDNN's issue 6035, found
with torch 2.6.0 (oneDNN 3.5.3) to 2.14.1 (3.12.0). ``python -m benchmarks.onednn`` maps it; when
that finds nothing broken in the oldest torch that this project takes, this file can go.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

MIN_CHANNELS = 8  # from here on the kernel stays within its memory


def subsample_first(model: nn.Module) -> list[str]:
    """Let narrow 1x1 convolutions with a stride drop the pixels that they skip beforehand.

    They compute the same with a stride of 1, through another kernel, in every memory format and on
    every device. Weights and their names do not change. Convolutions that ``forward`` calls as a
    function are not found.

    Returns:
        the names of the layers that were changed.
    """
    changed = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d) and _is_broken(layer):
            layer.register_forward_pre_hook(partial(_subsample, layer.stride))
            layer.stride = (1, 1)
            changed.append(name)
    return changed


def _is_broken(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels < MIN_CHANNELS
        and conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
    )


def _subsample(stride: tuple[int, ...], conv: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    return avg_pool2d(inputs[0], 1, stride)
