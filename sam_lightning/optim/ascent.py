"""From parameter groups to the direction in which SAM perturbs, and the move along it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.amp import GradScaler

from sam_lightning.optim.decay import check_decay
from sam_lightning.optim.foreach import add_scaled_, foreach
from sam_lightning.optim.methods.asam import normalized_ascent
from sam_lightning.optim.perturbation import Direction, GradientAscent, Perturbation, State
from sam_lightning.optim.step_state import Backup


class Ascent(NamedTuple):
    """The weights to perturb, and for each its gradient, name, signed rho and ``adaptive``."""

    weights: list[Tensor]
    grads: list[Tensor]
    names: list[str | None]
    rhos: list[float]
    adaptive: list[bool]


def ascent_of(sam: Any, scaler: GradScaler | None = None) -> Ascent:
    """Select the trainable weights that have a gradient, or the momentum that stands for it.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    needs_gradient, chosen = sam.needs_gradient, sam.param_names
    rows: list[tuple[Any, ...]] = []
    for group in sam.param_groups:
        # Under maximize the gradient is of what grows, and the momentum still of what falls.
        sign = -1 if group.get("maximize") and needs_gradient else 1
        rho, decay = sign * group["rho"], sign * group.get("weight_decay", 0.0)
        names = group.get("param_names") or [None] * len(group["params"])
        for name, p in zip(names, group["params"], strict=True):
            state = {} if needs_gradient else sam.state.get(p, {})
            grad = p.grad if needs_gradient else state.get("momentum_buffer", state.get("exp_avg"))
            if grad is None or not p.requires_grad or (chosen is not None and name not in chosen):
                continue
            if grad.is_sparse:
                raise RuntimeError("SAM does not support sparse gradients")
            rows.append((p, grad, name, rho, group["adaptive"], decay))
    if not rows:
        return Ascent([], [], [], [], [])
    weights, grads, names, rhos, adaptive, decays = map(list, zip(*rows, strict=True))
    if needs_gradient and scaler is not None:
        scale = scaler.scale(torch.ones((), device=grads[0].device))
        grads = foreach(torch._foreach_mul, grads, 1 / scale)
    if needs_gradient and sam.decay_in_ascent:
        rows_of_decay = zip(grads, weights, decays, strict=True)
        grads = [g.add(w, alpha=decay) for g, w, decay in rows_of_decay]
    return Ascent(weights, grads, names, rhos, adaptive)


def ascend(
    sam: Any, backup: Backup, first: bool, scaler: GradScaler | None, rho_scale: float
) -> None:
    """Move the weights from where they are, and keep copies; ``first`` says that this is w."""
    ascent = ascent_of(sam, scaler)
    if not ascent.weights:
        return
    remembered = sam.method_state
    states = [remembered.get(w, {}) if remembered else {} for w in ascent.weights]
    if not first:  # a method remembers only the gradient at w
        states = [dict(state) for state in states]
    direction, norm = direction_of(sam.perturbation, ascent, states)
    if first and any(states):
        remembered.update(zip(ascent.weights, states, strict=True))
    backup.save(ascent.weights)
    add_scaled_(ascent.weights, direction, [rho * rho_scale for rho in ascent.rhos], norm)


def direction_of(perturbation: Perturbation, ascent: Ascent, states: Sequence[State]) -> Direction:
    """The direction of a perturbation, scaled by |w| where ``adaptive``, and its norm."""
    weights, grads, names, _, adaptive = ascent
    if not any(adaptive):
        return perturbation(weights, grads, names, states)
    check_adaptive(perturbation)  # groups may have been loaded or changed
    if type(perturbation) is not GradientAscent:  # whose norm would not be used
        grads, _ = perturbation(weights, grads, names, states)
    return normalized_ascent(weights, grads, adaptive, eta=0.0)


def check_choices(sam: Any) -> None:
    """Refuse a perturbation, gradient transform, names or decay that cannot work.

    Raises:
        ValueError: names the argument that cannot.
    """
    defaults = sam.base_optimizer.defaults
    if not (sam.needs_gradient or defaults.get("momentum") or "betas" in defaults):
        raise ValueError(
            f"momentum={defaults.get('momentum')}: must be above 0 to perturb along it"
        )
    if not sam.needs_gradient and sam.gradient_transform is not None:
        raise ValueError("gradient_transform: combines two gradients, and this step has only one")
    names = {name for group in sam.param_groups for name in group.get("param_names", ())}
    if sam.param_names is not None and not sam.param_names <= names:
        raise ValueError(f"param_names={min(sam.param_names - names)}: no parameter of this name")
    check_decay(sam)


def check_adaptive(perturbation: Perturbation) -> None:
    """Refuse ``adaptive`` with a perturbation whose direction cannot be scaled.

    Raises:
        ValueError: the norm of the perturbation is not the 2-norm of its direction.
    """
    if not getattr(perturbation, "euclidean", False):
        name = type(perturbation).__name__
        raise ValueError(f"adaptive=True: not together with {name}, which decides it")
