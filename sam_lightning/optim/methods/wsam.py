"""WSAM: sharpness as a regularisation term with a weight of its own."""

import torch

from sam_lightning.optim.foreach import foreach
from sam_lightning.optim.perturbation import States, Tensors


class WeightedSharpness:
    """Weigh the sharpness against the loss: WSAM, Yue et al. 2023 (arXiv 2305.15817).

    The goal is L(w) + c * (L(w + e) - L(w)) with c = gamma / (1 - gamma). So the step uses
    g + c * (g' - g), as the authors' code does with ``decouple=False``. Its default gives the base
    optimizer g alone, and subtracts lr * c * (g' - g) after the step: the same without momentum.

    Args:
        gamma: in [0, 1), else a ValueError; 0 is the base optimizer, 0.5 SAM. More looks for
            flatter minima. The authors' code has 0.88.
    """

    def __init__(self, gamma: float = 0.88) -> None:
        if not 0 <= gamma < 1:
            raise ValueError(f"gamma={gamma}: must be a number from 0 to below 1")
        self.gamma = gamma

    def __call__(self, first: Tensors | None, second: Tensors, states: States) -> None:
        """Mix the gradients; keep the gradient of a step that does not perturb."""
        if first is None:
            return
        c = self.gamma / (1 - self.gamma)
        foreach(torch._foreach_mul_, second, c)
        foreach(torch._foreach_add_, second, first, alpha=1 - c)
