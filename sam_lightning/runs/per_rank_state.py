"""What differs between ranks, in a checkpoint: for each part a tensor with a row per rank.

Weights and the base optimizer's state are the same on all ranks. Running statistics of BatchNorm,
sums since the last log and a method's state differ.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Parts = Mapping[str, Sequence[Tensor]]


def gather_rows(parts: Parts, all_gather: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """The values of each part's tensors as one row per rank; all ranks must call this.

    Args:
        parts: tensors by name; parts without tensors are left out.
        all_gather: stacks the tensors of all ranks, or returns a single rank's as it is.
    """
    rows = {}
    for name, tensors in parts.items():
        if tensors:
            empty = torch.zeros(0, device=tensors[0].device)  # makes rows float32 at least
            row = torch.cat([empty, *(tensor.flatten() for tensor in tensors)])
            rows[name] = torch.atleast_2d(all_gather(row))
    return rows


def fill(parts: Parts, rows: Mapping[str, Tensor]) -> None:
    """Copy a rank's row of each part into its tensors; skip parts that have no row."""
    for name, tensors in parts.items():
        if tensors and name in rows:
            values = rows[name].split([tensor.numel() for tensor in tensors])
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value.view_as(tensor))


def store_means(state_dict: dict[str, Tensor], buffers: Mapping[str, Tensor], rows: Tensor) -> None:
    """Write the buffers' means over ranks, which evaluation uses, into a state dict."""
    means = rows.mean(0).split([buffer.numel() for buffer in buffers.values()])
    for (name, buffer), mean in zip(buffers.items(), means, strict=True):
        if name in state_dict:  # not if it is not persistent
            state_dict[name] = mean.view_as(buffer).to(buffer.dtype)
