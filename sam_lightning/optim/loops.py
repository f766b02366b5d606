"""What ``SAM`` has to find out about the loop that it is used in."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from sam_lightning.optim.foreach import any_sharded

SECOND = "second"


def mark_spent(params: Iterable[Tensor], clearings: int, *, each: bool = False) -> None:
    """Note that the present gradients have been stepped with, or set to zero.

    The mark is on the first gradient itself, so that it goes when the gradient does.

    Args:
        params: whose gradients.
        clearings: how often gradients were cleared. A tensor that somebody assigns once more after
            that is a new gradient.
        each: mark every gradient. That takes a while, and tells of a backward pass that left the
            first one out.
    """
    for p in params:
        grad: Any = p.grad
        if grad is not None and p.requires_grad:
            grad._sam_spent = clearings, _version(grad)
            if not each:
                return


def mark_second(params: Iterable[Tensor], clearings: int) -> None:
    """Note that the present gradients are those of a second pass, still to be stepped with."""
    grad: Any = next((p.grad for p in params if p.grad is not None), None)
    if grad is not None:
        grad._sam_spent = (SECOND, clearings), _version(grad)


def has_second_gradients(params: Iterable[Tensor], clearings: int) -> bool:
    """Whether gradients of a second pass are still there, with others added to them.

    One write since then is a backward pass; setting them to zero before it is another.
    """
    grad = next((p.grad for p in params if p.grad is not None), None)
    mark, version = getattr(grad, "_sam_spent", (None, 0))
    return grad is not None and mark == (SECOND, clearings) and _version(grad) - version == 1


def has_new_gradients(groups: list[dict[str, Any]], clearings: int, *, zeros_count: bool) -> bool:
    """Whether there are gradients that were written since ``mark_spent``.

    Args:
        groups: of the parameters whose gradients they are.
        clearings: as for ``mark_spent``.
        zeros_count: whether a write that left zeros in a gradient of before counts, which may be
            a backward pass, or somebody who cleared it. If so, no host waits for a device.
    """
    marked = False
    for p in (p for group in groups for p in group["params"]):
        if p.grad is None or not p.requires_grad:
            continue
        cleared, version = getattr(p.grad, "_sam_spent", (None, None))
        if cleared == clearings:
            marked = True
            rewritten = _version(p.grad) != version
            if rewritten and (zeros_count or _any_nonzero(groups)):
                return True
        elif not marked:
            return True
    return False


def _any_nonzero(groups: list[dict[str, Any]]) -> bool:
    params = (p for group in groups for p in group["params"])
    return any(bool(p.grad.any()) for p in params if p.grad is not None)


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # of a tensor made in inference mode
        return 0


def lightning_module(closure: Any) -> Any:
    """The LightningModule of the trainer that made a closure, or None for any other closure.

    Lightning hands every ``step`` a closure, and it has to be called: in manual optimization it
    computes nothing unless it was given one, but runs ``on_before_optimizer_step``; in automatic
    optimization it clears the gradients and runs ``training_step`` and the backward pass.
    """
    made_by = getattr(getattr(closure, "func", None), "__name__", "")  # of a functools.partial
    return closure.args[0] if made_by == "_wrap_closure" else None


def closure_in_parts(closure: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What computes the loss and its gradients, and what Lightning's closure does after that.

    The second part runs ``on_before_optimizer_step`` and clips the gradients. It runs once, after
    the second pass, because only the gradient of the step is clipped.
    """
    if lightning_module(closure) is None:
        return closure, lambda: None
    *others, compute = closure.args  # type: ignore[attr-defined]
    return compute, partial(closure.func, *others, lambda: None)  # type: ignore[attr-defined]


def check_gradients_can_be_combined(model: nn.Module | None, weights: Iterable[Tensor]) -> None:
    """Refuse to combine two gradients where devices would end with different weights.

    Args:
        model: what computed the gradients: DistributedDataParallel, with it inside, or a module of
            a trainer that has put it around; None if that is not known.
        weights: the parameters with a gradient.

    Raises:
        RuntimeError: the last pass was inside ``no_sync``; or there are several devices, their
            weights are not sharded, and nothing is seen that averages their gradients.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if any_sharded(weights):
        return  # a reduced gradient is all that there is
    # Lightning keeps what it has put around a module with the trainer.
    strategy = getattr(getattr(model, "_trainer", None), "strategy", None)
    seen = [m for m in (model, getattr(strategy, "model", None)) if isinstance(m, nn.Module)]
    modules = [m for whole in seen for m in whole.modules()]
    averaging = [m for m in modules if isinstance(m, nn.parallel.DistributedDataParallel)]
    if not averaging:
        raise RuntimeError(
            "a method that combines two gradients has to see what averages them over devices: "
            "pass the model that DistributedDataParallel has wrapped, not the one inside, or the "
            "LightningModule, as perturbed(model), first_step(model=model) or step(closure, model);"
            " or pass local=True, call combine(), and average what it makes of the gradients"
        )
    # A pass notes there whether it is one that averages.
    if not all(ddp.require_forward_param_sync for ddp in averaging):
        raise RuntimeError(
            "a method that combines two gradients needs both averaged over devices: run both "
            "passes outside of no_sync(); or both inside of it, with perturbed(local=True) or "
            "first_step(local=True), call combine(), and average what it makes of the gradients"
        )
