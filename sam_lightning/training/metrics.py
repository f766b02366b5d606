"""Metrics of training: sums on the device, read only at a log."""

import math
from typing import Any

import torch
from torch import Tensor

# loss, accuracy, sharpness, gradient norm, steps, perturbed steps; perturbation norm, cosine, and
# the number of steps at which these two were measured; steps with a finite gradient norm
SUMS = 10


class TrainMetrics:
    """Running sums over steps.

    Attributes:
        window: the sums since the last log, 1-dim of ``SUMS``.
        skipped: skipped steps in all, in a row now, and the longest row.
    """

    def __init__(self) -> None:
        self.window = torch.zeros(SUMS)
        self.skipped = torch.zeros(3)
        # The present step's gradient norm, and 1 if it is finite, each 1-dim of 1.
        self._gradient: tuple[Tensor, Tensor] | None = None
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        self.window = self.window.to(device)
        self.skipped = self.skipped.to(device)
        # What a step adds, perturbed or not: to the counts, and zeros to the geometry.
        self._counts = {
            perturbed: torch.tensor([1.0, perturbed, 0, 0, 0], device=device)
            for perturbed in (True, False)
        }

    def add_step(self, clean: Tensor, perturbed: Tensor, has_sharpness: bool) -> None:
        """Add a step, after ``add_gradient``: losses and accuracies at w and w + e, 1-dim of 2.

        One operation adds all: a GPU's host takes longer to start one than the GPU to do it.
        """
        counts = self._counts[has_sharpness]
        rise = (perturbed - clean)[:1] if has_sharpness else counts[1:2]
        assert self._gradient is not None
        (norm, finite), self._gradient = self._gradient, None
        self.window.add_(torch.cat([clean, rise, norm, counts, finite]))

    def add_geometry(self, norm: Tensor, cosine: Tensor) -> None:
        """Add the norm of a perturbation and the cosine of the two gradients."""
        self.window[6:9].add_(torch.stack([norm, cosine, torch.ones_like(norm)]))

    def add_gradient(self, norm: Tensor) -> Tensor:
        """Add the norm of the gradient to step with; return 1 if it is not finite, else 0."""
        not_finite = norm * 0 != 0  # inf * 0 is NaN, and NaN is not 0
        skip = not_finite.float()
        self._gradient = torch.where(not_finite, 0, norm).view(1), (1 - skip).view(1)
        in_all, in_a_row, longest = self.skipped.unbind()
        in_all.add_(skip)
        in_a_row.add_(1).mul_(skip)
        torch.maximum(longest, in_a_row, out=longest)
        return skip

    def means(self, strategy: Any, world_size: int) -> tuple[dict[str, float], float]:
        """Means over steps and ranks, and the longest row of skipped steps; sets the sums to 0."""
        window = self.window
        if world_size > 1:
            window = strategy.reduce(window.clone(), reduce_op="mean")
        sums = torch.cat([window, self.skipped]).tolist()  # waits for the device, once
        self.window.zero_()
        loss, acc, sharpness, grad_norm, count, perturbed = sums[:6]
        norm, cosine, measured, finite, skipped, _, longest = sums[6:]
        values = {
            "train/loss": loss / count,
            "train/acc": acc / count,
            "train/grad_norm": grad_norm / finite if finite else math.inf,
            "train/skipped_steps": skipped,
        }
        if perturbed:
            values["train/sharpness"] = sharpness / perturbed
        if measured and math.isfinite(cosine):  # not if a gradient is 0 or not finite
            values["train/perturbation_norm"] = norm / measured
            values["train/cosine"] = cosine / measured
        return values, longest
