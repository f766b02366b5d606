"""Losses: from logits and labels to a loss for each image. The loss of a batch is their mean."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.data.augment import MixedLabels

Loss = Callable[[Tensor, Tensor], Tensor]
Labels = Tensor | MixedLabels


class CrossEntropy(nn.Module):
    """Cross-entropy, of each image.

    Class weights are relative: they are scaled so that their mean over the training images is 1.
    Over the whole training set, the mean is then torch's weighted mean, sum(w * loss) / sum(w). A
    batch is divided by its number of images, not by its sum of weights, so its gradient is the same
    however it is split over micro-batches and ranks.

    Args:
        smoothing: part of the target, in [0, 1), that all classes share.
        class_weights: a number >= 0 for each class; ``balanced``: images / (classes * images of the
            class), as in scikit-learn; None: 1 for each.
        class_counts: training images of each class.

    Raises:
        ValueError: an argument is out of its range, or does not fit the classes.
    """

    weight: Tensor | None

    def __init__(
        self,
        smoothing: float = 0.0,
        class_weights: Sequence[float] | str | None = None,
        class_counts: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: must be a number from 0 to below 1")
        self.smoothing = smoothing
        weights = None if class_weights is None else _weights(class_weights, class_counts)
        self.register_buffer("weight", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits N x classes and labels N to losses N."""
        weight = self.weight
        if weight is not None:  # under autocast, logits have less than float32
            weight = weight.to(torch.promote_types(logits.dtype, weight.dtype))
        return cross_entropy(
            logits, labels, weight, label_smoothing=self.smoothing, reduction="none"
        )


def _weights(given: Sequence[float] | str, class_counts: Sequence[int]) -> Tensor:
    counts = torch.tensor(class_counts, dtype=torch.float64)
    if given == "balanced":
        if 0 in class_counts:
            empty = [i for i, count in enumerate(class_counts) if not count]
            raise ValueError(
                f"class_weights=balanced: needs training images of every class; class {empty[0]} "
                "has none"
            )
        weights = 1 / counts
    elif isinstance(given, str) or len(given) != len(class_counts) or min(given) < 0:
        raise ValueError(
            f"class_weights={given}: must be {len(class_counts)} numbers >= 0, one for each class, "
            "or balanced, or null"
        )
    else:
        weights = torch.tensor([*given], dtype=torch.float64)
    total = weights @ counts
    if not 0 < total < torch.inf:
        raise ValueError(f"class_weights={given}: must be above 0 for a class with images")
    return (weights * counts.sum() / total).float()


def losses_of(loss: Loss, logits: Tensor, labels: Labels) -> Tensor:
    """The loss of each image; of a mixture, that with each label, by their shares."""
    if not isinstance(labels, MixedLabels):
        return loss(logits, labels)
    own, other = loss(logits, labels.labels), loss(logits, labels.other)
    return other + labels.share * (own - other)


def accuracy(logits: Tensor, labels: Labels) -> Tensor:
    """The part of the images whose largest logit is that of their label, 0-dim.

    A mixture counts with the share of the label that is found.
    """
    found = logits.argmax(1)
    if not isinstance(labels, MixedLabels):
        return (found == labels).float().mean()
    own, other = (found == labels.labels).float(), (found == labels.other).float()
    return (labels.share * own + (1 - labels.share) * other).mean()


def check_loss(loss: Loss, num_classes: int) -> None:
    """Refuse what does not return a loss for each image, or has weights to train.

    Raises:
        ConfigError: says which.
    """
    if isinstance(loss, nn.Module) and [*loss.parameters()]:
        raise ConfigError("loss: has parameters, and only those of the model are trained")
    labels = torch.tensor([0, num_classes - 1])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            losses = loss(torch.zeros(2, num_classes), labels)
    except Exception as error:  # whatever a user's own raises
        given = f"logits 2 x {num_classes} and labels {labels.tolist()}"
        raise ConfigError(f"loss: does not take {given} ({one_line(error)})") from error
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (2,):
        raise ConfigError(f"loss: returns {shape} for 2 images; must be (2,), a loss for each")
