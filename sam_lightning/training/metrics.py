"""What is known of the updates since the last log: sums on the device, read once per log."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sam_lightning.optim.foreach import global_norm, inner_product

# loss, accuracy, sharpness, gradient norm, updates, ascents; perturbation norm, cosine, and the
# number of updates at which these two were measured; updates with a finite gradient norm
SUMS = 10


class UpdateSums:
    """Sums over updates, which never wait for the device until ``means`` is asked for.

    Attributes:
        window: the sums since the last log, 1-dim of ``SUMS``.
        skipped: skipped updates in all, in a row now, and the longest row.
    """

    def __init__(self) -> None:
        self.window = torch.zeros(SUMS)
        self.skipped = torch.zeros(3)
        # Of the update under way: its gradient's norm, and 1 if that is finite, each 1-dim of 1.
        self._gradient: tuple[Tensor, Tensor] | None = None
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        """Move the sums."""
        self.window = self.window.to(device)
        self.skipped = self.skipped.to(device)
        # What an update that climbs, or not, adds to the counts and, none, to the geometry.
        self._counts = {
            climbs: torch.tensor([1.0, climbs, 0, 0, 0], device=device) for climbs in (True, False)
        }

    def add_update(self, first: Tensor, second: Tensor, climbs: bool) -> None:
        """Add an update with these losses and accuracies at w and at w + e, each 1-dim of 2.

        Call ``add_gradient`` before it. All is added by one operation, for to start one takes a
        GPU's host longer than the GPU takes to do it.
        """
        counts = self._counts[climbs]
        rise = (second - first)[:1] if climbs else counts[1:2]
        assert self._gradient is not None
        (norm, finite), self._gradient = self._gradient, None
        self.window.add_(torch.cat([first, rise, norm, counts, finite]))

    def add_geometry(self, norm: Tensor, similarity: Tensor) -> None:
        """Add the norm of a perturbation and the cosine of the two gradients."""
        self.window[6:9].add_(torch.stack([norm, similarity, torch.ones_like(norm)]))

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
        """The means over updates and devices by metric, and the longest row of skipped updates.

        The sums start anew. This waits for the device, once.
        """
        window = self.window
        if world_size > 1:
            window = strategy.reduce(window.clone(), reduce_op="mean")
        sums = torch.cat([window, self.skipped]).tolist()
        self.window.zero_()
        loss, acc, sharpness, grad_norm, count, ascents = sums[:6]
        norm, similarity, measured, finite, skipped, _, longest = sums[6:]
        values = {
            "train/loss": loss / count,
            "train/acc": acc / count,
            "train/grad_norm": grad_norm / finite if finite else math.inf,
            "train/skipped_steps": skipped,
        }
        if ascents:
            values["train/sharpness"] = sharpness / ascents
        if measured and math.isfinite(similarity):  # not so where a gradient is 0 or not finite
            values["train/perturbation_norm"] = norm / measured
            values["train/cosine"] = similarity / measured
        return values, longest


class LogUpdates(L.Callback):
    """Calls ``SAMModule.log_training`` after every batch, before other callbacks save."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log if it is time."""
        pl_module.log_training()


@torch.no_grad()
def cosine(ones: list[Tensor | None], others: list[Tensor | None]) -> Tensor:
    """The cosine of the angle between two gradients, 0-dim; a missing part counts as zeros."""
    both = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None and b is not None]
    norms = [global_norm(g for g in gradient if g is not None) for gradient in (ones, others)]
    if not both:
        return torch.zeros_like(norms[0])
    return inner_product([a for a, _ in both], [b for _, b in both]) / (norms[0] * norms[1])
