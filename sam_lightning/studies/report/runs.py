"""What runs left behind: ``metrics.json`` and ``metrics.csv`` of the completed, names of others."""

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_lightning.config.schema import flat
from sam_lightning.runs.old_names import with_current_names

# A run keeps no run in these.
PRUNED = {".hydra", ".git", "checkpoints", "tensorboard"}
# Where the images are and how they are read: the same result from any.
PLACES = {"data.root", "data.cache_dir", "data.download", "data.num_workers"}
# Keys that say nothing of a result. The effective rho, lr and weight decay are those of the method
# and the optimizer.
IGNORED = {
    *PLACES,
    *("seed", "rho", "lr", "weight_decay", "task_name", "output_dir", "ckpt_path", "debug"),
    *("test", "optimized_metric", "max_skipped_steps", "checkpoint_every_n_steps"),
    *("experiment", "sweep", "method.passes"),
    *("trainer.log_every_n_steps", "trainer.timeout"),
}
# Callbacks that watch; others, such as early stopping, change what comes out.
WATCHERS = ("Checkpoint", "progress", "Progress", "Monitor", "Summary", "Dashboard")


@dataclass(frozen=True)
class Run:
    """A completed run.

    ``settings`` are the configuration's keys that may matter to the result, without the seed;
    ``passes`` is the cost of a step in passes (one forward and backward of the batch);
    ``train_seconds`` are those of training batches, also from before a run was resumed.
    """

    folder: Path
    seed: int | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, float]
    passes: float | None
    epochs: float | None
    train_seconds: float | None
    images_per_second: float | None
    device: str
    written: float

    @property
    def total_passes(self) -> float | None:
        """Passes over the training images."""
        if self.passes is None or self.epochs is None:
            return None
        return self.passes * self.epochs

    def metric(self, name: str) -> float | None:
        """A final metric; an error is what is missing in the accuracy."""
        if name not in self.metrics and name.endswith("/error"):
            accuracy = self.metrics.get(name.replace("/error", "/acc"))
            return None if accuracy is None else 1 - accuracy
        return self.metrics.get(name)


@dataclass(frozen=True)
class LeftOut:
    """A run that is not counted: its status, or what is wrong with its files, and the reason."""

    folder: Path
    status: str
    reason: str


def gather(folders: Iterable[Path]) -> tuple[list[Run], list[LeftOut], list[str]]:
    """Read every run at and below the folders, each once.

    Returns:
        completed runs, runs left out, and warnings.
    """
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    warnings: list[str] = []
    for folder in _run_folders(folders):
        run = _read(folder, warnings)
        if isinstance(run, Run):
            runs.append(run)
        else:
            left_out.append(run)
    return runs, left_out, warnings


def _run_folders(folders: Iterable[Path]) -> list[Path]:
    seen: dict[Path, Path] = {}  # links may lead to a folder again, or around in a circle
    runs = []
    for top in folders:
        for path, below, files in os.walk(top, followlinks=True):
            folder = Path(path)
            real = folder.resolve()
            if real in seen:
                below.clear()
                continue
            seen[real] = folder
            if "metrics.json" in files or (folder / ".hydra" / "config.yaml").is_file():
                runs.append(folder)
            below[:] = sorted(name for name in below if name not in PRUNED)
    return runs


def _read(folder: Path, warnings: list[str]) -> Run | LeftOut:
    path = folder / "metrics.json"
    if not path.exists():
        return LeftOut(folder, "unfinished", "no metrics.json: running still, or killed")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        written = path.stat().st_mtime
    except (OSError, ValueError) as error:
        return LeftOut(folder, "damaged", f"metrics.json: {error}")
    if not isinstance(summary, dict):
        return LeftOut(folder, "damaged", "metrics.json is not that of a run")
    status = summary.get("status")
    if status != "completed":
        reason = summary.get("exit_reason") or "metrics.json does not say that the run completed"
        return LeftOut(folder, str(status or "unknown"), str(reason))
    found = _dict(summary.get("metrics"))
    metrics = {k: v for k, v in found.items() if _number(v) is not None}
    for name in sorted(found.keys() - metrics.keys()):
        warnings.append(f"{folder}: {name}={found[name]} is not finite and is not counted")
    if not metrics:
        return LeftOut(folder, "damaged", "metrics.json has no metrics")
    config = _dict(with_current_names(summary.get("config")))
    return Run(
        folder=folder,
        seed=config.get("seed"),
        settings=settings(config),
        metrics=metrics,
        passes=passes_per_step(_dict(config.get("method"))),
        epochs=_number(summary.get("epochs", config.get("epochs"))),
        train_seconds=_number(summary.get("train_seconds")),
        images_per_second=_number(summary.get("images_per_second")),
        device=str(summary.get("device", "unknown")),
        written=written,
    )


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that may matter to the result, in dotted form, with names first.

    At ``rho=0`` every method is the base optimizer alone, and is called ``sgd``.
    """
    parts = {k: _dict(config.get(k)) for k in ("method", "model", "data", "optimizer", "scheduler")}
    method = parts["method"]
    alone = method.get("name") == "sgd" or method.get("rho") == 0
    named = {
        "data": _data_name(_dict(parts["data"].get("source"))),
        "model": _target_name(parts["model"]),
        "method": "sgd" if alone else method.get("name"),
        "rho": 0.0 if alone else method.get("rho"),
        "epochs": config.get("epochs"),
        "optimizer": _target_name(parts["optimizer"]),
        "scheduler": _target_name(parts["scheduler"]),
    }
    callbacks = {
        name: callback
        for name, callback in _dict(config.get("callbacks")).items()
        if not any(w in str(_dict(callback).get("_target_", w)) for w in WATCHERS)
    }
    named |= {f"callbacks.{name}": _target_name(callback) for name, callback in callbacks.items()}
    found = {k: v for k, v in named.items() if v is not None}
    for key, value in flat({**config, "callbacks": callbacks}).items():
        ignored = key in IGNORED or key.startswith("logger.")
        if key.startswith("data.source."):  # its arguments, some of which are keys of data
            argument = key.removeprefix("data.source.")
            ignored |= argument in ("_target_", *parts["data"]) or f"data.{argument}" in IGNORED
        known = key in named or key in ("method.name", "method.rho")
        known |= key.rpartition(".")[0] in named and key.endswith("._target_")
        if ignored or known or isinstance(value, dict) or (alone and key.startswith("method.")):
            continue
        found[key] = json.dumps(value) if isinstance(value, list) else value
    return found


def passes_per_step(method: Mapping[str, Any]) -> float | None:
    """The cost of a step in passes, on average; None if the method is not known.

    One with the base optimizer alone, else what ``method.passes`` says, else what follows from the
    parts of the batch (``ascent_fraction``, ``descent_fraction``, which needs a forward pass more),
    the steps of ascent and how often there is one (``ascent_steps``, ``every``).
    """
    if method.get("name") == "sgd" or method.get("rho") == 0:
        return 1.0
    if (stored := _number(method.get("passes"))) is not None:
        return stored
    if "rho" not in method:
        return None
    keys = ("ascent_fraction", "ascent_steps", "descent_fraction", "every")
    fraction, steps, descent, every = (_number(method.get(key, 1)) for key in keys)
    if not (fraction and steps and descent and every):
        return None
    climbing = fraction * steps + (1 if descent == 1 else descent + 1 / 3)
    return 1 + (climbing - 1) / every


def curve(run: Run, name: str) -> dict[int, float]:
    """A metric by epoch, counted from 1, from ``metrics.csv``; empty where it was not logged.

    Of several validations in an epoch the last counts. Training metrics are a mean over the
    epoch's updates: each row has that of the updates since the one before.
    """
    rows: dict[int, list[tuple[int, float]]] = {}  # of an epoch: updates, and the value
    before = 0
    try:
        with open(run.folder / "metrics.csv", newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row.get("epoch") and row.get(name):
                    step = int(float(row.get("step") or 0))
                    found = (step - before, float(row[name]))
                    rows.setdefault(int(float(row["epoch"])) + 1, []).append(found)
                    before = step
    except (OSError, ValueError, csv.Error):
        return {}
    if not name.startswith("train/"):
        return {epoch: found[-1][1] for epoch, found in rows.items()}
    updates = {epoch: sum(n for n, _ in found) for epoch, found in rows.items()}
    return {
        epoch: math.fsum(n * value for n, value in found) / updates[epoch]
        for epoch, found in rows.items()
        if updates[epoch]
    }


def _data_name(source: Mapping[str, Any]) -> str | None:
    name = _target_name(source)
    if name == "image_folder":  # the folder is the data set; elsewhere it is a place to keep it
        return f"{name} {Path(str(source.get('root'))).name}"
    return name


def _target_name(node: Mapping[str, Any]) -> str | None:
    target = node.get("_target_")
    return None if target is None else str(target).rpartition(".")[2]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else None
