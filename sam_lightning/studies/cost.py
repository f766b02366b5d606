"""``python -m sam_lightning cost``: what a run will cost, before it is started."""

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.arguments import parse
from sam_lightning.config.conf import top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import COMPOSING, CONF, OF_ARGUMENTS, explain
from sam_lightning.config.schema import Rule, check
from sam_lightning.studies.report.runs import passes_per_step

ABOUT = """
What a run will cost: the FLOPs of a forward pass, counted on one image, times 3 for forward and
backward, times the passes of an update, the images and the epochs; and the hours that takes on one
device. A product and a sum are two FLOPs; only those of convolutions and matrices are counted.

  python -m sam_lightning cost experiment=wrn28_10 data=cifar100 epochs=1800
  python -m sam_lightning cost experiment=wrn28_10 method=sgd flops_per_second=1e14

All other arguments are those of train.py, for one run. The rate is what a device achieves, not what
its maker promises: the default is a guess. A short run shows yours: 3 times the FLOPs of a forward
pass, times the passes, times images_per_second of its metrics.json.
"""
DEFAULTS = {"flops_per_second": 2e13}
RULES: list[Rule] = [("flops_per_second", "a number > 0")]

# Of each source: training images, and their channels, side and classes.
SHAPES = {
    "cifar10": (50_000, 3, 32, 10),
    "cifar100": (50_000, 3, 32, 100),
    "digits": (1_438, 1, 32, 10),
    "fashion_mnist": (60_000, 1, 28, 10),
    "svhn": (73_257, 3, 32, 10),
}
EXTRA = 531_131  # images of svhn with extra=true


@dataclass(frozen=True)
class Cost:
    """FLOPs of a ``forward`` pass of one image, passes per update, images per epoch, epochs."""

    forward: int
    passes: float
    images: int
    epochs: int

    @property
    def flops(self) -> float:
        """Those of the whole training; a backward pass costs two forward passes."""
        return 3 * self.forward * self.passes * self.images * self.epochs

    def hours(self, flops_per_second: float) -> float:
        """On one device that achieves this rate."""
        return self.flops / flops_per_second / 3600


def main(argv: Sequence[str] | None = None) -> None:
    """Print the cost of the run that the arguments describe.

    Raises:
        ConfigError: an argument is wrong, or the number of images is not known.
    """
    argv = sys.argv[1:] if argv is None else argv
    own = [a for a in argv if a.partition("=")[0] in DEFAULTS or a in ("-h", "--help")]
    rate = float(parse(ABOUT, DEFAULTS, RULES, own).flops_per_second)
    cost = estimate(configuration([a for a in argv if a not in own]))
    for name, value in {
        "a forward pass of one image": f"{cost.forward / 1e9:,.3f} GFLOPs",
        "forward and backward": "x 3",
        "passes of an update": f"x {cost.passes:g}",
        "images of an epoch": f"x {cost.images:,}",
        "epochs": f"x {cost.epochs:,}",
        "in all": f"{cost.flops:.3g} FLOPs",
        f"at {rate:g} FLOPs/s": f"{cost.hours(rate):,.2f} hours",
    }.items():
        print(f"{name:<30}{value}")


def configuration(overrides: Sequence[str]) -> DictConfig:
    """What ``train.py`` would run with, checked.

    Raises:
        ConfigError: names the override that is wrong.
    """
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError(f"{override}: no such flag; a setting is given as key=value")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", list(overrides))
    except Exception as error:
        if isinstance(error, COMPOSING) or any(said in str(error) for said in OF_ARGUMENTS):
            raise ConfigError(explain(error, list(overrides))) from error
        raise
    cfg.output_dir = tempfile.gettempdir()  # Hydra's own is that of a run
    check(cfg, top_level())
    return cfg


def estimate(cfg: DictConfig) -> Cost:
    """The cost of a run; its data are not read, and its weights take no memory.

    Raises:
        ConfigError: the number of training images is not known, or the model is wrong.
    """
    module, _, name = str(cfg.data.source._target_).rpartition(".")
    if module != "sam_lightning.data" or name not in SHAPES:
        raise ConfigError(
            f"data.source._target_={cfg.data.source._target_}: the number of images is known of "
            f"{', '.join(SHAPES)} only"
        )
    total, channels, side, classes = SHAPES[name]
    total += EXTRA if cfg.data.source.get("extra") else 0
    images = total - _count(cfg.data.val_size, total)
    images = images if cfg.data.subset == 1 else min(images, _count(cfg.data.subset, images))
    images -= images % cfg.batch_size if cfg.data.drop_last else 0
    if images < 1:
        raise ConfigError(f"data.val_size={cfg.data.val_size}: leaves nothing of {total} images")
    method: Any = OmegaConf.to_container(cfg.method, resolve=True)
    forward = forward_flops(cfg, classes, (channels, side, side))
    return Cost(forward, passes_per_step(method) or 2.0, images, cfg.epochs)


def _count(size: float, total: int) -> int:
    """A number of images, or a fraction of them, as ``ImageDataModule`` counts."""
    return round(size * total) if size < 1 else int(size)


def forward_flops(cfg: DictConfig, classes: int, shape: tuple[int, int, int]) -> int:
    """FLOPs of the convolutions and matrix products of the model for one image, C x H x W."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from sam_lightning.config.instantiate import build

    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = build(cfg, "model", num_classes=classes, in_channels=shape[0])
        model.eval()(torch.empty(1, *shape))
    flops: int = counter.get_total_flops()
    return flops
