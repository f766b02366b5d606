"""A SAM step with a closure: how often it runs, and at which weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from sam_lightning.optim.step_state import StepState

Closure = Callable[[], Any]

UNPERTURBED = (
    "step() without a perturbation: this would be a plain step of the base optimizer. Run the "
    "second pass inside `with optimizer.perturbed(model):`, or between first_step() and "
    "second_step(), or pass step() a closure that computes the gradients. (A closure does not work "
    "with a GradScaler, nor with 16-mixed under Lightning's automatic optimization.) Call "
    "skip_perturbation() first if you want a plain step. If Lightning, Fabric or accelerate has "
    "wrapped the optimizer, still call step() of the wrapper"
)


def run_passes(sam: Any, step: StepState, closure: Closure, model: nn.Module | None) -> Any:
    """Run the passes that a step still needs, perturbed where it is time.

    Returns:
        what the closure returned, at w if it ran there; None if it ran at w + e only.
    """
    if step.perturbed:  # a pass that was not stepped with
        sam.zero_grad()
    module = lightning_module(closure)
    automatic = module is not None and module.automatic_optimization
    compute, finish = _in_parts(closure)
    model = module if model is None else model
    result = None
    if step.plain or not sam.perturbs:
        if automatic:
            result = compute()
        elif not step.has_new_gradients(sam.params):
            given = [(p, p.grad) for p in sam.params]
            sam.zero_grad()
            result = compute()
            _put_back_if_none(given)
        sam.combine()
    elif automatic and _accumulates(module.trainer):
        raise RuntimeError(
            "accumulate_grad_batches under automatic optimization: SAM needs a second pass over "
            "all accumulated batches; use manual optimization"
        )
    elif not sam.needs_gradient:
        with sam.perturbed(model):
            result = compute()
    elif not automatic and step.has_new_gradients(sam.params):
        _second_pass(sam, compute, model)
    else:
        sam.zero_grad()
        result = compute()
        if any(p.grad is not None for p in sam.params):
            _second_pass(sam, compute, model)
        elif automatic:
            sam.skip_perturbation()  # training_step, or a callback, left out this batch
    finish()
    return result


def lightning_module(closure: Any) -> Any:
    """The LightningModule whose trainer made a closure, or None for any other closure.

    Lightning gives a closure to every ``step``, which must call it. In manual optimization it
    computes nothing unless the user passed one, but runs ``on_before_optimizer_step``. In
    automatic optimization it clears the gradients and runs ``training_step`` and the backward pass.
    """
    made_by = getattr(getattr(closure, "func", None), "__name__", "")  # of a functools.partial
    return closure.args[0] if made_by == "_wrap_closure" else None


def _in_parts(closure: Closure) -> tuple[Closure, Closure]:
    """What computes loss and gradients, and what Lightning's closure does after that.

    The second part runs ``on_before_optimizer_step`` and clips the gradients. It runs once, after
    the second pass, because only the gradient of the step is clipped.
    """
    if lightning_module(closure) is None:
        return closure, lambda: None
    *others, compute = closure.args  # type: ignore[attr-defined]
    return compute, partial(closure.func, *others, lambda: None)  # type: ignore[attr-defined]


def _accumulates(trainer: Any) -> bool:
    """Whether Lightning accumulates gradients; averaging weights, it says so and computes none."""
    computes = not getattr(trainer.fit_loop, "_skip_backward", False)
    return bool(computes and trainer.accumulate_grad_batches > 1)


def _second_pass(sam: Any, compute: Closure, model: nn.Module | None) -> None:
    given = [(p, p.grad) for p in sam.params]
    with sam.perturbed(model):
        compute()
        if _put_back_if_none(given):
            raise RuntimeError(UNPERTURBED)


def _put_back_if_none(given: list[tuple[Tensor, Tensor | None]]) -> bool:
    """Put back gradients if a closure computed none; return whether that is so."""
    if any(p.grad is not None for p, _ in given):
        return False
    for p, grad in given:
        p.grad = grad
    return True
