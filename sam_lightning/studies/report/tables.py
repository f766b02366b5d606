"""A study as tables: for Markdown, LaTeX and the terminal, and as CSV for other programs."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.table import Table as RichTable

from sam_lightning.studies.report.comparison import ABSENT, SELECTION, Study, show, title
from sam_lightning.studies.report.runs import COSTS
from sam_lightning.studies.terminal import table

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
    strong: Sequence[int] = ()

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.head))]
        rows = self._rows(lambda cell: re.sub(r"([|*_`<\\])", r"\\\1", cell), "**{}**")
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.head, rule, *rows])

    def latex(self, caption: str, label: str) -> str:
        """The table as an environment of LaTeX with the package booktabs."""
        cells = [map(latex, self.head), *self._rows(latex, "\\textbf{{{}}}")]
        head, *rows = (f"    {' & '.join(row)} \\\\" for row in cells)
        return "\n".join(
            [
                f"\\begin{{table}}\n  \\centering\n  \\caption{{{latex(caption)}}}",
                f"  \\label{{{label}}}",
                f"  \\begin{{tabular}}{{{'l' * self.left}{'r' * (len(self.head) - self.left)}}}",
                *("    \\toprule", head, "    \\midrule", *rows, "    \\bottomrule"),
                "  \\end{tabular}\n\\end{table}",
            ]
        )

    def terminal(self, caption: str) -> RichTable:
        """The table as ``rich`` prints it."""
        right = range(self.left, len(self.head))
        return table(caption, self.head, self.rows, right, self.strong)

    def _rows(self, escape: Callable[[str], str], bold: str) -> list[list[str]]:
        return [
            [(bold if i in self.strong else "{}").format(escape(cell)) for cell in row]
            for i, row in enumerate(self.rows)
        ]


def latex(text: str) -> str:
    """Text as LaTeX sets it, not as it reads it; the hyphen of a negative number is a minus."""
    text = re.sub(r"(?<![\w.])-(?=\d)", "−", text)
    return "".join(LATEX.get(c, c) for c in text)


def results(study: Study) -> Table:
    """A row per group: settings, metrics and costs."""
    names = dict.fromkeys([SELECTION, "test/acc", "test/error", study.metric])
    metrics = [name for name in names if study.estimates[name]["n"].any()]
    sizes = study.runs.groupby(level=0).size()
    rows = []
    for group, values in study.settings.iterrows():
        cells = [*map(show, values), str(sizes[group])]
        for name in metrics:
            found = study.estimates[name].loc[group]
            some = f" (n={found['n']:.0f})" if 0 < found["n"] < sizes[group] else ""
            cells.append(interval(found, name) + some)
        for name, form in zip(COSTS, COST_FORMATS.values(), strict=True):
            mean = study.estimates[name].at[group, "mean"]
            cells.append(ABSENT if math.isnan(mean) else form.format(mean))
        rows.append(cells)
    head = [title(column, study.settings) for column in study.settings]
    head += ["n", *(f"{metric_name(name)}{unit(name)}" for name in metrics), *COST_FORMATS]
    best = [group for group in study.choices.values() if group is not None]
    return Table(head, rows, study.settings.shape[1], best)


def comparisons(study: Study) -> Table:
    """A row per comparison with the baseline."""
    points = unit(study.metric).replace("%", "points")
    head = ["method", "against", "at equal", "pairs", f"difference{points}"]
    head += ["p (t)", "p (Holm)", "p (Wilcoxon)"]
    rows = []
    for _, test in study.comparisons.iterrows():
        cells = [study.describe(test["group"]), study.describe(test["baseline"]), test["equal"]]
        cells += [str(test["n"]), interval(test, study.metric, sign="+")]
        for p in test[["p", "holm", "wilcoxon"]]:
            cells.append(ABSENT if math.isnan(p) else f"{p:.4f}" if p >= 0.0001 else "< 0.0001")
        rows.append(cells)
    return Table(head, rows, 3)


def interval(found: Mapping[str, Any], metric: str, sign: str = "") -> str:
    """Mean ± half of the interval, in percent except for losses."""
    if found["n"] == 0:
        return ABSENT
    scale, digits = (1, 4) if metric.endswith("loss") else (100, 2)
    text = f"{scale * found['mean']:{sign}.{digits}f}"
    return f"{text} ± {scale * found['half']:.{digits}f}" if found["n"] > 1 else text


def metric_name(metric: str) -> str:
    """``val/acc`` in words."""
    split, _, name = metric.partition("/")
    return f"{SPLITS[split]} {NAMES[name]}"


def unit(metric: str) -> str:
    """The end of a heading for a metric."""
    return "" if metric.endswith("loss") else ", %"


def csv(study: Study) -> dict[str, str]:
    """``report.csv`` with a row per run, ``summary.csv`` with one per group; metrics as fractions.

    Settings are as on the command line, but floats with all digits, and nothing for no value.
    """
    shown = study.settings.map(lambda v: v if isinstance(v, float) else show(v)).astype(object)
    shown = shown.where(shown != ABSENT, None)
    measured = {k: v for k, v in sorted(study.estimates.items()) if v["n"].any() and k not in COSTS}
    runs = study.runs
    of_runs = [runs["folder"], shown.loc[runs.index], runs[["seed", *COSTS, "device", *measured]]]
    chosen = study.settings.index.isin(study.choices.values()).astype(int)
    of_groups = [shown.assign(n=runs.groupby(level=0).size(), chosen=chosen)]
    of_groups += [study.estimates[name]["mean"].rename(name) for name in COSTS]
    of_groups += [v.drop(columns="half").add_prefix(f"{k} ") for k, v in measured.items()]
    return {
        name: pd.concat(parts, axis=1).to_csv(index=False, lineterminator="\n")
        for name, parts in (("report.csv", of_runs), ("summary.csv", of_groups))
    }
