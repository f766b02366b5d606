"""What ``SAM`` has to find out about the loop that it is used in."""

import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

SPENT = "_sam_spent_at_version"


def mark_spent(params: Iterable[Tensor]) -> None:
    """Note that the present gradients have been stepped with, or cleared.

    The mark is on the first gradient itself, so that it goes when the gradient does.
    """
    for p in params:
        if p.grad is not None:
            setattr(p.grad, SPENT, p.grad._version)
            return


def has_new_gradients(params: Iterable[Tensor]) -> bool:
    """Whether there are gradients that were written since ``mark_spent``."""
    params = [p for p in params if p.grad is not None and p.requires_grad]
    if not params:
        return False
    grad = params[0].grad
    assert grad is not None
    spent = getattr(grad, SPENT, None)
    if spent is None:
        return True
    if grad._version == spent:
        return False
    # A backward pass, or somebody who set them to zero.
    return any(bool(p.grad.any()) for p in params if p.grad is not None)


def lightning_module(closure: Any) -> Any:
    """The LightningModule of the trainer that made a closure, or None for any other closure.

    Lightning hands every ``step`` a closure, and it has to be called: in manual optimization it
    computes nothing unless it was given one, but runs ``on_before_optimizer_step``; in automatic
    optimization it clears the gradients and runs ``training_step`` and the backward pass.
    """
    arguments = getattr(closure, "args", ())  # of a functools.partial
    return next((a for a in arguments if hasattr(a, "automatic_optimization")), None)


def closure_in_parts(closure: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """What computes the loss and its gradients, and what Lightning's closure does after that.

    The latter runs ``on_before_optimizer_step`` and clips the gradients. Only those that the
    optimizer steps with are to be clipped, so it has to run once, after the second pass.
    """
    *others, compute = getattr(closure, "args", (None,))
    if lightning_module(closure) is None or not callable(compute):
        return closure, lambda: None
    return compute, partial(closure.func, *others, lambda: None)  # type: ignore[attr-defined]


def check_gradients_can_be_combined(model: nn.Module | None, weights: Iterable[Tensor]) -> None:
    """Refuse to combine two gradients where devices would end with different weights.

    Args:
        model: what computed the gradients, DistributedDataParallel or with it inside; None if that
            is not known.
        weights: those that have a gradient.

    Raises:
        RuntimeError: the last pass was inside ``no_sync``; or there are several devices, their
            weights are not sharded, and it is not known what averages their gradients.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if any_sharded(weights):
        return  # a reduced gradient is all that there is
    if model is None:
        raise RuntimeError(
            "a method that combines two gradients has to know what averages them over devices: "
            "pass the model, as in perturbed(model), first_step(model=model)"
        )
    for module in model.modules():
        ddp = isinstance(module, nn.parallel.DistributedDataParallel)
        if ddp and not module.require_forward_param_sync:
            raise RuntimeError(
                "a method that combines two gradients takes those that are averaged over devices: "
                "run both passes outside of no_sync()"
            )


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, as FSDP2 makes of parameters and gradients."""
    # It takes half a second to import, and who has one has done so.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor; faster than asking each where DTensor is not imported."""
    return "torch.distributed.tensor" in sys.modules and any(map(is_sharded, tensors))
