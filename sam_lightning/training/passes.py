"""Forward and backward passes over the batches of one step: which images, and which masks."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_lightning.config.errors import ConfigError
from sam_lightning.data.seeding import draw_seed
from sam_lightning.optim.distributed import averaged
from sam_lightning.optim.foreach import global_norm, inner_product
from sam_lightning.optim.sam import SAM
from sam_lightning.training.graphs import GraphedPasses
from sam_lightning.training.losses import Labels, Loss, accuracy, losses_of


@dataclass(frozen=True)
class MicroBatch:
    """Images N x C x H x W, labels N, and the seed of their dropout masks."""

    images: Tensor
    labels: Labels
    seed: int

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, part: "slice | Tensor") -> "MicroBatch":
        """The images at these places, with the same seed."""
        return MicroBatch(self.images[part], self.labels[part], self.seed)


@dataclass
class Passes:
    """The passes of SAM over the batches of a step.

    Args:
        forward: images -> logits.
        backward: takes a loss and whether ranks average its gradient, and adds to ``.grad``.
        loss: logits N x classes, labels N -> losses N; see ``losses``.
        same_randomness: the second pass uses the dropout masks of the first.
        sync_perturbation: average the gradient to perturb along over ranks. Otherwise each rank
            uses its own, without communication (m-sharpness, Foret et al. 2021, section 4.1).
        ascent_per_micro_batch: under accumulation, perturb for each micro-batch by itself.
        ascent_fraction: part of each batch, in (0, 1], for the first pass. Loss, accuracy and
            running statistics come from this part, and so does the noise of ``train/sharpness``.
        ascent_steps: go from w to w + e in steps of rho / ascent_steps, with a pass for each.
        descent_fraction: part of each batch, in (0, 1], for the second pass: the images whose loss
            rises most (Du et al. 2022, sharpness-sensitive data selection).
        graphs: records and replays the passes, where it can.

    Raises:
        ConfigError: both fractions are below 1.
    """

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, bool], None]
    loss: Loss
    same_randomness: bool = True
    sync_perturbation: bool = False
    ascent_per_micro_batch: bool = False
    ascent_fraction: float = 1.0
    ascent_steps: int = 1
    descent_fraction: float = 1.0
    graphs: GraphedPasses | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.ascent_fraction < 1 and self.descent_fraction < 1:
            raise ConfigError(
                f"method.descent_fraction={self.descent_fraction}: needs the loss of every image "
                f"before the ascent, so not with method.ascent_fraction={self.ascent_fraction}"
            )
        self._losses_at_w: list[Tensor] = []  # of each image, where the second pass selects

    def two(
        self,
        sam: SAM,
        batches: list[MicroBatch],
        *,
        sync: bool,
        seeds: Sequence[int],
        measure: bool,
        model: nn.Module,
        scaler: Any,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """Leave the gradient at w + e in ``.grad``, and the weights at w.

        Args:
            sam: the optimizer, with cleared gradients.
            batches: one or more.
            sync: ranks average the gradient at w + e.
            seeds: for the draws of a perturbation, one for each of ``ascent_steps``.
            measure: return the norm of e and the cosine of the two gradients too, unless each
                micro-batch has its own; this keeps the first gradient during the second pass.
            model, scaler: as for ``sam.perturbed``.

        Returns:
            mean loss and accuracy at w and at w + e, each 1-dim of 2; and what was measured.
        """
        params = sam.params
        parts = [[batch] for batch in batches] if self.ascent_per_micro_batch else [batches]
        measure = measure and not self.ascent_per_micro_batch
        total, device = sum(map(len, batches)), batches[0].images.device
        ascent: dict[str, Any] = {"scaler": scaler, "rho_scale": 1 / self.ascent_steps}
        at_w, at_w_e, geometry = [], [], None
        for i, part in enumerate(parts):
            earlier = [p.grad for p in params] if i else []
            if i:
                sam.zero_grad()
            share = sum(map(len, part)) / total
            at_w.append(_times(self._first(part), share))
            first = [p.grad for p in params] if measure else []
            seed_draws(seeds[0], device)
            with sam.perturbed(model, local=not self.sync_perturbation, share=share, **ascent):
                for seed in seeds[1:]:
                    self._first(part, further=True)
                    seed_draws(seed, device)
                    sam.perturb(zero_grad=True, further=True, **ascent)
                for p, grad in zip(params, earlier, strict=False):
                    p.grad = grad  # the second gradients of all parts add up
                last = i + 1 == len(parts)
                at_w_e.append(_times(self._second(part, total, sync=sync and last), share))
                if any(g is not None for g in first):  # before the two are combined
                    geometry = sam.perturbation_norm(), cosine(first, [p.grad for p in params])
        return sum(at_w[1:], at_w[0]), sum(at_w_e[1:], at_w_e[0]), geometry

    def _first(self, batches: list[MicroBatch], *, further: bool = False) -> Tensor:
        """Add the gradient to perturb along: at w, or ``further`` on the way to w + e."""
        if self.ascent_fraction < 1:
            sizes = [math.ceil(self.ascent_fraction * len(batch)) for batch in batches]
            batches = [b.take(slice(size)) for b, size in zip(batches, sizes, strict=True)]
        if self.descent_fraction == 1 or further:
            return self.gradient(batches, sync=self.sync_perturbation, second=further)
        self._losses_at_w = []
        return self.gradient(batches, sync=self.sync_perturbation, losses=self._losses_at_w)

    def _second(self, batches: list[MicroBatch], total: float, *, sync: bool) -> Tensor:
        """Add the gradient at w + e, as part of a mean over ``total`` images."""
        if self.descent_fraction == 1:
            return self.gradient(batches, sync=sync, second=True, total=total)
        chosen, loss = self._most_sensitive(batches)
        # The images left out of a batch weigh as much as the chosen ones.
        total = total * sum(map(len, chosen)) / sum(map(len, batches))
        return torch.stack([loss, self.gradient(chosen, sync=sync, second=True, total=total)[1]])

    def gradient(
        self,
        batches: list[MicroBatch],
        *,
        sync: bool,
        second: bool = False,
        total: float | None = None,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Add the gradient of the mean loss; return mean loss and accuracy, 1-dim of 2.

        Args:
            batches: one or more.
            sync, second: ranks average the gradient; it is not the first pass over these batches.
            total: the number of images that the gradient is a mean over, if not these alone.
            losses: filled with the loss of each image, 1-dim for each batch.
        """
        count = sum(map(len, batches))
        sums: Tensor | None = None
        for i, batch in enumerate(batches):
            self._seed_masks(batch, second)
            share, last = len(batch) / (total or count), i + 1 == len(batches)
            run = partial(self._pass, share=share, sync=sync and last)
            if self.graphs is None:
                both, each = run(batch.images, batch.labels)
            else:
                both, each = self.graphs(run, batch.images, batch.labels, share)
            if losses is not None:
                losses.append(each)
            if sums is None:
                sums = _times(both, len(batch) / count)
            else:
                sums.add_(both, alpha=len(batch) / count)
        assert sums is not None
        return sums

    def _pass(
        self, images: Tensor, labels: Labels, *, share: float, sync: bool
    ) -> tuple[Tensor, Tensor]:
        """Add the gradient of the mean loss times ``share``.

        Returns:
            mean loss and accuracy, 1-dim of 2; and the loss of each image, 1-dim.
        """
        logits = self.forward(images)
        each = losses_of(self.loss, logits, labels)
        loss = each.mean()
        self.backward(loss if share == 1 else loss * share, sync)
        with torch.no_grad():
            both = torch.stack([loss.float(), accuracy(logits, labels)])
        return both, each.detach()

    @torch.no_grad()
    def _most_sensitive(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], Tensor]:
        """The images whose loss has risen most, in their order, and the mean loss of all now."""
        count = sum(map(len, batches))
        chosen, mean = [], torch.zeros((), device=batches[0].images.device)
        for batch, before in zip(batches, self._losses_at_w, strict=True):
            self._seed_masks(batch, second=True)
            after = losses_of(self.loss, self.forward(batch.images), batch.labels)
            size = math.ceil(self.descent_fraction * len(batch))
            chosen.append(batch.take((after - before).topk(size).indices.sort().values))
            mean += after.sum() / count
        return chosen, mean

    def _seed_masks(self, batch: MicroBatch, second: bool) -> None:
        # Seeding each pass repeats its masks, and lets a resumed run continue exactly.
        changed = second and not self.same_randomness
        seed_draws(draw_seed(batch.seed, 2) if changed else batch.seed, batch.images.device)


def seed_draws(seed: int, device: torch.device) -> None:
    """Seed what torch draws from now on, on the CPU and on this device."""
    # torch.manual_seed takes a millisecond and some memory at every call: it notes a stack trace
    # for each kind of device that is missing.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)


def _times(values: Tensor, share: float) -> Tensor:
    return values if share == 1 else values * share


@torch.no_grad()
def cosine(ones: list[Tensor | None], others: list[Tensor | None]) -> Tensor:
    """The cosine of the angle between two gradients, 0-dim; a missing part counts as zeros."""
    both = [(a, b) for a, b in zip(ones, others, strict=True) if a is not None and b is not None]
    norms = [global_norm(g for g in gradient if g is not None) for gradient in (ones, others)]
    if not both:
        return torch.zeros_like(norms[0])
    return inner_product([a for a, _ in both], [b for _, b in both]) / (norms[0] * norms[1])


@torch.no_grad()
def average_gradients(model: nn.Module, devices: int) -> None:
    """Average over ranks the gradients that no backward pass has averaged."""
    if devices == 1:
        return
    params = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    for p, grad in zip(params, averaged(grads, devices), strict=True):
        p.grad = torch.empty_like(p).copy_(grad)  # in the memory order of p
