"""WSAM: sharpness as a regularisation term with a weight of its own."""

import torch

from sam_lightning.optim.foreach import foreach
from sam_lightning.optim.perturbation import States, Tensors


class WeightedSharpness:
    """Weigh the sharpness against the loss: WSAM, Yue et al. 2023 (arXiv 2305.15817).

    The goal is L(w) + c * (L(w + e) - L(w)) with c = gamma / (1 - gamma). The base optimizer steps
    with g, and lr * c * (g' - g) is subtracted after that, so momentum has no sharpness of earlier
    steps.

    Args:
        gamma: in [0, 1), else a ValueError; 0 is the base optimizer; from 0.5 on the sharpness
            counts as much as in SAM, and more. The authors' code has 0.88.
        decouple: false for one gradient, g + c * (g' - g), for the base optimizer; SAM at 0.5.
    """

    def __init__(self, gamma: float = 0.88, decouple: bool = True) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma={gamma}: must be a number from 0 to below 1")
        self.gamma = gamma
        self.decouple = decouple

    def __call__(self, first: Tensors | None, second: Tensors, states: States) -> Tensors | None:
        """Mix the gradients, or return what belongs beside the step; a plain step stays one."""
        if first is None:
            return None
        c = self.gamma / (1 - self.gamma)
        beside = None
        if self.decouple:
            beside = foreach(torch._foreach_sub, second, first)
            foreach(torch._foreach_mul_, beside, c)
            c = 0.0  # and an overflow in g' is left as NaN, so that the step is skipped
        foreach(torch._foreach_mul_, second, c)
        foreach(torch._foreach_add_, second, first, alpha=1 - c)
        return beside
