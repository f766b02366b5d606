"""One look for all figures, and files that come out the same from the same numbers."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sam_lightning.runs.files import replacing

# Okabe and Ito 2008, told apart by colour-blind readers; yellow is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Uniform in lightness, in grey print too. Dark is low, so that a minimum is a dark valley.
HEIGHTS = "viridis"
# What would make two files of the same numbers differ.
UNDATED = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

_STYLE: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 10),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    **dict.fromkeys(("legend.frameon", "axes.spines.top", "axes.spines.right"), False),
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "image.cmap": HEIGHTS,
    "axes.prop_cycle": cycler(color=COLOURS),
    "svg.fonttype": "path",  # looks the same where the fonts are missing
    "svg.hashsalt": "sam-lightning",  # else the ids in the file are random
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def plain(text: str, most: int | None = None) -> str:
    """Text of a user's for a figure, of ``most`` letters; matplotlib takes $...$ for formulas."""
    shown = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
    return shown.replace("$", r"\$")


def pixels(images: Any, mean: Any, std: Any) -> Any:
    """Normalised images as they were: a uint8 tensor N x C x H x W, C = 1 or 3, on the CPU."""
    images = images.float().cpu()
    shift, scale = (images.new_tensor([*of])[:, None, None] for of in (mean, std))
    shown = (images * scale + shift).mul(255).round().clamp(0, 255)
    if shown.shape[1] not in (1, 3):
        shown = shown.mean(1, keepdim=True)
    return shown.byte()


def style() -> AbstractContextManager[None]:
    """Draw and save figures inside; what the caller has set comes back afterwards."""
    return matplotlib.style.context(_STYLE, after_reset=True)


def dash(i: int) -> str:
    """The line style of the i-th line, for those who see no colours."""
    return ("-", "--", "-.", ":")[i % 4]


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``, whole or not at all and undated; return the files."""
    files = {form: stem.with_name(f"{stem.name}.{form}") for form in formats}
    for form, file in files.items():
        with replacing(file) as temporary:
            figure.savefig(temporary, format=form, metadata=UNDATED.get(form))
    return [*files.values()]


def panels(
    count: int, width: float = 3.4, height: float = 3.2, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in a row, each in inches; ``options`` of ``subplots``."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False, **options)[0])
