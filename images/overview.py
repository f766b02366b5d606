"""``python images/overview.py``: the README's first picture, drawn from committed results."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from sam_lightning.config.arguments import Keys, help_of, parse
from sam_lightning.config.errors import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
ABOUT = """
Draw the loss around the minima of SGD and SAM beside accuracy against epochs, as PNG and SVG. The
numbers are in images/landscape.json and results/digits_label_noise/runs.json.

  python images/overview.py out=images/overview
"""
# Arm and settings of a line, its name and style. SAM's rho is the one that validation chose.
LINES: tuple[tuple[str, dict[str, float], str, str], ...] = (
    ("sam", {"rho": 0.2}, "SAM, 15 epochs", "-"),
    ("sgd", {}, "SGD, 15 epochs", "-"),
    ("sgd_twice", {}, "SGD, 30 epochs", "--"),
)


def curves(runs: Sequence[dict[str, Any]], arm: str, settings: dict[str, float]) -> np.ndarray:
    """Validation accuracies in %, a row per seed and a column per epoch."""
    found = [r["curves"]["val/acc"] for r in runs if (r["arm"], r["settings"]) == (arm, settings)]
    return 100 * np.array(found)


def draw(options: DictConfig) -> list[Path]:
    """Two landscapes with one scale of colours, and the curves of a study."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    from sam_lightning import plotting as plots
    from sam_lightning.analysis.landscape_plots import COLOURS, bounds, ticks

    landscape = json.loads((ROOT / "images/landscape.json").read_text())
    study = json.loads((ROOT / "results/digits_label_noise/runs.json").read_text())
    low, high = bounds(landscape)
    with plots.style():
        figure = Figure((9, 3.2), layout="constrained")
        *maps, graph = figure.subplots(1, 3, width_ratios=[1, 1, 1.4])
        x, levels = landscape["coordinates"], np.geomspace(low, high, 19)
        levels[[0, -1]] = low, high  # not a rounding error inside
        for axes, name, loss in zip(maps, landscape["labels"], landscape["loss"], strict=True):
            shown = np.clip(np.array(loss), low, 2 * high).T  # a picture's rows are its second axis
            axes.contourf(x, x, shown, levels, norm=LogNorm(low, high), cmap=COLOURS, extend="max")
            axes.contour(x, x, shown, levels[2::2], colors="white", linewidths=0.5, alpha=0.6)
            axes.plot(0, 0, "+", color="white", markersize=8)
            axes.set(title=f"{name}: training loss", aspect="equal", xticks=[], yticks=[])
            axes.set_xlabel("weights along two directions")
        bar = figure.colorbar(ScalarMappable(LogNorm(low, high), COLOURS), ax=maps, shrink=0.75)
        bar.set_ticks(marks := ticks(low, high), labels=[f"{t:g}" for t in marks])
        bar.minorticks_off()
        colours = plots.colours(name for _, _, name, _ in LINES)
        for (arm, settings, name, style), colour in zip(LINES, colours, strict=True):
            accuracy = curves(study["runs"], arm, settings)
            epochs = range(1, 1 + accuracy.shape[1])
            graph.plot(epochs, accuracy.mean(0), style, color=colour, label=name)
            band = accuracy.min(0), accuracy.max(0)
            graph.fill_between(epochs, *band, color=colour, alpha=0.12, linewidth=0)
        graph.set(title="accuracy on right labels", xlabel="epoch")
        graph.set_ylabel("validation accuracy, %")
        graph.legend(loc="lower right")
        return plots.save(figure, Path(str(options.out)).expanduser())


KEYS: Keys = {"out": ("images/overview", str)}


def main(argv: list[str]) -> None:
    """Draw the figure."""
    if {"-h", "--help"} & {*argv}:
        print(help_of(ABOUT, KEYS))
        return
    print(*map(os.path.relpath, draw(parse(KEYS, argv))))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
