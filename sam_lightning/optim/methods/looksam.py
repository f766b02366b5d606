"""LookSAM: perturb every few steps, and reuse the direction in between."""

import torch

from sam_lightning.optim.foreach import foreach, global_norm, projection
from sam_lightning.optim.perturbation import States, Tensors


class LookSAM:
    """Add the last ascent's direction to plain gradients: Liu et al. 2022 (arXiv 2203.02714).

    A step that perturbs uses g', and keeps g_v = g' - <g', g> g / ||g||^2, with g at w. The others
    use g + alpha * ||g|| * g_v / ||g_v|| (algorithm 1) and cost one pass. Norms and products are
    over all weights. ``method.every`` is the paper's k.

    Args:
        alpha: >= 0, else a ValueError; the correction as a part of the gradient, whatever rho is.
            The authors use 0.7 for vision transformers.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        if not alpha >= 0:
            raise ValueError(f"alpha={alpha}: must be a number >= 0")
        self.alpha = alpha

    def __call__(self, first: Tensors | None, second: Tensors, states: States) -> None:
        """Keep g_v / ||g_v||, or add it to the gradient of a step that does not perturb."""
        if first is None:
            size = self.alpha * global_norm(second)
            for g, state in zip(second, states, strict=True):
                if "direction" in state:
                    g.add_(state["direction"] * size)
            return
        rest = foreach(torch._foreach_mul, first, -projection(second, first))
        foreach(torch._foreach_add_, rest, second)
        size = global_norm(rest)
        seen = size > 1e-6 * global_norm(second)  # otherwise it is rounding
        for r, state in zip(rest, states, strict=True):
            new = torch.where(seen, r / (size + 1e-12), 0)
            state["direction"] = torch.where(size.isfinite(), new, state.get("direction", 0))
