"""What a method defines: where SAM perturbs the weights, or what it steps with.

A perturbation maps weights w and gradients g to a direction for each weight and one norm for all.
The optimizer then moves the weights by

    e = rho * direction / (norm + 1e-12)

A new method is one class with this ``__call__`` and one YAML file in ``conf/method``. See the files
in ``sam_lightning/optim/methods`` for examples.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sam_lightning.optim.foreach import global_norm

# What a method remembers of one weight between steps, by name. The optimizer saves it with its own
# state, on each rank.
State = dict[str, Tensor]
Tensors = list[Tensor]
Names = Sequence[str | None]
States = Sequence[State]
Direction = tuple[Tensors, Tensor]  # with its norm


class Perturbation(Protocol):
    """Maps weights and gradients to a direction of ascent and the norm to divide it by.

    With an attribute ``needs_gradient = False`` it receives the base optimizer's momentum in place
    of the gradients, and the step has no pass at w. With ``euclidean = True`` it promises that its
    norm is the 2-norm of its direction, so ``adaptive`` can scale the direction.
    """

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Compute the ascent direction.

        Args:
            weights: the trainable weights that have a gradient, of any shapes; read only.
            grads: their gradients, same shapes, dtypes and devices; read only.
            names: each parameter's name in its model; None if the optimizer has no names.
            states: a dict for each weight, to remember tensors of its shape; empty at first.

        Returns:
            direction, as long and of the same shapes as ``weights``, and norm, 0-dim. If the norm
            is not finite, no weight moves.
        """
        ...


class GradientTransform(Protocol):
    """Combines the gradients at w and at w + e to the gradient of the step."""

    def __call__(self, first: Tensors | None, second: Tensors, states: States) -> Tensors | None:
        """Change ``second`` in place.

        Both may be scaled by the same loss scale, so the result must scale with them.

        Args:
            first: the gradients at w; None at a step that does not perturb. Read only.
            second: the gradients at w + e, of the same shapes; at w if the step does not perturb.
            states: as for a perturbation.

        Returns:
            None; or what is subtracted from the weights after the base optimizer's step, times the
            learning rate. Where that is not finite, ``second`` must not be, which skips the step.
        """
        ...


def update_mean(state: State, g: Tensor, weight: float, finite: Tensor) -> Tensor:
    """The running mean of a gradient with g, in which g has ``weight``; at first g itself.

    ``state`` keeps it, unless ``finite``, 0-dim, says that a gradient of this step is not.
    """
    mean = state.get("mean")
    new = g if mean is None else torch.lerp(mean, g, weight)
    state["mean"] = torch.where(finite, new, 0 if mean is None else mean)
    return new


class GradientAscent:
    """Perturb along the gradient: SAM, Foret et al. 2021 (arXiv 2010.01412), eq. 2 with p = 2."""

    euclidean = True

    def __call__(self, weights: Tensors, grads: Tensors, names: Names, states: States) -> Direction:
        """Return g and ||g||_2."""
        return grads, global_norm(grads)
