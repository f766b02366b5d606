"""What a run is, in a few lines at its start, and how long it will take."""

import os
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from sam_lightning.config.progress import duration
from sam_lightning.config.text import clean
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.data.source import Split
from sam_lightning.training.callbacks.progress import steps, trained

NAMED = 5  # of more classes the counts are not listed
STEPS, SECONDS = 5, 2  # that the time left is measured over, at least, or to the epoch's end


class RunSummary(Callback):
    """Prints what is trained on what, and after the first steps how long training will take.

    Loggers that do not write into the run's folder get its settings. Rank 0 does all this. It reads
    the clock only at steps that have waited for the device to log, so nothing waits for it; on a
    CPU at every step.
    """

    def __init__(self) -> None:
        self._step = 0
        self._start: tuple[int, float] | None = None  # steps and seconds of training done
        self._told = False

    @rank_zero_only
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Print the summary."""
        lines = {"folder": os.path.relpath(trainer.default_root_dir)}
        data = trainer.datamodule
        if isinstance(data, ImageDataModule):
            for name in ("train", "val", "test"):
                split = getattr(data, name)
                lines[name] = "no images" if split is None else images(split, data.classes)
                if split is not None and (name != "test" or name in data.pixels_of):
                    if not isinstance(split.stored, Tensor):
                        lines[name] += "; decoded each time"
                    if workers := data.workers(split):
                        lines[name] += f"; loading processes: {workers} (data.num_workers)"
            if data.left_out:
                lines["unused"] = left_out(data)
        every = [p.numel() for p in pl_module.model.parameters()]
        trained, perturbed = pl_module.groups.counts()
        lines["model"] = f"{type(pl_module.model).__name__}, {sum(every):,} parameters"
        if trained != sum(every):
            lines["model"] += f", {trained:,} of them trained"
        if trained != sum(every) or perturbed not in (0, trained):
            lines["model"] += f", {perturbed:,} perturbed"
        device, count = pl_module.device, trainer.world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        lines["device"] = f"{count} x {name}, {trainer.precision}"
        batches, size = trainer.num_training_batches, getattr(data, "batch_size", None)
        per_epoch, total = steps(trainer, batches, pl_module.accumulate_grad_batches)
        lines["steps"] = f"{total:,} in all, {per_epoch:,} in an epoch of {batches:,} batches"
        lines["steps"] += "" if size is None else f" of {size:,} images"
        if trainer.global_step:
            lines["steps"] += f"; {trainer.global_step:,} are done"
        print(*(f"{name:<7} {line}" for name, line in lines.items()), sep="\n", flush=True)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger | TensorBoardLogger):
                logger.log_hyperparams(dict(pl_module.hparams))

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure the first steps behind the one that warms up; then say the time left, once."""
        step, before = trainer.global_step, self._step
        self._step = step
        logged = trainer.is_last_batch or step % (trainer.log_every_n_steps or 1) == 0
        if self._told or step == before or not (logged or pl_module.device.type == "cpu"):
            return
        _, seconds = trained(trainer)
        if self._start is None:
            self._start = step, seconds
            return
        taken, seconds = step - self._start[0], seconds - self._start[1]
        if not ((taken >= STEPS and seconds >= SECONDS) or trainer.is_last_batch):
            return
        self._told = True
        _, total = steps(trainer, trainer.num_training_batches, pl_module.accumulate_grad_batches)
        left = seconds / taken * (total - step)
        if left >= 5:
            print(f"about {duration(left)} of training left", flush=True)

    @rank_zero_only
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say why a callback such as ``EarlyStopping`` has ended the run."""
        epoch = trainer.current_epoch
        for callback in trainer.callbacks:
            reason = getattr(callback, "stopping_reason_message", None)
            if reason and callback.stopped_epoch + 1 == epoch:  # not where a resumed run went on
                print(f"stopped after epoch {epoch}: {reason}", flush=True)


def images(split: Split, classes: list[str]) -> str:
    """The number of images, and of those in each class."""
    counts = torch.bincount(split.labels, minlength=len(classes)).tolist()
    if len(classes) <= NAMED:
        named = (f"{count:,} {clean(name)}" for count, name in zip(counts, classes, strict=True))
        each = ", ".join(named)
    else:
        least, most = min(counts), max(counts)
        each = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        each += f" in each of {len(classes):,} classes"
    return f"{len(split):,} images, {each}"


def left_out(data: ImageDataModule) -> str:
    """How many files of which kinds are not used, and the first that are broken."""
    counts = ", ".join(f"{count:,} {clean(kind)}" for kind, count in data.left_out.items())
    named = ", ".join(clean(name) for name in [*data.broken][:NAMED])
    more = ", ..." if len(data.broken) > NAMED else ""
    return f"files: {counts}{f' ({named}{more})' if named else ''}"
