"""A study as tables, and as CSV for other programs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from sam_lightning.config.errors import ConfigError, did_you_mean
from sam_lightning.config.schema import METRICS
from sam_lightning.config.text import clean
from sam_lightning.studies.report.comparison import ABSENT, Study
from sam_lightning.studies.report.runs import COSTS
from sam_lightning.studies.table import Table, title, typed

NAMES = {"acc": "accuracy", "acc5": "top-5 accuracy", "error": "error", "loss": "loss"}
SPLITS = {"val": "validation", "test": "test", "train": "train"}
# What the costs are called, and how they are written.
FORMATS = {
    "passes": ("passes/step", "{:.3g}"),
    "total_passes": ("passes", "{:.4g}"),
    "train_seconds": ("train s", "{:,.1f}"),
    "images_per_second": ("images/s", "{:,.0f}"),
}


def results(study: Study, chosen: Sequence[str] | None = None) -> Table:
    """A row per group: settings, metrics and costs, or the ``chosen`` columns; the best is bold.

    Raises:
        ConfigError: there is no such column.
    """
    settings, sizes = study.settings, study.runs.groupby(level=0).size()
    # By name: the heading, and a cell per group.
    columns = {c: (title(c, settings), [*map(typed, settings[c])]) for c in settings}
    columns |= {c: (c, [typed(v)] * len(settings)) for c, v in study.common.items()}
    columns["n"] = ("n", [*map(str, sizes)])
    for name in METRICS:
        if (found := study.estimates[name])["n"].any():
            cells = [interval(row, name, of=sizes[group]) for group, row in found.iterrows()]
            columns[name] = (f"{metric_name(name)}{unit(name)}", cells)
    for cost, (name, form) in FORMATS.items():
        means = study.estimates[cost]["mean"]
        columns[cost] = (name, [ABSENT if math.isnan(m) else form.format(m) for m in means])
    if chosen is None:
        metrics = (f"val/{study.kind}", f"test/{study.kind}", study.metric)
        names = dict.fromkeys([*settings, "n", *metrics, *FORMATS])
    else:
        names = dict.fromkeys(_known(name, columns) for name in chosen)
    shown = [name for name in names if name in columns]
    head, by_column = zip(*(columns[name] for name in shown), strict=True)
    left = [i for i, name in enumerate(shown) if name in {*settings, *study.common}]
    strong = {(g, i) for i, name in enumerate(shown) if name in METRICS for g in study.best(name)}
    return Table(head, [*zip(*by_column, strict=True)], left, strong)


def _known(name: str, columns: Iterable[str]) -> str:
    """The column of this name, or the only one that ends in it, as ``lr`` in ``optimizer.lr``."""
    ends = [c for c in columns if c == name] or [c for c in columns if c.endswith(f".{name}")]
    if len(ends) != 1:
        hint = did_you_mean(name, columns) or f"; there are {', '.join(ends or columns)}"
        raise ConfigError(f"columns: no column {name}{hint}")
    return ends[0]


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
    return Table(head, rows, range(3))


def interval(found: Mapping[str, Any], metric: str, sign: str = "", of: int = 0) -> str:
    """Mean ± half of the interval, in percent except for losses; n where not all ``of`` have it."""
    if found["n"] == 0:
        return ABSENT
    scale, digits = percent(metric), 4 if metric.endswith("loss") else 2
    text = f"{scale * found['mean']:{sign}.{digits}f}"
    text += f" ± {scale * found['half']:.{digits}f}" if found["n"] > 1 else ""
    return f"{text} (n={found['n']:.0f})" if found["n"] < of else text


def metric_name(metric: str) -> str:
    """``val/acc`` in words."""
    split, _, name = metric.partition("/")
    return f"{SPLITS[split]} {NAMES[name]}"


def percent(metric: str) -> int:
    """What a metric is multiplied by where it is shown: losses are shown as they are."""
    return 1 if metric.endswith("loss") else 100


def unit(metric: str) -> str:
    """The end of a heading for a metric."""
    return "" if metric.endswith("loss") else ", %"


def csv(study: Study) -> dict[str, str]:
    """``report.csv`` with a row per run, ``summary.csv`` with one per group; metrics as fractions.

    Settings are as on the command line, but floats with all digits, and nothing for no value.
    """

    def safe(text: Any) -> str:
        return clean(text, "csv", undecoded=True)

    shown = study.settings.map(lambda v: v if isinstance(v, float) else safe(typed(v)))
    shown = shown.astype(object).where(shown != ABSENT, None)
    measured = {k: v for k, v in sorted(study.estimates.items()) if v["n"].any() and k not in COSTS}
    runs = study.runs.assign(**{c: study.runs[c].map(safe) for c in ("folder", "device")})
    of_runs = [runs["folder"], shown.loc[runs.index], runs[["seed", *COSTS, "device", *measured]]]
    chosen = study.settings.index.isin(study.choices.values()).astype(int)
    of_groups = [shown.assign(n=runs.groupby(level=0).size(), chosen=chosen)]
    of_groups += [study.estimates[name]["mean"].rename(name) for name in COSTS]
    of_groups += [v.drop(columns="half").add_prefix(f"{k} ") for k, v in measured.items()]

    return {
        name: pd.concat(parts, axis=1).rename(columns=safe).to_csv(index=False, lineterminator="\n")
        for name, parts in (("report.csv", of_runs), ("summary.csv", of_groups))
    }
