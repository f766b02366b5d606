"""Sharpness and curvature during a run, in every logger."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_type_hints

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from sam_lightning.analysis.checkpoints import stage
from sam_lightning.analysis.curvature import top_eigenpairs, trace, worst_case
from sam_lightning.analysis.loss_surface import LossSurface, fixed_batches
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.values import Count, Positive, Seed, check_value
from sam_lightning.data.datamodule import ImageDataModule

MEASURED = ("sharpness/worst", "sharpness/lambda_max", "sharpness/trace")


@dataclass(eq=False)
class SharpnessMonitor(Callback):
    """Logs ``sharpness/worst``, ``sharpness/lambda_max`` and ``sharpness/trace``.

    ``curvature.py`` computes them, always on the same training images, without augmentation and
    label smoothing, normalised by running statistics. Training is slower, but bit for bit the same.
    Rank 0 computes, with the mean running statistics of all ranks; the others wait.

    Args:
        every_n_epochs: measure after every n epochs, and after the last one.
        images: how many training images to measure on.
        batch_size: images at a time.
        rho: radius of ``sharpness/worst``.
        trace_samples: random vectors for the trace.
        max_steps: at most this many products with the Hessian for the largest eigenvalue.
        seed: of the images and of random vectors.

    Raises:
        ConfigError: an argument is out of its range, or the run has other data than an
            ``ImageDataModule``.
    """

    every_n_epochs: Count = 1
    images: Count = 512
    batch_size: Count = 128
    rho: Positive = 0.05
    trace_samples: Count = 8
    max_steps: Count = 30
    seed: Seed = 0

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(SharpnessMonitor, include_extras=True).items():
            check_value(f"callbacks.sharpness.{name}", getattr(self, name), hint)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse data without fixed images."""
        if not isinstance(getattr(trainer, "datamodule", None), ImageDataModule):
            raise ConfigError("callbacks.sharpness: needs the data of an ImageDataModule")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure on rank 0 and log on all, so that other callbacks can monitor the values."""
        epochs = trainer.current_epoch + 1
        if epochs % self.every_n_epochs and epochs != trainer.max_epochs:
            return
        buffers = [buffer.clone() for buffer in pl_module.model.buffers()]
        pl_module.average_running_stats()
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            compiled = pl_module.model._compiled_call_impl is not None
            # Compiled code cannot be differentiated twice.
            with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
                values = self._measure(trainer.datamodule, pl_module)  # type: ignore[attr-defined]
        for buffer, local in zip(pl_module.model.buffers(), buffers, strict=True):
            buffer.copy_(local)
        values = trainer.strategy.broadcast(values)
        pl_module.log_dict(values, logger=False)
        pl_module.log_at_step(values)

    def _measure(self, data: ImageDataModule, pl_module: Any) -> dict[str, float]:
        options = (self.images, self.batch_size, self.seed, pl_module.device)
        dtype = next(pl_module.parameters()).dtype
        batches = [(x.to(dtype), y) for x, y in fixed_batches(data, "train", *options)]
        surface = LossSurface(pl_module.model, batches)
        generator = torch.Generator().manual_seed(self.seed)
        with stage(surface, "sharpness, at most", self.max_steps + 2 + self.trace_samples):
            top = top_eigenpairs(surface, generator, k=1, tolerance=1e-2, max_steps=self.max_steps)
            worst = worst_case(surface, float(self.rho))
            mean_trace, _ = trace(surface, generator, self.trace_samples, top)
        return dict(zip(MEASURED, (worst, top.values[0].item(), mean_trace), strict=True))
