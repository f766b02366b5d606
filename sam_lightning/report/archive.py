"""``runs.json``: the results of every run of a study in one small file, to keep and commit."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam_lightning.explain import key_of
from sam_lightning.files import replacing
from sam_lightning.report.runs import PLACES, Run, curve

if TYPE_CHECKING:
    from sam_lightning.plan import Plan
    from sam_lightning.runner import Outcome

CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc")
DIGITS = 5  # of curves; metrics have all of theirs
COPIED = (
    *("epochs", "updates", "seconds", "train_seconds", "images_per_second"),
    *("peak_memory_bytes", "devices", "device", "versions", "git_commit"),
)


def write_runs(
    plan: "Plan", outcomes: Mapping[Path, "Outcome"], runs: Sequence[Run], path: Path
) -> None:
    """Write the study's file, its overrides, and a line for each run: its results or its state."""
    found = {run.folder: run for run in runs}
    lines = []
    for run in plan.runs:
        line = {"arm": run.arm, "settings": dict(run.choice), "seed": run.seed}
        if run.folder in found:
            line |= {"state": "completed"} | results(found[run.folder])
        else:
            outcome = outcomes[run.folder]
            line |= {"state": outcome.state, "reason": outcome.reason}
        lines.append(json.dumps(line))
    given = [o for o in plan.overrides if key_of(o) not in PLACES]
    head = {"study": plan.name, "file": plan.content, "overrides": given}
    with replacing(path) as temporary:
        temporary.write_text(
            json.dumps(head, indent=1)[:-2]
            + ',\n "runs": [\n  '
            + ",\n  ".join(lines)
            + "\n ]\n}\n",
            encoding="utf-8",
        )


def results(run: Run) -> dict[str, Any]:
    """What a completed run came to.

    ``passes`` are those over all training images; ``curves`` have a value per ``epoch``, null where
    none was logged, or none that is finite.
    """
    summary = _summary(run)
    curves = {name: curve(run, name) for name in CURVES}
    curves = {name: values for name, values in curves.items() if len(values) > 1}
    epochs = sorted({epoch for values in curves.values() for epoch in values})
    return {
        "metrics": summary["metrics"],
        "passes": run.total_passes,
        **{key: summary.get(key) for key in COPIED},
        "curves": {
            "epoch": epochs,
            **{name: [_rounded(values.get(e)) for e in epochs] for name, values in curves.items()},
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, DIGITS)


def commits(runs: Sequence[Run]) -> list[str]:
    """A warning where runs are of different versions of the code."""
    known = sorted({str(_summary(run).get("git_commit"))[:7] for run in runs})
    return [f"runs are of different commits ({', '.join(known)})"] if len(known) > 1 else []


def _summary(run: Run) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.folder / "metrics.json").read_text(encoding="utf-8"))
    return summary
