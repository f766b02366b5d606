"""The files of a report and ``runs.json`` of a study, and the tables on the terminal."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sam_lightning.config.hydra_errors import key_of
from sam_lightning.config.text import clean
from sam_lightning.runs import terminal
from sam_lightning.runs.files import RunStatus, replacing
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.studies.plan import Plan
from sam_lightning.studies.report import tables
from sam_lightning.studies.report.comparison import TUNED, Study, numbers_first
from sam_lightning.studies.report.runs import PLACES, Run, counts, curve
from sam_lightning.studies.report.tables import interval, metric_name
from sam_lightning.studies.table import WIDTH, title, typed

# What runs.json has of a run, besides its metrics.
CURVES = ("train/loss", "train/acc", "val/loss", "val/acc", "test/loss", "test/acc")
COPIED = (
    *("epochs", "updates", "seconds", "train_seconds", "images_per_second"),
    *("peak_memory_bytes", "devices", "device", "versions", "git_commit"),
    *("parameters", "computed_over"),
)
# What readers ask of an experiment first; everything else is in each run's metrics.json.
NOTABLE = (
    *("data", "data.image_size", "data.label_noise", "data.subset", "data.val_size"),
    *("data.sampler", "augment.crop.padding", "augment.flip.p", "augment.policy"),
    *("augment.cutout.side", "augment.erasing.p", "augment.mixup.alpha", "augment.cutmix.alpha"),
    *("model", "model.width", "model.depth", "model.widen_factor"),
    *("batch_size", "optimizer", "optimizer.lr", "optimizer.momentum", "optimizer.weight_decay"),
    *("scheduler", "scheduler.warmup_epochs", "loss", "label_smoothing", "trainer.precision"),
)
READING = (
    "Mean ± half of the 95 % interval of the mean over n seeds (Student's t; none for one seed). "
    "A pass is one forward and backward of every training image; seconds are those of training "
    "batches, evaluation left out. In bold: the best mean of a metric on the same data and model."
)
TESTING = (
    "The difference is a mean over pairs of runs with the same seed, with its 95 % interval. "
    "p (t): paired t test, two-sided; p (Holm): the same, adjusted for all comparisons here; "
    "p (Wilcoxon): signed-rank test, from 6 pairs on, exact up to 13."
)


def report(
    study: Study,
    left_out: Sequence[RunStatus],
    warnings: list[str],
    out: Path,
    formats: list[str],
    columns: Sequence[str] | None = None,
) -> None:
    """Write every file, whole or not at all, into ``out``; print the tables.

    Raises:
        ConfigError: the table of results has none of these ``columns``.
    """
    results, comparisons = tables.results(study, columns), tables.comparisons(study)
    warnings = [*warnings, *study.warnings]
    runs = f"{len(study.runs)} runs in {len(study.settings)} groups"
    runs += f"; {len(study.repeats)} repeated, not counted" if study.repeats else ""
    runs += counts(left_out)
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, str] = {}
    if formats:
        from sam_lightning.studies.report.figures import draw  # matplotlib, only if it is needed

        figures = draw(study, out, formats)
    common = [f"{title(k, NOTABLE)} {typed(study.common[k])}" for k in NOTABLE if k in study.common]
    against = f"{metric_name(study.metric)} against {study.baseline}"
    heading = f"{against[0].upper()}{against[1:]}"
    choices, alone = choices_by_validation(study), without_baseline(study)
    markdown = [
        "# Report",
        f"{runs}.",
        *([clean(f"Common to all: {', '.join(common)}.", "markdown")] if common else []),
        *_list("Warnings", warnings),
        "## Results",
        results.markdown(),
        READING,
        *_list("Choice on validation data", choices),
        f"## {clean(heading, 'markdown')}",
        *([comparisons.markdown(), TESTING] if comparisons.rows else []),
        *(clean(line, "markdown") for line in alone),
        *(["## Figures"] if figures else []),
        *(
            f"![{caption}]({name}.{formats[0]})\n\n{caption[0].upper()}{caption[1:]}."
            for name, text in figures.items()
            for caption in [clean(text, "markdown")]
        ),
        *_list("Left out", [f"{run.state}: {run.folder}: {run.reason}" for run in left_out]),
    ]
    latex = ["% needs \\usepackage{booktabs,graphicx}", results.latex(READING, "tab:sam-results")]
    shown: list[Any] = [results.terminal("mean ± half of 95 % interval over seeds"), *choices]
    if comparisons.rows:
        latex.append(comparisons.latex(f"{heading}. {TESTING}", "tab:sam-comparisons"))
        shown.append(comparisons.terminal(f"{against}, pairs with the same seed"))
    for name, content in {
        **tables.csv(study),
        "report.tex": "\n\n".join(latex) + "\n",
        "report.md": "\n\n".join(markdown) + "\n",
    }.items():
        with replacing(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    terminal.show(*shown, *alone, width=WIDTH)
    for warning in warnings:
        print(f"warning: {clean(warning)}", file=sys.stderr)
    print(f"{runs}; see {os.path.relpath(out / 'report.md')}")


def choices_by_validation(study: Study) -> list[str]:
    """Which rho and learning rate are best on validation data, a sentence per choice of several."""
    lines = []
    for groups, best in study.choices.items():
        if len(groups) == 1:
            continue
        values = {c: {*study.settings[c][[*groups]]} for c in TUNED if c in study.settings}
        tried = {c: sorted(v, key=numbers_first) for c, v in values.items() if len(v) > 1}
        names = {column: title(column, study.settings) for column in tried}
        listed = "; ".join(", ".join(map(typed, values)) for values in tried.values())
        name = study.describe(groups[0], without=TUNED)
        if best is None:
            line = f"{name}: no validation data, so no {' and '.join(names.values())} is chosen of "
            lines.append(f"{line}{listed}; the test set is not for choosing")
            continue
        chosen = {column: study.settings.at[best, column] for column in tried}
        metric = f"val/{study.kind}"
        text = f"{metric_name(metric)} {interval(study.estimates[metric].loc[best], metric)} %"
        words = ", ".join(f"{names[column]} {typed(value)}" for column, value in chosen.items())
        line = f"{name}: {words} is best on validation data ({text}), of {listed}"
        for column, (first, *_, last) in tried.items():
            if chosen[column] in (first, last):
                what = "it" if len(tried) == 1 else names[column]
                end = "smallest" if chosen[column] == first else "largest"
                line += f"; {what} is the {end} tried"
        lines.append(line)
    return lines


def without_baseline(study: Study) -> list[str]:
    """Which of the leading groups have no baseline, in sentences."""
    methods = study.settings["method"]
    if study.baseline not in {*methods}:
        return [f"No runs of baseline={study.baseline}, so nothing is compared."]
    compared = {*study.comparisons.get("group", [])}
    other = [g for g in study.leading if methods[g] != study.baseline and g not in compared]
    lacks = f"no {study.baseline} with the same settings and as many epochs or passes"
    return [f"{study.describe(group)}: {lacks}" for group in other]


def _list(heading: str, lines: Sequence[str]) -> list[str]:
    listed = "\n".join(f"- {clean(line, 'markdown')}" for line in lines)
    return [f"## {heading}", listed] if lines else []


def write_runs(plan: Plan, statuses: Sequence[RunStatus], runs: Sequence[Run], path: Path) -> None:
    """Write the study's file, its overrides, and a line per run: its results or its state."""
    results = {run.folder: _results(run) for run in runs}
    lines = []
    for run, status in zip(plan.runs, statuses, strict=True):
        line = {"arm": run.arm, "settings": dict(run.choice), "seed": run.seed}
        line["state"] = status.state
        lines.append(json.dumps(line | results.get(run.folder, {"reason": status.reason})))
    given = without_secrets([o for o in plan.overrides if key_of(o) not in PLACES])
    head = json.dumps(
        {"study": plan.name, "file": without_secrets(plan.content), "overrides": given}, indent=1
    )
    rows = ",\n  ".join(lines)
    with replacing(path) as temporary:
        temporary.write_text(f'{head[:-2]},\n "runs": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


def _results(run: Run) -> dict[str, Any]:
    """Results of a completed run; a curve has five digits, null where there is no finite value."""
    curves = {name: curve(run.folder, name) for name in CURVES}
    by_epoch = pd.DataFrame({name: c for name, c in curves.items() if len(c) > 1}).sort_index()
    rounded = {
        name: [round(v, 5) if math.isfinite(v) else None for v in by_epoch[name]]
        for name in by_epoch
    }
    return {
        "metrics": run.summary["metrics"],
        "passes": run.results.get("total_passes"),
        **{key: run.summary.get(key) for key in COPIED},
        "curves": {"epoch": by_epoch.index.tolist(), **rounded},
    }
