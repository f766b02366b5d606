"""ASAM: perturb each weight in proportion to its size."""

import torch

from sam_lightning.optim.foreach import foreach, global_norm
from sam_lightning.optim.perturbation import Direction, Names, States, Tensors


class AdaptiveAscent:
    """Scale the ascent by each weight's size: ASAM, Kwon et al. 2021 (arXiv 2102.11600).

    Equation 7: e = rho * T^2 g / ||T g||_2, where T = |w| + eta for parameters with ``weight`` in
    their name, as in the authors' code, and 1 for the rest. Published values of rho belong to it.

    Args:
        eta: >= 0, else a ValueError.
        normalize_bias: T = |w| + eta for every parameter, as the usual PyTorch port of SAM has it.
    """

    def __init__(self, eta: float = 0.01, normalize_bias: bool = False) -> None:
        if not eta >= 0:
            raise ValueError(f"eta={eta}: must be a number >= 0")
        self.eta = eta
        self.normalize_bias = normalize_bias

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return T^2 g and ||T g||_2."""
        if not self.normalize_bias and None in names:
            raise ValueError(
                "normalize_bias=False: needs parameter names to tell weights from biases; "
                "pass model.named_parameters() to SAM, or use normalize_bias=True"
            )
        chosen = [self.normalize_bias or "weight" in (name or "") for name in names]
        return normalized_ascent(weights, grads, chosen, self.eta)


def normalized_ascent(
    weights: Tensors, grads: Tensors, chosen: list[bool], eta: float
) -> Direction:
    """Return T^2 g and ||T g||_2; T is |w| + eta for the chosen weights, else 1."""
    places = [i for i, normalized in enumerate(chosen) if normalized]
    direction = list(grads)
    if not places:
        return direction, global_norm(direction)
    # Without eta a real w serves as |w|: the square and the norm lose its sign.
    size = [weights[i] for i in places]
    if eta or any(map(torch.is_complex, size)):
        size = list(foreach(torch._foreach_abs, size))
        foreach(torch._foreach_add_, size, eta)
    scaled = foreach(torch._foreach_mul, size, [grads[i] for i in places])
    for i, t_g in zip(places, scaled, strict=True):
        direction[i] = t_g
    norm = global_norm(direction)
    foreach(torch._foreach_mul_, scaled, size)  # T^2 g, in the same memory
    return direction, norm
