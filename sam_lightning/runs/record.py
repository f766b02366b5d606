"""``metrics.json``: a run's results, time and settings."""

import logging
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import flat, one_line
from sam_lightning.runs.files import now, read_status, write_json

log = logging.getLogger(__name__)

SHOWN = {"test accuracy": "test/acc", "test error": "test/error", "validation accuracy": "val/acc"}
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics")
OWN = ("epochs", "batch_size", "lr", "weight_decay", "label_smoothing")
# Groups of the configuration whose settings tell runs apart.
DETAILS = ("data", "model", "method", "optimizer", "scheduler", "trainer")


class Record:
    """Collects the metrics of a run and writes them at the end of the block, also after an error.

    Rank 0 writes ``metrics.json`` under a temporary name and renames it, so the file is always
    whole. It also adds the HParams of TensorBoard and prints the final table.

    Args:
        cfg: the run's configuration.
        trainer: what trains.
        throughput: counts the images, the seconds of training, and those elapsed in all.
        parts: from ``runs.parts``: where the run began and continued, and what changed there.
        only_test: the run was trained before. Where its record is complete, only the test's metrics
            change in it.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: L.Trainer,
        throughput: Any,
        parts: Sequence[Mapping[str, Any]] = (),
        *,
        only_test: bool = False,
    ) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.throughput = throughput
        self.parts = parts
        self.path = Path(cfg.output_dir) / "metrics.json"
        before = read_status(self.path.parent) if only_test else None
        self.before = before.summary if before and before.completed else None
        self.metrics: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add metrics by name; later values replace earlier ones."""
        self.metrics.update({k: float(v) for k, v in metrics.items() if "/" in k})

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.trainer.global_rank != 0 or (error is not None and self.before):
            return
        status, reason = "completed", "completed"
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "interrupted" if interrupted else "failed"
            reason = f"{type(error).__name__}: {one_line(error)}"
        summary = self._summary(status, reason)
        try:
            write_json(self.path, summary, "output_dir")
        except ConfigError as unwritten:
            if error is None:
                raise
            log.error("%s", unwritten)  # the error that ended the run matters more
        if error is None:
            self._log_hparams()
            self._print_table(summary)

    def _summary(self, status: str, reason: str) -> dict[str, Any]:
        if self.before:
            metrics = {**self.before["metrics"], **self.metrics}
            new = {"finished": now(), "metrics": metrics, "parts": [*self.parts]}
            return {**self.before, **new}
        trained, root = self.throughput.seconds, self.trainer.strategy.root_device
        config: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return {
            "status": status,
            "exit_reason": reason,
            "finished": now(),
            "metrics": self.metrics,
            "seconds": self.throughput.elapsed,
            "train_seconds": trained,
            "images_per_second": self.throughput.images / trained if trained else None,
            "peak_memory_bytes": _peak_memory(),
            "epochs": self.trainer.current_epoch,
            "updates": self.trainer.global_step,
            "devices": self.trainer.world_size,
            "device": torch.cuda.get_device_name(root) if root.type == "cuda" else root.type,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "git_commit": _git_commit(),
            "parts": [*self.parts],
            # A run has the same settings wherever it was stopped and continued.
            "config": {**config, "ckpt_path": None},
        }

    def _log_hparams(self) -> None:
        """Log the settings; TensorBoard's table has the final metrics from the curves."""
        from torch.utils.tensorboard.summary import hparams

        cfg = self.cfg
        settings = {
            "method": cfg.method.name,
            "rho": cfg.method.rho,
            "seed": cfg.seed,
            "model": str(cfg.model._target_).rpartition(".")[2],
            "data": str(cfg.data.source._target_).rpartition(".")[2],
            "optimizer": str(cfg.optimizer._target_).rpartition(".")[2],
            "label_noise": cfg.data.label_noise,
            **{k: cfg[k] for k in OWN},
        }
        groups = {k: OmegaConf.to_container(cfg[k], resolve=True) for k in DETAILS}
        for key, value in flat(groups).items():
            known = key.rpartition(".")[2] in {*settings, "name", "_target_"}
            if isinstance(value, int | float | str) and not known and ".source." not in key:
                settings[key] = value
        # An experiment summary describes one run. Without it TensorBoard finds columns in all runs,
        # and shows those first that differ.
        _, start, end = hparams(settings, {})
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for part in (start, end):
                    logger.experiment._get_file_writer().add_summary(part)
                logger.save()

    def _print_table(self, summary: dict[str, Any]) -> None:
        table = Table(title=f"{self.cfg.method.name}, rho {self.cfg.method.rho:g}")
        table.add_column("result")
        table.add_column("value", justify="right")
        for label, name in SHOWN.items():
            if name in self.metrics:
                table.add_row(label, f"{self.metrics[name]:.2%}")
        table.add_row("seconds", f"{summary['seconds']:.1f}")
        if summary["images_per_second"]:
            table.add_row("training images/s", f"{summary['images_per_second']:,.0f}")
        table.add_row("folder", os.path.relpath(self.cfg.output_dir))
        Console(width=None if sys.stdout.isatty() else 120).print(table)


def _peak_memory() -> int:
    """The most bytes allocated on this process's GPU, or held by the process on a CPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _git_commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
