"""Gradients of batches by hand: which masks they draw, and when devices average them."""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sam_lightning.data.augment import draw_seed
from sam_lightning.training.classifier import Batch, Classifier

# a batch, and the seed of its dropout masks
MicroBatch = tuple[Batch, int]


class GradientModule(Classifier):
    """A classifier that computes gradients when told to, under any precision and strategy.

    Args:
        model, num_classes, memory_format: as for ``Classifier``.
        label_smoothing: of the training loss, in [0, 1).
        same_randomness: the second pass over a batch uses the dropout masks of the first.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        memory_format: str = "contiguous",
        *,
        label_smoothing: float = 0.0,
        same_randomness: bool = True,
    ) -> None:
        super().__init__(model, num_classes, memory_format)
        self.automatic_optimization = False
        self.same_randomness = same_randomness
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def gradient(
        self,
        micro_batches: list[MicroBatch],
        *,
        sync: bool = True,
        second_pass: bool = False,
        total: float | None = None,
        losses: list[Tensor] | None = None,
    ) -> Tensor:
        """Add the gradient of the mean loss to ``.grad``; return mean loss and accuracy.

        Args:
            micro_batches: one or more.
            sync: average the gradient over devices.
            second_pass: it is not the first pass over these batches.
            total: the number of samples that the gradient is a mean over, if not these alone.
            losses: filled with the loss of each image, 1-dim for each micro-batch.
        """
        count = sum(len(labels) for (_, labels), _ in micro_batches)
        sums: Tensor | None = None
        for i, ((images, labels), seed) in enumerate(micro_batches):
            # Seeding each pass repeats its masks, and lets a resumed run continue exactly.
            self._seed_masks(seed, second_pass)
            logits = self(images)
            loss = self.criterion(logits, labels)
            with self._communication(sync and i + 1 == len(micro_batches)):
                share = len(labels) / (total or count)
                self.manual_backward(loss if share == 1 else loss * share)
            with torch.no_grad():
                if losses is not None:
                    losses.append(self._losses(logits, labels))
                accuracy = (logits.argmax(1) == labels).float().mean()
                both = torch.stack([loss.float(), accuracy])
                if sums is None:
                    sums = both if len(labels) == count else both * (len(labels) / count)
                else:
                    sums.add_(both, alpha=len(labels) / count)
        assert sums is not None
        return sums

    @torch.no_grad()
    def most_sensitive(
        self, micro_batches: list[MicroBatch], losses: list[Tensor], fraction: float
    ) -> tuple[list[MicroBatch], Tensor]:
        """Select from each micro-batch the images whose loss is most above ``losses`` now.

        Returns:
            ceil(fraction * N) of N images of each, in their order, and the mean loss of all, 0-dim.
        """
        count = sum(len(labels) for (_, labels), _ in micro_batches)
        chosen, mean = [], torch.zeros((), device=self.device)
        for ((images, labels), seed), before in zip(micro_batches, losses, strict=True):
            self._seed_masks(seed, second_pass=True)
            after = self._losses(self(images), labels)
            size = math.ceil(fraction * len(labels))
            index = (after - before).topk(size).indices.sort().values
            chosen.append(((images[index], labels[index]), seed))
            mean += after.sum() / count
        return chosen, mean

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.criterion.label_smoothing
        return nn.functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=smoothing
        )

    def _seed_masks(self, seed: int, second_pass: bool) -> None:
        if second_pass and not self.same_randomness:
            seed = draw_seed(seed, 2)
        self.seed_draws(seed)

    def seed_draws(self, seed: int) -> None:
        """Seed what torch draws from now on, on the CPU and on this device."""
        # torch.manual_seed would take a millisecond and some memory at every call, to note a stack
        # trace for each kind of device that is not there.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    @contextlib.contextmanager
    def _communication(self, sync: bool) -> Iterator[None]:
        """Run a backward pass outside autocast, averaging its gradient over devices or not."""
        with contextlib.ExitStack() as stack:
            # Lightning runs training_step inside autocast, where torch advises against backward.
            if torch.is_autocast_enabled(self.device.type):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if not sync and hasattr(self.trainer.strategy, "block_backward_sync"):
                stack.enter_context(self.trainer.strategy.block_backward_sync())
            yield

    @torch.no_grad()
    def average_gradients(self) -> None:
        """Average over devices the gradients that no backward pass has averaged."""
        if self.trainer.world_size == 1:
            return
        params = [p for p in self.model.parameters() if p.requires_grad]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        flat = torch.cat([g.flatten() for g in grads])  # one message for all
        dist.all_reduce(flat.div_(self.trainer.world_size))  # the strategy's would wait for it
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = torch.empty_like(p).copy_(part.view_as(p))  # in the memory order of p

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss under ``trainer.precision=16-mixed``."""
        return getattr(self.trainer.precision_plugin, "scaler", None)
