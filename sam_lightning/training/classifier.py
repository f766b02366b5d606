"""A classifier under Lightning: logits, evaluation and its log; how to train it is left open."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from sam_lightning.models.onednn import subsample_first

Batch = tuple[Tensor, Tensor]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Classifier(L.LightningModule):
    """Evaluates a model on all devices together, each image once.

    Args:
        model: images N x C x H x W -> logits N x num_classes. Changed in place: its memory format,
            and what ``models.onednn.subsample_first`` changes.
        num_classes: number of classes.
        memory_format: of weights and images, ``contiguous`` or ``channels_last``.

    Raises:
        ValueError: unknown memory format.
    """

    def __init__(
        self, model: nn.Module, num_classes: int, memory_format: str = "contiguous"
    ) -> None:
        super().__init__()
        if memory_format not in MEMORY_FORMATS:
            raise ValueError(
                f"memory_format={memory_format}: allowed are {', '.join(MEMORY_FORMATS)}"
            )
        self.memory_format = MEMORY_FORMATS[memory_format]
        subsample_first(model)
        self.model = model.to(memory_format=self.memory_format)
        fast: dict[str, Any] = {"validate_args": False}  # validation waits for the device
        metrics: dict[str, Any] = {"acc": MulticlassAccuracy(num_classes, average="micro", **fast)}
        if num_classes >= 10:
            metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5, **fast)
        self.eval_metrics = MetricCollection(metrics, compute_groups=False)
        self.eval_loss = MeanMetric(nan_strategy="disable")  # NaN stays NaN, and nothing waits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images N x C x H x W -> logits N x num_classes."""
        dtype = next(self.model.parameters()).dtype  # augmentation makes float32 for 64-true too
        return self.model(images.to(dtype=dtype, memory_format=self.memory_format))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Add a batch to the loss and the accuracies; return its logits, for callbacks."""
        images, labels = batch
        logits = self(images)
        self.eval_loss.update(nn.functional.cross_entropy(logits, labels, reduction="none"))
        self.eval_metrics.update(logits, labels)
        return logits

    test_step = validation_step

    def on_validation_epoch_start(self) -> None:
        """Forget earlier evaluations; evaluate with the running statistics of all devices."""
        # Not at their end: sums made in inference mode cannot be updated in a later fit.
        self.eval_loss.reset()
        self.eval_metrics.reset()
        self.average_running_stats()

    on_test_epoch_start = on_validation_epoch_start

    def average_running_stats(self) -> None:
        """Average BatchNorm's statistics over devices, as the official JAX code does."""
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def on_validation_epoch_end(self) -> None:
        """Log val/loss, val/acc and, from 10 classes on, val/acc5, over all devices."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log test/loss, test/acc, test/error and, from 10 classes on, test/acc5."""
        self._log_evaluation("test")

    def _log_evaluation(self, split: str) -> None:
        values = {"loss": self.eval_loss.compute(), **self.eval_metrics.compute()}
        values["error"] = 1 - values["acc"]
        logged = {f"{split}/{name}": value for name, value in values.items()}
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log_dict(logged, prog_bar=True, logger=False)
            self.log_update({name: float(value) for name, value in logged.items()})
        else:  # the trainer returns what goes to its loggers, and takes the step from there
            self.log_dict({**logged, "step": float(self.global_step)})

    def log_update(self, values: dict[str, float]) -> None:
        """Send values to the loggers, at the number of updates done."""
        # The logged step is the update, where self.log would count batches.
        for logger in self.loggers:
            logger.log_metrics({**values, "epoch": self.current_epoch}, step=self.global_step)
