"""A classifier under Lightning: its logits and its evaluation. ``module.py`` trains it."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from sam_lightning.inference.metrics import EvalMetrics
from sam_lightning.models.onednn import subsample_first
from sam_lightning.optim.distributed import averaged
from sam_lightning.training.finetune import Freezing

Batch = tuple[Tensor, Any]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Classifier(L.LightningModule):
    """Evaluates a model on all ranks together, each image once.

    Args:
        model: images N x C x H x W -> logits N x num_classes. Changed in place: its memory format,
            and what ``models.onednn.subsample_first`` changes.
        num_classes: number of classes.
        memory_format: of weights and images, ``contiguous`` or ``channels_last``.

    Raises:
        ValueError: unknown memory format.
    """

    def __init__(self, model: nn.Module, num_classes: int, memory_format: str) -> None:
        super().__init__()
        if memory_format not in MEMORY_FORMATS:
            raise ValueError(
                f"memory_format={memory_format}: allowed are {', '.join(MEMORY_FORMATS)}"
            )
        self.memory_format = MEMORY_FORMATS[memory_format]
        subsample_first(model)
        self.model = model.to(memory_format=self.memory_format)
        self.eval_metrics = EvalMetrics(num_classes)
        self.freezing: Freezing | None = None

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images N x C x H x W -> logits N x num_classes."""
        dtype = next(self.model.parameters()).dtype  # augmentation makes float32 for 64-true too
        return self.model(images.to(dtype=dtype, memory_format=self.memory_format))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the loss and the accuracies; return its logits, for callbacks."""
        images, labels = batch
        logits = self(images)
        self.eval_metrics.update(logits, labels)
        return logits

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Forget earlier evaluations; evaluate with the mean running statistics of all ranks."""
        # Not at their end: sums made in inference mode cannot be updated in a later fit.
        self.eval_metrics.reset()
        self.average_running_stats()

    on_test_epoch_start = on_validation_epoch_start

    def average_running_stats(self) -> None:
        """Average BatchNorm's statistics over ranks, as the official JAX code does."""
        if self.trainer.world_size > 1:
            still = self.freezing.still if self.freezing is not None else []
            same = {id(buffer) for layer in still for buffer in layer.buffers(recurse=False)}
            buffers = [b for b in self.model.buffers() if b.is_floating_point()]
            moved = [buffer for buffer in buffers if id(buffer) not in same]
            for buffer, mean in zip(moved, averaged(moved, self.trainer.world_size), strict=True):
                buffer.copy_(mean)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/acc, val/error and, from 10 classes on, val/acc5; or test/..."""
        split = "test" if self.trainer.testing else "val"
        logged = {f"{split}/{name}": v for name, v in self.eval_metrics.compute().items()}
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log_dict(logged, prog_bar=True, logger=False)
            self.log_at_step({name: float(value) for name, value in logged.items()})
        else:  # the trainer returns what goes to its loggers, and takes the step from there
            self.log_dict({**logged, "step": float(self.global_step)})

    on_test_epoch_end = on_validation_epoch_end

    def log_at_step(self, values: dict[str, float]) -> None:
        """Send values to the loggers, at the number of steps done; ``self.log`` counts batches."""
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step)
