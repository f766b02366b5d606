"""A study as tables: for Markdown and LaTeX, and as CSV for other programs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from rich.table import Table as RichTable
from rich.text import Text

from sam_lightning.studies.report.comparison import ABSENT, SELECTION, Study, show, title
from sam_lightning.studies.report.runs import COSTS

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
    best = [group in study.choices.values() for group in study.settings.index]
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
    return Table(head, rows, 3, [False] * len(rows))


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


def runs_csv(study: Study) -> str:
    """A row per run: folder, settings, seed, costs and every metric as a fraction."""
    index = study.runs.index
    folder, seed, device = (
        pd.Series([getattr(run, name) for run in study.runs["run"]], index, object, name)
        for name in ("folder", "seed", "device")
    )
    settings = _as_typed(study.settings).loc[index]
    costs, metrics = study.runs[[*COSTS]], study.runs[_metrics(study)]
    return _csv([folder, settings, seed, costs, device, metrics])


def groups_csv(study: Study) -> str:
    """A row per group; of every metric mean, standard deviation and interval, as fractions."""
    parts = [_as_typed(study.settings), study.runs.groupby(level=0).size().rename("n")]
    chosen = study.settings.index.isin(study.choices.values()).astype(int)
    parts.append(pd.Series(chosen, name="chosen"))
    parts += [study.estimates[name]["mean"].rename(name) for name in COSTS]
    for name in _metrics(study):
        parts.append(study.estimates[name].drop(columns="half").add_prefix(f"{name} "))
    return _csv(parts)


def _csv(parts: Sequence[Any]) -> str:
    return pd.concat(parts, axis=1).to_csv(index=False, lineterminator="\n")


def _metrics(study: Study) -> list[str]:
    return sorted(k for k, found in study.estimates.items() if found["n"].any() and k not in COSTS)


def _as_typed(settings: pd.DataFrame) -> pd.DataFrame:
    """Settings as on the command line, but floats with all digits, and nothing for no value."""
    shown = settings.map(lambda value: value if isinstance(value, float) else show(value))
    return shown.astype(object).where(shown != ABSENT, None)
