"""Normalisation statistics in SAM's second pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def frozen_running_stats(model: nn.Module | None = None) -> Iterator[None]:
    """Normalise by the batch without touching running statistics, whatever ends the block.

    The statistics belong to the weights that are kept, so SAM's pass at the perturbed weights must
    not enter them (the official JAX code keeps those of the first pass). Works on every layer with
    ``track_running_stats``: BatchNorm, SyncBatchNorm and InstanceNorm, lazy ones too once a first
    batch has given them their shape; means, variances and ``num_batches_tracked`` all stay. A
    layer in evaluation mode is left alone, for it normalises by its running statistics.

    Args:
        model: whose statistics; those of every layer that is called in the block if not given,
            which costs a call of a function for each.
    """
    frozen: list[Any] = []
    # InstanceNorm updates what buffers it has, whatever its flag says, so they are put aside.
    put_aside: list[tuple[Any, Any, Any]] = []

    @torch._disable_dynamo
    def freeze_all(module: nn.Module, *_: Any) -> None:
        for layer in module.modules():
            freeze(layer)

    def freeze(layer: Any) -> None:
        if layer.training and getattr(layer, "track_running_stats", False):
            frozen.append(layer)
            layer.track_running_stats = False
            if isinstance(layer, _InstanceNorm):
                put_aside.append((layer, layer.running_mean, layer.running_var))
                layer.running_mean = layer.running_var = None

    hook = register_module_forward_pre_hook(freeze_all) if model is None else None
    try:
        for layer in () if model is None else model.modules():
            freeze(layer)
        yield
    finally:
        if hook is not None:
            hook.remove()
        for layer in frozen:
            layer.track_running_stats = True
        for layer, mean, var in put_aside:
            layer.running_mean, layer.running_var = mean, var
