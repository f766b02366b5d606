"""TensorBoard beyond curves: charts laid out, images, the model, and where the test went wrong."""

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sam_lightning import plotting as plots
from sam_lightning.config.errors import ConfigError
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.training.callbacks.progress import trained
from sam_lightning.training.callbacks.sharpness import SharpnessMonitor

log = logging.getLogger(__name__)

# What only a run with callbacks=sharpness has.
MONITORED = "Sharpness on fixed training images"
# The charts of the page "Custom scalars" and the metric in each. TensorBoard's colours tell runs
# apart; two metrics of a run would have one colour, and symbols that no legend explains.
CHARTS = {
    "Learning": {
        "training loss": "train/loss",
        "validation loss": "val/loss",
        "learning rate": "train/lr",
        "training accuracy": "train/acc",
        "validation accuracy": "val/acc",
        "training images per second": "train/images_per_second",
    },
    "Sharpness": {
        "loss at the perturbed weights minus loss": "train/sharpness",
        "cosine of the two passes' gradients": "train/cosine",
        "norm of the gradient": "train/grad_norm",
    },
    MONITORED: {
        "rise of the loss within rho": "sharpness/worst",
        "largest eigenvalue of the Hessian": "sharpness/lambda_max",
        "trace of the Hessian": "sharpness/trace",
    },
}
WRONG_IMAGES = 25


class Dashboard(Callback):
    """Adds pages for every ``TensorBoardLogger``; does nothing without one.

    - charts in pages, the training images per second of each epoch, and the model's graph;
    - images of the first training batch, augmented as the model sees them;
    - after the test, the confusion matrix over all ranks, and rank 0's worst wrong predictions;
    - the last accuracies as ``accuracy/test`` and ``accuracy/val``, the first of the metrics in the
      table of HParams, as TensorBoard sorts them by name.

    Rank 0 writes all of it, after the first step. Runs stay bit for bit the same.

    Raises:
        ConfigError: the run has other data than an ``ImageDataModule``.
    """

    def __init__(self) -> None:
        self._seen = (0, 0.0)  # images and seconds of the epochs before this one
        self._confusion: Tensor | None = None  # counts, label x prediction
        self._wrong: list[Tensor] = []  # losses, labels, predictions, their probabilities, images

    def setup(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse data whose images cannot be shown."""
        if _loggers(trainer) and not isinstance(trainer.datamodule, ImageDataModule):
            raise ConfigError("callbacks.dashboard: needs the data of an ImageDataModule")

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Lay out the charts; a resumed run writes the same again."""
        monitored = any(isinstance(c, SharpnessMonitor) for c in trainer.callbacks)
        layout = {
            page: {title: ["Multiline", [f"^{tag}$"]] for title, tag in of.items()}
            for page, of in CHARTS.items()
            if monitored or page != MONITORED
        }
        for writer in _writers(trainer):
            writer.add_custom_scalars(layout)
        self._seen = trained(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the first batch, once it has been trained on."""
        if trainer.current_epoch == 0 and batch_idx == 0:
            for writer in _writers(trainer):
                data = trainer.datamodule
                shown = plots.pixels(batch[0][:64], data.mean, data.std)
                writer.add_image("train/first_batch", grid(shown), 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log images per second, which never repeat, to TensorBoard only; add the model's graph."""
        before, self._seen = self._seen, trained(trainer)
        images, seconds = (now - then for now, then in zip(self._seen, before, strict=True))
        for writer in _writers(trainer):
            if seconds and trainer.is_last_batch:  # else the clock of an epoch cut short still runs
                writer.add_scalar("train/images_per_second", images / seconds, trainer.global_step)
            if trainer.current_epoch == 0:
                add_graph(writer, pl_module.model, trainer.datamodule.train.shape)

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Log what a search compares."""
        if (accuracy := trainer.callback_metrics.get("val/acc")) is not None:
            for writer in _writers(trainer):
                writer.add_scalar("accuracy/val", accuracy, trainer.global_step)

    def on_test_epoch_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Count from zero."""
        if _loggers(trainer):
            size = [trainer.datamodule.num_classes] * 2
            self._confusion = torch.zeros(size, dtype=torch.long, device=pl_module.device)
            self._wrong = []

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *indices: int
    ) -> None:
        """Count a batch and its logits, without waiting for the device."""
        if self._confusion is None:
            return
        (images, labels), logits = batch, outputs.float()
        probabilities, predicted = logits.softmax(1).max(1)
        self._confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
        losses = cross_entropy(logits, labels, reduction="none")
        losses = losses.masked_fill(predicted == labels, -math.inf)
        found = [losses, labels, predicted, probabilities, images]
        if self._wrong:
            found = [torch.cat(both) for both in zip(self._wrong, found, strict=True)]
        worst = found[0].topk(min(WRONG_IMAGES, len(found[0]))).indices
        self._wrong = [values[worst] for values in found]

    def on_test_epoch_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        """Draw the confusion matrix and the wrong predictions."""
        if self._confusion is None:
            return
        confusion = trainer.strategy.reduce(self._confusion, reduce_op="sum").cpu()
        data, step = trainer.datamodule, trainer.global_step
        for writer in _writers(trainer):
            writer.add_figure("test/confusion", draw_confusion(confusion, data.classes), step)
            writer.add_scalar("accuracy/test", confusion.diagonal().sum() / confusion.sum(), step)
            losses, *wrong = self._wrong
            labels, predicted, probabilities, images = (v[losses != -math.inf] for v in wrong)
            if len(images):
                names = [plots.plain(name, 12) for name in data.classes]
                found = zip(labels, predicted, probabilities, strict=True)
                titles = [f"{names[i]}\n→ {names[j]}, {100 * p:.0f} %" for i, j, p in found]
                pixels = plots.pixels(images, data.mean, data.std)
                writer.add_figure("test/most_wrong", draw_images(pixels, titles), step)
        self._confusion, self._wrong = None, []


def _loggers(trainer: L.Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _writers(trainer: L.Trainer) -> list[Any]:
    """The ``SummaryWriter``s, on rank 0."""
    return [logger.experiment for logger in _loggers(trainer) if trainer.is_global_zero]


def grid(pixels: Tensor) -> Tensor:
    """At most 64 images in rows, in not much more than 1,000 x 1,000 pixels: 3 x H x W."""
    from torchvision.utils import make_grid  # slow to import

    per_row = min(8, max(1, 1024 // pixels.shape[3]))
    rows = min(8, max(1, 1024 // pixels.shape[2]))
    return make_grid(pixels[: rows * per_row], nrow=per_row, pad_value=255)


def add_graph(writer: Any, model: nn.Module, shape: Sequence[int]) -> None:
    """Trace the model with one image, C x H x W; where it cannot be traced, only say so."""
    first = next(model.parameters())
    image = torch.zeros(1, *shape, dtype=first.dtype, device=first.device)
    modes = {module: module.training for module in model.modules()}
    compiled, model._compiled_call_impl = model._compiled_call_impl, None  # as it was written
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng([first.device] if first.is_cuda else []),
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),  # torch prints errors too, in many lines
        ):
            warnings.simplefilter("ignore")
            model.eval()
            # Unchecked: a second trace, to compare, would take half of the time.
            writer.add_graph(torch.jit.trace(model, image, check_trace=False), image)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        log.warning("TensorBoard gets no graph of the model: %s: %s", type(error).__name__, reason)
    finally:
        model._compiled_call_impl = compiled
        for module, training in modes.items():
            module.training = training


def draw_confusion(counts: Tensor, classes: Sequence[str]) -> Figure:
    """The counts, label x prediction, in percent of each label (rows), with the classes' names."""
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    number = len(classes)
    side = min(12.0, 3.5 + 0.1 * max(number, 10))
    with plots.style():
        figure = Figure(figsize=(side + 0.6, side), dpi=120, layout="constrained")
        axes = figure.subplots()
        # Colour by the root: a good model's errors are a few percent in few places.
        shown = axes.imshow(shares.numpy(), cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        if number <= 100:
            size = 9 if number <= 20 else 5
            names = [plots.plain(name, 18) for name in classes]
            upright = 90 if max(map(len, names)) > 2 else 0
            axes.set_xticks(range(number), names, rotation=upright, fontsize=size)
            axes.set_yticks(range(number), names, fontsize=size)
        for i, j in counts.nonzero().tolist() if number <= 10 else []:
            share = shares[i, j].item()
            colour = "white" if share > 40 else "black"
            axes.text(j, i, f"{share:.1f}", c=colour, ha="center", va="center", fontsize=8)
        right = 100 * counts.diagonal().sum() / counts.sum()
        axes.set(xlabel="prediction", ylabel="label", title=f"test accuracy {right:.2f} %")
        axes.grid(False)
        figure.colorbar(shown, ax=axes, label="% of the label's images", shrink=0.8, aspect=30)
    return figure


def draw_images(pixels: Tensor, titles: Sequence[str]) -> Figure:
    """Images, uint8 N x C x H x W, in rows of five, each below its title of two lines."""
    rows, ratio = math.ceil(len(pixels) / 5), pixels.shape[2] / pixels.shape[3]
    step = ratio + 0.4  # of a row, in widths of an image
    with plots.style():
        figure = Figure(figsize=(7, 7 / 5.8 * (rows * step + 0.1)), dpi=120)
        axes = figure.add_axes((0, 0, 1, 1))
        images = pixels.permute(0, 2, 3, 1).numpy()
        for i, (image, title) in enumerate(zip(images, titles, strict=True)):
            left, bottom = i % 5 * 1.15, (i // 5 + 1) * step
            extent = (left, left + 1, bottom, bottom - ratio)
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=extent)
            axes.text(left, bottom - ratio - 0.05, title, fontsize=8)
        axes.set(xlim=(-0.1, 5.7), ylim=(rows * step + 0.1, 0))
        axes.axis("off")
    return figure
