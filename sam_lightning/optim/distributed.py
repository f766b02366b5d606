"""What SAM checks, makes and averages when several ranks (processes) train together."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam_lightning.optim.ascent import ascent_of
from sam_lightning.optim.closures import UNPERTURBED
from sam_lightning.optim.foreach import any_sharded
from sam_lightning.optim.perturbation import State
from sam_lightning.optim.step_state import StepState


def check_not_divided(group: dict[str, Any]) -> None:
    """Refuse a parameter group that is divided over ranks, unless FSDP2 divided it.

    Raises:
        ValueError: FullyShardedDataParallel or ZeroRedundancyOptimizer has divided the parameters.
    """
    if any(getattr(p, "_fsdp_flattened", False) for p in group["params"]):
        raise ValueError(
            "FullyShardedDataParallel: not supported, since it hides that each device has only a "
            "part of the gradient; use torch.distributed.fsdp.fully_shard"
        )
    if "base_optimizer" in group:  # it makes settings of SAM's arguments
        raise ValueError(
            "ZeroRedundancyOptimizer around SAM: not supported, since each device would perturb "
            "only its own part of the weights; use torch.distributed.fsdp.fully_shard"
        )


def check_averaged(step: StepState, weights: Iterable[Tensor]) -> None:
    """Refuse to combine two gradients if ranks would end with different weights.

    The model of the step may be DistributedDataParallel, contain it, or have a Lightning trainer.

    Args:
        step: whose gradients are to be combined.
        weights: the parameters with a gradient.

    Raises:
        RuntimeError: the last pass was inside ``no_sync``; or there are several ranks, their
            weights are not sharded, and SAM sees nothing that averages their gradients.
    """
    if step.local or not dist.is_available() or not dist.is_initialized():
        return
    if dist.get_world_size() == 1 or any_sharded(weights):
        return  # FSDP2 always averages
    # Lightning's trainer has the wrapped module.
    strategy = getattr(getattr(step.model, "_trainer", None), "strategy", None)
    seen = [m for m in (step.model, getattr(strategy, "model", None)) if isinstance(m, nn.Module)]
    modules = [m for whole in seen for m in whole.modules()]
    averaging = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not averaging:
        raise RuntimeError(
            "a method that combines two gradients, or decay_in_ascent=both, has to see what "
            "averages them over ranks: pass the model that DistributedDataParallel has wrapped, "
            "not the one inside, or the LightningModule, as perturbed(model), "
            "first_step(model=model) or step(closure, model); or pass local=True, call combine(), "
            "and average the gradients after it"
        )
    # A pass notes there whether it averages.
    if not all(ddp.require_forward_param_sync for ddp in averaging):
        raise RuntimeError(
            "a method that combines two gradients, or decay_in_ascent=both, needs both averaged "
            "over ranks: run both passes outside of no_sync(); or both inside of it, with "
            "perturbed(local=True) or first_step(local=True), call combine(), and average the "
            "gradients after it"
        )


@torch.no_grad()
def make_method_state(sam: Any) -> None:
    """Make the state of SAM's method, all zeros, in a step that moves nothing.

    ``torch.distributed.checkpoint`` takes a step with a learning rate of 0, to make the state into
    which it loads a checkpoint.

    Raises:
        RuntimeError: a learning rate is not 0, so the step should have perturbed.
    """
    params = [p for p in sam.params if p.grad is not None]
    if not params or any(group.get("lr", 1) != 0 for group in sam.param_groups):
        raise RuntimeError(UNPERTURBED)
    weights, grads, names, _, _ = ascent_of(sam)
    states: list[State] = [{} for _ in [*weights, *params]]
    if sam.needs_gradient:
        sam.perturbation(weights, grads, names, states[: len(weights)])
    if sam.gradient_transform is not None:
        zeros = [torch.zeros_like(p) for p in params]
        sam.gradient_transform(zeros, [z.clone() for z in zeros], states[len(weights) :])
    for p, state in zip([*weights, *params], states, strict=True):
        for name, value in state.items():
            sam.method_state[p].setdefault(name, torch.zeros_like(value))


def averaged(tensors: list[Tensor], devices: int) -> list[Tensor]:
    """The means over ranks, in one message and without waiting for it, as a strategy's would."""
    if not tensors:
        return []
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat.div_(devices))
    parts = flat.split([t.numel() for t in tensors])
    return [part.view_as(t) for t, part in zip(tensors, parts, strict=True)]
