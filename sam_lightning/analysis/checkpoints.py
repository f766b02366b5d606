"""What ``sharpness`` and ``landscape`` share: checkpoints, images, names, progress."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.arguments import Keys
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.process import importing
from sam_lightning.config.progress import progress
from sam_lightning.config.values import Count, Seed
from sam_lightning.inference import command
from sam_lightning.runs.files import checkpoint_file, run_folder

if TYPE_CHECKING:
    from sam_lightning.analysis.loss_surface import LossSurface
    from sam_lightning.inference.load import TrainedClassifier
SHARED_KEYS: Keys = {
    **command.CKPT_PATH,
    "split": ("train", Literal["train", "val", "test"], "train, val or test"),
    "images": (512, Count, "how many of the split"),
    "batch_size": (128, Count, "images of one pass"),
    "seed": (0, Seed, "of the images and directions that are drawn"),
    **command.DEVICE,
    **command.ROOT,
    **command.OUT,
    "labels": (None, Any, "names in the results, as in SGD,SAM; null: the folders' names"),
}


class LoadedCheckpoint(NamedTuple):
    """A checkpoint's file, the loaded model, and where its results go."""

    file: Path
    model: "TrainedClassifier"
    out: Path


def listed(value: Any) -> list[str]:
    """``a,b`` or ``[a,b]`` as a list."""
    if OmegaConf.is_list(value):
        return [str(v) for v in value]
    return [part for part in str(value).split(",") if part]


def checkpoint_files(value: Any) -> list[Path]:
    """The checkpoints that ``ckpt_path=a,b`` names, of a run's folder the last one."""
    files, name = [], ""
    for part in listed(value):
        name = f"{name},{part}" if name else part
        # Else the comma is in the name, as in a sweep's.
        if Path(os.path.expanduser(name)).exists():
            files.append(checkpoint_file(name))
            name = ""
    if name or not files:
        raise ConfigError(f"ckpt_path={name or value}: no such file or folder")
    return files


def load_checkpoints(options: DictConfig) -> list[LoadedCheckpoint]:
    """Load the checkpoints, onto the device that ``options`` names."""
    files = checkpoint_files(options.ckpt_path)
    out = command.out_folder(options)

    with importing():
        from sam_lightning.inference.load import load

    return [
        LoadedCheckpoint(file, load(file, device=options.device), out or run_folder(file))
        for file in files
    ]


def surface_of(
    checkpoint: LoadedCheckpoint, options: DictConfig, batch_norm: str = "stored"
) -> "LossSurface":
    """The loss of a checkpoint on images of its own run, as ``options`` chooses them."""
    from sam_lightning.analysis.loss_surface import LossSurface, fixed_batches
    from sam_lightning.inference.load import data_of

    needed = ["test" if options.split == "test" else "train"]
    place = (options.data.root, run_folder(checkpoint.file))
    data = data_of(checkpoint.model.config, *place, pixels_of=needed)
    device = next(checkpoint.model.parameters()).device
    drawn = (options.split, options.images, options.batch_size, options.seed)
    batches = fixed_batches(data, *drawn, device)
    surface = LossSurface(checkpoint.model, batches, batch_norm=batch_norm)
    if not math.isfinite(loss := surface.value()):
        raise ConfigError(f"ckpt_path={checkpoint.file}: the loss of its weights is {loss}")
    return surface


def labels_of(given: Any, loaded: Sequence[LoadedCheckpoint]) -> list[str]:
    """A short name for each: as given, or the method, or what else tells them apart."""
    if given is not None:
        labels = listed(given)
        if len(labels) != len(loaded):
            raise ConfigError(f"labels={','.join(labels)}: must be {len(loaded)}, one for each")
        return labels
    configs = [checkpoint.model.config for checkpoint in loaded]
    files = [checkpoint.file for checkpoint in loaded]
    names = [[run_folder(file).name for file in files]]
    with suppress(LookupError, TypeError, ValueError):  # strangers may have stored anything
        methods = [_method(config["method"]) for config in configs]
        seeds = [f"{name}, seed {c['seed']}" for name, c in zip(methods, configs, strict=True)]
        names = [methods, seeds, *names]
    return next((n for n in names if len({*n}) == len(n)), [str(file) for file in files])


def _method(config: Any) -> str:
    name = str(config["name"]).upper()
    if config.get("rho"):
        return f"{name}, rho {config['rho']:g}"
    return name if name == "SGD" else "base optimizer"


@contextmanager
def stage(surface: "LossSurface", name: str, passes: int) -> Iterator[None]:
    """Show the passes of one measurement, ``passes`` over all batches at most."""
    before = surface.tick
    try:
        with progress(name, passes * len(surface.batches)) as surface.tick:
            yield
    finally:
        surface.tick = before
