"""GSAM: lower the perturbed loss, and the gap between it and the loss."""

import torch

from sam_lightning.optim.foreach import foreach, projection
from sam_lightning.optim.perturbation import States, Tensors


class SurrogateGap:
    """Remove from the step what lowers only the loss at w: GSAM, Zhuang et al. 2022 (2203.08065).

    With g at w and g' at w + e, the step is g' - alpha * g_o, where g_o = g - <g, g'> g' / ||g'||^2
    (algorithm 1, whose falling radius is ``method.rho_min``). Each rank decomposes its own
    gradients, and training averages the results.

    Args:
        alpha: >= 0, else a ValueError; 0 is SAM; the authors' 0.6 is for ViT-B/32 on ImageNet.
    """

    def __init__(self, alpha: float = 0.4) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha

    def __call__(self, first: Tensors | None, second: Tensors, states: States) -> None:
        """Subtract alpha * g_o from g'; keep the gradient of a step that does not perturb."""
        if first is None:
            return
        foreach(torch._foreach_mul_, second, 1 + self.alpha * projection(first, second))
        foreach(torch._foreach_add_, second, first, alpha=-self.alpha)
