"""``python -m sam_lightning preview``: what a run would see of its data, before it is started."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from omegaconf import DictConfig

from sam_lightning.config.arguments import Keys
from sam_lightning.config.errors import ConfigError, argument_errors
from sam_lightning.config.text import clean
from sam_lightning.config.values import Count, Rule
from sam_lightning.inference.command import table
from sam_lightning.runs.terminal import show
from sam_lightning.studies.plan import configuration, split

if TYPE_CHECKING:
    from sam_lightning.data.image_data import ImageData

ABOUT = """
Show the data of a run: how many images each class has, their sizes, which files are not used and
why, and pictures of images as the network sees them: augmented for training, and for evaluation.

  python -m sam_lightning preview data=image_folder data.root=photos data.image_size=224
  python -m sam_lightning preview data=digits augment.cutout.side=8 out=digits.png

All other arguments are for train.py, for one run. Images are decoded as for training, and
kept for it.
"""
File = Annotated[str, Rule("a file, as in preview.png", bool)]
KEYS: Keys = {
    "out": ("preview.png", File, "the PNG to write"),
    "images": (16, Count, "pictures of training, and as many of evaluation"),
}
COLUMNS = 8  # pictures in a row
SHOWN = 30  # classes in the table


def main(argv: Sequence[str]) -> None:
    """Print the tables and write the pictures of what the arguments describe."""
    options, overrides = split(KEYS, argv)
    out = Path(os.path.expanduser(options.out))
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"out={options.out}: must be a file that ends in .png")
    data = read(configuration(overrides))
    _print_tables(data)
    draw(data, out, options.images)
    print(f"pictures: {out}")


def read(cfg: DictConfig) -> "ImageData":
    """The data of a run in host memory, without files that are broken."""
    from sam_lightning.data.image_data import ImageData, build_data
    from sam_lightning.training.weights import prepare_as_weights

    prepare_as_weights(cfg)
    cfg.data.update(num_workers=0, device=None)
    if "skip_broken" in cfg.data:
        cfg.data.skip_broken = True
    data = build_data(cfg, ImageData)
    with argument_errors("data"):
        data.read()
    return data


def _print_tables(data: "ImageData") -> None:
    splits, counts = data.splits, data.class_counts()
    shown = list(range(data.num_classes))
    title = "images"
    if len(shown) > SHOWN:
        shown = sorted(shown, key=counts["train"].__getitem__)[:SHOWN]
        title = f"images, the {SHOWN} of {data.num_classes:,} classes with fewest for training"
    images = table("class", *splits, title=title)
    for i in shown:
        images.add_row(data.classes[i], *(f"{of[i]:,}" for of in counts.values()))
    images.add_row("all", *(f"{len(split):,}" for split in splits.values()))
    channels, height, width = data.train.shape
    colour = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    sizes = table("pixels", "least", "median", "largest")
    for name, of in data.sizes.items():
        for side, values in of.items():
            sizes.add_row(f"{side} of files, {name}", *values)
    lines = [f"the network sees {width} x {height} pixels, {colour}"]
    if data.left_out:
        kinds = ", ".join(f"{count:,} {clean(kind)}" for kind, count in data.left_out.items())
        lines.append(f"not used: {kinds}")
    lines += [f"broken: {clean(name)} ({clean(why)})" for name, why in data.broken.items()]
    show(images, *([sizes] if data.sizes else []), *lines)


def draw(data: "ImageData", out: Path, count: int) -> None:
    """Write the first images of the first epoch as training sees them, and some of evaluation."""
    import torch
    from matplotlib.figure import Figure

    from sam_lightning.data.augment import MixedLabels
    from sam_lightning.plotting import pixels, plain, save, style

    images, given = data.finish(*next(iter(data.train_loader())))
    labels = given.labels if isinstance(given, MixedLabels) else given
    parts = [("training", images[:count], labels[:count])]
    name, split = next((n, s) for n, s in [*data.splits.items()][::-1] if n != "val")
    chosen = torch.arange(min(count, len(split))) * len(split) // min(count, len(split))
    part = split.take(chosen)
    parts.append((f"evaluation ({name})", data.normalize(part.seen()), part.labels))
    rows = [-(-len(labels) // COLUMNS) for _, _, labels in parts]
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # letters of a class
        figure = Figure((1.35 * COLUMNS, 1.65 * sum(rows)), layout="constrained")
        blocks: Any = figure.subfigures(2, height_ratios=rows)
        for block, height, (title, pictures, labels) in zip(blocks, rows, parts, strict=True):
            block.suptitle(title)
            axes = block.subplots(height, COLUMNS, squeeze=False).flatten()
            for axis in axes:
                axis.axis("off")
            shown = pixels(pictures, data.mean, data.std).permute(0, 2, 3, 1).numpy()
            for axis, picture, label in zip(axes, shown, labels.tolist(), strict=False):
                axis.imshow(picture, cmap="gray", vmin=0, vmax=255)
                axis.set_title(plain(clean(data.classes[label]), 16), fontsize=8)
        save(figure, out.with_suffix(""), ("png",))
