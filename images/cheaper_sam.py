"""``python images/cheaper_sam.py``: the part of SAM's gain that cheaper methods keep."""

import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from sam_lightning.config.arguments import Keys, help_of, parse
from sam_lightning.config.errors import one_line_errors
from sam_lightning.studies.report.comparison import TUNED, Study, analyse
from sam_lightning.studies.report.runs import COSTS, Run
from sam_lightning.studies.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
ABOUT = """
Draw how much of SAM's gain over SGD each method of the committed studies keeps, against its passes,
as PNG and SVG, and print the table. The numbers are in results/*/report.csv.

  python images/cheaper_sam.py out=images/cheaper_sam
"""
SHOWN = (-110, 215)  # of the y axis, in %; what lies outside is written at the edge
BY_DEFINITION = ("sgd", "sam")  # what keep 0 and 100 %, for the same epochs
HEAD = ("study", "method", "passes", "test accuracy, %", "gain kept, %", "95 % interval", "seeds")


@dataclass(frozen=True)
class Point:
    """A method of a study; ``passes`` and ``kept`` count SGD's and SAM's gain over it as 1.

    ``name`` has what tells the method from others, ``settings`` its radius and learning rate too.
    ``accuracy`` is mean and half of the interval, ``kept`` the part of the gain, low and high.
    """

    study: str
    name: str
    settings: str
    passes: float
    accuracy: tuple[float, float]
    kept: tuple[float, float, float]
    seeds: int


def read(file: Path) -> Study:
    """The runs of a committed ``report.csv``, compared as ``sam_lightning report`` does."""
    table = pd.read_csv(file).astype(object)
    table = table.where(table.notna(), None)
    names = [*table]
    of_settings = names[1 : names.index("seed")]
    measured = [*COSTS, *(name for name in names if "/" in name)]
    runs = [
        Run(
            folder=Path(row["folder"]),
            seed=row["seed"],
            device=row["device"],
            settings={k: row[k] for k in of_settings if row[k] is not None},
            results={k: row[k] for k in measured},
            summary={},
            written=0,
        )
        for _, row in table.iterrows()
    ]
    return analyse(runs, "test/acc", "sgd")


def part(gain: np.ndarray, of: np.ndarray) -> tuple[float, float, float]:
    """``mean(gain) / mean(of)`` of pairs, and its 95 % interval by Fieller 1954.

    It has the ratios r at which a t test finds no difference between ``gain`` and ``r * of``. The
    t test must find that ``of`` is not zero; else there is no such interval.
    """
    (gain_variance, covariance), (_, of_variance) = np.cov(gain, of)
    t = stats.t.ppf(0.975, len(of) - 1) ** 2 / len(of)
    mean, of_mean = gain.mean(), of.mean()
    # The interval is where a r^2 - 2 b r + c <= 0.
    a, b = of_mean**2 - t * of_variance, mean * of_mean - t * covariance
    c = mean**2 - t * gain_variance
    half = math.sqrt(max(b * b - a * c, 0))
    return float(mean / of_mean), float((b - half) / a), float((b + half) / a)


def points(name: str, study: Study) -> Iterator[Point | str]:
    """The methods of a study; a sentence in place of a SAM that is not significantly better."""
    free = [*TUNED, "epochs", *study.subjects]
    names = {g: study.describe(g, without=free) for g in study.leading}
    accuracy = study.runs.set_index("seed", append=True)["test/acc"].astype(float)
    passes = study.estimates["total_passes"]["mean"]
    for _, test in study.comparisons.iterrows():
        sam, sgd = int(test["group"]), int(test["baseline"])
        if names[sam] != "sam" or "epochs" not in test["equal"] or test["n"] < 2:
            continue
        subject = study.subject[sam]
        title = ", ".join(filter(None, [name, subject]))
        if not test["holm"] < 0.05:
            yield f"{title}: SAM - SGD = {100 * test['mean']:.1f}, p = {test['holm']:.2f}"
            continue
        gain = (accuracy[sam] - accuracy[sgd]).dropna()
        for group in (g for g in study.leading if study.subject[g] == subject):
            found = study.estimates["test/acc"].loc[group]
            ours = (accuracy[group] - accuracy[sgd])[gain.index]
            yield Point(
                study=title,
                name=names[group],
                settings=study.describe(group, without=study.subjects),
                passes=passes[group] / passes[sgd],
                accuracy=(found["mean"], found["half"]),
                kept=part(ours.to_numpy(), gain.to_numpy()),
                seeds=len(gain),
            )


def committed() -> tuple[list[Point], list[str]]:
    """The points of all studies with SGD and a SAM that is better, and sentences on the others."""
    files = sorted(ROOT.glob("results/*/report.csv"))
    found = [p for file in files for p in points(file.parent.name, read(file))]
    shown = [p for p in found if isinstance(p, Point)]
    return shown, [p for p in found if isinstance(p, str)]


def table(shown: list[Point]) -> Table:
    """A row per point, the cheapest of a study first; of studies of SGD and SAM alone, one row."""
    rows = []
    of_methods = {p.study for p in shown if p.name not in BY_DEFINITION}
    for point in sorted(shown, key=lambda p: (p.study, p.passes)):
        if point.study not in of_methods and point.kept[0] in (0, 1):
            continue
        mean, half = point.accuracy
        kept, low, high = (f"{100 * value:.0f}" for value in point.kept)
        cells = [point.study, point.settings, f"{point.passes:.3g}"]
        cells += [f"{100 * mean:.1f} ± {100 * half:.1f}", kept]
        cells += ["" if low == high else f"{low} to {high}", str(point.seeds)]
        rows.append(cells)
    return Table(HEAD, rows, range(2))


def draw(shown: list[Point], out: Path) -> list[Path]:
    """The methods against their passes and, beside them, SGD that trains as long as SAM."""
    from matplotlib.figure import Figure

    from sam_lightning import plotting as plots
    from sam_lightning.studies.report.figures import MARKERS

    methods = sorted((p for p in shown if p.name not in BY_DEFINITION), key=lambda p: p.passes)
    longer = [p for p in shown if p.name == "sgd" and p.passes > 1]
    names, studies = (
        list(dict.fromkeys(of)) for of in ([p.name for p in methods], [p.study for p in methods])
    )
    with plots.style():
        figure = Figure((9, 5.4), layout="constrained")
        graph, beside = figure.subplots(1, 2, sharey=True, width_ratios=[3.4, 1])
        for name, colour, marker in zip(names, plots.colours(names), cycle(MARKERS), strict=False):
            for point in (p for p in methods if p.name == name):
                same = [p for p in methods if p.passes == point.passes]
                x = point.passes + 0.015 * (same.index(point) - (len(same) - 1) / 2)
                face = (colour, "white")[studies.index(point.study)]
                _point(graph, x, point, {"color": colour, "marker": marker, "mfc": face})
            graph.plot([], [], marker, color=colour, label=name)
        for study, face in zip(studies, ("#666666", "white"), strict=False):
            graph.plot([], [], "o", color="#666666", mfc=face, label=study)
        for x, point in enumerate(longer):
            _point(beside, x, point, {"color": plots.METHODS["sgd"], "marker": "o"})
        beside.set_xticks(
            range(len(longer)), [p.study.replace(", ", "\n") for p in longer], rotation=90
        )
        beside.set(title="SGD, twice the epochs", xlim=(-0.6, len(longer) - 0.4))
        for axes in (graph, beside):
            for level in (0, 100):
                axes.axhline(level, color="#444444", linewidth=0.9, zorder=1)
        for level, name in ((0, "SGD"), (100, "SAM")):
            graph.annotate(name, (2.075, level), (0, 3), textcoords="offset points", ha="right")
        graph.set(xlabel="passes a step", ylabel="part of SAM's gain over SGD, %")
        graph.set(xlim=(0.94, 2.08), ylim=SHOWN)
        graph.legend(loc="upper left", bbox_to_anchor=(-0.06, -0.13), ncols=3, columnspacing=1)
        return plots.save(figure, out)


def _point(axes: "Axes", x: float, point: Point, look: dict[str, Any]) -> None:
    """The part of the gain with its interval; at the edge, and written, where it is outside."""
    kept, low, high = (100 * value for value in point.kept)
    bars = [[kept - low], [high - kept]]
    axes.errorbar([x], [kept], bars, capsize=2, linewidth=1.2, markersize=6, **look)
    if not SHOWN[0] < kept < SHOWN[1]:
        at = {"xy": (x, SHOWN[kept > 0]), "xytext": (x, SHOWN[kept > 0] + (35, -35)[kept > 0])}
        arrow = {"arrowstyle": "->", "color": look["color"]}
        axes.annotate(f"{kept:.0f}", **at, ha="center", color=look["color"], arrowprops=arrow)


KEYS: Keys = {"out": ("images/cheaper_sam", str)}


def main(argv: list[str]) -> None:
    """Draw the figure, and print the table and what is left out."""
    if {"-h", "--help"} & {*argv}:
        print(help_of(ABOUT, KEYS))
        return
    options = parse(KEYS, argv)
    shown, left_out = committed()
    print(table(shown).markdown(), *left_out, sep="\n")
    print(*map(os.path.relpath, draw(shown, Path(str(options.out)).expanduser())))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
