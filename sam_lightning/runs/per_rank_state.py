"""What differs between devices, in a checkpoint: a row for each.

The weights and the base optimizer's state are the same on all. The sums since the last log, the
running statistics of BatchNorm and what a method remembers of its own gradients are not.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_lightning.training.module import SAMModule


def save_by_rank(module: "SAMModule", checkpoint: dict[str, Any]) -> None:
    """Add ``by_rank`` to a checkpoint: tensors with a row for each device.

    The weights' own state dict gets the mean of the running statistics, as evaluation does. To be
    called on all devices.
    """
    buffers = _float_buffers(module)
    stats = _of_all(module, _flat(module, list(buffers.values())))
    if module.trainer.world_size > 1:
        means = stats.mean(0).split([b.numel() for b in buffers.values()])
        weights = checkpoint["state_dict"]
        for (name, buffer), mean in zip(buffers.items(), means, strict=True):
            if f"model.{name}" in weights:  # not if it is one that a state dict leaves out
                weights[f"model.{name}"] = mean.view_as(buffer).to(buffer.dtype)
    checkpoint["by_rank"] = {"window": _of_all(module, module.sums.window), "running_stats": stats}
    if module.trainer.world_size > 1 and (memory := _memory(module)):
        checkpoint["by_rank"]["memory"] = _of_all(module, _flat(module, memory))


def load_by_rank(module: "SAMModule", rows: dict[str, Tensor]) -> None:
    """Take up this device's rows, once the model is on the device and the optimizer is loaded."""
    module.sums.window = rows["window"].to(module.device)
    _fill(list(_float_buffers(module).values()), rows["running_stats"])
    if "memory" in rows and (memory := _memory(module)):  # not of another method
        _fill(memory, rows["memory"])


def _float_buffers(module: "SAMModule") -> dict[str, Tensor]:
    return {n: b for n, b in module.model.named_buffers() if b.is_floating_point()}


def _memory(module: "SAMModule") -> list[Tensor]:
    params = [p for group in module.sam.param_groups for p in group["params"]]
    kept = [module.sam.method_state[p] for p in params if module.sam.method_state.get(p)]
    return [memory[name] for memory in kept for name in sorted(memory)]


def _flat(module: "SAMModule", tensors: list[Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0, device=module.device), *(t.flatten() for t in tensors)])


def _of_all(module: "SAMModule", local: Tensor) -> Tensor:
    gathered = module.all_gather(local)
    assert isinstance(gathered, Tensor)
    return gathered.view(module.trainer.world_size, -1)


def _fill(tensors: list[Tensor], row: Tensor) -> None:
    for tensor, part in zip(tensors, row.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
