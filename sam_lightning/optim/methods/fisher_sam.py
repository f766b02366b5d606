"""Fisher SAM: measure the perturbation by how much it changes the model's predictions."""

import torch

from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors


class FisherAscent:
    """Perturb within an ellipsoid of the Fisher information: Kim et al. 2022 (arXiv 2206.04920).

    The largest <g, e> with <e, F e> <= rho^2 is e = rho * F^-1 g / sqrt(<g, F^-1 g>). F is diagonal
    and estimated from the batch's gradient: F = 1 + eta * g^2. So weights with a large gradient
    move less than in SAM.

    Args:
        eta: >= 0, else a ValueError; 0 is SAM. It is of the size of 1 / g^2 where it matters.
    """

    def __init__(self, eta: float = 1.0) -> None:
        if not eta >= 0:
            raise ValueError(f"eta={eta}: must be a number >= 0")
        self.eta = eta

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return F^-1 g and sqrt(<g, F^-1 g>)."""
        root = foreach(torch._foreach_abs, grads)  # of F; real also where the gradient is complex
        foreach(torch._foreach_mul_, root, root)
        foreach(torch._foreach_mul_, root, self.eta)
        foreach(torch._foreach_add_, root, 1)
        foreach(torch._foreach_sqrt_, root)
        direction = foreach(torch._foreach_div, grads, root)
        norm = global_norm(direction)
        foreach(torch._foreach_div_, direction, root)
        return direction, norm
