"""Where a SAM step climbs to: the direction and the norm that sets its length.

A perturbation maps weights w and gradients g to a direction for every weight and one norm for all
of them, and the optimizer moves the weights by

    e = rho * direction / (norm + 1e-12)

A new method is one class with this ``__call__`` and one YAML file in ``conf/method``; those of
``sam_lightning/methods`` are examples.
"""

from collections.abc import Sequence
from typing import Protocol, overload

import torch
from torch import Tensor

from sam_lightning.optim.foreach import foreach, global_norm, norm_of_norms, norms_of, parts

# What a method keeps of a weight from one update to the next, by name. It is saved and loaded with
# the optimizer's state, for each device.
Memory = dict[str, Tensor]


class Perturbation(Protocol):
    """Maps weights and gradients to the direction of ascent and the norm to divide it by.

    One with an attribute ``along = "momentum"`` is given the base optimizer's momentum in place of
    the gradients, and needs no pass at w. One with ``euclidean = True`` returns the 2-norm of its
    direction, so that ``adaptive`` can scale the direction and take the norm again.
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
            is not finite makes the optimizer move nothing. A direction that is not a list has to
            take slices; each is asked for once, before its own weights move, but after those of
            earlier slices have.
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

    euclidean = True

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
        if not self.normalize_bias and None in names:
            raise ValueError(
                "normalize_bias=False: needs parameter names to tell weights from biases; "
                "pass model.named_parameters() to SAM, or use normalize_bias=True"
            )
        chosen = [self.normalize_bias or "weight" in (name or "") for name in names]
        return _normalized_ascent(weights, grads, chosen, self.eta)


def ascent_by_group(
    weights: list[Tensor], direction: list[Tensor], adaptive: list[bool]
) -> tuple[Sequence[Tensor], Tensor]:
    """Scale a direction d of ascent by the weights' size, T = |w|, where ``adaptive``; else T = 1.

    Returns:
        T^2 d and the norm ||T d||_2 over all weights.
    """
    return _normalized_ascent(weights, direction, adaptive, 0.0)


def _normalized_ascent(
    weights: list[Tensor], grads: list[Tensor], chosen: list[bool], eta: float
) -> tuple[Sequence[Tensor], Tensor]:
    direction = _Normalized(weights, grads, chosen, eta)
    norms = [n for part in parts(weights) for n in norms_of(direction.once(part))]
    return direction, norm_of_norms(norms)


class _Normalized(Sequence[Tensor]):
    """T^2 g, made part by part where it is used: as a whole it would be as large as the weights."""

    def __init__(
        self, weights: list[Tensor], grads: list[Tensor], chosen: list[bool], eta: float
    ) -> None:
        self.weights = weights
        self.grads = grads
        self.chosen = chosen
        self.eta = eta

    def __len__(self) -> int:
        return len(self.weights)

    @overload
    def __getitem__(self, part: int) -> Tensor: ...

    @overload
    def __getitem__(self, part: slice) -> list[Tensor]: ...

    def __getitem__(self, part: int | slice) -> Tensor | list[Tensor]:
        if isinstance(part, int):
            return self[slice(part, part + 1 or None)][0]
        return self._scaled(part, twice=True)

    def once(self, part: slice) -> list[Tensor]:
        """T g of a part, up to its signs."""
        return self._scaled(part, twice=False)

    def _scaled(self, part: slice, *, twice: bool) -> list[Tensor]:
        weights, result = self.weights[part], self.grads[part]
        chosen = [i for i, normalized in enumerate(self.chosen[part]) if normalized]
        if not chosen:
            return result
        # Without eta a real w itself will do: its sign is lost in the square, and in the norm.
        size = [weights[i] for i in chosen]
        if self.eta or any(map(torch.is_complex, size)):
            size = list(foreach(torch._foreach_abs, size))
            foreach(torch._foreach_add_, size, self.eta)
        scaled = foreach(torch._foreach_mul, size, [result[i] for i in chosen])
        if twice:
            foreach(torch._foreach_mul_, scaled, size)
        for i, t_g in zip(chosen, scaled, strict=True):
            result[i] = t_g
        return result
