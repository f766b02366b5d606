"""Where a SAM step climbs to: the direction and the norm that sets its length.

A perturbation maps weights w and gradients g to two lists of tensors, ``(direction, scaled)``.
The optimizer then moves the weights by

    e = rho * direction / (||scaled||_2 + 1e-12)

with **one** norm over every tensor of ``scaled``. A new method is one class with this
``__call__`` and one YAML file in ``conf/method``.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Perturbation(Protocol):
    """Maps weights and gradients to the direction of ascent and to what its norm is taken of."""

    def __call__(
        self, weights: list[Tensor], grads: list[Tensor], names: Sequence[str | None]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Compute the ascent direction.

        Args:
            weights: the trainable weights that have a gradient, of any shapes; read only.
            grads: their gradients, same shapes, dtypes and devices; read only.
            names: the parameter's name in its model, or None where the optimizer was not told.

        Returns:
            direction and scaled, each as long and of the same shapes as ``weights``.
        """
        ...


class GradientAscent:
    """Climb along the gradient: SAM, Foret et al. 2021 (arXiv 2010.01412), eq. 2 with p = 2."""

    def __call__(
        self, weights: list[Tensor], grads: list[Tensor], names: Sequence[str | None]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the gradients for both."""
        return grads, grads


class AdaptiveAscent:
    """Climb in units of each weight's size: ASAM, Kwon et al. 2021 (arXiv 2102.11600), equation 7.

    e = rho * T^2 g / ||T g||_2 with T = |w| + eta. The authors' code applies T to parameters named
    ``*weight`` (normalisation layers included) and leaves all others, the biases, at T = 1; that
    is the default here too. Published values of rho belong to that choice.

    Args:
        eta: keeps weights near zero moving; >= 0.
        normalize_bias: apply T to every parameter, as the usual PyTorch port of SAM does.
    """

    def __init__(self, eta: float = 0.01, normalize_bias: bool = False) -> None:
        if not eta >= 0:
            raise ValueError(f"eta={eta}: must be a number >= 0")
        self.eta = eta
        self.normalize_bias = normalize_bias

    def __call__(
        self, weights: list[Tensor], grads: list[Tensor], names: Sequence[str | None]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return T^2 g and T g."""
        chosen = list(range(len(weights)))
        if not self.normalize_bias:
            if None in names:
                raise ValueError(
                    "normalize_bias=False: needs parameter names to tell weights from biases; "
                    "pass model.named_parameters() to SAM, or use normalize_bias=True"
                )
            chosen = [i for i, name in enumerate(names) if name and name.endswith("weight")]
        direction, scaled = list(grads), list(grads)
        if chosen:
            size = torch._foreach_abs([weights[i] for i in chosen])
            torch._foreach_add_(size, self.eta)
            scaled_chosen = torch._foreach_mul(size, [grads[i] for i in chosen])
            torch._foreach_mul_(size, scaled_chosen)
            for i, t_g, t2_g in zip(chosen, scaled_chosen, size, strict=True):
                scaled[i], direction[i] = t_g, t2_g
        return direction, scaled
