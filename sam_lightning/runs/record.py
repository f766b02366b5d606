"""``metrics.json``: a run's results, time and settings."""

import logging
import math
import os
import platform
import resource
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.runs.files import now, read_status, record_failure, write_json
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.runs.terminal import Table, show

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
        throughput: counts the images, the seconds of training, and those elapsed in all, and has
            the ``parts`` of the run.
        data: an ``ImageDataModule``, set up.
        module: what is trained, with what the checkpoints keep of it in ``hparams``; its
            ``groups``, if it has some, count its weights.
        changed: the settings that differ from the part of the run before, from ``runs.parts``.
        only_test: the run was trained before. Where its record is complete, only the test's metrics
            change in it.
    """

    def __init__(
        self,
        cfg: DictConfig,
        trainer: L.Trainer,
        throughput: Any,
        data: Any,
        module: L.LightningModule,
        *,
        changed: Mapping[str, Any],
        only_test: bool,
    ) -> None:
        self.cfg = cfg
        self.trainer = trainer
        self.throughput = throughput
        self.data = data
        throughput.start = _start(trainer) | ({"changed": dict(changed)} if changed else {})
        self.module = module
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
        if error is not None and self._is_true():
            record_failure(self.cfg, f"{type(error).__name__}: {one_line(error)}")
            return
        if isinstance(error, ConfigError) and not self.throughput.began:
            return  # the run is refused
        status, reason = "completed", "completed"
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
            status = "interrupted" if interrupted else "failed"
            reason = without_secrets(f"{type(error).__name__}: {one_line(error)}")
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

    def _is_true(self) -> bool:
        """Whether the folder has the record of a complete run, and nothing was saved since."""
        if not read_status(self.path.parent).completed:
            return False
        written = self.path.stat().st_mtime_ns
        saved = self.path.parent.glob("checkpoints/*.ckpt")
        return all(file.stat().st_mtime_ns <= written for file in saved)

    def _summary(self, status: str, reason: str) -> dict[str, Any]:
        trained, parts = self.throughput.seconds, self.throughput.parts
        if self.before:
            metrics = {**self.before["metrics"], **self.metrics}
            kept = {key: value for key, value in self.before.items() if key != "refused"}
            return {**kept, "finished": now(), "metrics": metrics, "parts": parts}
        config: Any = OmegaConf.to_container(self.cfg, resolve=True)
        return {
            "status": status,
            "exit_reason": reason,
            "finished": now(),
            "metrics": self.metrics,
            "computed_over": self._computed_over(),
            "images": self._images(),
            **self._left_out(),
            **self._parameters(),
            **({"weights": weights} if (weights := self.module.hparams.get("weights")) else {}),
            "seconds": self.throughput.elapsed,
            "train_seconds": trained,
            "images_per_second": self.throughput.images / trained if trained else None,
            "peak_memory_bytes": _peak_memory(),
            "epochs": self.trainer.current_epoch,
            "updates": self.trainer.global_step,
            **{key: parts[-1][key] for key in ("devices", "device", "host", "command")},
            "parts": parts,
            "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
            "git_commit": _git_commit(),
            # A run has the same settings wherever it was stopped and continued.
            "config": without_secrets({**config, "ckpt_path": None}),
        }

    def _parameters(self) -> dict[str, int]:
        """Numbers of weights: of all, and of those that train and that SAM perturbs."""
        groups: Any = getattr(self.module, "groups", None)  # none if the fit has not begun
        counts = ("trained_parameters", "perturbed_parameters")
        found = dict(zip(counts, groups.counts(), strict=True)) if groups else {}
        return {"parameters": sum(p.numel() for p in self.module.parameters()), **found}

    def _computed_over(self) -> dict[str, dict[str, int]]:
        """Of each split with metrics, the images in them, ``of`` all; training's are an epoch's.

        Training metrics are means over the ``last_steps`` of the run.
        """
        trainer, data, over = self.trainer, self.data, {}
        for split in ("train", "val", "test"):
            if not any(name.startswith(f"{split}/") for name in self.metrics):
                continue
            limit, total = getattr(trainer, f"limit_{split}_batches"), len(getattr(data, split))
            found = _covered(total, data.eval_batch_size, limit, trainer.world_size)
            if split == "train":
                whole = total // data.batch_size * data.batch_size if data.drop_last else total
                found = _covered(whole, data.batch_size, limit)
            over[split] = {"images": found, "of": total}
        if "train" in over:
            step, every = trainer.global_step - 1, self.cfg.trainer.log_every_n_steps
            batches = math.ceil(over["train"]["images"] / data.batch_size)
            epoch = math.ceil(batches / self.cfg.trainer.accumulate_grad_batches)
            logged = max(step // every * every, step // epoch * epoch)
            over["train"]["last_steps"] = step + 1 - logged
        return over

    def _images(self) -> dict[str, dict[str, int]]:
        """Images of each split by class; training labels as they are trained on."""
        classes, counts = self.data.classes, self.data.class_counts()
        return {name: dict(zip(classes, of, strict=True)) for name, of in counts.items()}

    def _left_out(self) -> dict[str, Any]:
        """Files that are not used: their number by kind, and each that is broken, with why."""
        found = {name: getattr(self.data, name, None) for name in ("left_out", "broken")}
        return {name: dict(of) for name, of in found.items() if of}

    def _log_hparams(self) -> None:
        """Log the settings; TensorBoard's table has the final metrics from the curves."""
        from torch.utils.tensorboard.summary import hparams

        cfg = self.cfg
        settings = {  # TensorBoard sorts by name, capitals first
            "Method": cfg.method.name,
            "Rho": cfg.method.rho,
            "seed": cfg.seed,
            "model": cfg.model.get("name") or str(cfg.model._target_).rpartition(".")[2],
            "data": str(cfg.data.source._target_).rpartition(".")[2],
            "optimizer": str(cfg.optimizer._target_).rpartition(".")[2],
            "label_noise": cfg.data.label_noise,
            **{k: cfg[k] for k in OWN},
        }
        groups = {k: OmegaConf.to_container(cfg[k], resolve=True) for k in DETAILS}
        for key, value in flat(without_secrets(groups)).items():
            known = key.rpartition(".")[2] in {*map(str.lower, settings), "name", "_target_"}
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
                over = summary["computed_over"][name.partition("/")[0]]
                part = f", {over['images']:,} of {over['of']:,} images"
                label += part if over["images"] < over["of"] else ""
                table.add_row(label, f"{self.metrics[name]:.2%}")
        table.add_row("seconds", f"{summary['seconds']:.1f}")
        if summary["images_per_second"]:
            table.add_row("training images/s", f"{summary['images_per_second']:,.0f}")
        table.add_row("folder", os.path.relpath(self.cfg.output_dir))
        show(table)


def _covered(images: int, batch_size: int, limit: int | float, ranks: int = 1) -> int:
    """Images in the batches that a trainer's ``limit`` leaves, a number or a fraction of them."""
    count = 0
    for rank in range(ranks):
        shard = len(range(rank, images, ranks))
        batches = math.ceil(shard / batch_size)
        most = limit if isinstance(limit, int) else int(batches * limit)
        count += min(shard, most * batch_size)
    return count


def _start(trainer: L.Trainer) -> dict[str, Any]:
    """When, by which command and where the processes of this part started."""
    arguments, root = sys.argv, trainer.strategy.root_device
    hosts = [socket.gethostname()] * trainer.world_size
    if dist.is_initialized():
        dist.all_gather_object(hosts, hosts[0])
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        arguments = [arguments[0], *HydraConfig.get().overrides.task]  # those of the job
    return {
        "started": now(),
        "command": shlex.join(map(without_secrets, ["python", *arguments])),
        "host": ", ".join(dict.fromkeys(hosts)),
        "device": torch.cuda.get_device_name(root) if root.type == "cuda" else root.type,
        "devices": trainer.world_size,
        "threads": torch.get_num_threads(),  # of each process: sums round by their number
    }


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
