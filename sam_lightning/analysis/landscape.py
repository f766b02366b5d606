"""The command ``landscape``: the loss around checkpoints and between two of them."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from omegaconf import DictConfig

from sam_lightning.analysis.checkpoints import (
    SHARED_KEYS,
    labels_of,
    load_checkpoints,
    stage,
    surface_of,
)
from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.values import Positive, Rule
from sam_lightning.runs.files import inside_run, make_folder, run_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from sam_lightning.analysis.loss_surface import LossSurface

ABOUT = """
Draw the loss around checkpoints along random directions, each filter of which has the norm of that
filter's weights (Li et al. 2018, arXiv 1712.09913); biases and normalisation layers stay. Several
checkpoints get the same directions, axes and colours. kind=line draws the loss on the line between
two checkpoints of one architecture instead, on images of the first.

  python -m sam_lightning landscape ckpt_path=RUN/checkpoints/last.ckpt
  python -m sam_lightning landscape ckpt_path=RUN1,RUN2 labels=SGD,SAM out=figures
  python -m sam_lightning landscape ckpt_path=RUN1,RUN2 kind=line

A folder stands for its checkpoints/last.ckpt. Images are fixed and not augmented. BatchNorm uses
its stored statistics, as in evaluation (on the line: those between the two); batch_norm=batch
takes those of each batch. PNG, SVG and the numbers, landscape.json, go into the folder landscape
of the first run, or into out; each run's TensorBoard shows the pictures too, at the update of its
checkpoint. A 2d picture takes points x points passes over the images.
"""
ODD = Rule("an odd number >= 3", lambda v: v >= 3 and v % 2 == 1)
KEYS: Keys = {
    **SHARED_KEYS,
    "kind": ("2d", Literal["2d", "1d", "line"], "2d, 1d, or line: between two checkpoints"),
    "span": (1.0, Positive, "from -span to span along a direction"),
    "points": (21, Annotated[int, ODD], "along a direction; an odd number"),
    "batch_norm": ("stored", Literal["stored", "batch"], "its statistics: stored or batch"),
}


def main(argv: list[str]) -> None:
    """Compute the losses, write them, and draw them."""
    options = parse(KEYS, argv)
    loaded = load_checkpoints(options)
    labels = labels_of(options.labels, loaded)
    line = options.kind == "line"
    if line:
        if len(loaded) != 2:
            raise ConfigError(f"kind=line: needs two checkpoints in ckpt_path, not {len(loaded)}")
        first, second = ({k: v.shape for k, v in c.model.state_dict().items()} for c in loaded)
        if first != second:
            files = f"{loaded[0].file} and {loaded[1].file}"
            raise ConfigError(f"kind=line: {files} are of different models")
    middle, reach = (0.5, 0.5) if line else (0.0, options.span)
    half = options.points // 2
    coordinates = [middle + reach * i / half for i in range(-half, half + 1)]
    out = loaded[0].out
    if options.out is None:
        out = inside_run(out / "landscape", loaded[0].file)
    events = [inside_run(run_folder(c.file) / "tensorboard" / "landscape", c.file) for c in loaded]

    from sam_lightning.analysis.landscape_plots import draw, show_in_tensorboard
    from sam_lightning.runs.checkpoint import read

    measured = loaded[:1] if line else loaded
    surfaces = [surface_of(checkpoint, options, options.batch_norm) for checkpoint in measured]
    make_folder(out, out)
    if line:
        losses = [between(surfaces[0], loaded[1].model.state_dict(), coordinates)]
    else:
        losses = [around(surface, coordinates, options) for surface in surfaces]
    result = {
        "kind": options.kind,
        "labels": labels,
        "ckpt_path": [str(checkpoint.file) for checkpoint in loaded],
        **{key: options[key] for key in ("split", "seed", "batch_norm")},
        "images": surfaces[0].examples,
        "guessing": math.log(len(loaded[0].model.classes)),
        "coordinates": coordinates,
        "loss": losses,
    }
    write_json(out / "landscape.json", result)
    pictures = draw(result, out)
    print(*map(os.path.relpath, [out / "landscape.json", *pictures]))
    for checkpoint, folder in zip(loaded, events, strict=True):
        if folder.parent.is_dir():
            update = read(checkpoint.file, mmap=True)["global_step"]
            show_in_tensorboard(folder, update, options.kind, pictures)


def around(surface: "LossSurface", coordinates: Sequence[float], options: DictConfig) -> list[Any]:
    """The loss around the weights: a list, or a list of rows, as ``LossSurface.along``."""
    import torch

    generator = torch.Generator().manual_seed(options.seed)
    dimensions = 2 if options.kind == "2d" else 1
    directions = [surface.filter_normalised(generator) for _ in range(dimensions)]
    with stage(surface, "landscape", len(coordinates) ** dimensions):
        return surface.along(directions, coordinates).tolist()


def between(
    surface: "LossSurface",
    end: "Mapping[str, Tensor]",
    coordinates: Sequence[float],
) -> list[float]:
    """The loss at (1 - t) a + t b for each t: a surface's model a, and the state b of another.

    Running statistics are mixed as the weights are.
    """
    import torch

    start = {name: value.clone() for name, value in surface.model.state_dict().items()}
    losses = []
    try:
        with stage(surface, "line", len(coordinates)):
            for t in coordinates:
                mixed = {
                    name: torch.lerp(value, end[name], t) if value.is_floating_point() else value
                    for name, value in start.items()
                }
                surface.model.load_state_dict(mixed)
                losses.append(surface.value())
    finally:
        surface.model.load_state_dict(start)
    return losses
