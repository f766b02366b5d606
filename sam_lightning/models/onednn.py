"""A way around a fault of oneDNN, PyTorch's library for convolutions on x86 CPUs.

The weight gradient of a 1x1 convolution with a stride writes past its memory if the images are in
channels_last and have fewer channels than the kernel takes at a time: 8, on CPUs with AVX2 and
without AVX-512. One thread ends in a crash; several get wrong gradients, or wait for each other for
ever. ``torch.compile`` arranges images in channels_last by itself. It is oneDNN's issue 6035, found
with torch 2.6.0 to 2.14.1 (oneDNN 3.12.0). ``python -m benchmarks.onednn`` maps it; when that finds
nothing broken in the oldest torch that this project takes, this file can go.
"""

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d

MIN_CHANNELS = 8  # from here on the kernel stays within its memory


class SubsampledConv2d(nn.Conv2d):
    """Subsamples its images by the stride, then convolves them 1x1 with a stride of 1.

    Computes what ``nn.Conv2d`` does, by another kernel, in every memory format and on every device.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(avg_pool2d(input, 1, self.stride), weight, bias)


def subsample_first(model: nn.Module) -> list[str]:
    """Turn the narrow 1x1 convolutions with a stride of a model into ``SubsampledConv2d``.

    The model is changed in place; weights and their names stay. Not found are convolutions that
    ``forward`` calls as a function, and those of a subclass of ``nn.Conv2d``.

    Returns:
        the names of the layers that were changed.
    """
    changed = []
    for name, layer in model.named_modules():
        if type(layer) is nn.Conv2d and _reaches_broken_kernel(layer):
            layer.__class__ = SubsampledConv2d
            changed.append(name)
    return changed


def _reaches_broken_kernel(conv: nn.Conv2d) -> bool:
    return (
        conv.in_channels < MIN_CHANNELS
        and conv.kernel_size == (1, 1)
        and conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
    )
