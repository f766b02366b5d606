"""``python -m sam_lightning cost``: what a run will cost, before it is started."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.arguments import Keys
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.values import Folder, Positive
from sam_lightning.runs.files import finite
from sam_lightning.studies.plan import configuration, split
from sam_lightning.studies.report.runs import passes_per_step, read_runs, settings

ABOUT = """
What a run will cost: the FLOPs of a forward pass, counted on one image, times 3 for forward and
backward, times the passes of an update, the images and the epochs; and the hours that takes on one
device. A product and a sum are two FLOPs; only those of convolutions and matrices are counted.

  python -m sam_lightning cost experiment=wrn28_10 data=cifar100 epochs=1800
  python -m sam_lightning cost experiment=wrn28_10 method=sgd flops_per_second=1e14

All other arguments are for train.py, for one run. The rate is what the newest finished run in
runs=FOLDER achieved that has this model, shape of images, batch size and precision, and at least
100 updates. The last line names that run. If there is none, the rate is a guess; a short run, with
+trainer.max_steps=300, measures it.
"""
GUESS = 2e13
KEYS: Keys = {
    "flops_per_second": (None, Positive | None, "of one device; null: as measured"),
    "runs": ("logs", Folder, "in which finished runs are looked for"),
}
# Settings that the rate depends on, beside those of model and finetune.
OF_RATE = {"batch_size", "compile", "cuda_graph", "memory_format", "model", "trainer.accelerator"}
OF_RATE |= {"trainer.precision", "data.device", "data.image_size", "data.view"}
UPDATES = 100  # in a shorter run the first ones, which are slower, count too much


# Of each source: training images, and their channels, side and classes.
SHAPES = {
    "cifar10": (50_000, 3, 32, 10),
    "cifar100": (50_000, 3, 32, 100),
    "digits": (1_438, 1, 32, 10),
    "fashion_mnist": (60_000, 1, 28, 10),
    "svhn": (73_257, 3, 32, 10),
}
EXTRA = 531_131  # images of svhn with extra=true


class Cost(NamedTuple):
    """FLOPs of a ``forward`` pass of one image, passes per update, images per epoch, epochs."""

    forward: int
    passes: float
    images: int
    epochs: int


def main(argv: Sequence[str]) -> None:
    """Print the cost of the run that the arguments describe."""
    options, overrides = split(KEYS, argv)
    if options.runs != KEYS["runs"][0] and not Path(options.runs).is_dir():
        raise ConfigError(f"runs={options.runs}: no such folder")
    cfg = configuration(overrides)
    cost = estimate(cfg)
    flops = 3 * math.prod(cost)  # a backward pass costs two forward passes
    rate, source = options.flops_per_second, ""
    if rate is None:
        rate, source = measured_rate(cfg, cost.forward, Path(options.runs))
    for name, value in {
        "a forward pass of one image": f"{cost.forward / 1e9:,.3f} GFLOPs",
        "forward and backward": "x 3",
        "passes of an update": f"x {cost.passes:g}",
        "images of an epoch": f"x {cost.images:,}",
        "epochs": f"x {cost.epochs:,}",
        "in all": f"{flops:.3g} FLOPs",
        f"at {rate:g} FLOPs/s": f"{flops / rate / 3600:,.2f} hours",
    }.items():
        print(f"{name:<30}{value}")
    if source:
        print(f"{'this rate':<30}{source}")


def measured_rate(cfg: DictConfig, forward: int, folder: Path) -> tuple[float, str]:
    """FLOPs a second of one device in the newest run like this one, or a guess; and its source."""
    wanted = _of_rate(settings(OmegaConf.to_container(cfg, resolve=True)))  # type: ignore[arg-type]
    runs, _, _ = read_runs([folder])
    for run in sorted(runs, key=lambda run: run.written, reverse=True):
        passes, speed = run.results["passes"] or 0, run.results["images_per_second"] or 0
        updates, devices = (finite(run.summary.get(key)) or 1 for key in ("updates", "devices"))
        rate = 3 * forward * passes * speed / devices
        if rate > 0 and updates >= UPDATES and _of_rate(run.settings) == wanted:
            where = f"{devices:g} x {run.device}, {speed:,.0f} images/s"
            return rate, f"measured on {where}: {run.folder}"
    like = "this model, batch size and precision"
    return GUESS, f"a guess: no finished run of {like} in {folder}"


def _of_rate(found: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the rate depends on; data sets with images of one shape are alike."""
    images = SHAPES[data][1:3] if (data := found.get("data")) in SHAPES else data
    parts = ("model.", "finetune.")
    named = {k: v for k, v in found.items() if k in OF_RATE or k.startswith(parts)}
    return {"images": images, **named}


def estimate(cfg: DictConfig) -> Cost:
    """The cost of a run; its data are not read, and its weights take no memory."""
    from sam_lightning.training.weights import prepare_as_weights  # loads torch

    prepare_as_weights(cfg)
    total, channels, height, width, classes, has_val = _shape(cfg)
    images = total if has_val else total - _count(cfg.data.val_size, total)
    images = images if cfg.data.subset == 1 else min(images, _count(cfg.data.subset, images))
    images -= images % cfg.batch_size if cfg.data.drop_last else 0
    if images < 1:
        raise ConfigError(f"data.val_size={cfg.data.val_size}: leaves nothing of {total} images")
    flops, _ = forward(cfg, classes, (channels, height, width))
    if flops is None:
        size = f"{channels} x {height} x {width}"
        raise ConfigError(
            f"model._target_={cfg.model._target_}: cannot be tried on images of {size}"
        )
    method: Any = OmegaConf.to_container(cfg.method, resolve=True)
    passes = passes_per_step(method) or 2.0
    return Cost(flops, passes, images, cfg.epochs)


def forward(cfg: Any, classes: int, image: Sequence[int]) -> tuple[int | None, int]:
    """FLOPs of a forward pass of one image, and the number of parameters; without memory.

    Args:
        cfg: with the description of the model.
        classes: number of logits.
        image: its channels, height and width.

    Returns:
        None for the FLOPs of a model that reads values, which there are none of.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sam_lightning.config.instantiate import build, takes

    flops = None
    shape: dict[str, Any] = {"num_classes": classes, "in_channels": image[0]}
    if str(cfg.model._target_).startswith("sam_lightning.") and takes(cfg, "image_size"):
        shape["image_size"] = [*image[1:]]
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(cfg, "model", **shape).eval()
        with suppress(Exception):
            model(torch.empty(1, *image))
            flops = counter.get_total_flops()
    return flops, sum(p.numel() for p in model.parameters())


def _shape(cfg: DictConfig) -> tuple[int, int, int, int, int, bool]:
    """Training images; their channels, height and width; classes; if there are validation images.

    Photographs are listed, and not decoded.
    """
    module, _, name = str(cfg.data.source._target_).rpartition(".")
    if module == "sam_lightning.data" and name in SHAPES:
        total, channels, side, classes = SHAPES[name]
        total += EXTRA if cfg.data.source.get("extra") else 0
        return total, channels, side, side, classes, False
    if module != "sam_lightning.data" or name != "image_folder":
        raise ConfigError(
            f"data.source._target_={cfg.data.source._target_}: the number of images is known of "
            f"{', '.join([*SHAPES, 'image_folder'])} only"
        )
    from sam_lightning.config.instantiate import build

    source = build(cfg, "data.source")
    return len(source.train), *source.train.shape, len(source.classes), source.val is not None


def _count(size: float, total: int) -> int:
    """A number of images, or a fraction of them, as ``ImageDataModule`` counts."""
    return round(size * total) if size < 1 else int(size)
