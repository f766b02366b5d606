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

from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.data.augment import draw_seed
from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.methods.sam_on import normalization_parameters
from sam_lightning.optim.perturbation import GradientTransform, Perturbation
from sam_lightning.optim.sam import SAM
from sam_lightning.runs.per_rank_state import load_by_rank, save_by_rank
from sam_lightning.training.classifier import Batch
from sam_lightning.training.metrics import LogUpdates, UpdateSums, cosine
from sam_lightning.training.passes import GradientModule, MicroBatch


class SAMModule(GradientModule):
    """Trains an image classifier with SAM and its relatives.

    Args:
        model: images N x C x H x W -> logits N x num_classes.
        num_classes: number of classes.
        base_optimizer: from parameter groups to a torch optimizer, e.g. ``partial(SGD, lr=0.1)``.
        rho, perturbation, gradient_transform, decay_in_ascent: as for ``SAM``; rho=0 costs one
            pass.
        rho_min: where the radius ends as the learning rate falls to 0: rho_min + (rho - rho_min)
            times the schedule's factor (Zhuang et al. 2022, algorithm 1); None for a constant one.
        perturbed_layers: ``all``, or ``normalization`` for SAM-ON.
        lr_factor: from the number of updates done to the factor on the learning rates.
        sync_perturbation: average the ascent gradient over devices. Otherwise each device climbs
            along its own, without communication (m-sharpness, Foret et al. 2021, section 4.1).
        ascent_per_micro_batch: under accumulation, climb for each micro-batch by itself
            (m-sharpness) and not along the gradient of the whole accumulated batch.
        ascent_fraction: part of each batch, in (0, 1], whose gradient is climbed along; a step
            costs ``1 + ascent_fraction`` passes. Loss, accuracy and running statistics are then
            of that part, and ``train/sharpness`` also has the noise between it and the batch.
        ascent_steps: climb in so many steps of rho / ascent_steps, each along the gradient where it
            starts; a step costs ``1 + ascent_steps`` passes.
        descent_fraction: part of each batch, in (0, 1], whose gradient at w + e is taken: the
            images whose loss rises most (Du et al. 2022, sharpness-sensitive data selection).
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

    Raises:
        ConfigError: options that cannot be combined, or layers that the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        perturbation: Perturbation | None = None,
        *,
        gradient_transform: GradientTransform | None = None,
        decay_in_ascent: bool = False,
        rho_min: float | None = None,
        perturbed_layers: str = "all",
        lr_factor: Callable[[int], float] | None = None,
        sync_perturbation: bool = False,
        ascent_per_micro_batch: bool = False,
        ascent_fraction: float = 1.0,
        ascent_steps: int = 1,
        descent_fraction: float = 1.0,
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
        super().__init__(
            model,
            num_classes,
            memory_format,
            label_smoothing=label_smoothing,
            same_randomness=same_randomness,
        )
        if ascent_fraction < 1 and descent_fraction < 1:
            raise ConfigError(
                f"method.descent_fraction={descent_fraction}: needs the loss of every image before "
                f"the ascent, so not with method.ascent_fraction={ascent_fraction}"
            )
        if ascent_per_micro_batch and gradient_transform is not None:
            raise ConfigError(
                "method.ascent_per_micro_batch=true: not with method.descent, which combines the "
                "gradients of the whole accumulated batch"
            )
        if not getattr(perturbation, "needs_gradient", True):
            whole = ascent_fraction == descent_fraction == ascent_steps == 1
            if not whole or ascent_per_micro_batch or decay_in_ascent or sync_perturbation:
                raise ConfigError(
                    "method.perturbation: one along the momentum has one pass, so ascent_fraction, "
                    "descent_fraction, ascent_steps, ascent_per_micro_batch, decay_in_ascent and "
                    "sync_perturbation must be as in conf/method/sam.yaml"
                )
        if rho_min is not None and 0 < rho < rho_min:
            raise ConfigError(
                f"method.rho_min={rho_min}: must be at most rho={rho}, from which the radius falls"
            )
        if perturbed_layers not in ("all", "normalization"):
            raise ConfigError(
                f"method.perturbed_layers={perturbed_layers}: allowed are all, normalization"
            )
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.rho_min = rho if rho_min is None else rho_min
        try:
            chosen = normalization_parameters(model) if perturbed_layers != "all" else None
        except ValueError as error:
            raise ConfigError(f"method.{error}") from error
        self.param_names = chosen
        self.perturbation = perturbation
        self.gradient_transform = gradient_transform
        self.decay_in_ascent = decay_in_ascent
        self.lr_factor = lr_factor or (lambda step: 1.0)
        self.sync_perturbation = sync_perturbation
        self.ascent_per_micro_batch = ascent_per_micro_batch
        self.ascent_fraction = ascent_fraction
        self.ascent_steps = ascent_steps
        self.descent_fraction = descent_fraction
        self.every = every
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.sums = UpdateSums()
        self._micro_batches: list[MicroBatch] = []
        self._own_state: dict[str, Tensor] | None = None  # this device's part of a checkpoint
        if hparams is not None:
            self.save_hyperparameters(hparams, logger=False)

    # ------------------------------------------------------------------ optimizer and schedule

    def configure_optimizers(self) -> Any:
        """SAM around the base optimizer, and the schedule that is stepped once per update."""
        trainable = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        optimizer = SAM(
            trainable,
            self.base_optimizer,
            rho=self.rho,
            perturbation=self.perturbation,
            gradient_transform=self.gradient_transform,
            param_names=self.param_names,
            decay_in_ascent=self.decay_in_ascent,
        )
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)]

    @property
    def sam(self) -> SAM:
        """The optimizer itself, without Lightning's wrapper around ``step``."""
        return self.optimizers().optimizer  # type: ignore[union-attr,return-value]

    @property
    def lr(self) -> float:
        """The learning rate of the present update."""
        return float(self.sam.param_groups[0]["lr"])

    def _apply_settings(self) -> None:
        """Let the settings of this run count, also where its checkpoint has others."""
        given = self.base_optimizer([torch.zeros(1, requires_grad=True)]).defaults
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        schedule.base_lrs = [given["lr"]] * len(schedule.base_lrs)
        for group in self.sam.param_groups:
            group.update({n: given[n] for n in given if n in group and n != "rho"})
            if "rho" in given:  # the base optimizer's own
                group["base_rho"] = given["rho"]
            group.update(rho=self.rho, initial_lr=given["lr"])
            group["lr"] = given["lr"] * self.lr_factor(schedule.last_epoch)

    # ------------------------------------------------------------------------------- one update

    def on_train_start(self) -> None:
        """Take up what a checkpoint has of this device, and put the running sums on it."""
        self._apply_settings()
        self._micro_batches.clear()
        self.sums.to(self.device)
        if self._own_state is not None:
            load_by_rank(self, self._own_state)
            self._own_state = None

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
        perturbs = sam.perturbs and self.global_step % self.every == 0
        # What combines gradients does so on each device, and the results are averaged.
        average_late = (
            sam.perturbs and self.gradient_transform is not None and not self.sync_perturbation
        )
        if not perturbs:
            sam.skip_perturbation()
            first = second = self.gradient(micro_batches, sync=not average_late)
        elif not sam.needs_gradient:
            with sam.perturbed(rho_scale=self._rho_scale()):
                first = second = self.gradient(micro_batches, sync=not average_late)
        elif self.ascent_per_micro_batch:
            first, second = self._gradients_per_micro_batch(micro_batches)
        else:
            measure = last or self._log_before_next_ascent()
            first, second = self._two_passes(micro_batches, measure, sync=not average_late)
        sam.combine()  # before they are clipped
        if average_late:
            self.average_gradients()
        self._logged_lr = self.lr  # before the schedule sets that of the next update
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.sums.add_update(first, second, perturbs and sam.needs_gradient)

    def _log_before_next_ascent(self) -> bool:
        every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        return self.global_step // every != (self.global_step + self.every) // every

    def _two_passes(
        self, micro_batches: list[MicroBatch], measure: bool, *, sync: bool
    ) -> tuple[Tensor, Tensor]:
        """Leave the gradient at w + e in ``.grad``; return loss and accuracy at w and at w + e.

        ``measure`` adds the norm of e, and the cosine of the two gradients, to the log. It keeps
        the first gradient during the second pass, so it is not done at every update.
        """
        losses: list[Tensor] = []
        first = self._ascent_gradient(micro_batches, losses=losses)
        params = [p for group in self.sam.param_groups for p in group["params"]]
        ascent = [p.grad for p in params] if measure else []
        with self._perturbed(micro_batches):
            norm = self.sam.perturbation_norm() if measure else None
            second = self._descent_gradient(micro_batches, losses, sync=sync)
        if norm is not None and any(g is not None for g in ascent):
            self.sums.add_geometry(norm, cosine(ascent, [p.grad for p in params]))
        return first, second

    def _ascent_gradient(
        self,
        micro_batches: list[MicroBatch],
        *,
        losses: list[Tensor] | None = None,
        second_pass: bool = False,
    ) -> Tensor:
        part = []
        for (images, labels), seed in micro_batches:
            size = math.ceil(self.ascent_fraction * len(labels))
            part.append(((images[:size], labels[:size]), seed))
        return self.gradient(
            part,
            sync=self.sync_perturbation,
            second_pass=second_pass,
            losses=losses if self.descent_fraction < 1 else None,
        )

    @contextlib.contextmanager
    def _perturbed(self, micro_batches: list[MicroBatch]) -> Iterator[None]:
        """Hold the weights at w + e, after all steps of ascent, with running statistics frozen."""
        scale: dict[str, Any] = {"scaler": self.scaler, "rho_scale": self._rho_scale()}
        self._seed_perturbation(0)
        # A gradient transform gets both gradients averaged, or _update averages its result.
        with self.sam.perturbed(self, local=not self.sync_perturbation, **scale):
            for further in range(1, self.ascent_steps):
                self._ascent_gradient(micro_batches, second_pass=True)
                self._seed_perturbation(further)
                self.sam.perturb(zero_grad=True, further=True, **scale)
            yield

    def _seed_perturbation(self, number: int) -> None:
        """Seed what a perturbation draws: the same on all devices where their gradient is."""
        rank = 0 if self.sync_perturbation else self.global_rank
        self.seed_draws(draw_seed(self.seed, self.global_step, 1 + number, rank))

    def _rho_scale(self) -> float:
        """The length of a step of ascent now, in units of rho."""
        if self.rho_min == self.rho:
            return 1 / self.ascent_steps
        fraction = self.lr / self.sam.param_groups[0]["initial_lr"]
        rho = self.rho_min + (self.rho - self.rho_min) * fraction
        return rho / self.rho / self.ascent_steps

    def _descent_gradient(
        self,
        micro_batches: list[MicroBatch],
        losses: list[Tensor],
        *,
        sync: bool = True,
        total: float | None = None,
    ) -> Tensor:
        """Add the gradient at w + e; return loss and accuracy there, the loss of all images."""
        if self.descent_fraction == 1:
            return self.gradient(micro_batches, sync=sync, second_pass=True, total=total)
        chosen, loss = self.most_sensitive(micro_batches, losses, self.descent_fraction)
        if total is not None:  # the images of one micro-batch weigh as all of them did
            size = sum(len(labels) for (_, labels), _ in micro_batches)
            total = total * sum(len(labels) for (_, labels), _ in chosen) / size
        second = self.gradient(chosen, sync=sync, second_pass=True, total=total)
        return torch.stack([loss, second[1]])

    def _gradients_per_micro_batch(self, micro_batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """As ``_two_passes``, but each micro-batch climbs along its own gradient."""
        params = [p for group in self.sam.param_groups for p in group["params"]]
        total = sum(len(labels) for (_, labels), _ in micro_batches)
        first = second = torch.zeros(2, device=self.device)
        kept: list[Tensor | None] = [None] * len(params)
        for i, micro_batch in enumerate(micro_batches):
            self.sam.zero_grad()
            share = len(micro_batch[0][1]) / total
            losses: list[Tensor] = []
            first = first + self._ascent_gradient([micro_batch], losses=losses) * share
            with self._perturbed([micro_batch]):
                for p, grad in zip(params, kept, strict=True):
                    p.grad = grad  # the second gradients add up over the micro-batches
                last = i + 1 == len(micro_batches)
                loss_and_accuracy = self._descent_gradient(
                    [micro_batch], losses, sync=last, total=total
                )
                second = second + loss_and_accuracy * share
                kept = [p.grad for p in params]
        return first, second

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the (unscaled) gradient, or skip the step if it is not finite; all on the device."""
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            raise TrainingError("the model has no trainable parameter with a gradient")
        norm = global_norm(grads)
        self.sam.found_inf = self.sums.add_gradient(norm)
        if self.gradient_clip_val is not None:
            factor = torch.clamp(self.gradient_clip_val / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, factor)

    # ------------------------------------------------------------------- logging and checkpoint

    def configure_callbacks(self) -> list[L.Callback]:
        """The log is written before callbacks save, as the module's own hooks would not be."""
        return [LogUpdates()]

    def log_training(self) -> None:
        """Every ``log_every_n_steps`` updates and at the end, log the means since the last time.

        The end is that of an epoch, or of a run of ``max_steps``.

        Raises:
            TrainingError: too many updates in a row were skipped. A checkpoint of this epoch has
                not been written then, and the last good one is still there.
        """
        every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
        due = self.trainer.is_last_batch or self.global_step % every == 0
        if not (due or self.global_step == self.trainer.max_steps) or self._micro_batches:
            return
        values, skipped_in_a_row = self.sums.means(self.trainer.strategy, self.trainer.world_size)
        self.log_update({**values, "train/lr": self._logged_lr})
        shown = {name: values[name] for name in ("train/loss", "train/acc")}
        self.log_dict(shown, prog_bar=True, logger=False)
        if skipped_in_a_row >= self.max_skipped_steps:
            raise TrainingError(
                f"{skipped_in_a_row:.0f} steps in a row had a gradient that is not finite "
                f"(max_skipped_steps={self.max_skipped_steps}): lower lr or rho, clip with "
                "trainer.gradient_clip_val, or check the data"
            )

    def on_train_end(self) -> None:
        """Keep the mean of all devices' running statistics, which is what a checkpoint has."""
        self.average_running_stats()  # Lightning copies those of rank 0 to all before a test

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what differs between devices, to continue exactly."""
        save_by_rank(self, checkpoint)
        checkpoint["skipped"] = self.sums.skipped

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the running sums, and this device's part of what differs between devices."""
        if "skipped" in checkpoint:
            self.sums.skipped = checkpoint["skipped"]
        by_rank = checkpoint.get("by_rank")
        if by_rank is not None and len(by_rank["window"]) == self.trainer.world_size:
            self._own_state = {name: rows[self.global_rank] for name, rows in by_rank.items()}
