"""Loss and accuracies of an evaluation, as a run validates and tests, and as ``evaluate`` does."""

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy


class EvalMetrics(nn.Module):
    """Mean loss, accuracy and, from 10 classes on, top-5 accuracy over all ranks."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        fast: dict[str, Any] = {"validate_args": False}  # validation waits for the device
        metrics: dict[str, Any] = {"acc": MulticlassAccuracy(num_classes, average="micro", **fast)}
        if num_classes >= 10:
            metrics["acc5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5, **fast)
        self.accuracies = MetricCollection(metrics, compute_groups=False)
        self.loss = MeanMetric(nan_strategy="disable")  # NaN stays NaN, and nothing waits

    def reset(self) -> None:
        """Forget earlier evaluations."""
        self.loss.reset()
        self.accuracies.reset()

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add logits N x num_classes and their labels N."""
        self.loss.update(nn.functional.cross_entropy(logits, labels, reduction="none"))
        self.accuracies.update(logits, labels)

    def compute(self) -> dict[str, Tensor]:
        """``loss``, ``acc``, ``error`` and, from 10 classes on, ``acc5``."""
        values = {"loss": self.loss.compute(), **self.accuracies.compute()}
        return {**values, "error": 1 - values["acc"]}
