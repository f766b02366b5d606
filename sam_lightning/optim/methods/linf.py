"""SAM in the infinity norm: every weight moves by rho."""

import torch

from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors


class SignAscent:
    """e = rho * sign(g): Foret et al. 2021 (arXiv 2010.01412), equation 2 with p = infinity.

    Choose a rho smaller than SAM's by about the root of the number of weights.
    """

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return sign(g) and 1, or NaN where a gradient is not finite."""
        norm = global_norm(grads)
        norm = torch.where(norm.isfinite(), torch.ones_like(norm), torch.nan)
        return foreach(torch._foreach_sign, grads), norm
