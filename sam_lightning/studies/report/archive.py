"""``runs.json``: the results of every run of a study in one small file, to keep and commit."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sam_lightning.config.hydra_errors import key_of
from sam_lightning.runs.files import replacing
from sam_lightning.studies.report.runs import PLACES, Run, curve

if TYPE_CHECKING:
    from sam_lightning.studies.plan import Plan
    from sam_lightning.studies.runner import Outcome

CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc")
DIGITS = 5  # of curves; metrics have all of theirs
COPIED = (
    *("epochs", "updates", "seconds", "train_seconds", "images_per_second"),
    *("peak_memory_bytes", "devices", "device", "versions", "git_commit"),
)


def write_runs(
    plan: "Plan", outcomes: Mapping[Path, "Outcome"], runs: Sequence[Run], path: Path
) -> None:
    """Write the study's file, its overrides, and a line per run: its results or its state."""
    found = {run.folder: run for run in runs}
    lines = []
    for run in plan.runs:
        line = {"arm": run.arm, "settings": dict(run.choice), "seed": run.seed}
        if run.folder in found:
            line |= {"state": "completed"} | _results(found[run.folder])
        else:
            line |= {"state": outcomes[run.folder].state, "reason": outcomes[run.folder].reason}
        lines.append(json.dumps(line))
    given = [o for o in plan.overrides if key_of(o) not in PLACES]
    head = json.dumps({"study": plan.name, "file": plan.content, "overrides": given}, indent=1)
    rows = ",\n  ".join(lines)
    with replacing(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "runs": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def commits(runs: Sequence[Run]) -> list[str]:
    """A warning where runs are of different versions of the code."""
    known = sorted({str(_summary(run).get("git_commit"))[:7] for run in runs})
    return [f"runs are of different commits ({', '.join(known)})"] if len(known) > 1 else []


def _results(run: Run) -> dict[str, Any]:
    """Results of a completed run; a curve has null where there is no finite value."""
    summary = _summary(run)
    curves = {name: curve(run, name) for name in CURVES}
    by_epoch = pd.DataFrame({name: c for name, c in curves.items() if len(c) > 1}).sort_index()
    return {
        "metrics": summary["metrics"],
        "passes": run.results.get("total_passes"),
        **{key: summary.get(key) for key in COPIED},
        "curves": {
            "epoch": by_epoch.index.tolist(),
            **{
                name: [round(v, DIGITS) if math.isfinite(v) else None for v in by_epoch[name]]
                for name in by_epoch
            },
        },
    }


def _summary(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    return summary
