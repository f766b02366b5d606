"""LookSAM: climb now and then, and reuse what it taught in between."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_lightning.optim.foreach import foreach, global_norm, projection
from sam_lightning.optim.perturbation import Memory


class Reuse:
    """Add the last ascent's direction to plain gradients: LookSAM, Liu et al. 2022 (2203.02714).

    At an update that climbs, the step is g', and g_v = g' - <g', g> g / ||g||^2, its part
    orthogonal to the gradient g at w, is kept. At the others it is g + alpha * ||g|| * g_v /
    ||g_v|| (algorithm 1), at the cost of one pass. Norms and products are over all weights. How
    often to climb is ``method.every``, the paper's k.

    Args:
        alpha: >= 0; 0 climbs at every k-th update and forgets. The correction is so large a part
            of the gradient whatever rho is. The authors use 0.7 for vision transformers.

    Raises:
        ValueError: alpha is negative.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha

    def __call__(
        self, first: list[Tensor] | None, second: list[Tensor], memory: Sequence[Memory]
    ) -> None:
        """Keep g_v / ||g_v||, or add it to a gradient of an update that does not climb."""
        if first is not None:
            self._keep(first, second, memory)
            return
        size = self.alpha * global_norm(second)
        for g, kept in zip(second, memory, strict=True):
            if "direction" in kept:
                g.add_(kept["direction"] * size)

    def _keep(self, first: list[Tensor], second: list[Tensor], memory: Sequence[Memory]) -> None:
        rest = foreach(torch._foreach_mul, first, -projection(second, first))
        foreach(torch._foreach_add_, rest, second)
        size = global_norm(rest)
        seen = size > 1e-6 * global_norm(second)  # not where rounding is all there is of it
        for r, kept in zip(rest, memory, strict=True):
            new = torch.where(seen, r / (size + 1e-12), 0)
            kept["direction"] = torch.where(size.isfinite(), new, kept.get("direction", 0))
