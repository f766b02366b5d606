"""SAM with ``torch.amp.GradScaler``."""

from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler

from sam_lightning.optim.decay import BOTH
from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.step_state import StepState


def check_scaled(sam: Any, step: StepState) -> None:
    """Refuse to combine gradients of which a scaler has unscaled only the second.

    Raises:
        RuntimeError: it has; the weights are restored.
    """
    unscaled = sam.found_inf is not None and getattr(sam, "grad_scale", None) is None
    adds_decay = step.held and sam.decay_in_ascent == BOTH
    if unscaled and not step.combined and (adds_decay or step.at_w is not None):
        step.combined = True
        sam.restore()
        raise RuntimeError(
            "scaler.unscale_(): it has unscaled one of the two gradients that are combined. Run "
            "the second pass in `with optimizer.perturbed(model):`, or call combine() before "
            "scaler.unscale_()"
        )


def scale_of(sam: Any, scaler: GradScaler | None) -> Tensor | None:
    """The scale of the present gradients, 0-dim; None if nobody has scaled them."""
    if scaler is None:
        return getattr(sam, "grad_scale", None)
    return scaler.scale(torch.ones((), device=sam.params[0].device))


@torch.no_grad()
def combine_and_unscale(sam: Any) -> None:
    """Combine the two gradients, and unscale where the scaler leaves this to the optimizer."""
    sam.combine()
    scale = getattr(sam, "grad_scale", None)
    if scale is None or sam.found_inf is None:
        return
    grads = [p.grad for p in sam.params if p.grad is not None]
    if grads:
        foreach(torch._foreach_mul_, grads, 1 / scale)
        # The scaler saw the gradients before they were combined. Fused kernels compare with 1.
        bad = (global_norm(grads) * 0 != 0).to(sam.found_inf)
        sam.found_inf = torch.maximum(sam.found_inf, bad)
