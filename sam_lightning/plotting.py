"""One look for all figures, and files that come out the same from the same numbers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sam_lightning.runs.files import replacing

# Okabe and Ito 2008, told apart by colour-blind readers; yellow is too light for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
# Uniform in lightness, in grey print too. Dark is low, so that a minimum is a dark valley.
HEIGHTS = "viridis"
# What would make two files of the same numbers differ.
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}

_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "image.cmap": HEIGHTS,
    "axes.prop_cycle": cycler(color=COLOURS),
    "svg.fonttype": "path",  # looks the same where the fonts are missing
    "svg.hashsalt": "sam-lightning",  # else the ids in the file are drawn anew each time
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def plain(text: str) -> str:
    """Text of a user's for a figure, in which matplotlib would take what is between $ for maths."""
    return text.replace("$", r"\$")


@contextmanager
def style() -> Iterator[None]:
    """Draw and save figures inside; what the caller has set comes back afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def dash(i: int) -> str:
    """The line style of the i-th line, for those who see no colours."""
    return ("-", "--", "-.", ":")[i % 4]


def save(figure: Figure, stem: Path, formats: Sequence[str] = ("png", "svg")) -> list[Path]:
    """Write ``stem.png`` and ``stem.svg``, each whole or not at all, without date and version.

    Returns:
        the files.
    """
    files = []
    for form in formats:
        file = stem.with_name(f"{stem.name}.{form}")
        with replacing(file) as temporary:
            figure.savefig(temporary, format=form, metadata=UNDATED.get(form))
        files.append(file)
    return files


def panels(
    count: int, width: float = 3.4, height: float = 3.2, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` axes in a row, each of so many inches; ``options`` of ``subplots``."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    row = figure.subplots(1, count, squeeze=False, **options)[0]
    return figure, list(row)
