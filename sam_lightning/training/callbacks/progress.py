"""What watches a run: progress, throughput, and the table of metrics on disk."""

import csv
import errno
import io
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from sam_lightning.runs.files import replacing


def progress() -> Callback:
    """A live bar on a terminal, a line per epoch elsewhere."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


def steps(trainer: Any, batches: float, accumulated: int) -> tuple[int, int]:
    """Steps of an epoch with this many batches, and of the run, within the trainer's limits."""
    per_epoch = math.ceil(max(batches, 1) / accumulated)
    total, most = trainer.max_epochs * per_epoch, trainer.max_steps
    return per_epoch, total if most == -1 else min(total, most)


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
        self._began: float | None = None
        self._earlier = 0.0
        self._trainer: L.Trainer | None = None
        self._first_step: int | None = None  # None where nothing was left to train
        self._earlier_parts: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}  # ``Record`` says when, how and where the process started

    @property
    def began(self) -> bool:
        """Whether this start of the run has come to its training, if any was left."""
        return self._first_step is not None

    @property
    def elapsed(self) -> float:
        """Seconds from the start of the run until now, evaluation included."""
        return self._earlier + _since(self._began)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Note when the run begins."""
        if self._began is None:
            self._began = time.perf_counter()
            self._trainer = trainer

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Every start of the run up to now: ``start``, and from which step to which it trained.

        A checkpoint has the parts that led to it, so steps that were lost are in none.
        """
        step = 0 if self._trainer is None else self._trainer.global_step
        first = step if self._first_step is None else self._first_step
        return [*self._earlier_parts, {**self.start, "from_step": first, "to_step": step}]

    def state_dict(self) -> dict[str, Any]:
        """The sums up to now, also within an epoch, and the parts."""
        seconds = self.seconds + _since(self._started)
        sums = {"seconds": seconds, "images": self.images, "elapsed": self.elapsed}
        return {**sums, "parts": self.parts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the sums and the parts of a checkpoint."""
        self.seconds, self.images = state_dict["seconds"], state_dict["images"]
        self._earlier = state_dict["elapsed"]
        # A checkpoint may come from a stranger, and these go into a file.
        parts = json.loads(json.dumps(state_dict.get("parts"), skipkeys=True, default=str))
        found = parts if isinstance(parts, list) else []  # not in an old checkpoint
        self._earlier_parts = [part for part in found if isinstance(part, dict)]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step at which this part begins, and start the clock."""
        self._first_step = trainer.global_step
        self.on_train_epoch_start(trainer, pl_module)  # which one resumed in an epoch never starts

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; after the epoch's last batch wait for the device and stop the clock."""
        self.images += len(batch[1]) * trainer.world_size
        if trainer.is_last_batch:
            self._stop(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock, which runs within an epoch, and where one was cut short."""
        self._stop(pl_module)

    on_train_epoch_end = on_validation_start

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again if the epoch goes on."""
        if not trainer.is_last_batch:
            self._started = time.perf_counter()

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


def trained(trainer: Any) -> tuple[int, float]:
    """Images and seconds of training up to now; zeros where no ``Throughput`` counts them."""
    counts = (c.state_dict() for c in trainer.callbacks if isinstance(c, Throughput))
    return next(((found["images"], found["seconds"]) for found in counts), (0, 0.0))


def _since(start: float | None) -> float:
    """Seconds since a clock was started; 0 where it was not."""
    return 0.0 if start is None else time.perf_counter() - start


class _Rows(ExperimentWriter):
    """Writes ``metrics.csv`` so that a kill at any time leaves all rows before."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.written: list[dict[str, Any]] = []

    def _check_log_dir_exists(self) -> None:
        """Let the file of before stay until there is another."""

    def save(self) -> None:
        """Append the new rows; where they have new columns, write a new file in its place."""
        if self.written and not os.path.exists(self.metrics_file_path):
            # Written again, it would hide that the folder was removed.
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.metrics_file_path)
        self.written += self.metrics
        if self.metrics and self._record_new_keys():
            with replacing(Path(self.metrics_file_path), "output_dir") as temporary:
                self._write(temporary, "w", self.written)
        elif self.metrics:
            self._write(Path(self.metrics_file_path), "a", self.metrics)
        self.metrics = []

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


class MetricsCSV(CSVLogger):
    """``metrics.csv`` in the run folder: a row per logged step, kept when a run is resumed.

    Lightning's logger overwrites an existing file. On resume this one first writes again the rows
    that there were at the checkpoint. It drops later rows, which are lost work or a test's, because
    the test runs again.
    """

    def __init__(self, root_dir: str) -> None:
        path = Path(root_dir, "metrics.csv")
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        # The last line may be incomplete, if the run was killed while writing.
        self._previous = list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))
        # Rows must be on disk when a run is killed: the next one keeps them.
        super().__init__(root_dir, name=None, version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> _Rows:
        """The writer of the file, on rank 0."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    @property
    def rows(self) -> int:
        """The number of rows in the file; 0 on ranks other than 0."""
        return 0 if self._experiment is None else len(self.experiment.written)

    @rank_zero_only
    def continue_from(self, step: int, rows: int | None = None) -> None:
        """Keep the rows that a checkpoint knows of, as they are, before the resumed run logs.

        Args:
            step: the checkpoint's step.
            rows: how many rows there were; None: those up to ``step``.
        """
        found: list[dict[str, Any]] = [
            {k: v for k, v in row.items() if k and v}
            for row in self._previous
            if str(row.get("step")).isdecimal()
        ]
        if rows is None:
            tests = [row for row in found if any(name.startswith("test/") for name in row)]
            found = [row for row in found if int(row["step"]) <= step and row not in tests]
        for row in found[:rows]:
            self.experiment.log_metrics(row, step=int(row["step"]))
        self.save()
        rank_zero_info(f"metrics.csv: kept {self.rows} rows up to step {step}")
