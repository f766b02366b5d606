"""Momentum-SAM: a perturbation that needs no pass."""

import torch

from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors


class MomentumAscent:
    """Step away against the momentum v: MSAM, Becker et al. 2024 (arXiv 2401.12033), algorithm 1.

    e = -rho * v / ||v||, where v is the base optimizer's momentum, or Adam's first moment. The
    weights are at w between steps; the authors keep, and so decay, the perturbed ones. The
    published rho is larger than SAM's, up to 3.
    """

    needs_gradient = False

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return -v and ||v||_2, where v stands in place of the gradients."""
        return foreach(torch._foreach_neg, grads), global_norm(grads)
