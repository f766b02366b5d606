"""What ``landscape.json`` holds, as pictures."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from sam_lightning import plotting as plots
from sam_lightning.config.errors import one_line

COLOURS = matplotlib.colormaps[plots.HEIGHTS].with_extremes(over="#E8E8E8")


def draw(result: Mapping[str, Any], out: Path) -> list[Path]:
    """Draw what ``landscape.main`` computed: of ``2d`` contours and surfaces, else lines."""
    result = {**result, "labels": [plots.plain(label) for label in result["labels"]]}
    with plots.style():
        if result["kind"] == "2d":
            figures = {"landscape": contours(result), "landscape_3d": surfaces(result)}
        else:
            figures = {f"landscape_{result['kind']}": lines(result)}
        return [file for name, figure in figures.items() for file in plots.save(figure, out / name)]


def show_in_tensorboard(folder: Path, update: int, kind: str, pictures: Sequence[Path]) -> None:
    """Log pictures of a kind and remove the earlier ones; if this fails, only say so.

    The folder is not the one of the run's own events: TensorBoard takes a file for complete if
    there is a newer one beside it, and would miss the curves of a run that goes on.
    """
    from torch.utils.tensorboard import SummaryWriter

    earlier = [*folder.glob(f"*.{kind}")]
    try:
        with SummaryWriter(folder, filename_suffix=f".{kind}") as writer:
            for picture in pictures:
                if picture.suffix == ".png":
                    name = picture.stem.partition("_")[2] or kind
                    with Image.open(picture) as image:
                        pixels = np.asarray(image.convert("RGB"))
                    writer.add_image(f"landscape/{name}", pixels, update, dataformats="HWC")
        for file in earlier:
            file.unlink()
    except OSError as error:
        print(f"warning: {folder}: gets no pictures ({one_line(error)})", file=sys.stderr)


def bounds(result: Mapping[str, Any]) -> tuple[float, float]:
    """The lowest loss, and the highest or, if that is less, ten times the loss of guessing.

    Far away the loss explodes; without the cut no colours would be left for the valley.
    """
    losses = _losses(result)
    high = max(min(losses.max(), 10 * result["guessing"]), 1e-6)
    return min(max(losses.min(), high / 1e4), high / 1.01), high


def contours(result: Mapping[str, Any]) -> Figure:
    """A panel per checkpoint, seen from above, with one scale of colours."""
    losses, x = _losses(result), result["coordinates"]
    low, high = bounds(result)
    levels = np.geomspace(low, high, 19)
    levels[[0, -1]] = low, high  # not a rounding error inside
    figure, row = plots.panels(len(losses), 3.2, 3.0, sharey=True)
    for axes, label, loss in zip(row, result["labels"], losses, strict=True):
        shown = np.clip(loss, low, 2 * high).T  # the rows of a picture are its second axis
        axes.contourf(x, x, shown, levels, norm=LogNorm(low, high), cmap=COLOURS, extend="max")
        axes.contour(x, x, shown, levels[2::2], colors="white", linewidths=0.5, alpha=0.6)
        axes.plot(0, 0, "+", color="white", markersize=8)
        axes.set(title=fill(label, 30), xlabel="along the first direction", aspect="equal")
        axes.locator_params(nbins=4, prune="both")
        axes.grid(False)
    row[0].set_ylabel("along the second direction")
    _colour_bar(figure, row, result)
    return figure


def surfaces(result: Mapping[str, Any]) -> Figure:
    """A panel per checkpoint, in perspective; heights are logarithmic, as colours are.

    Between the points that were computed they are linear. What is too high is cut off.
    """
    losses, coarse = _losses(result), result["coordinates"]
    low, high = bounds(result)
    marks = ticks(low, high)
    if len(marks) > 5:  # no room for more
        marks = [10.0**e for e in range(-12, 6) if low <= 10**e <= high]
    figure, row = plots.panels(len(losses), 3.8, 3.3, subplot_kw={"projection": "3d"})
    halves = [share * coarse[-1] for share in (-0.5, 0, 0.5)]
    sides = len(coarse) - 1
    fine = np.linspace(coarse[0], coarse[-1], sides * math.ceil(60 / sides) + 1)
    x, y = np.meshgrid(fine, fine)
    shown: Any
    for shown, label, loss in zip(row, result["labels"], losses, strict=True):
        height = np.log10(np.clip(loss, low, 2 * high)).T
        for axis in (0, 1):
            height = np.apply_along_axis(lambda z: np.interp(fine, coarse, z), axis, height)
        height[height > np.log10(high)] = np.nan
        colours = ScalarMappable(LogNorm(low, high), COLOURS).to_rgba(10**height)
        faces = {"facecolors": colours, "shade": False, "rcount": len(fine), "ccount": len(fine)}
        # Thousands of faces, between which antialiasing would leave seams.
        shown.plot_surface(x, y, height, **faces, antialiased=False, rasterized=True)
        shown.set_title(fill(label, 30), y=1.0)
        shown.set_zlim(np.log10(low), np.log10(high))
        shown.set_zticks(np.log10(marks), labels=[f"{t:g}" for t in marks])
        shown.set(xticks=halves, yticks=halves)
        shown.set_xlabel("first direction", labelpad=2)
        shown.set_ylabel("second direction", labelpad=2)
        shown.tick_params(pad=0)
        shown.set_box_aspect(None, zoom=0.85)  # the layout leaves no room for the labels
        shown.view_init(elev=28, azim=-58)
    _colour_bar(figure, row, result)
    return figure


def ticks(low: float, high: float) -> list[float]:
    """Of 1, 2, 5, 10, 20 and so on, those that are in range."""
    return [t for e in range(-12, 6) for t in (10**e, 2 * 10**e, 5 * 10**e) if low <= t <= high]


def lines(result: Mapping[str, Any]) -> Figure:
    """Of ``1d`` a line per checkpoint; of ``line`` the loss between two, named at the ends."""
    figure, (axes,) = plots.panels(1, 6, 3.4)
    losses, x, labels = _losses(result), result["coordinates"], result["labels"]
    if result["kind"] == "1d":
        for i, (loss, colour) in enumerate(zip(losses, plots.colours(labels), strict=True)):
            axes.plot(x, loss, color=colour, linestyle=plots.dash(i), label=labels[i])
        axes.set_xlabel("along a filter-normalised direction")
        plots.legend(figure)
    else:
        axes.plot(x, losses[0], marker="o", markersize=3)
        first, second = (fill(label, 12) for label in labels)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], [first, "1/4", "1/2", "3/4", second])
        axes.set_xlabel("on the line between the weights")
    axes.set_ylabel(_loss_of(result))
    low, high = bounds(result)
    if high > 30 * low:
        axes.set(yscale="log", ylim=(low / 1.2, 1.2 * high))
    else:
        axes.set_ylim(0, 1.05 * high)
    return figure


def _losses(result: Mapping[str, Any]) -> np.ndarray:
    losses = np.array(result["loss"], dtype=float)
    return np.where(np.isfinite(losses), losses, np.inf)


def _loss_of(result: Mapping[str, Any]) -> str:
    split = {"train": "training", "val": "validation"}.get(result["split"], result["split"])
    return f"{split} loss, {result['images']:,} images"


def _colour_bar(figure: Figure, row: list[Axes], result: Mapping[str, Any]) -> None:
    low, high = bounds(result)
    cut = _losses(result).max() > high
    mappable = ScalarMappable(LogNorm(low, high), COLOURS)
    bar = figure.colorbar(mappable, ax=row, extend="max" if cut else "neither", shrink=0.9)
    bar.set_ticks(shown := ticks(low, high), labels=[f"{t:g}" for t in shown])
    bar.minorticks_off()
    bar.set_label(_loss_of(result))
