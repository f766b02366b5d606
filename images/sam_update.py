"""``python images/sam_update.py``: what one step of SAM does, as a figure."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from omegaconf import DictConfig

from sam_lightning.config.arguments import Keys, help_of, parse
from sam_lightning.config.errors import one_line_errors
from sam_lightning.config.values import Count, Positive, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.contour import ContourSet
    from torch import Tensor, nn

Point = tuple[float, float]

ABOUT = """
Compute and draw one step of SAM beside one of SGD, and where 200 of them lead, as PNG and SVG.

  python images/sam_update.py out=images/sam_update
"""


def draw(options: DictConfig) -> list[Path]:
    """Draw one step of SAM beside one of SGD, and where many steps lead, on a loss of two weights.

    The loss, of ``two_weights`` on 569 tumours, depends on the product of the weights. So its
    minima are a curve, a valley, which is widest where the two are equal.
    """
    from sam_lightning import plotting as plots

    with plots.style():
        figure, (near, far) = plots.panels(2, 3.8, 3.4)
        filled = draw_paths(far, options)
        draw_step(near, options, filled.levels)
        figure.colorbar(filled, ax=[near, far], label="loss", format="%.2g", shrink=0.8)
        return plots.save(figure, Path(str(options.out)).expanduser())


def two_weights(options: DictConfig) -> tuple["nn.Sequential", "Callable[[], Tensor]"]:
    """A network of two linear layers of one weight each, and its loss.

    It tells malignant from benign tumours by their mean radius, in scikit-learn's breast cancer
    data; the loss is logistic. The weights are ``options.start``.
    """
    import torch
    from sklearn.datasets import load_breast_cancer
    from torch import nn

    bunch = load_breast_cancer()
    radius = torch.tensor(bunch.data[:, :1])
    radius = (radius - radius.mean()) / radius.std()
    malignant = torch.tensor(bunch.target[:, None] == 0).double()
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        for weight, value in zip(model.parameters(), options.start, strict=True):
            weight.fill_(value)
    criterion = nn.BCEWithLogitsLoss()
    return model, lambda: criterion(model(radius), malignant)


def walk(options: DictConfig, rho: float, steps: int) -> list[Point]:
    """The weights at the start and, for each step of ``SAM``, at w + e and after the step."""
    import torch

    from sam_lightning.optim.sam import SAM

    model, loss = two_weights(options)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lr=options.lr)
    points = [point(model)]
    for _ in range(steps):
        loss().backward()
        optimizer.first_step(zero_grad=True)
        points.append(point(model))
        loss().backward()
        optimizer.second_step(zero_grad=True)
        points.append(point(model))
    return points


def point(model: "nn.Module") -> Point:
    """The two weights of a model."""
    first, second = (p.item() for p in model.parameters())
    return first, second


def draw_step(axes: "Axes", options: DictConfig, levels: Sequence[float]) -> None:
    """w, w + e, and the step along the gradient there, beside the step of SGD."""
    start, perturbed, sam = walk(options, options.rho, 1)
    sgd = walk(options, 0.0, 1)[-1]
    points = [start, perturbed, sam, sgd]
    reach = 0.6 * max(max(values) - min(values) for values in zip(*points, strict=True))
    middle = [(max(values) + min(values)) / 2 for values in zip(*points, strict=True)]
    draw_loss(axes, options, [(c - 1.2 * reach, c + 1.2 * reach) for c in middle], levels)
    # The gradient at w + e, as long as the step that it makes from w.
    there = (perturbed[0] + sam[0] - start[0], perturbed[1] + sam[1] - start[1])
    for begin, end, style in (
        (start, perturbed, "-C1"),
        (perturbed, there, ":C1"),
        (start, sam, "-C1"),
        (start, sgd, "-C0"),
    ):
        line = {"linestyle": style[0], "color": style[1:], "linewidth": 1.8}
        arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, **line}
        axes.annotate("", end, begin, arrowprops=arrow)
    axes.plot(*zip(*points, strict=True), "ko", markersize=4)
    for at, name, offset in (
        (start, "$w$", (-6, 7)),
        (perturbed, "$w + e$", (-10, 8)),
        (there, "$-\\eta\\, g(w + e)$", (-18, -15)),
        (sam, "SAM", (6, -4)),
        (sgd, "SGD", (6, 2)),
    ):
        axes.annotate(name, at, offset, textcoords="offset points")
    axes.set_title("one step")


def draw_paths(axes: "Axes", options: DictConfig) -> "ContourSet":
    """Where the steps lead: SAM goes on along the valley, to where it is wide."""
    paths = {
        "SGD": walk(options, 0.0, options.steps)[::2],
        f"SAM, rho {options.rho:g}": walk(options, options.rho, options.steps)[::2],
    }
    filled = draw_loss(axes, options, [(0, 3.2), (0, 3.2)])
    for i, (name, path) in enumerate(paths.items()):
        axes.plot(*zip(*path, strict=True), f"C{i}", linewidth=0.7)
        axes.plot(*path[-1], f"C{i}{'os'[i]}", markersize=6, label=f"{name}: end")
    axes.plot(*options.start, "ko", markersize=4)
    axes.axline((0, 0), slope=1, color="k", linestyle=":", linewidth=0.8, label="equal weights")
    axes.legend(loc="lower right", frameon=True)
    axes.set_title(f"{options.steps} steps")
    return filled


def draw_loss(
    axes: "Axes",
    options: DictConfig,
    limits: Sequence[tuple[float, float]],
    levels: Sequence[float] = (),
) -> "ContourSet":
    """Contours of the loss, at ``levels`` if given; the floor of the valley is dark."""
    import torch

    from sam_lightning import plotting as plots

    model, loss = two_weights(options)
    x, y = (torch.linspace(low, high, 61) for low, high in limits)
    heights = torch.zeros(len(y), len(x))
    with torch.no_grad():
        for i, second in enumerate(y):
            for j, first in enumerate(x):
                for weight, value in zip(model.parameters(), (first, second), strict=True):
                    weight.fill_(value)
                heights[i, j] = loss()
    if not len(levels):
        low, high = heights.min().item(), heights.max().item()
        close = torch.linspace(0, 1, 16).square()  # on the valley's floor
        levels = (low + (high - low) * close).tolist()
    filled = axes.contourf(x, y, heights, levels, cmap=plots.HEIGHTS, alpha=0.5, extend="both")
    axes.contour(x, y, heights, levels[1:], colors="white", linewidths=0.5)
    axes.set(xlabel="first weight", ylabel="second weight", aspect="equal")
    axes.grid(False)
    return filled


Coordinate = Annotated[float, within(-1000, 1000)]
KEYS: Keys = {
    "out": ("images/sam_update", str),
    "start": ([0.6, 1.8], tuple[Coordinate, Coordinate]),
    "rho": (0.4, Positive),
    "lr": (1.5, Positive),
    "steps": (200, Count),
}


def main(argv: list[str]) -> None:
    """Draw the figure that the arguments describe."""
    if {"-h", "--help"} & {*argv}:
        print(help_of(ABOUT, KEYS))
        return
    print(*map(os.path.relpath, draw(parse(KEYS, argv))))


if __name__ == "__main__":
    with one_line_errors():
        main(sys.argv[1:])
