"""A study as text: Markdown, CSV, LaTeX, and on the terminal."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table as RichTable

from sam_lightning.report.comparison import ABSENT, SELECTION, Comparison, Study, show, title
from sam_lightning.report.runs import Run
from sam_lightning.report.statistics import Estimate

NAMES = {"acc": "accuracy", "acc5": "top-5 accuracy", "error": "error", "loss": "loss"}
SPLITS = {"val": "validation", "test": "test", "train": "train"}


@dataclass(frozen=True)
class Table:
    """Cells of text; ``left`` columns are words, the others numbers, ``strong`` rows stand out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int
    strong: Sequence[bool]


def results(study: Study) -> Table:
    """A row per group: what tells it apart, its metrics and its costs."""
    metrics = metrics_shown(study)
    columns = [title(column, study.columns) for column in study.columns]
    costs = ["passes/step", "passes", "train s", "images/s"]
    best = [choice.best for choice in study.choices]
    rows = []
    for group in study.groups:
        n = len(group.runs)
        cells = [show(group.values[column]) for column in study.columns] + [str(n)]
        cells += [interval(group.estimate(name), name, n) for name in metrics]
        for attribute, form in (
            ("passes", "{:.3g}"),
            ("total_passes", "{:.4g}"),
            ("train_seconds", "{:,.1f}"),
            ("images_per_second", "{:,.0f}"),
        ):
            value = group.mean(attribute)
            cells.append(ABSENT if value is None else form.format(value))
        rows.append(cells)
    head = [*columns, "n", *(f"{spoken(name)}{unit(name)}" for name in metrics), *costs]
    return Table(head, rows, len(columns), [group in best for group in study.groups])


def comparisons(study: Study) -> Table:
    """A row per comparison with the baseline."""
    unit_ = "" if study.metric.endswith("loss") else ", points"
    head = ["method", "against", "at equal", "pairs", f"difference{unit_}"]
    head += ["p (t)", "p (Holm)", "p (Wilcoxon)"]
    rows = [
        [study.describe(c.group), study.describe(c.baseline), c.equal, *_result(c, study.metric)]
        for c in study.comparisons
    ]
    return Table(head, rows, 3, [False] * len(rows))


def _result(comparison: Comparison, metric: str) -> list[str]:
    result = comparison.result
    if result is None:
        return ["0", *[ABSENT] * 4]
    tests = [result.p, comparison.holm, result.wilcoxon]
    return [
        str(result.difference.n),
        interval(result.difference, metric, signed=True),
        *(ABSENT if p is None else f"{p:.4f}" if p >= 0.0001 else "< 0.0001" for p in tests),
    ]


def interval(
    found: Estimate | None, metric: str, runs: int | None = None, signed: bool = False
) -> str:
    """Mean ± half of the interval, in percent except for losses; n where it is not ``runs``."""
    if found is None:
        return ABSENT
    scale, digits = (1, 4) if metric.endswith("loss") else (100, 2)
    text = f"{scale * found.mean:{'+' if signed else ''}.{digits}f}"
    if found.half is not None:
        text += f" ± {scale * found.half:.{digits}f}"
    return text if runs in (None, found.n) else f"{text} (n={found.n})"


def metrics_shown(study: Study) -> list[str]:
    """The metrics of the tables, as far as any group has them; the compared one among them."""
    names = dict.fromkeys([SELECTION, "test/acc", "test/error", study.metric])
    return [name for name in names if any(g.estimate(name) is not None for g in study.groups)]


def spoken(metric: str) -> str:
    """``val/acc`` in words."""
    split, _, name = metric.partition("/")
    return f"{SPLITS[split]} {NAMES[name]}"


def unit(metric: str) -> str:
    """What stands behind a metric's name in a heading."""
    return "" if metric.endswith("loss") else ", %"


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, strong rows in bold."""
    rule = ["---" if i < table.left else "---:" for i in range(len(table.head))]
    rows = [
        [f"**{cell}**" if strong else cell for cell in map(_escape_markdown, row)]
        for row, strong in zip(table.rows, table.strong, strict=True)
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [table.head, rule, *rows])


def latex(table: Table, caption: str, label: str) -> str:
    """A ``table`` environment for the package booktabs, strong rows in bold."""
    rows = [
        [f"\\textbf{{{cell}}}" if strong else cell for cell in map(escape_latex, row)]
        for row, strong in zip(table.rows, table.strong, strict=True)
    ]
    lines = [
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{escape_latex(caption)}}}",
        f"  \\label{{{label}}}",
        f"  \\begin{{tabular}}{{{'l' * table.left}{'r' * (len(table.head) - table.left)}}}",
        "    \\toprule",
        f"    {' & '.join(map(escape_latex, table.head))} \\\\",
        "    \\midrule",
        *(f"    {' & '.join(row)} \\\\" for row in rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines)


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it, not as it reads it."""
    special = {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        "\\": "\\textbackslash{}",
        "<": "$<$",
        ">": "$>$",
        "±": "$\\pm$",
        "–": "--",
    }
    # Numbers are set as mathematics where their sign is a minus, not a hyphen.
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join({**special, "−": "$-$"}.get(c, c) for c in text)


def _escape_markdown(text: str) -> str:
    return re.sub(r"([|*_`<\\])", r"\\\1", text)


def terminal(table: Table, caption: str) -> RichTable:
    """A table for ``rich``, strong rows in bold."""
    shown = RichTable(title=caption)
    for i, name in enumerate(table.head):
        justify: Literal["left", "right"] = "left" if i < table.left else "right"
        shown.add_column(escape(name), justify=justify, overflow="fold")
    for row, strong in zip(table.rows, table.strong, strict=True):
        shown.add_row(*map(escape, row), style="bold" if strong else None)
    return shown


def runs_csv(study: Study) -> str:
    """A row per run: folder, what tells it apart, seed, costs and every metric as a fraction."""
    runs = [(group, run) for group in study.groups for run in group.runs]
    metrics = sorted({name for _, run in runs for name in run.metrics})
    costs = ["passes", "total_passes", "train_seconds", "images_per_second", "device"]
    head = ["folder", *study.columns, "seed", *costs, *metrics]
    rows = [
        [
            run.folder,
            *(_bare(group.values[c]) for c in study.columns),
            run.seed,
            *(getattr(run, cost) for cost in costs),
            *(run.metrics.get(name) for name in metrics),
        ]
        for group, run in runs
    ]
    return _csv([head, *rows])


def groups_csv(study: Study) -> str:
    """A row per group; of every metric mean, standard deviation and interval, as fractions."""
    runs: list[Run] = [run for group in study.groups for run in group.runs]
    metrics = sorted({name for run in runs for name in run.metrics})
    costs = ["passes", "total_passes", "train_seconds", "images_per_second"]
    parts = ["n", "mean", "sd", "low", "high"]
    head = [*study.columns, "n", "chosen", *costs, *(f"{m} {p}" for m in metrics for p in parts)]
    best = [choice.best for choice in study.choices]
    rows = []
    for group in study.groups:
        row = [_bare(group.values[c]) for c in study.columns]
        row += [len(group.runs), int(group in best), *map(group.mean, costs)]
        for name in metrics:
            row += _parts(group.estimate(name))
        rows.append(row)
    return _csv([head, *rows])


def _parts(found: Estimate | None) -> list[float | None]:
    if found is None:
        return [0, None, None, None, None]
    low, high = (
        (None, None) if found.half is None else (found.mean - found.half, found.mean + found.half)
    )
    return [found.n, found.mean, found.sd, low, high]


def _bare(value: Any) -> Any:
    if value == ABSENT:
        return None
    return value if isinstance(value, float) else show(value)  # with all its digits


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
