"""``runs.json``: the results of every run of a study in one small file, to keep and commit."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sam_lightning.config.hydra_errors import key_of
from sam_lightning.runs.files import RunStatus, replacing
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.studies.report.runs import PLACES, Run, curve

if TYPE_CHECKING:
    from sam_lightning.studies.plan import Plan

CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc")
DIGITS = 5  # of curves; metrics have all of theirs
COPIED = (
    *("epochs", "updates", "seconds", "train_seconds", "images_per_second"),
    *("peak_memory_bytes", "devices", "device", "versions", "git_commit"),
    *("parameters", "computed_over"),
)


def write_runs(
    plan: "Plan", statuses: Sequence[RunStatus], runs: Sequence[Run], path: Path
) -> None:
    """Write the study's file, its overrides, and a line per run: its results or its state."""
    results = {run.folder: _results(run) for run in runs}
    lines = []
    for run, status in zip(plan.runs, statuses, strict=True):
        line = {"arm": run.arm, "settings": dict(run.choice), "seed": run.seed}
        line["state"] = status.state
        lines.append(json.dumps(line | results.get(run.folder, {"reason": status.reason})))
    given = without_secrets([o for o in plan.overrides if key_of(o) not in PLACES])
    head = json.dumps({"study": plan.name, "file": plan.content, "overrides": given}, indent=1)
    rows = ",\n  ".join(lines)
    with replacing(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "runs": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def _results(run: Run) -> dict[str, Any]:
    """Results of a completed run; a curve has null where there is no finite value."""
    curves = {name: curve(run.folder, name) for name in CURVES}
    by_epoch = pd.DataFrame({name: c for name, c in curves.items() if len(c) > 1}).sort_index()
    rounded = {
        name: [round(v, DIGITS) if math.isfinite(v) else None for v in by_epoch[name]]
        for name in by_epoch
    }
    return {
        "metrics": run.summary["metrics"],
        "passes": run.results.get("total_passes"),
        **{key: run.summary.get(key) for key in COPIED},
        "curves": {"epoch": by_epoch.index.tolist(), **rounded},
    }
