"""LookSAM: climb now and then, and reuse what it taught in between."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_lightning.perturbations import Memory
from sam_lightning.vectors import global_norm, inner_product


class Reuse:
    """Add the last ascent's direction to plain gradients: LookSAM, Liu et al. 2022 (2203.02714).

    At an update that climbs, the step is g', and g_v = g' - <g', g> g / ||g||^2, its part
    orthogonal to the gradient g at w, is kept. At the others it is g + alpha * ||g|| * g_v /
    ||g_v|| (algorithm 1), at the cost of one pass. Norms and products are over all weights. How
    often to climb is ``method.every``, the paper's k.

    Args:
        alpha: >= 0; 0 climbs at every k-th update and forgets. The authors use 0.7.

    Raises:
        ValueError: alpha is negative.
    """

    def __init__(self, alpha: float = 0.7) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha

    def __call__(
        self, first: list[Tensor] | None, second: list[Tensor], memory: Sequence[Memory]
    ) -> None:
        """Keep g_v / ||g_v||, or add it to a gradient of an update that does not climb."""
        if first is not None:
            self._keep(first, second, memory)
        elif all("direction" in kept for kept in memory):
            size = self.alpha * global_norm(second)
            kept = [m["direction"] for m in memory]
            torch._foreach_add_(second, torch._foreach_mul(kept, size))

    def _keep(self, first: list[Tensor], second: list[Tensor], memory: Sequence[Memory]) -> None:
        norm = global_norm(first) + 1e-12
        unit = torch._foreach_div(first, norm)
        along = inner_product(unit, second)
        rest = torch._foreach_sub(second, torch._foreach_mul(unit, along))
        size = global_norm(rest)
        for r, kept in zip(rest, memory, strict=True):
            old = kept.get("direction", torch.zeros_like(r))
            kept["direction"] = torch.where(size.isfinite(), r / (size + 1e-12), old)
