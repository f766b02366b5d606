"""The figures of a study: its metric against rho, against epochs, and against cost."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_lightning.plotting import UNDATED, colours, dash, legend, plain, save, style
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
    with_rho = sum(rho[line[0]] != 0 for line in lines.values())
    aside = _aside(with_rho, 0.012, 0.09)
    for look, line in zip(_looks(lines), lines.values(), strict=True):
        found = _estimates(study, line)
        if rho[line[0]] != 0:
            factor = max(2, rhos[-1] / rhos[0]) ** next(aside)
            _error_bars(axes, look, [factor * rho[g] for g in line], found)
            continue
        mean, low, high = found[["mean", "low", "high"]].iloc[0]
        axes.axhline(mean, **{**look, "marker": ""})
        if not math.isnan(low):
            axes.axhspan(low, high, color=look["color"], alpha=0.12, linewidth=0)
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
    bands = len(shown) <= 4  # more would cover each other
    looks = _looks(plain(study.describe(group, without=study.subjects)) for group in shown)
    for look, of_group in zip(looks, curves, strict=True):
        seeds = pd.concat(of_group, axis=1, join="inner").sort_index()
        if seeds.empty:
            continue
        seeds = percent(metric) * (1 - seeds if kind == "error" else seeds)
        axes.plot(seeds.index, seeds.mean(axis=1), markevery=max(1, len(seeds) // 10), **look)
        if bands and len(of_group) > 1:
            band = seeds.min(axis=1), seeds.max(axis=1)
            axes.fill_between(seeds.index, *band, color=look["color"], alpha=0.15, linewidth=0)
    if not axes.lines:
        return None
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(figure, "epoch", metric)
    bands_are = ", bands from the lowest to the highest" if bands else ""
    return f"{metric_name(metric)} against epochs: means over seeds{bands_are}"


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
    figure.set_size_inches(2 + 3.2 * len(measured), 4)
    panels = figure.subplots(1, len(measured), sharey=True, squeeze=False)[0]
    for axes, cost in zip(panels, measured, strict=True):
        aside = _aside(len(lines), 0.006, 0.03 if cost == "total_passes" else 0)
        for look, line in zip(_looks(lines), lines.values(), strict=True):
            at = means[cost][means[cost].index.isin(line)].sort_values(kind="stable")
            factor = 1 + next(aside)
            if len(at):
                _error_bars(axes, look, factor * at, _estimates(study, at.index))
        axes.margins(x=0.1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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


def _error_bars(axes: Axes, look: dict[str, Any], at: Sequence[float], found: pd.DataFrame) -> None:
    half = found["half"] if found["half"].notna().any() else None
    axes.errorbar(at, found["mean"], half, capsize=3, **look)


def _looks(names: Iterable[str]) -> list[dict[str, Any]]:
    """The lines' names, the colours of their methods, and what tells them apart without colours."""
    names = [*names]
    looks: list[dict[str, Any]] = []
    for i, (name, colour) in enumerate(zip(names, of_names := colours(names), strict=True)):
        # Of one method the line with the shortest name, which is the method as it is, comes first.
        same = [n for n, other in zip(names, of_names, strict=True) if other == colour]
        place = sorted(same, key=len).index(name)
        look = {"label": name, "color": colour, "linestyle": dash(place), "markersize": 5}
        look |= {"marker": MARKERS[i % len(MARKERS)]}
        looks.append(look | {"markerfacecolor": "white" if place else colour})
    return looks


def _aside(count: int, each: float, all_of_them: float) -> Iterator[float]:
    """Part of the axis that each line is moved by, lest others of equal rho or cost hide it."""
    step = min(each, all_of_them / max(count, 1))
    return (step * (i - (count - 1) / 2) for i in range(count))


def _estimates(study: Study, groups: Sequence[int]) -> pd.DataFrame:
    """The groups' estimates of the metric in percent, except for losses."""
    return percent(study.metric) * study.estimates[study.metric].loc[groups]


def _label(figure: Figure, x: str, metric: str) -> None:
    """Name the first axes, and the lines."""
    axes = figure.axes[0]
    axes.set_xlabel(x)
    axes.set_ylabel(f"{metric_name(metric)}{unit(metric)}")
    if percent(metric) == 100:  # the interval of two seeds may leave 0..100 %
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -2), min(high, 102))
    legend(figure)
