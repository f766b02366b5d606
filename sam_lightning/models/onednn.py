"""A way around a fault of oneDNN, PyTorch's library for convolutions on x86 CPUs.

The weight gradient of a 1x1 convolution with a stride writes past its memory if the images are in
channels_last and have fewer channels than the kernel takes at a time: 8 with AVX2, 16 with AVX-512,
where small images come out right by chance. One thread crashes; several get wrong gradients or wait
for ever. It is oneDNN's issue 6035, found with torch 2.6.0 to 2.14.1 (oneDNN 3.12.0).
``python -m benchmarks.onednn`` maps it; when that finds nothing broken in the oldest torch that
this project takes, this file can go.

``subsample_first`` changes layers of ``nn.Conv2d``, which stay fast in channels_last. A model that
convolves in other ways has to stay contiguous on such a CPU: ``reaches_fault`` tells.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, conv2d
from torch.utils._python_dispatch import TorchDispatchMode

MIN_CHANNELS = 16  # from here on every kernel stays within its memory


class SubsampledConv2d(nn.Conv2d):
    """Computes what ``nn.Conv2d`` does: subsamples by the stride, then convolves without one."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return conv2d(avg_pool2d(input, 1, self.stride), weight, bias)


def subsample_first(model: nn.Module) -> list[str]:
    """Turn the narrow 1x1 convolutions with a stride of a model into ``SubsampledConv2d``.

    The model is changed in place; weights and their names stay. Functional and transposed
    convolutions and subclasses of ``nn.Conv2d`` stay what they are.

    Returns:
        the names of the layers that were changed.
    """
    changed = []
    for name, layer in model.named_modules():
        if type(layer) is nn.Conv2d and layer.in_channels < MIN_CHANNELS:
            padded = layer.padding not in ((0, 0), "valid")
            if layer.kernel_size == (1, 1) != layer.stride and not padded and layer.groups == 1:
                layer.__class__ = SubsampledConv2d
                changed.append(name)
    return changed


def reaches_fault(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether training a model in channels_last on this CPU would reach the broken kernel.

    Watches the convolutions of one forward pass over images of ``shape`` (C, H, W), where the CPU
    has that kernel. The model is on the CPU; its state does not change.
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
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    if not torch.backends.mkldnn.is_available() or limit.upper() in ("SSE41", "AVX"):
        return False
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


class _Convolutions(TorchDispatchMode):
    """Notes whether a computed convolution is narrow, 1x1 and has a stride."""

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
