"""Read what runs left behind: ``metrics.json`` and ``metrics.csv``."""

import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_lightning.config.conf import flat
from sam_lightning.runs.files import RunStatus, content, finite, read_status
from sam_lightning.runs.old_names import DEFAULTS, with_current_names

if TYPE_CHECKING:
    import pandas as pd

# Folders of a run that hold no other run.
PRUNED = {".hydra", ".git", "checkpoints", "tensorboard"}
# Keys for the place of the images and how they are read: the result is the same from any.
PLACES = {"data.root", "data.cache_dir", "data.download", "data.num_workers"}
# Other keys without influence on a result, or copied to a key of method or optimizer that counts.
IGNORED = {
    *PLACES,
    *("seed", "rho", "lr", "weight_decay", "task_name", "output_dir", "ckpt_path", "debug"),
    *("traceback", "test", "optimized_metric", "max_skipped_steps", "checkpoint_every_n_steps"),
    *("experiment", "sweep", "method.name", "method.rho", "method.passes"),
    *("trainer.log_every_n_steps", "trainer.timeout"),
}
# Callbacks that only watch; others, such as early stopping, change the result.
WATCHERS = ("Checkpoint", "progress", "Progress", "Monitor", "Summary", "Dashboard")
COSTS = ("passes", "total_passes", "train_seconds", "images_per_second")


@dataclass(frozen=True)
class Run:
    """A completed run.

    ``settings`` are the keys that may change the result, without the seed; ``results`` final
    metrics and ``COSTS``: ``passes`` per step, ``total_passes`` over the images, and times.
    """

    folder: Path
    seed: int | None
    device: str
    settings: Mapping[str, Any]
    results: Mapping[str, float | None]
    summary: Mapping[str, Any]
    written: float


def read_runs(folders: Iterable[Path]) -> tuple[list[Run], list[RunStatus], list[str]]:
    """Completed runs at and below the folders, each once; runs left out; and warnings."""
    of_runs, warnings = _run_folders([*folders])
    found = [read_status(folder) for folder in of_runs]
    completed = [status for status in found if status.completed]
    warnings += [
        f"{status.folder}: {name}={value} is not finite and is not counted"
        for status in completed
        for name, value in sorted(status.summary["metrics"].items())
        if name not in status.metrics
    ]
    parts = Counter(part for status in completed for part in _computed_over_parts(status))
    warnings += [f"{count} runs: {part}" for part, count in parts.items()]
    return [_run(s) for s in completed], [s for s in found if not s.completed], warnings


def _computed_over_parts(status: RunStatus) -> Iterator[str]:
    """Which metrics are not over a whole split."""
    for split, over in _dict(status.summary.get("computed_over")).items():
        images, of = (finite(_dict(over).get(key)) for key in ("images", "of"))
        if split in ("val", "test") and images is not None and of is not None and images < of:
            yield f"{split} metrics are over {images:,.0f} of {of:,.0f} images"


def counts(left_out: Sequence[RunStatus]) -> str:
    """How many were left out of each state, as the end of a sentence."""
    states = sorted(Counter(run.state for run in left_out).items())
    listed = ", ".join(f"{n} {state}" for state, n in states)
    return f"; left out: {listed}" if left_out else ""


def _run_folders(tops: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The folders of runs at and below some folders, each once, and links that are not followed.

    A link to a run counts, but what is below a link does not: it may lead anywhere.
    """
    found: dict[Path, Path] = {}
    links = []
    for top in tops:
        for path, below, _ in os.walk(top):
            below[:] = sorted({*below} - PRUNED)
            for folder in (Path(path), *(Path(path, name) for name in below)):
                config = folder / ".hydra" / "config.yaml"
                if (folder / "metrics.json").exists() or config.is_file():
                    found.setdefault(folder.resolve(), folder)
                elif folder.is_symlink() and folder != top:
                    links.append(folder)
    return [*found.values()], [
        f"{link}: is a link and not followed; name it to count runs there"
        for link in dict.fromkeys(links)
        if not any(link.resolve().is_relative_to(top.resolve()) for top in tops)
    ]


def _run(status: RunStatus) -> Run:
    summary, metrics = status.summary, status.metrics
    config = _dict(with_current_names(summary.get("config")))
    passes = finite(passes_per_step(_dict(config.get("method"))))
    epochs = finite(summary.get("epochs", config.get("epochs")))
    results = {
        **{f"{s}/error": 1 - metrics[f"{s}/acc"] for s in ("val", "test") if f"{s}/acc" in metrics},
        **metrics,
        "passes": passes,
        "total_passes": None if passes is None or epochs is None else finite(passes * epochs),
        **{name: finite(summary.get(name)) for name in ("train_seconds", "images_per_second")},
    }
    return Run(
        folder=status.folder,
        seed=config["seed"] if isinstance(config.get("seed"), int) else None,
        device=str(summary.get("device", "unknown")),
        settings=settings(config),
        results=results,
        summary=summary,
        written=(status.folder / "metrics.json").stat().st_mtime,
    )


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that may change the result, in dotted form, names first.

    At ``rho=0`` every method is the base optimizer alone, and is called ``sgd``.
    """
    method, data = _dict(config.get("method")), _dict(config.get("data"))
    source, alone = _dict(data.get("source")), is_sgd(method)
    callbacks = {
        name: callback
        for name, callback in _dict(config.get("callbacks")).items()
        if not any(w in str(_dict(callback).get("_target_", w)) for w in WATCHERS)
    }
    named = {
        "data": _name(source),
        "model": _name(config.get("model")),
        "method": "sgd" if alone else method.get("name"),
        "rho": 0.0 if alone else method.get("rho"),
        "epochs": config.get("epochs"),
        **{part: _name(config.get(part)) for part in ("optimizer", "scheduler", "loss")},
        **{f"augment.{name}": _name(e) for name, e in _dict(config.get("augment")).items() if e},
        **{f"callbacks.{name}": _name(callback) for name, callback in callbacks.items()},
    }
    if named["data"] == "image_folder":  # a data set of its own; elsewhere root is only a place
        named["data"] += f" {Path(str(source.get('root'))).name}"
    found = {k: v for k, v in named.items() if v is not None}
    for key, value in flat({**config, "callbacks": callbacks}).items():
        part, _, name = key.rpartition(".")
        ignored = key in IGNORED or key in named or key.startswith("logger.")
        ignored |= name == "_target_" and part in (*named, "data.source")
        ignored |= alone and key.startswith("method.")
        ignored |= key in DEFAULTS and value in (None, DEFAULTS[key])
        # Some arguments of the source are keys of data.
        ignored |= part == "data.source" and (name in data or f"data.{name}" in IGNORED)
        if not ignored and not isinstance(value, dict):
            found[key] = value
    return {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in found.items()}


def passes_per_step(method: Mapping[str, Any]) -> float | None:
    """The mean cost of a step in passes: ``method.passes``, or what its other keys amount to.

    A part of the batch in descent needs a forward pass more; None if the method is not known.
    """
    if is_sgd(method):
        return 1.0
    if (stored := finite(method.get("passes"))) is not None:
        return stored
    keys = ("ascent_fraction", "ascent_steps", "descent_fraction", "every")
    fraction, steps, descent, every = (finite(method.get(key, 1)) for key in keys)
    if "rho" not in method or not (fraction and steps and descent and every):
        return None
    passes = fraction * steps + (1 if descent == 1 else descent + 1 / 3)
    return 1 + (passes - 1) / every


def curve(folder: Path, name: str) -> "pd.Series[float]":
    """A metric of ``metrics.csv`` by epoch, counted from 1; empty where it was not logged.

    The last validation of an epoch counts. A row of a training metric is a mean over the updates
    since the row before; their mean over an epoch is weighted by these.
    """
    import numpy as np  # not to be loaded by --help
    import pandas as pd

    path, empty = folder / "metrics.csv", pd.Series(dtype=float)
    columns = ["epoch", "step", name] if name.startswith("train/") else ["epoch", name]
    try:
        text = content(path, most=256 * 2**20)
        log = pd.read_csv(io.BytesIO(text), dtype=str, keep_default_na=False)
        log = log.loc[(log[columns].fillna("") != "").all(axis=1), columns].astype(float)
        log.index = log["epoch"].astype(int) + 1
    except (OSError, ValueError, KeyError):
        return empty
    if "step" not in columns:
        return log.loc[~log.index.duplicated(keep="last"), name]
    log["updates"] = log["step"].diff().fillna(log["step"])
    epochs = log[log["updates"] > 0].groupby(level=0)
    return epochs.apply(lambda rows: np.average(rows[name], weights=rows["updates"]))


def is_sgd(method: Mapping[str, Any]) -> bool:
    """Whether a method is the base optimizer alone, so that its other keys change nothing."""
    return method.get("name") == "sgd" or method.get("rho") == 0


def _name(node: Any) -> str | None:
    target = _dict(node).get("_target_")
    return None if target is None else str(target).rpartition(".")[2]


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
