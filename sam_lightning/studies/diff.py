"""The command ``diff``: which settings of two runs differ, and what came out of each."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam_lightning.config.conf import mapped
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs.files import RunStatus, read_status
from sam_lightning.runs.terminal import show
from sam_lightning.studies.identical import MISSING, OWN_KEYS, differing
from sam_lightning.studies.table import WIDTH, Table, typed

ABOUT = """
Compare two runs: settings that differ, metrics side by side, and what else differs in their
records, such as device, versions and seconds.

  python -m sam_lightning diff RUN_A RUN_B
"""
# Parts of metrics.json that have a table of their own, or that differ between any two runs.
APART = ("config", "metrics", "finished", "parts")


def main(argv: Sequence[str]) -> None:
    """Read both records and print what differs."""
    runs = []
    for folder in argv:
        run = read_status(Path(os.path.expanduser(folder)))
        if not run.summary:
            reason = run.reason or "there is no metrics.json in it"
            raise ConfigError(f"{folder}: is not the folder of a run that has ended ({reason})")
        runs.append(run)
    if len(runs) != 2:
        raise ConfigError(f"diff: needs two folders of runs, not {len(runs)}")
    one, other = runs
    settings = differing(*map(_config, runs))
    rows = [  # optimizer.lr says no more than lr
        (key, *map(typed, pair))
        for key, pair in settings.items()
        if "." not in key or settings.get(key.rpartition(".")[2]) != pair
    ]
    metrics = []
    for name in sorted({*one.metrics, *other.metrics}):
        a, b = one.metrics.get(name), other.metrics.get(name)
        change = MISSING if a is None or b is None else f"{b - a:+.4f}"
        metrics.append((name, *(MISSING if v is None else f"{v:.4f}" for v in (a, b)), change))
    records = differing(*({k: v for k, v in r.summary.items() if k not in APART} for r in runs))
    record = [(key, *map(typed, pair)) for key, pair in records.items()]
    tables = {
        "settings that differ": (("setting", "A", "B"), rows),
        "metrics": (("metric", "A", "B", "B - A"), metrics),
        "what else differs": (("record", "A", "B"), record),
    }
    show(
        *(f"{letter}: {run.folder}" for letter, run in zip("AB", runs, strict=True)),
        *(
            Table(head, cells, left=[0]).terminal(title) if cells else f"{title}: nothing"
            for title, (head, cells) in tables.items()
        ),
        width=WIDTH,
    )


def _config(run: RunStatus) -> Any:
    """The recorded configuration; paths in the run's own folder are the same for every run."""
    config = run.summary.get("config")
    own = str(config.get("output_dir") or OWN_KEYS) if isinstance(config, dict) else ""
    return mapped(lambda v: v.replace(own, "RUN") if isinstance(v, str) else v, config)
