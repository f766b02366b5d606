"""The training step: two passes, perturb and restore around the second, one optimizer step.

Lightning's automatic optimization assumes that an optimizer calls its closure once. SAM needs two
gradients a step. So this module uses manual optimization, and does what Lightning then leaves out:
accumulation, clipping, skipping of non-finite steps, the schedule and the log.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_lightning.config.errors import ConfigError, TrainingError, argument_errors
from sam_lightning.data.seeding import draw_seed
from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.methods.sam_on import normalization_parameters
from sam_lightning.optim.param_groups import Settings, grouped, trainable
from sam_lightning.optim.perturbation import GradientTransform, Perturbation
from sam_lightning.optim.sam import SAM
from sam_lightning.runs.per_rank_state import fill, gather_rows, store_means
from sam_lightning.training.classifier import Batch, Classifier
from sam_lightning.training.finetune import Freezing
from sam_lightning.training.groups import Groups
from sam_lightning.training.losses import CrossEntropy, Loss
from sam_lightning.training.metrics import TrainMetrics
from sam_lightning.training.passes import MicroBatch, Passes, average_gradients


def steps(trainer: Any, batches: float, accumulated: int) -> tuple[int, int]:
    """Steps of an epoch with this many batches, and of the run, within the trainer's limits."""
    per_epoch = math.ceil(max(batches, 1) / accumulated)
    total, most = trainer.max_epochs * per_epoch, trainer.max_steps
    return per_epoch, total if most == -1 else min(total, most)


class SAMModule(Classifier):
    """Trains an image classifier with SAM and its relatives.

    Args:
        model: images N x C x H x W -> logits N x num_classes.
        num_classes: number of classes.
        base_optimizer: from parameter groups to a torch optimizer, e.g. ``partial(SGD, lr=0.1)``.
        rho, perturbation, gradient_transform, decay_in_ascent: as for ``SAM``; rho=0 is one pass.
        rho_min: the radius ends here as the learning rate falls to 0: rho_min + (rho - rho_min)
            times the schedule's factor (Zhuang et al. 2022, algorithm 1); None for a constant one.
        perturbed_layers: ``all``, or ``normalization`` for SAM-ON.
        lr_factor: from the number of steps done to the factor on the learning rates.
        param_settings: of parameters by name, as ``optim.param_groups.grouped`` takes them. Where
            rho is 0, so is that of every group.
        freezing: which parameters and running statistics do not change, and until when.
        every: perturb once in this many steps, starting with the first.
        same_randomness, sync_perturbation, ascent_per_micro_batch, ascent_fraction, ascent_steps,
            descent_fraction: as for ``Passes``.
        loss: of each image, from logits and labels; cross-entropy by default.
        accumulate_grad_batches: batches per step.
        gradient_clip_val: largest 2-norm of the gradient to step with; None for no limit.
        max_skipped_steps: end the run after this many non-finite gradients in a row.
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
        param_settings: Mapping[str, Settings] | None = None,
        freezing: Freezing | None = None,
        every: int = 1,
        same_randomness: bool = True,
        sync_perturbation: bool = False,
        ascent_per_micro_batch: bool = False,
        ascent_fraction: float = 1.0,
        ascent_steps: int = 1,
        descent_fraction: float = 1.0,
        loss: Loss | None = None,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        max_skipped_steps: int = 20,
        memory_format: str = "contiguous",
        seed: int = 0,
        hparams: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, num_classes, memory_format)
        self.automatic_optimization = False
        if perturbed_layers not in ("all", "normalization"):
            raise ConfigError(
                f"method.perturbed_layers={perturbed_layers}: allowed are all, normalization"
            )
        with argument_errors("method"):
            param_names = normalization_parameters(model) if perturbed_layers != "all" else None
        if rho_min is not None and 0 < rho < rho_min:
            raise ConfigError(
                f"method.rho_min={rho_min}: must be at most rho={rho}, from which the radius falls"
            )
        self._sam_of = partial(
            SAM,
            base_optimizer=base_optimizer,
            rho=rho,
            perturbation=perturbation,
            gradient_transform=gradient_transform,
            param_names=param_names,
            decay_in_ascent=decay_in_ascent,
        )
        self.param_settings = {
            name: {k: v for k, v in own.items() if k != "rho" or rho}
            for name, own in (param_settings or {}).items()
        }
        self.freezing = freezing
        self.rho_min = rho_min
        self.lr_factor = lr_factor or (lambda step: 1.0)
        self.every = every
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.max_skipped_steps = max_skipped_steps
        self.seed = seed
        self.passes = Passes(
            self.forward,
            self._backward,
            loss=loss or CrossEntropy(),
            same_randomness=same_randomness,
            sync_perturbation=sync_perturbation,
            ascent_per_micro_batch=ascent_per_micro_batch,
            ascent_fraction=ascent_fraction,
            ascent_steps=ascent_steps,
            descent_fraction=descent_fraction,
        )
        if ascent_per_micro_batch and gradient_transform is not None:
            raise ConfigError(
                "method.ascent_per_micro_batch=true: not with method.descent, which combines the "
                "gradients of the whole accumulated batch"
            )
        options = (ascent_per_micro_batch, decay_in_ascent, sync_perturbation)
        plain = ascent_fraction == descent_fraction == ascent_steps == 1 and not any(options)
        if not getattr(perturbation, "needs_gradient", True) and not plain:
            raise ConfigError(
                "method.perturbation: one along the momentum has one pass, so ascent_fraction, "
                "descent_fraction, ascent_steps, ascent_per_micro_batch, decay_in_ascent and "
                "sync_perturbation must be as in conf/method/sam.yaml"
            )
        self.train_metrics = TrainMetrics()
        self.settings: dict[str, Any] | None = None  # kept in checkpoints, from ``runs.parts``
        self._batches: list[MicroBatch] = []
        self._own_state: dict[str, Tensor] | None = None  # this rank's part of a checkpoint
        if hparams is not None:
            self.save_hyperparameters(hparams, logger=False)

    def configure_optimizers(self) -> Any:
        """SAM around the base optimizer, and the schedule that is stepped once per step."""
        optimizer = self.make_sam(trainable(self.model))
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)]

    def make_sam(self, named: Iterable[tuple[str, Tensor]]) -> SAM:
        """The optimizer of parameters with their names, in the groups of ``param_settings``."""
        sam = self._sam_of(grouped(named, self.param_settings))
        for group in sam.param_groups:
            group["lr"] = sam.defaults["lr"] * group.get("lr_factor", 1.0)
            if group.get("weight_decay") and "weight_decay" not in sam.defaults:
                name, decay = type(sam.base_optimizer).__name__, group["weight_decay"]
                raise ConfigError(f"param_groups: weight_decay={decay}: {name} has none")
        return sam

    @property
    def sam(self) -> SAM:
        """The optimizer itself, without Lightning's wrapper around ``step``."""
        return self.optimizers().optimizer  # type: ignore[union-attr,return-value]

    def on_fit_start(self) -> None:
        """Note the settings of the groups before those of a checkpoint replace them."""
        self.groups = Groups(self.sam)

    def on_train_start(self) -> None:
        """Load this rank's part of a checkpoint; this run's settings replace the checkpoint's."""
        self.on_train_epoch_start()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, torch.optim.lr_scheduler.LambdaLR)
        batches = self.trainer.num_training_batches
        between = not self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if between and math.isfinite(batches):  # the length of an epoch may have changed
            per_epoch, _ = steps(self.trainer, batches, self.accumulate_grad_batches)
            schedule.last_epoch = self.current_epoch * per_epoch
        self.groups.put_back(schedule)
        self._batches.clear()
        self.train_metrics.to(self.device)
        if isinstance(self.passes.loss, nn.Module):
            self.passes.loss.to(self.device)
        if self._own_state is not None:
            fill(self._per_rank_state(), self._own_state)
            self._own_state = None

    def on_train_epoch_start(self) -> None:
        """Freeze what does not train in this epoch."""
        if self.freezing is not None and self.freezing.begin(self.current_epoch):
            strategy: Any = self.trainer.strategy
            if isinstance(strategy.model, nn.parallel.DistributedDataParallel):
                strategy.model = strategy._setup_model(self)  # it averages what trains when made

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Collect a batch; with ``accumulate_grad_batches`` of them, or the epoch's last, step."""
        seed = draw_seed(self.seed, self.current_epoch, batch_idx, self.global_rank)
        self._batches.append(MicroBatch(*batch, seed))
        last = batch_idx + 1 == self.trainer.num_training_batches or self.trainer.is_last_batch
        if last or len(self._batches) == self.accumulate_grad_batches:
            batches, self._batches = self._batches, []
            self._step(batches, last)
            self._log_training(last)

    def _step(self, batches: list[MicroBatch], last: bool) -> None:
        sam, passes, step = self.sam, self.passes, self.global_step
        if self.freezing is not None:
            self.freezing.keep_statistics()
        sam.zero_grad()
        if self.rho_min is not None:
            self.groups.set_radius(self.rho_min)
        perturbs = sam.perturbs and step % self.every == 0
        # Each rank combines its own gradients, then all ranks average the result.
        combines = sam.perturbs and sam.gradient_transform is not None
        sync, geometry = not combines or passes.sync_perturbation, None
        if not perturbs:
            sam.skip_perturbation()
            clean = perturbed = passes.gradient(batches, sync=sync)
        elif not sam.needs_gradient:
            with sam.perturbed():
                clean = perturbed = passes.gradient(batches, sync=sync)
        else:
            # With the same gradient, a perturbation draws the same on all ranks.
            rank = 0 if passes.sync_perturbation else self.global_rank
            # The geometry is measured at the last perturbed step before a log.
            log_every = self.trainer.log_every_n_steps or 1  # type: ignore[attr-defined]
            clean, perturbed, geometry = passes.two(
                sam,
                batches,
                sync=sync,
                seeds=[draw_seed(self.seed, step, 1 + i, rank) for i in range(passes.ascent_steps)],
                measure=last or step // log_every != (step + self.every) // log_every,
                model=self,
                scaler=getattr(self.trainer.precision_plugin, "scaler", None),  # under 16-mixed
            )
        sam.combine()  # before the gradients are clipped
        if not sync:
            average_gradients(self.model, self.trainer.world_size)
        self._logged_lr = self.groups.lr()  # before the schedule sets the next one
        self.optimizers().step()  # type: ignore[union-attr]
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.train_metrics.add_step(clean, perturbed, perturbs and sam.needs_gradient)
        if geometry is not None:
            self.train_metrics.add_geometry(*geometry)

    def _backward(self, loss: Tensor, sync: bool) -> None:
        with contextlib.ExitStack() as stack:
            # Lightning runs training_step inside autocast, where torch advises against backward.
            if torch.is_autocast_enabled(self.device.type):
                stack.enter_context(torch.autocast(self.device.type, enabled=False))
            if not sync and hasattr(self.trainer.strategy, "block_backward_sync"):
                stack.enter_context(self.trainer.strategy.block_backward_sync())
            self.manual_backward(loss)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the (unscaled) gradient, or skip the step if it is not finite; all on the device."""
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not grads:
            raise TrainingError("the model has no trainable parameter with a gradient")
        norm = global_norm(grads)
        self.sam.found_inf = self.train_metrics.add_gradient(norm)
        if self.gradient_clip_val is not None:
            factor = torch.clamp(self.gradient_clip_val / (norm + 1e-6), max=1.0)
            torch._foreach_mul_(grads, factor)

    def _log_training(self, last: bool) -> None:
        """Log the means since the last log; a TrainingError leaves the last good checkpoint."""
        ends = last or self.global_step == self.trainer.max_steps
        if not ends and self.global_step % (self.trainer.log_every_n_steps or 1):  # type: ignore[attr-defined]
            return
        values, skipped = self.train_metrics.means(self.trainer.strategy, self.trainer.world_size)
        self.log_at_step({**values, "train/lr": self._logged_lr})
        shown = {name: values[name] for name in ("train/loss", "train/acc")}
        self.log_dict(shown, prog_bar=True, logger=False)
        if skipped >= self.max_skipped_steps:
            raise TrainingError(
                f"{skipped:.0f} steps in a row had a gradient that is not finite "
                f"(max_skipped_steps={self.max_skipped_steps}): lower lr or rho, clip with "
                "trainer.gradient_clip_val, or check the data"
            )

    # For the checkpoint: Lightning copies rank 0's to all before a test.
    on_train_end = Classifier.average_running_stats

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what differs between ranks, to continue exactly, and the run's settings."""
        parts, state = self._per_rank_state(), checkpoint["state_dict"]
        if self.trainer.world_size == 1:
            parts["memory"] = []  # the optimizer's own state has it
        if "current_model_state" in checkpoint:  # Lightning's averaging of weights
            averaged = [state[name].to(self.device) for name in self._running_stats()]
            parts["averaged_stats"] = averaged
        rows = checkpoint["per_rank_state"] = gather_rows(parts, self.all_gather)
        stats = rows.get("averaged_stats", rows.get("running_stats"))
        if self.trainer.world_size > 1 and stats is not None:
            store_means(state, self._running_stats(), stats)
        checkpoint["skipped"] = self.train_metrics.skipped
        if self.settings is not None:
            checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the running sums, and this rank's part of what differs between ranks."""
        trainer: Any = self.trainer
        averages = any(isinstance(c, WeightAveraging) for c in trainer.callbacks)
        if "current_model_state" in checkpoint and not averages:  # it was left out
            checkpoint["state_dict"] = checkpoint.pop("current_model_state")
        self.train_metrics.skipped = checkpoint.get("skipped", self.train_metrics.skipped)
        stored = checkpoint.get("per_rank_state", checkpoint.get("by_rank"))  # by_rank until 0.1
        if stored is not None and len(stored["window"]) == self.trainer.world_size:
            self._own_state = {name: rows[self.global_rank] for name, rows in stored.items()}
            if "averaged_stats" in stored and averages:  # before the averaging loads them
                state = checkpoint["state_dict"]
                mine = {"averaged_stats": [state[name] for name in self._running_stats()]}
                fill(mine, self._own_state)

    def _per_rank_state(self) -> dict[str, list[Tensor]]:
        memories = [self.sam.method_state.get(p, {}) for p in self.sam.params]
        return {
            "window": [self.train_metrics.window],
            "running_stats": list(self._running_stats().values()),
            "memory": [memory[name] for memory in memories for name in sorted(memory)],
        }

    def _running_stats(self) -> dict[str, Tensor]:
        buffers = self.model.named_buffers()
        return {f"model.{name}": b for name, b in buffers if b.is_floating_point()}
