"""Friendly-SAM: perturb along what is special to the batch."""

import torch

from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors, update_mean


class FriendlyAscent:
    """Perturb along the batch's own part of the gradient: F-SAM, Li et al. 2024 (2403.12350).

    e = rho * d / ||d|| with d = g - sigma * m and then m <- decay * m + (1 - decay) * g. So d uses
    the mean of earlier steps, as in the authors' code. In the first step d = m = g.

    Args:
        sigma: >= 0, else a ValueError; 0 is SAM, 1 the authors' choice.
        decay: the paper's lambda, in [0, 1), else a ValueError; the authors use 0.6 to 0.95.
    """

    euclidean = True

    def __init__(self, sigma: float = 1.0, decay: float = 0.9) -> None:
        if not sigma >= 0:
            raise ValueError(f"sigma={sigma}: must be a number >= 0")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be a number from 0 to below 1")
        self.sigma = sigma
        self.decay = decay

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return d and ||d||_2; keep the mean, unless a gradient is not finite."""
        finite = global_norm(grads).isfinite()
        direction = []
        for g, state in zip(grads, states, strict=True):
            mean = state.get("mean")
            direction.append(g if mean is None else torch.sub(g, mean, alpha=self.sigma))
            update_mean(state, g, 1 - self.decay, finite)
        return direction, global_norm(direction)
