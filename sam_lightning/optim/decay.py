"""Weight decay as an L2 term of the loss, in both passes: ``decay_in_ascent="both"``."""

from typing import Any

import torch
from torch import Tensor, optim

from sam_lightning.optim.foreach import foreach

BOTH = "both"
# They add their weight_decay to the gradient, so moving it there before the step changes nothing.
COUPLED = (
    *(optim.SGD, optim.Adam, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.Adagrad, optim.Adadelta, optim.RMSprop, optim.ASGD),
)


def check_decay(sam: Any) -> None:
    """Refuse a ``decay_in_ascent`` that means nothing.

    Raises:
        ValueError: it is not a choice, the perturbation uses no gradient, or the base optimizer
            does not add its weight decay to the gradient.
    """
    chosen, base = sam.decay_in_ascent, sam.base_optimizer
    if chosen not in (False, True, BOTH):
        raise ValueError(f"decay_in_ascent={chosen}: allowed are false, true, both")
    if chosen and not sam.needs_gradient:
        name = type(sam.perturbation).__name__
        raise ValueError(f"decay_in_ascent={chosen}: not with {name}, which has no gradient at w")
    decoupled = any(group.get("decoupled_weight_decay") for group in sam.param_groups)
    if chosen == BOTH and (decoupled or not isinstance(base, COUPLED)):
        known = ", ".join(cls.__name__ for cls in COUPLED)
        raise ValueError(
            f"decay_in_ascent=both: {type(base).__name__} does not add its weight_decay to the "
            f"gradient, as an L2 term of the loss would; these do: {known}"
        )


def add_decay(sam: Any, scale: Tensor | None, share: float) -> None:
    """Add ``share * weight_decay * w`` to the gradients, times the scale; w as it is now."""
    for group in sam.param_groups:
        weights = [p for p in group["params"] if p.grad is not None]
        # Under maximize the gradient is of what grows, which the term lowers.
        decay = (-share if group.get("maximize") else share) * group.get("weight_decay", 0.0)
        if not weights or not decay:
            continue
        grads = [p.grad for p in weights]
        if scale is not None:
            weights = foreach(torch._foreach_mul, weights, scale)
        foreach(torch._foreach_add_, grads, weights, alpha=decay)
