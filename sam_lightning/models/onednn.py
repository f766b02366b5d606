"""A way around a fault of oneDNN, PyTorch's library for convolutions on x86 CPUs.

The weight gradient of a 1x1 convolution with a stride writes past its memory if the images are in
channels_last and have fewer channels than the kernel takes at a time: 8, on CPUs with AVX2 and
without AVX-512. One thread ends in a crash; several get wrong gradients, or wait for each other for
ever. ``torch.compile`` arranges images in channels_last by itself. It is oneDNN's issue 6035, found
with torch 2.6.0 to 2.14.1 (oneDNN 3.12.0). ``python -m benchmarks.onednn`` maps it; when that finds
nothing broken in the oldest torch that this project takes, this file can go.

Layers of ``nn.Conv2d`` are changed, and stay fast in channels_last. A model that convolves in other
ways has to stay contiguous on such a CPU: ``reaches_fault`` tells.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d
from torch.utils._python_dispatch import TorchDispatchMode

MIN_CHANNELS = 8  # from here on the kernel stays within its memory


class SubsampledConv2d(nn.Conv2d):
    """Subsamples its images by the stride, then convolves them 1x1 with a stride of 1.

    Computes what ``nn.Conv2d`` does, by another kernel, in every memory format and on every device.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(avg_pool2d(input, 1, self.stride), weight, bias)


def subsample_first(model: nn.Module) -> list[str]:
    """Turn the narrow 1x1 convolutions with a stride of a model into ``SubsampledConv2d``.

    The model is changed in place; weights and their names stay. Convolutions that ``forward`` calls
    as a function, transposed ones and those of a subclass of ``nn.Conv2d`` stay what they are.

    Returns:
        the names of the layers that were changed.
    """
    changed = []
    for name, layer in model.named_modules():
        if type(layer) is nn.Conv2d and layer.in_channels < MIN_CHANNELS and _subsamples(layer):
            layer.__class__ = SubsampledConv2d
            changed.append(name)
    return changed


def _subsamples(conv: nn.Conv2d) -> bool:
    padded = conv.padding not in ((0, 0), "valid")
    return conv.kernel_size == (1, 1) != conv.stride and not padded and conv.groups == 1


def reaches_fault(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether training a model in channels_last on this CPU would reach the broken kernel.

    Watches the convolutions of one forward pass, where the CPU has that kernel.

    Args:
        model: on the CPU; images N x C x H x W -> anything. Its state does not change.
        shape: C, H and W of an image.
    """
    if not _has_broken_kernel():
        return False
    training = {module: module.training for module in model.modules()}
    dtype = next(model.parameters()).dtype
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _Convolutions() as watched:
            model.eval()(torch.zeros(2, *shape, dtype=dtype))
    finally:
        for module, was in training.items():
            module.training = was
    return watched.narrow


def _has_broken_kernel() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if limit.upper() in ("SSE41", "AVX"):
        return False
    return limit.upper().startswith("AVX2") or torch.backends.cpu.get_cpu_capability() == "AVX2"


class _Convolutions(TorchDispatchMode):
    """Notes whether one of the convolutions that are computed is narrow, 1x1 and has a stride."""

    narrow = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.convolution.default:
            images, weight, _, stride, padding, _, transposed, _, groups = args
            channels = weight.shape[1] if transposed else images.shape[1]
            self.narrow |= (
                channels < MIN_CHANNELS
                and set(weight.shape[2:]) == {1}
                and set(stride) != {1}
                and set(padding) == {0}
                and groups == 1
            )
        return func(*args, **(kwargs or {}))
