"""Normalisation statistics in SAM's second pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm


@contextmanager
def frozen_running_stats(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch without touching running statistics, whatever ends the block.

    The statistics belong to the weights that are kept, so SAM's pass at the perturbed weights must
    not enter them (the official JAX code keeps those of the first pass). Works on every layer with
    ``track_running_stats``: BatchNorm, SyncBatchNorm and InstanceNorm, lazy ones too once a first
    batch has given them their shape; means, variances and ``num_batches_tracked`` all stay. A
    layer in evaluation mode is left alone, for it normalises by its running statistics.
    """
    layers: list[Any] = [
        m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)
    ]
    # InstanceNorm updates what buffers it has, whatever its flag says, so they are put aside.
    put_aside = [(m, m.running_mean, m.running_var) for m in layers if isinstance(m, _InstanceNorm)]
    try:
        for layer in layers:
            layer.track_running_stats = False
        for layer, _, _ in put_aside:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True
        for layer, mean, var in put_aside:
            layer.running_mean, layer.running_var = mean, var
