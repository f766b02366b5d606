"""Where a SAM step climbs to: the direction and the norm that sets its length.

A perturbation maps weights w and gradients g to a direction for every weight and one norm for all
of them, and the optimizer moves the weights by

    e = rho * direction / (norm + 1e-12)

A new method is one class with this ``__call__`` and one YAML file in ``conf/method``; those of
``sam_lightning/methods`` are examples.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sam_lightning.vectors import global_norm, norms_of

# What a method keeps of a weight from one update to the next, by name. It is saved and loaded with
# the optimizer's state, for each device.
Memory = dict[str, Tensor]


class Perturbation(Protocol):
    """Maps weights and gradients to the direction of ascent and the norm to divide it by.

    One with an attribute ``along = "momentum"`` is given the base optimizer's momentum in place of
    the gradients, and needs no pass at w.
    """

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        names: Sequence[str | None],
        memory: Sequence[Memory],
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Compute the ascent direction.

        Args:
            weights: the trainable weights that have a gradient, of any shapes; read only.
            grads: their gradients, same shapes, dtypes and devices; read only.
            names: the parameter's name in its model, or None where the optimizer was not told.
            memory: a dict for each weight to keep tensors of its shape in; empty at first.

        Returns:
            direction, as long and of the same shapes as ``weights``, and norm, 0-dim; a norm that
            is not finite makes the optimizer move nothing.
        """
        ...


class Descent(Protocol):
    """Combines the gradient at w and the one at w + e to the gradient that is stepped with."""

    def __call__(
        self, first: list[Tensor] | None, second: list[Tensor], memory: Sequence[Memory]
    ) -> None:
        """Change ``second`` in place.

        Both may be scaled by one loss scale, so the result has to scale with them.

        Args:
            first: the gradients at w; None at an update that does not climb. Read only.
            second: those at w + e, of the same shapes; at w where the update does not climb.
            memory: as for a perturbation.
        """
        ...


class GradientAscent:
    """Climb along the gradient: SAM, Foret et al. 2021 (arXiv 2010.01412), eq. 2 with p = 2."""

    def __call__(
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        names: Sequence[str | None],
        memory: Sequence[Memory],
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return g and ||g||_2."""
        return grads, global_norm(grads)


class AdaptiveAscent:
    """Climb in units of each weight's size: ASAM, Kwon et al. 2021 (arXiv 2102.11600), equation 7.

    e = rho * T^2 g / ||T g||_2 with T = |w| + eta. The authors' code applies T to parameters with
    ``weight`` in their name (normalisation layers included) and leaves all others, the biases, at
    T = 1; that is the default here too. Published values of rho belong to that choice.

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
        self,
        weights: list[Tensor],
        grads: list[Tensor],
        names: Sequence[str | None],
        memory: Sequence[Memory],
    ) -> tuple[Sequence[Tensor], Tensor]:
        """Return T^2 g and ||T g||_2."""
        chosen = list(range(len(weights)))
        if not self.normalize_bias:
            if None in names:
                raise ValueError(
                    "normalize_bias=False: needs parameter names to tell weights from biases; "
                    "pass model.named_parameters() to SAM, or use normalize_bias=True"
                )
            chosen = [i for i, name in enumerate(names) if name and "weight" in name]
        direction, norms = list(grads), []
        for part in _parts(chosen, weights):
            size = torch._foreach_abs([weights[i] for i in part])
            torch._foreach_add_(size, self.eta)
            scaled = torch._foreach_mul(size, [grads[i] for i in part])
            norms += norms_of(scaled)
            torch._foreach_mul_(size, scaled)
            for i, t2_g in zip(part, size, strict=True):
                direction[i] = t2_g
        rest = {*range(len(grads))} - {*chosen}
        return direction, global_norm([*norms, *norms_of(grads[i] for i in rest)])


def _parts(chosen: list[int], weights: list[Tensor]) -> Iterator[list[int]]:
    """On a CPU, parts small enough that what is made on the way stays in the cache; else one."""
    part, size = [], 0
    for i in chosen:
        part.append(i)
        size += weights[i].numel() if weights[i].is_cpu else 0
        if size >= 2**18:
            yield part
            part, size = [], 0
    if part:
        yield part
