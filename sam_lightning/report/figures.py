"""The figures of a study: error against radius, accuracy against epochs and against cost."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sam_lightning.plots import plain, save, style
from sam_lightning.report.comparison import Group, Study
from sam_lightning.report.runs import curve
from sam_lightning.report.tables import spoken, unit

MARKERS = "osD^vPX*"
MARKER_SIZE = 5  # points


def draw(study: Study, folder: Path, formats: Sequence[str]) -> list[tuple[str, str]]:
    """Draw every figure that there is data for, one of each kind per data set and model.

    Returns:
        (file name without its ending, caption) of each.
    """
    subjects = [c for c in study.differing if c.partition(".")[0] in ("data", "model")]
    parts: dict[tuple[str, ...], list[Group]] = {}
    for group in study.groups:
        parts.setdefault(tuple(group.values[c] for c in subjects), []).append(group)
    drawn = []
    with style():
        for number, groups in enumerate(parts.values(), 1):
            ending = f"_{number}" if len(parts) > 1 else ""
            for name, kind in KINDS.items():
                figure = Figure(layout="constrained")
                caption = kind(study, groups, figure, subjects)
                if caption is None:
                    continue
                if subjects:
                    subject = study.words(groups[0], subjects)
                    caption = f"{subject}: {caption}"
                    figure.axes[0].set_title(plain(subject), loc="left")
                save(figure, folder / f"{name}{ending}", formats)
                drawn.append((f"{name}{ending}", caption))
    return drawn


def radius(
    study: Study, groups: Sequence[Group], figure: Figure, subjects: Sequence[str]
) -> str | None:
    """Error against rho, a line per method; what has rho 0 is a horizontal line with a band."""
    metric = study.metric
    if metric.endswith("/acc"):
        metric = metric.replace("/acc", "/error")
    lines: dict[str, list[Group]] = {}
    for group in groups:
        if group.estimate(metric) is not None and _rho(group) >= 0:
            name = plain(study.describe(group, without=["rho", *subjects]))
            lines.setdefault(name, []).append(group)
    rhos = sorted({_rho(g) for line in lines.values() for g in line} - {0.0})
    if not rhos:
        return None
    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    scale = _scale(metric)
    for i, (name, line) in enumerate(lines.items()):
        if (alone := next((g for g in line if _rho(g) == 0), None)) is not None:
            found = alone.estimate(metric)
            assert found is not None
            axes.axhline(scale * found.mean, color=f"C{i}", linestyle="--", label=name)
            if found.half is not None:
                low, high = found.mean - found.half, found.mean + found.half
                axes.axhspan(scale * low, scale * high, color=f"C{i}", alpha=0.12, linewidth=0)
            continue
        aside = (rhos[-1] / rhos[0]) ** _aside(i, len(lines))
        _error_bars(axes, i, name, line, [aside * _rho(g) for g in line], metric)
    _log_axis(axes, rhos)
    axes.set_xlabel("rho")
    axes.set_ylabel(f"{spoken(metric)}{unit(metric)}")
    _legend(figure)
    return (
        f"{spoken(metric)} against rho: means over seeds, bars and bands are 95 % intervals; "
        "lines without markers have no rho"
    )


def epochs(
    study: Study, groups: Sequence[Group], figure: Figure, subjects: Sequence[str]
) -> str | None:
    """Accuracy against epochs of the leading groups; bands from the lowest to the highest seed."""
    shown = [group for group in study.leading if group in groups]
    for metric in ("val/acc", "train/acc"):
        curves = [[curve(run, metric) for run in group.runs] for group in shown]
        if all(found for of_group in curves for found in of_group):
            break
    figure.set_size_inches(8, 4)
    axes = figure.subplots()
    for i, (group, of_group) in enumerate(zip(shown, curves, strict=True)):
        steps = sorted(set.intersection(*({*found} for found in of_group)))
        if not steps:
            continue
        seeds = [[100 * found[step] for found in of_group] for step in steps]
        name = plain(study.describe(group, without=subjects))
        means = [sum(values) / len(values) for values in seeds]
        (line,) = axes.plot(steps, means, color=f"C{i}", label=name)
        line.set(marker=MARKERS[i % len(MARKERS)], markersize=MARKER_SIZE)
        line.set_markevery(max(1, len(steps) // 10))
        if len(of_group) > 1:
            low, high = [min(values) for values in seeds], [max(values) for values in seeds]
            axes.fill_between(steps, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    if not axes.lines:
        return None
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(f"{spoken(metric)}{unit(metric)}")
    _legend(figure)
    return (
        f"{spoken(metric)} against epochs: means over seeds, bands from the lowest to the highest"
    )


def compute(
    study: Study, groups: Sequence[Group], figure: Figure, subjects: Sequence[str]
) -> str | None:
    """The compared metric of the leading groups against passes and, beside it, seconds."""
    metric = study.metric
    lines: dict[str, list[Group]] = {}
    for group in study.leading:
        if group in groups and group.estimate(metric) is not None:
            name = plain(study.describe(group, without=["epochs", *subjects]))
            lines.setdefault(name, []).append(group)
    panels = [
        (attribute, label)
        for attribute, label in (
            ("total_passes", "passes over the training images"),
            ("train_seconds", "seconds of training"),
        )
        if any(g.mean(attribute) is not None for line in lines.values() for g in line)
    ]
    if not panels:
        return None
    figure.set_size_inches(2.5 + 4 * len(panels), 4)
    for axes, (attribute, label) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for i, (name, line) in enumerate(lines.items()):
            costs = [(cost, g) for g in line if (cost := g.mean(attribute)) is not None]
            costs.sort(key=lambda pair: pair[0])
            if costs:
                at, points = zip(*costs, strict=True)
                measured = attribute == "train_seconds"
                aside = 1 if measured else 1 + _aside(i, len(lines))
                _error_bars(axes, i, name, points, [aside * cost for cost in at], metric)
        axes.set_xlabel(label)
        axes.margins(x=0.1)
        axes.set_xlim(left=0)
    figure.axes[0].set_ylabel(f"{spoken(metric)}{unit(metric)}")
    _legend(figure)
    return (
        f"{spoken(metric)} against cost: a point per length of training, means over seeds with "
        "95 % intervals"
    )


KINDS = {"rho": radius, "epochs": epochs, "compute": compute}


def _error_bars(
    axes: Axes, i: int, name: str, groups: Iterable[Group], at: Iterable[float], metric: str
) -> None:
    found = [e for group in groups if (e := group.estimate(metric)) is not None]
    scale = _scale(metric)
    axes.errorbar(
        list(at),
        [scale * e.mean for e in found],
        yerr=[math.nan if e.half is None else scale * e.half for e in found],
        color=f"C{i}",
        marker=MARKERS[i % len(MARKERS)],
        markersize=MARKER_SIZE,
        capsize=3,
        label=name,
    )


def _aside(i: int, count: int) -> float:
    """Part of the axis that a line is moved by, lest another with equal rho or cost hides it."""
    return min(0.006, 0.03 / count) * (i - (count - 1) / 2)


def _log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis whose marks are the values themselves, as far as there is room."""
    axes.set_xscale("log")
    if len(values) <= 10:
        axes.set_xticks(values)
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.1)


def _legend(figure: Figure) -> None:
    """Beside the axes, where it hides nothing; names too long for that below them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if max(map(len, names), default=0) <= 60:
        figure.legend(handles, names, loc="outside right upper")
        return
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.2 * len(names))
    figure.legend(handles, names, loc="outside lower left")


def _rho(group: Group) -> float:
    rho = group.values["rho"]
    return float(rho) if isinstance(rho, int | float) else -1.0


def _scale(metric: str) -> float:
    return 1 if metric.endswith("loss") else 100
