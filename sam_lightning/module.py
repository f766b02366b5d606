"""The training step: two passes, perturb and restore around the second, one optimizer step.

Lightning's automatic optimization calls the closure of an optimizer once, scales, clips and counts
by that; SAM needs two gradients a step. So this module optimizes by hand and owns what Lightning
then leaves to it: accumulation, clipping, skipping of non-finite steps, the schedule and the log.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_lightning.classifier import Batch, Classifier
from sam_lightning.data.augment import draw_seed
from sam_lightning.errors import TrainingError
from sam_lightning.models.running_stats import frozen_running_stats
from sam_lightning.perturbations import Perturbation, global_norm
from sam_lightning.sam import SAM

# a batch, and the seed of its dropout masks
MicroBatch = tuple[Batch, int]


class ManualSAM(SAM):
    """SAM under Lightning's manual optimization, which hands every optimizer a closure.

    That closure computes nothing, it calls ``on_before_optimizer_step``. Plain ``SAM.step`` would
    take it for one that evaluates the loss.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call the closure once, then step the base optimizer with the present gradients."""
        if closure is not None:
            closure()
        return super().step()


class SAMModule(Classifier):
    """Trains an image classifier with SAM.

    Args:
        model: images N x C x H x W -> logits N x num_classes.
        num_classes: number of classes.
        base_optimizer: from parameter groups to a torch optimizer, e.g. ``partial(SGD, lr=0.1)``.
        rho, perturbation, decay_in_ascent: as for ``SAM``; rho=0 costs one pass and no more.
        lr_factor: from the number of updates done to the factor on the learning rates.
        sync_perturbation: average the ascent gradient over devices. Otherwise each device climbs
            along its own, without communication (m-sharpness, Foret et al. 2021, section 4.1).
        ascent_per_micro_batch: under accumulation, climb for each micro-batch by itself
            (m-sharpness) and not along the gradient of the whole accumulated batch.
        ascent_fraction: part of each batch, in (0, 1], whose gradient is climbed along; a step
            costs ``1 + ascent_fraction`` passes. Loss, accuracy and running statistics are then
            of that part, and ``train/sharpness`` also has the noise between it and the batch.
        every: climb at one update in so many, starting with the first; the others are steps of
            the base optimizer, of one pass each.
        same_randomness: the second pass uses the dropout masks of the first.
        label_smoothing: of the training loss, in [0, 1).
        accumulate_grad_batches: batches per update.
        gradient_clip_val: largest 2-norm of the gradient that is stepped with; None for no limit.
        max_skipped_steps: end the run after so many non-finite gradients in a row.
        memory_format: ``contiguous`` or ``channels_last``.
        seed: of the dropout masks, together with epoch, batch and rank.
        hparams: plain values kept in checkpoints, to build model and data again.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        perturbation: Perturbation | None = None,
        *,
        decay_in_ascent: bool = False,
        lr_factor: Callable[[int], float] | None = None,
        sync_perturbation: bool = False,
        ascent_per_micro_batch: bool = False,
        ascent_fraction: float = 1.0,
        every: int = 1,
        same_randomness: bool = True,
        label_smoothing: float = 0.0,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        max_skipped_steps: int = 20,
        memory_format: str = "contiguous",
        seed: int = 0,
        hparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, num_classes, memory_format)
        self.automatic_optimization = False
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.perturbation = perturbation
        self.decay_in_ascent = decay_in_ascent
        self.lr_factor = lr_factor or (lambda step: 1.0)
        self.sync_perturbation = sync_perturbation
        self.ascent_per_micro_batch = ascent_per_micro_batch
        self.ascent_fraction = ascent_fraction
        self.every = every
        self.same_randomness = same_randomness
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.criterion = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self._micro_batches: list[MicroBatch] = []
        self.lr = 0.0
        self.window: Tensor | None = None
        self.skipped: Tensor | None = None
        self._running_stats: Tensor | None = None  # of this device, from a checkpoint
        if hparams is not None:
            self.save_hyperparameters(hparams, logger=False)

    # ------------------------------------------------------------------ optimizer and schedule

    def configure_optimizers(self) -> Any:
        """SAM around the base optimizer, and the schedule that is stepped once per update."""
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer = ManualSAM(
            trainable,
            self.base_optimizer,
            rho=self.rho,
            perturbation=self.perturbation,
            decay_in_ascent=self.decay_in_ascent,
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)]

    @property
    def sam(self) -> SAM:
        """The optimizer itself, without Lightning's wrapper around ``step``."""
        return self.optimizers().optimizer  # type: ignore[union-attr,return-value]

    def _apply_settings(self) -> None:
        """Let the settings of this run count, also where its checkpoint has others."""
        given = self.base_optimizer([torch.zeros(1, requires_grad=True)]).defaults
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [given["lr"]] * len(schedule.base_lrs)
        for group in self.sam.param_groups:
            group.update({name: given[name] for name in given if name in group})
            group.update(rho=self.rho, initial_lr=given["lr"])
            group["lr"] = given["lr"] * self.lr_factor(schedule.last_epoch)

    # ------------------------------------------------------------------------------- one update

    def on_train_start(self) -> None:
        """Put the running sums, also those of a checkpoint, on the device."""
        self._apply_settings()
        self._micro_batches.clear()
        if self._running_stats is not None:
            buffers = list(self._float_buffers().values())
            parts = self._running_stats.to(self.device).split([b.numel() for b in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))
            self._running_stats = None
        # sums since the last log: loss, accuracy, sharpness, gradient norm, updates, ascents;
        # perturbation norm, cosine, updates at which these two were measured
        self.window = self._sums(self.window, 9)
        # skipped updates: in all, in a row now, longest row
        self.skipped = self._sums(self.skipped, 3)

    def _sums(self, value: Tensor | None, size: int) -> Tensor:
        return (torch.zeros(size) if value is None else value).to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect a batch; with ``accumulate_grad_batches`` of them, or the epoch's last, update.

        Collecting first makes an update the exact mean over its samples, also where the last batch
        is smaller, and lets the perturbation be that of the whole accumulated batch.
        """
        seed = draw_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        self._micro_batches.append((batch, seed))
        last = batch_idx + 1 == self.trainer.num_training_batches or self.trainer.is_last_batch
        if last or len(self._micro_batches) == self.accumulate_grad_batches:
            micro_batches, self._micro_batches = self._micro_batches, []
            self._update(micro_batches, last)

    def _update(self, micro_batches: list[MicroBatch], last: bool) -> None:
        sam = self.sam
        sam.zero_grad()
        climbs = sam.climbs and self.global_step % self.every == 0
        if not climbs:
            first = second = self._gradient(micro_batches)
        elif self.ascent_per_micro_batch:
            first, second = self._gradients_per_micro_batch(micro_batches)
        else:
            measure = last or self._log_before_next_ascent()
            first, second = self._two_passes(micro_batches, measure=measure)
        self.lr = sam.param_groups[0]["lr"]  # before the schedule sets that of the next update
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        assert self.window is not None
        self.window[:2] += first
        self.window[2] += second[0] - first[0]
        self.window[4] += 1
        self.window[5] += climbs

    def _log_before_next_ascent(self) -> bool:
        every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        return self.global_step // every != (self.global_step + self.every) // every

    def _two_passes(
        self, micro_batches: list[MicroBatch], *, measure: bool
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradient at w + e in ``.grad``; return loss and accuracy at w and at w + e.

        ``measure`` adds the norm of e, and the cosine of the two gradients, to the window. It
        keeps the first gradient during the second pass, so it is not done at every update.
        """
        first = self._ascent_gradient(micro_batches)
        params = [p for group in self.sam.param_groups for p in group["params"]]
        ascent = [p.grad for p in params] if measure else []
        with self._perturbed():
            norm = self.sam.perturbation_norm() if measure else None
            second = self._gradient(micro_batches, second_pass=True)
        if norm is not None and any(g is not None for g in ascent):
            values = [norm, cosine(ascent, [p.grad for p in params]), torch.ones_like(norm)]
            assert self.window is not None
            self.window[6:] += torch.stack(values)
        return first, second

    def _ascent_gradient(self, micro_batches: list[MicroBatch]) -> Tensor:
        part = []
        for (images, labels), seed in micro_batches:
            size = math.ceil(self.ascent_fraction * len(labels))
            part.append(((images[:size], labels[:size]), seed))
        return self._gradient(part, sync=self.sync_perturbation)

    @contextlib.contextmanager
    def _perturbed(self) -> Iterator[None]:
        with self.sam.perturbed(inv_scale=self._inv_scale()), frozen_running_stats(self.model):
            yield

    def _gradient(
        self,
        micro_batches: list[MicroBatch],
        *,
        sync: bool = True,
        second_pass: bool = False,
        total: int | None = None,
    ) -> Tensor:
        """Add the gradient of the mean loss to ``.grad``; return mean loss and accuracy.

        ``total`` is the number of samples that the gradient is a mean over, if not these alone.
        """
        count = sum(len(labels) for (_, labels), _ in micro_batches)
        sums = torch.zeros(2, device=self.device)
        for i, ((images, labels), seed) in enumerate(micro_batches):
            # Seeding each pass repeats its masks, and lets a resumed run continue exactly.
            fresh = second_pass and not self.same_randomness
            self._seed_masks(draw_seed(seed, 2) if fresh else seed)
            logits = self(images)
            loss = self.criterion(logits, labels)
            with self._communication(sync and i + 1 == len(micro_batches)):
                self.manual_backward(loss * (len(labels) / (total or count)))
            with torch.no_grad():
                accuracy = (logits.argmax(1) == labels).float().mean()
                sums += torch.stack([loss.float(), accuracy]) * (len(labels) / count)
        return sums

    def _seed_masks(self, seed: int) -> None:
        # torch.manual_seed would take a millisecond and some memory at every call, to note a stack
        # trace for each kind of device that is not there.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            getattr(torch, self.device.type).manual_seed(seed)

    def _gradients_per_micro_batch(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """As two calls of ``_gradient``, but each micro-batch climbs along its own gradient."""
        params = [p for group in self.sam.param_groups for p in group["params"]]
        total = sum(len(labels) for (_, labels), _ in micro_batches)
        first = second = torch.zeros(2, device=self.device)
        kept: list[Tensor | None] = [None] * len(params)
        for i, micro_batch in enumerate(micro_batches):
            self.sam.zero_grad()
            share = len(micro_batch[0][1]) / total
            first = first + self._ascent_gradient([micro_batch]) * share
            with self._perturbed():
                for p, grad in zip(params, kept, strict=True):
                    p.grad = grad  # the second gradients add up over the micro-batches
                last = i + 1 == len(micro_batches)
                loss_and_accuracy = self._gradient(
                    [micro_batch], sync=last, second_pass=True, total=total
                )
                second = second + loss_and_accuracy * share
                kept = [p.grad for p in params]
        return first, second

    @contextlib.contextmanager
    def _communication(self, sync: bool) -> Iterator[None]:
        """Run a backward pass outside autocast, averaging its gradient over devices or not."""
        # Lightning runs training_step inside autocast, where torch advises against backward.
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if not sync and hasattr(self.trainer.strategy, "block_backward_sync"):
                stack.enter_context(self.trainer.strategy.block_backward_sync())
            yield

    def _inv_scale(self) -> Tensor | None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None:
            return None
        return 1 / scaler.scale(torch.ones((), device=self.device))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the (unscaled) gradient, or skip the step if it is not finite; all on the device."""
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            raise TrainingError("the model has no trainable parameter with a gradient")
        norm = global_norm(grads)
        skip = (~norm.isfinite()).float()
        self.sam.found_inf = skip
        if self.gradient_clip_val is not None:
            factor = torch.clamp(self.gradient_clip_val / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, factor)
        assert self.window is not None
        assert self.skipped is not None
        self.window[3] += norm
        in_a_row = (self.skipped[1] + 1) * skip
        self.skipped = torch.stack(
            [self.skipped[0] + skip, in_a_row, torch.maximum(self.skipped[2], in_a_row)]
        )

    # --------------------------------------------------------------------------------- logging

    def configure_callbacks(self) -> list[L.Callback]:
        """The log is written before callbacks save, as the module's own hooks would not be."""
        return [LogUpdates()]

    def log_training(self) -> None:
        """Every ``log_every_n_steps`` updates and at an epoch's end, log the means since then."""
        every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        due = self.trainer.is_last_batch or self.global_step % every == 0
        if due and not self._micro_batches:
            self._log_window()

    def _log_window(self) -> None:
        assert self.window is not None
        assert self.skipped is not None
        window = self.window
        if self.trainer.world_size > 1:
            window = self.trainer.strategy.reduce(window.clone(), reduce_op="mean")
        sums = torch.cat([window, self.skipped]).tolist()
        loss, acc, sharpness, grad_norm, count, ascents = sums[:6]
        norm, similarity, measured, skipped, _, longest = sums[6:]
        self.window.zero_()
        values = {
            "train/loss": loss / count,
            "train/acc": acc / count,
            "train/sharpness": sharpness / max(ascents, 1),
            "train/grad_norm": grad_norm / count,
            "train/lr": self.lr,
            "train/skipped_steps": skipped,
        }
        if measured and math.isfinite(similarity):  # not so where a gradient is 0 or not finite
            values["train/perturbation_norm"] = norm / measured
            values["train/cosine"] = similarity / measured
        self.log_update(values)
        self.log_dict(
            {name: values[name] for name in ("train/loss", "train/acc")},
            prog_bar=True,
            logger=False,
        )
        self._stop_if_hopeless(longest)

    def _stop_if_hopeless(self, longest: float) -> None:
        if longest >= self.max_skipped_steps:
            raise TrainingError(
                f"{longest:.0f} steps in a row had a gradient that is not finite "
                f"(max_skipped_steps={self.max_skipped_steps}): lower lr or rho, clip with "
                "trainer.gradient_clip_val, or check the data"
            )

    def on_train_epoch_end(self) -> None:
        """Check for a hopeless run before the epoch's checkpoint replaces the last good one."""
        assert self.skipped is not None
        self._stop_if_hopeless(self.skipped[2].item())

    def on_train_end(self) -> None:
        """Keep the mean of all devices' running statistics, which is what a checkpoint has."""
        self.average_running_stats()  # Lightning copies those of rank 0 to all before a test

    # ------------------------------------------------------------------------------ checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the running sums and every device's running statistics, to continue exactly.

        The weights' own state dict has the mean of these statistics, as evaluation does.
        """
        assert self.window is not None
        buffers = self._float_buffers()
        flat = [torch.zeros(0, device=self.device), *(b.flatten() for b in buffers.values())]
        by_rank = {
            "window": self._of_all(self.window),
            "running_stats": self._of_all(torch.cat(flat)),
        }
        if self.trainer.world_size > 1:
            means = by_rank["running_stats"].mean(0).split([b.numel() for b in buffers.values()])
            for (name, buffer), mean in zip(buffers.items(), means, strict=True):
                checkpoint["state_dict"][f"model.{name}"] = mean.view_as(buffer).to(buffer.dtype)
        checkpoint["by_rank"] = by_rank
        checkpoint["skipped"] = self.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up this device's sums and statistics; for another number of devices, the means."""
        self.skipped = checkpoint.get("skipped")
        by_rank = checkpoint.get("by_rank")
        if by_rank is not None and len(by_rank["window"]) == self.trainer.world_size:
            self.window = by_rank["window"][self.global_rank]
            self._running_stats = by_rank["running_stats"][self.global_rank]

    def _of_all(self, local: Tensor) -> Tensor:
        """A row for each device, of a vector that each has."""
        gathered = self.all_gather(local)
        assert isinstance(gathered, Tensor)
        return gathered.view(self.trainer.world_size, -1)

    def _float_buffers(self) -> dict[str, Tensor]:
        return {n: b for n, b in self.model.named_buffers() if b.is_floating_point()}


@torch.no_grad()
def cosine(ones: list[Tensor | None], others: list[Tensor | None]) -> Tensor:
    """The cosine of the angle between two gradients, 0-dim; a missing part counts as zeros."""
    norms = [global_norm(g for g in gradient if g is not None) for gradient in (ones, others)]
    product = torch.zeros_like(norms[0])  # float32 at least
    for a, b in zip(ones, others, strict=True):
        if a is not None and b is not None:
            product += torch.sum(a.to(product.dtype) * b)  # not of all at once, for the memory
    return product / (norms[0] * norms[1])


class LogUpdates(L.Callback):
    """Calls ``SAMModule.log_training`` after every batch."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log if it is time."""
        pl_module.log_training()
