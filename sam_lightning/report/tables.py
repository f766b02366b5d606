"""A study as tables: for Markdown and LaTeX, and as CSV for other programs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich.table import Table as RichTable
from rich.text import Text

from sam_lightning.report.comparison import ABSENT, SELECTION, Study, show, title
from sam_lightning.report.runs import COSTS
from sam_lightning.report.statistics import Estimate

NAMES = {"acc": "accuracy", "acc5": "top-5 accuracy", "error": "error", "loss": "loss"}
SPLITS = {"val": "validation", "test": "test", "train": "train"}
COST_FORMATS = {
    "passes/step": "{:.3g}",
    "passes": "{:.4g}",
    "train s": "{:,.1f}",
    "images/s": "{:,.0f}",
}
LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    **{"~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "\\": "\\textbackslash{}"},
    **{"<": "$<$", ">": "$>$", "±": "$\\pm$", "–": "--", "−": "$-$"},
}


@dataclass(frozen=True)
class Table:
    """Cells of text; ``left`` columns are words, the others numbers, ``strong`` rows are bold."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int
    strong: Sequence[bool]

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        rows = self._rows(lambda cell: re.sub(r"([|*_`<\\])", r"\\\1", cell), "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX with the package booktabs."""
        head, *rows = (
            f"    {' & '.join(row)} \\\\"
            for row in [map(escape_latex, self.head), *self._rows(escape_latex, "\\textbf{{{}}}")]
        )
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{escape_latex(caption)}}}",
                f"  \\label{{{label}}}",
                f"  \\begin{{tabular}}{{{'l' * self.left}{'r' * (len(self.head) - self.left)}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}\n\\end{table}",
            ]
        )

    def terminal(self, caption: str) -> RichTable:
        """The table as ``rich`` prints it."""
        shown = RichTable(title=caption)
        for i, name in enumerate(self.head):
            justify: Literal["left", "right"] = "left" if i < self.left else "right"
            shown.add_column(Text(name), justify=justify, overflow="fold")
        for strong, row in zip(self.strong, self.rows, strict=True):
            shown.add_row(*map(Text, row), style="bold" if strong else None)
        return shown

    def _rows(self, escape: Any, bold: str) -> list[list[str]]:
        pairs = zip(self.strong, self.rows, strict=True)
        return [[(bold if s else "{}").format(escape(c)) for c in row] for s, row in pairs]


def escape_latex(text: str) -> str:
    """Text as LaTeX sets it, not as it reads it; the hyphen of a negative number is a minus."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join(LATEX.get(c, c) for c in text)


def results(study: Study) -> Table:
    """A row per group: settings, metrics and costs."""
    names = dict.fromkeys([SELECTION, "test/acc", "test/error", study.metric])
    metrics = [name for name in names if any(g.estimate(name).n for g in study.groups)]
    rows = []
    for group in study.groups:
        n = len(group.runs)
        cells = [show(group.values[column]) for column in study.columns] + [str(n)]
        cells += [interval(group.estimate(name), name, n) for name in metrics]
        means = [group.estimate(name).mean for name in COSTS]
        forms = zip(COST_FORMATS.values(), means, strict=True)
        cells += [ABSENT if math.isnan(mean) else form.format(mean) for form, mean in forms]
        rows.append(cells)
    head = [title(column, study.columns) for column in study.columns]
    head += ["n", *(f"{metric_name(name)}{unit(name)}" for name in metrics), *COST_FORMATS]
    best = [choice.best for choice in study.choices]
    return Table(head, rows, len(study.columns), [group in best for group in study.groups])


def comparisons(study: Study) -> Table:
    """A row per comparison with the baseline."""
    points = unit(study.metric).replace("%", "points")
    head = ["method", "against", "at equal", "pairs", f"difference{points}"]
    head += ["p (t)", "p (Holm)", "p (Wilcoxon)"]
    rows = []
    for c in study.comparisons:
        cells = [study.describe(c.group), study.describe(c.baseline), c.equal]
        cells += [str(c.test.difference.n), interval(c.test.difference, study.metric, sign="+")]
        for p in (c.test.p, c.holm, c.test.wilcoxon):
            cells.append(ABSENT if math.isnan(p) else f"{p:.4f}" if p >= 0.0001 else "< 0.0001")
        rows.append(cells)
    return Table(head, rows, 3, [False] * len(rows))


def interval(found: Estimate, metric: str, runs: int | None = None, sign: str = "") -> str:
    """Mean ± half of the interval, in percent except for losses; n where it is not ``runs``."""
    if found.n == 0:
        return ABSENT
    scale, digits = (1, 4) if metric.endswith("loss") else (100, 2)
    text = f"{scale * found.mean:{sign}.{digits}f}"
    if found.n > 1:
        text += f" ± {scale * found.half:.{digits}f}"
    return text if runs in (None, found.n) else f"{text} (n={found.n})"


def metric_name(metric: str) -> str:
    """``val/acc`` in words."""
    split, _, name = metric.partition("/")
    return f"{SPLITS[split]} {NAMES[name]}"


def unit(metric: str) -> str:
    """The end of a heading for a metric."""
    return "" if metric.endswith("loss") else ", %"


def runs_csv(study: Study) -> str:
    """A row per run: folder, settings, seed, costs and every metric as a fraction."""
    metrics = _metrics(study)
    rows = [
        {"folder": run.folder, **_settings(group.values), "seed": run.seed}
        | {name: run.results.get(name) for name in COSTS}
        | {"device": run.device, **{name: run.results.get(name) for name in metrics}}
        for group in study.groups
        for run in group.runs
    ]
    return _csv(rows)


def groups_csv(study: Study) -> str:
    """A row per group; of every metric mean, standard deviation and interval, as fractions."""
    best = [choice.best for choice in study.choices]
    rows = []
    for group in study.groups:
        row = _settings(group.values) | {"n": len(group.runs), "chosen": int(group in best)}
        row |= {name: group.estimate(name).mean for name in COSTS}
        for name in _metrics(study):
            found = group.estimate(name)
            row |= {f"{name} n": found.n, f"{name} mean": found.mean, f"{name} sd": found.sd}
            row |= {f"{name} low": found.mean - found.half, f"{name} high": found.mean + found.half}
        rows.append(row)
    return _csv(rows)


def _metrics(study: Study) -> list[str]:
    return sorted({name for group in study.groups for name in group.results} - {*COSTS})


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are typed, but floats with all digits, and nothing for those not there."""
    texts = {k: v if isinstance(v, float) else show(v) for k, v in values.items()}
    return {k: None if v == ABSENT else v for k, v in texts.items()}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    return pd.DataFrame(rows, dtype=object).to_csv(index=False, lineterminator="\n")
