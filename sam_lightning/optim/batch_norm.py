"""Normalisation statistics in SAM's second pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def frozen_running_stats(model: nn.Module | None = None) -> Iterator[None]:
    """Normalise by the batch and do not change running statistics, however the block ends.

    The statistics belong to the weights that are kept, so SAM's second pass must not update them;
    the official JAX code, too, keeps the first pass's. Works on every layer in training mode with
    ``track_running_stats``: BatchNorm, SyncBatchNorm, InstanceNorm, and lazy ones that have a
    shape. Modules of ``torch.jit.script`` and ``torch.jit.trace`` update copies.

    Args:
        model: whose statistics; by default every layer's that the block calls, at the cost of one
            function call for each.
    """
    frozen: list[Any] = []
    put_aside: dict[int, tuple[Any, dict[str, Tensor]]] = {}  # buffers, by the id of their layer

    @torch._disable_dynamo
    def freeze_all(module: nn.Module, *_: Any) -> None:
        for layer in module.modules():
            freeze(layer)

    def freeze(layer: Any) -> None:
        # Flags of a script are constants; InstanceNorm updates its buffers whatever the flag is.
        if isinstance(layer, torch.jit.ScriptModule | _InstanceNorm):
            if id(layer) not in put_aside:
                names = ("running_mean", "running_var", "num_batches_tracked")
                found = {name: getattr(layer, name, None) for name in names}
                kept = {name: b for name, b in found.items() if isinstance(b, Tensor)}
                put_aside[id(layer)] = layer, kept
                for name, buffer in kept.items():
                    setattr(layer, name, buffer.clone())
        elif layer.training and getattr(layer, "track_running_stats", False):
            frozen.append(layer)
            layer.track_running_stats = False

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
        for layer, kept in put_aside.values():
            for name, buffer in kept.items():
                setattr(layer, name, buffer)
