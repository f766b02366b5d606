"""Momentum-SAM: a perturbation that costs no pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.perturbation import Memory


class MomentumAscent:
    """Step away against the momentum v: MSAM, Becker et al. 2024 (arXiv 2401.12033), algorithm 1.

    The gradient is taken at w - rho * v / ||v||, where v <- momentum * v + gradient is the base
    optimizer's (of Adam its first moment). The step is taken from w, which is where the weights are
    between updates; the authors keep them perturbed there, and so decay the perturbed weights.
    The published rho is larger than SAM's, up to 3.
    """

    along = "momentum"

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        names: Sequence[str | None],
        memory: Sequence[Memory],
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return -v and ||v||_2, of the momentum v that stands in place of the gradients."""
        return foreach(torch._foreach_neg, grads), global_norm(grads)
