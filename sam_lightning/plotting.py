"""One look for all figures, and files that come out the same from the same numbers."""

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from sam_lightning.runs.files import replacing

# A method has one colour in all figures. Seven are those of Okabe and Ito 2008, which colour-blind
# readers tell apart (their yellow is too light for a line).
METHODS = {
    **{"sgd": "#0072B2", "sam": "#D55E00", "asam": "#009E73", "gsam": "#CC79A7"},
    **{"looksam": "#56B4E9", "esam": "#E69F00", "msam": "#000000", "friendly_sam": "#882255"},
    **{"sam_on": "#999933", "linf": "#888888", "wsam": "#332288", "vasso": "#661100"},
    **{"fisher_sam": "#44AA99"},
}
# The first has no Chinese, Japanese or Korean letters; the others, where installed, lend theirs.
FONTS = (
    *("DejaVu Sans", "Noto Sans CJK JP", "Noto Sans CJK SC", "Droid Sans Fallback"),
    *("WenQuanYi Zen Hei", "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS"),
)
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
    "axes.prop_cycle": cycler(color=[*METHODS.values()]),
    "svg.fonttype": "path",  # looks the same where the fonts are missing
    "svg.hashsalt": "sam-lightning",  # else the ids in the file are random
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


def plain(text: str, most: int | None = None) -> str:
    """Text of a user's for a figure; matplotlib takes $...$ for formulas.

    Of more than ``most`` letters the middle is left out, as long names often differ at the end.
    """
    shown = (
        text
        if most is None or len(text) <= most
        else f"{text[: most // 2]}…{text[-((most - 1) // 2) :]}"
    )
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
    fonts = [font for font in FONTS if font in fontManager.get_font_names()]
    return matplotlib.style.context({**_STYLE, "font.family": fonts}, after_reset=True)


def colours(names: Iterable[str]) -> list[str]:
    """The colour of the method that each name begins with; of other names, one of those left.

    A method at rho 0 is SGD's, also where it is called the base optimizer.
    """
    begins = [re.sub("^base .*", "sgd", name.lower()) for name in names]
    own = [METHODS.get(re.split(r"[^a-z0-9_]", name)[0]) for name in begins]
    left = cycle([c for c in METHODS.values() if c not in own] or METHODS.values())
    return [colour or next(left) for colour in own]


def dash(i: int) -> str:
    """The line style of the i-th line, for those who see no colours."""
    return ("-", "--", "-.", ":")[i % 4]


def legend(figure: Figure) -> None:
    """Name the lines of the first axes beside all axes, or below where a name is long."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    if max(map(len, names), default=0) <= 36:
        figure.legend(handles, names, loc="outside right upper")
        return
    width, height = figure.get_size_inches()
    names = [fill(name, int(12 * width)) for name in names]
    figure.set_size_inches(width, height + 0.2 * sum(1 + name.count("\n") for name in names))
    figure.legend(handles, names, loc="outside lower left")


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
