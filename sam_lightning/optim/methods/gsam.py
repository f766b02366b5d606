"""GSAM: descend the perturbed loss, and close the gap between it and the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_lightning.optim.foreach import foreach, projection
from sam_lightning.optim.perturbation import Memory


class SurrogateGap:
    """Leave out of the step what lowers the loss only: GSAM, Zhuang et al. 2022 (arXiv 2203.08065).

    With g at w and g' at w + e, the step is g' - alpha * g_o, where g_o = g - <g, g'> g' / ||g'||^2
    is the part of g orthogonal to g' (algorithm 1). Its other half, a radius that falls with the
    learning rate, is ``method.rho_min``. On several devices each decomposes its own gradients, and
    the results are averaged.

    Args:
        alpha: >= 0; 0 is SAM. The authors' code has 0.6 for ViT-B/32 on ImageNet.

    Raises:
        ValueError: alpha is negative.
    """

    def __init__(self, alpha: float = 0.4) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha

    def __call__(
        self, first: list[Tensor] | None, second: list[Tensor], memory: Sequence[Memory]
    ) -> None:
        """Subtract alpha * g_o from g'; leave the gradient of an update that does not climb."""
        if first is None:
            return
        foreach(torch._foreach_mul_, second, 1 + self.alpha * projection(first, second))
        foreach(torch._foreach_add_, second, first, alpha=-self.alpha)
