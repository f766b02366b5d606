"""What watches a run: progress, throughput, and the table of metrics on disk."""

import csv
import io
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only


def progress() -> Callback:
    """A live bar on a terminal, a line per epoch elsewhere."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


class EpochLines(Callback):
    """One plain line per epoch: logged losses and accuracies, and seconds."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock: a run resumed within an epoch never starts this epoch."""
        self.started = time.perf_counter()

    on_train_epoch_start = on_train_start

    @rank_zero_only
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        names = ("train/loss", "train/acc", "val/loss", "val/acc")
        metrics = trainer.callback_metrics
        shown = "  ".join(f"{n} {metrics[n]:.4f}" for n in names if n in metrics)
        seconds = time.perf_counter() - self.started
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        print(f"{epoch}  {shown}  {seconds:.1f} s", flush=True)


class Throughput(Callback):
    """Counts training images and the seconds spent on training batches, evaluation left out.

    ``images`` counts all ranks. A resumed run continues with the sums of its checkpoint, so lost
    work does not count.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.images = 0
        self._started: float | None = None  # None while the clock stands
        self._validation_within_epoch = False
        self._began: float | None = None
        self._earlier = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds from the start of the run until now, evaluation included."""
        return self._earlier + _since(self._began)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note when the run begins."""
        if self._began is None:
            self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """The sums up to now, also within an epoch."""
        seconds = self.seconds + _since(self._started)
        return {"seconds": seconds, "images": self.images, "elapsed": self.elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the sums of a checkpoint."""
        self.seconds, self.images = state_dict["seconds"], state_dict["images"]
        self._earlier = state_dict["elapsed"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock: a run resumed within an epoch never starts this epoch."""
        self._started = time.perf_counter()

    on_train_epoch_start = on_train_start

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; after the epoch's last batch wait for the device and stop the clock."""
        self.images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            self._stop(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, which still runs within an epoch."""
        self._validation_within_epoch = self._started is not None
        self._stop(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again if it ran before."""
        if self._validation_within_epoch:
            self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of an epoch that ``max_steps`` or ``max_time`` cut short."""
        self._stop(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Stop the clock, without waiting for a device that may be the cause."""
        self._stop()

    def _stop(self, wait_for: L.LightningModule | None = None) -> None:
        if self._started is None:
            return
        if wait_for is not None and wait_for.device.type == "cuda":
            torch.cuda.synchronize(wait_for.device)
        self.seconds += _since(self._started)
        self._started = None


def _since(start: float | None) -> float:
    """Seconds since a clock was started; 0 where it was not."""
    return 0.0 if start is None else time.perf_counter() - start


class MetricsCSV(CSVLogger):
    """``metrics.csv`` in the run folder: a row per logged step, kept when a run is resumed.

    Lightning's logger overwrites an existing file. On resume this one first writes the rows up to
    the checkpoint's step again. It drops later rows, which are lost work, and a test's row,
    because the test runs again.
    """

    def __init__(self, root_dir: str) -> None:
        path = Path(root_dir, "metrics.csv")
        text = path.read_text() if path.is_file() else ""
        # The last line may be incomplete, if the run was killed while writing.
        self._previous = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        # Rows must be on disk when a run is killed: the next one keeps them.
        folder, name = os.path.split(root_dir)
        super().__init__(folder or ".", name, version="", flush_logs_every_n_steps=1)

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Keep the rows up to ``step``, as they are; called before the resumed run logs."""
        rows: list[dict[str, Any]] = [
            {k: v for k, v in row.items() if k and v}
            for row in self._previous
            if str(row.get("step")).isdecimal()
        ]
        test_rows = [row for row in rows if any(name.startswith("test/") for name in row)]
        kept = [row for row in rows if int(row["step"]) <= step and row not in test_rows]
        for row in kept:
            self.experiment.log_metrics(row, step=int(row["step"]))
        self.save()
        rank_zero_info(f"metrics.csv: kept {len(kept)} rows up to step {step}")
