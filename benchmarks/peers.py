"""SAM as others write it, behind the two calls that all of them have."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import SGD

from sam_lightning.optim.sam import SAM

RHO = 0.05
# The base optimizer of every case. Its fused form is the fastest, so SAM's own cost looks largest.
BASE: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "fused": True}


class TwoStep(Protocol):
    """Perturb in the first step; restore and step the base optimizer in the second."""

    def first_step(self, zero_grad: bool = False) -> None:
        """Perturb the weights along their gradients."""

    def second_step(self, zero_grad: bool = False) -> None:
        """Restore the weights and step the base optimizer."""


class PlainLoop:
    """SAM written down from its formula, tensor by tensor, as in the well-known gists.

    e = rho * g / (||g||_2 + 1e-12). The adaptive form multiplies e by w^2 and
    divides by the norm of |w| g instead.
    """

    def __init__(self, params: Iterable[nn.Parameter], adaptive: bool = False) -> None:
        self.params = list(params)
        self.adaptive = adaptive
        self.base = SGD(self.params, **BASE)
        self.before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Add e to every weight, keeping a copy of the weight."""
        moved = [(p, p.grad) for p in self.params if p.grad is not None]
        norms = [(p.abs() * grad if self.adaptive else grad).norm() for p, grad in moved]
        scale = RHO / (torch.stack(norms).norm() + 1e-12)
        for p, grad in moved:
            self.before[p] = p.clone()
            p.add_(p.square() * grad * scale if self.adaptive else grad * scale)
        if zero_grad:
            self.base.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Copy the weights back, and step."""
        for p, before in self.before.items():
            p.copy_(before)
        self.base.step()
        if zero_grad:
            self.base.zero_grad()


def implementations(adaptive: bool = False) -> dict[str, Callable[[nn.Module], TwoStep]]:
    """SAM (or ASAM) by name; pytorch-optimizer's only if it is installed."""
    found: dict[str, Callable[[nn.Module], TwoStep]] = {
        "ours": lambda model: SAM(model.parameters(), SGD, RHO, adaptive=adaptive, **BASE),
        "plain loop": lambda model: PlainLoop(model.parameters(), adaptive),
    }
    try:
        import pytorch_optimizer
    except ImportError:
        return found
    found["pytorch_optimizer"] = lambda model: pytorch_optimizer.SAM(
        model.parameters(), SGD, RHO, adaptive=adaptive, **BASE
    )
    return found
