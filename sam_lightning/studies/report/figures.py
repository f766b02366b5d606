"""The figures of a study: its metric against rho, against epochs, and against cost."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_lightning.plotting import UNDATED, plain, save, style
from sam_lightning.studies.report.comparison import Study
from sam_lightning.studies.report.runs import curve
from sam_lightning.studies.report.tables import metric_name, percent, unit

MARKERS = "osD^vPX*"


def draw(study: Study, folder: Path, formats: Sequence[str]) -> dict[str, str]:
    """Draw every figure that there is data for, one of each kind per data set and model.

    Returns:
        the caption of each file, by its name without the ending.
    """
    parts, drawn = study.subject.groupby(study.subject, sort=False), {}
    with style():
        for number, (subject, of_groups) in enumerate(parts, 1):
            groups = [*of_groups.index]
            for kind, plot in KINDS.items():
                figure = Figure((8, 4), layout="constrained")
                caption = plot(study, groups, figure)
                if caption is None:
                    continue
                if subject:
                    caption = f"{subject}: {caption}"
                    figure.axes[0].set_title(plain(subject), loc="left")
                name = f"{kind}_{number}" if len(parts) > 1 else kind
                save(figure, folder / name, formats)
                drawn[name] = caption
    for file in folder.iterdir():  # of an earlier report
        ours = re.fullmatch(rf"({'|'.join(KINDS)})(_\d+)?", file.stem)
        if ours and file.stem not in drawn and file.suffix[1:] in UNDATED:
            file.unlink()
    return drawn


def metric_against_rho(study: Study, groups: Sequence[int], figure: Figure) -> str | None:
    """A line per method; a horizontal line with a band for leading groups whose rho is 0."""
    rho = {g: v for g, v in study.settings["rho"].items() if isinstance(v, int | float)}
    shown = [g for g in groups if g in rho and (rho[g] != 0 or g in study.leading)]
    lines = _lines(study, shown, "rho")
    rhos = sorted({rho[group] for line in lines.values() for group in line} - {0})
    if not rhos:
        return None
    axes = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        found = _estimates(study, line)
        if rho[line[0]] != 0:
            aside = (rhos[-1] / rhos[0]) ** _aside(i, len(lines))
            _error_bars(axes, i, name, [aside * rho[g] for g in line], found)
            continue
        mean, low, high = found[["mean", "low", "high"]].iloc[0]
        axes.axhline(mean, color=f"C{i}", linestyle="--", label=name)
        if not math.isnan(low):
            axes.axhspan(low, high, color=f"C{i}", alpha=0.12, linewidth=0)
    axes.set_xscale("log")
    if len(rhos) <= 10:
        axes.set_xticks(rhos)
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1)
    _label(figure, "rho", study.metric)
    return (
        f"{metric_name(study.metric)} against rho: means over seeds, bars and bands are 95 % "
        "intervals; lines without markers have no rho"
    )


def metric_against_epochs(study: Study, groups: Sequence[int], figure: Figure) -> str | None:
    """A line per leading group; bands from the lowest to the highest seed."""
    shown = [group for group in study.leading if group in groups]
    kind = study.metric.partition("/")[2]
    for metric in (f"val/{kind}", f"train/{kind}"):
        logged = metric.replace("/error", "/acc")
        curves = [
            [curve(folder, logged) for folder in study.runs["folder"][[group]]] for group in shown
        ]
        if all(len(values) for of_group in curves for values in of_group):
            break
    axes = figure.subplots()
    for i, (group, of_group) in enumerate(zip(shown, curves, strict=True)):
        seeds = pd.concat(of_group, axis=1, join="inner").sort_index()
        if seeds.empty:
            continue
        seeds = percent(metric) * (1 - seeds if kind == "error" else seeds)
        name = plain(study.describe(group, without=study.subjects))
        every = max(1, len(seeds) // 10)
        axes.plot(seeds.index, seeds.mean(axis=1), label=name, markevery=every, **_marked(i))
        if len(of_group) > 1:
            band = seeds.min(axis=1), seeds.max(axis=1)
            axes.fill_between(seeds.index, *band, color=f"C{i}", alpha=0.15, linewidth=0)
    if not axes.lines:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(figure, "epoch", metric)
    return (
        f"{metric_name(metric)} against epochs: means over seeds, bands from the lowest to the "
        "highest"
    )


def metric_against_cost(study: Study, groups: Sequence[int], figure: Figure) -> str | None:
    """The leading groups' metric against passes and, beside it, seconds."""
    lines = _lines(study, [group for group in study.leading if group in groups], "epochs")
    costs = {
        "total_passes": "passes over the training images",
        "train_seconds": "seconds of training",
    }
    shown = [group for line in lines.values() for group in line]
    means = {cost: study.estimates[cost]["mean"][shown].dropna() for cost in costs}
    measured = [cost for cost in costs if len(means[cost])]
    if not measured:
        return None
    figure.set_size_inches(2.5 + 4 * len(measured), 4)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, measured, strict=True):
        for i, (name, line) in enumerate(lines.items()):
            aside = 1 + _aside(i, len(lines)) if cost == "total_passes" else 1
            at = means[cost][means[cost].index.isin(line)].sort_values(kind="stable")
            if len(at):
                _error_bars(axes, i, name, aside * at, _estimates(study, at.index))
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
        axes.set_xlabel(costs[cost])
    _label(figure, costs[measured[0]], study.metric)
    return (
        f"{metric_name(study.metric)} against cost: a point per length of training, means over "
        "seeds with 95 % intervals"
    )


KINDS = {
    "rho": metric_against_rho,
    "epochs": metric_against_epochs,
    "compute": metric_against_cost,
}


def _lines(study: Study, groups: Iterable[int], along: str) -> dict[str, list[int]]:
    """The groups that have the metric, by their description without the setting of the x axis."""
    lines: dict[str, list[int]] = {}
    for group in groups:
        if study.estimates[study.metric].at[group, "n"]:
            name = plain(study.describe(group, without=[along, *study.subjects]))
            lines.setdefault(name, []).append(group)
    return lines


def _error_bars(axes: Axes, i: int, name: str, at: Sequence[float], found: pd.DataFrame) -> None:
    axes.errorbar(at, found["mean"], found["half"], capsize=3, label=name, **_marked(i))


def _marked(i: int) -> dict[str, Any]:
    """The colour and the marker of a line, for those who see no colours."""
    return {"color": f"C{i}", "marker": MARKERS[i % len(MARKERS)], "markersize": 5}


def _aside(i: int, count: int) -> float:
    """Part of the axis that a line is moved by, lest another with equal rho or cost hides it."""
    return min(0.006, 0.03 / count) * (i - (count - 1) / 2)


def _estimates(study: Study, groups: Sequence[int]) -> pd.DataFrame:
    """The groups' estimates of the metric in percent, except for losses."""
    return percent(study.metric) * study.estimates[study.metric].loc[groups]


def _label(figure: Figure, x: str, metric: str) -> None:
    """Name the first axes; put the legend beside all, or below where its names are long."""
    figure.axes[0].set_xlabel(x)
    figure.axes[0].set_ylabel(f"{metric_name(metric)}{unit(metric)}")
    handles, names = figure.axes[0].get_legend_handles_labels()
    if max(map(len, names), default=0) <= 60:
        figure.legend(handles, names, loc="outside right upper")
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(names))
    figure.legend(handles, names, loc="outside lower left")
