"""The base optimizer's step, and what a method does beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sam_lightning.optim.decay import BOTH
from sam_lightning.optim.distributed import averaged
from sam_lightning.optim.foreach import foreach, local_parts
from sam_lightning.optim.step_state import StepState


def keep_beside(sam: Any, step: StepState, own: dict[Tensor, Tensor], scale: Tensor | None) -> None:
    """Keep what is subtracted from weights beside the step, unscaled and averaged over ranks."""
    step.beside = own
    if own and scale is not None:
        foreach(torch._foreach_mul_, list(own.values()), 1 / scale)
    if not (own and step.local and dist.is_available() and dist.is_initialized()):
        return
    # All weights, since another rank may have a gradient where this one has none.
    weights = [p for p in sam.params if p.requires_grad]
    moves = [own[p] if p in own else torch.zeros_like(p) for p in weights]
    step.beside = dict(zip(weights, averaged(moves, dist.get_world_size()), strict=True))


def beside_of(sam: Any) -> list[Tensor]:
    """What is subtracted beside the next step, to be clipped with its gradient."""
    return list(sam._step_state.beside.values())


@torch.no_grad()
def step_base(sam: Any, step: StepState) -> None:
    """Step the base optimizer, then subtract what is beside it; nothing of it if it is skipped."""
    found_inf = sam.found_inf
    with _decayed_once(sam):
        sam.step_base()
    beside, step.beside = step.beside, {}
    for group in sam.param_groups if beside else ():
        weights = [p for p in group["params"] if p in beside]
        factor = group["lr"] if group.get("maximize") else -group["lr"]
        moves = local_parts([beside[p] for p in weights])
        for w, move in zip(local_parts(weights), moves, strict=True):
            move = move * factor
            if found_inf is not None:
                move = torch.where(found_inf.to(move.device) == 0, move, 0)
            w.add_(move)


@contextmanager
def _decayed_once(sam: Any) -> Iterator[None]:
    """Hide the weight decay from the base optimizer if the gradients have it already."""
    groups = sam.param_groups if sam.decay_in_ascent == BOTH else []
    hidden = [(group, group["weight_decay"]) for group in groups if "weight_decay" in group]
    for group, _ in hidden:
        group["weight_decay"] = 0.0
    try:
        yield
    finally:
        for group, decay in hidden:
            group["weight_decay"] = decay
