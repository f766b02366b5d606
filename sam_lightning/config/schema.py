"""Names, types and ranges of a configuration, checked before torch is loaded.

Other arguments of ``_target_``s are checked by the signatures of their classes, in ``instantiate``.
"""

import errno
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import launched
from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, no_such_key
from sam_lightning.config.trust import TARGETS, check_name, is_in
from sam_lightning.config.tuning import Finetune, check_tuning
from sam_lightning.config.values import (
    ABSENT,
    BelowOne,
    Count,
    Folder,
    Fraction,
    Index,
    NonNegative,
    Positive,
    Rule,
    Section,
    Seed,
    Text,
    check_value,
    distinct,
    keys,
    within,
)

# Top-level keys that are optional.
OPTIONAL = (
    "augment",
    "finetune",
    "param_groups",
    "logger",
    "callbacks",
    "experiment",
    "debug",
    "sweep",
)
# What the folder of a data set that is downloaded has.
OWN_FILES = {
    **{"cifar10": "cifar-10-*", "cifar100": "cifar-100-*"},
    **{"fashion_mnist": "FashionMNIST", "svhn": "*_32x32.mat"},
}
PHOTOGRAPHS = ("*/*.*", "[tT]rain*/*/*.*")  # of one folder of classes, or of splits
# Names of the keys for folders that loggers and callbacks write to.
FOLDERS = ("save_dir", "root_dir", "dirpath")
Metric = Literal[
    "val/acc", "val/acc5", "val/error", "val/loss", "test/acc", "test/acc5", "test/error",
    "test/loss", "train/acc", "train/loss",
]  # fmt: skip
MethodName = Annotated[str, Rule("the name of a method", bool)]
METRICS: tuple[str, ...] = get_args(Metric)
BatchSize = Annotated[int, within(1, 10**9)]
Devices = Annotated[list[Index], Rule("a list of device indices", distinct)]
PartOfAll = Annotated[float, Rule("a fraction below 1", lambda v: 0 < v < 1)]
PartOfBatch = Annotated[float, within(0, 1, above=True)]
PROCESSORS = os.cpu_count() or 1


class Described(Section):
    """An object to build; the signature of its class says which other keys there are."""

    _target_: Any


class Model(Described):
    """The keys of our models."""

    width: Count = ABSENT
    depth: Count = ABSENT
    widen_factor: Count = ABSENT
    alpha: Count = ABSENT
    bottleneck: bool = ABSENT
    zero_init_residual: bool = ABSENT
    dropout: BelowOne = ABSENT
    p_last: Fraction = ABSENT


class Perturbation(Described):
    """The keys of our perturbations."""

    eta: NonNegative = ABSENT
    sigma: NonNegative = ABSENT
    decay: BelowOne = ABSENT
    beta: PartOfBatch = ABSENT
    normalize_bias: bool = ABSENT


class Loss(Described):
    """The keys of our losses."""

    smoothing: BelowOne = ABSENT
    class_weights: list[NonNegative] | Literal["balanced"] | None = ABSENT


class Scheduler(Described):
    """The keys of our schedules."""

    warmup_epochs: NonNegative = ABSENT
    final: Fraction = ABSENT
    milestones: list[Fraction] = ABSENT
    gamma: Positive = ABSENT


class Data(Section):
    """The keys of ``data``."""

    source: Described
    label_noise: Annotated[float, within(0, 1, ", a fraction of the labels")]
    val_size: Annotated[float, within(0, None, ", below 1 a fraction of the images")] = ABSENT
    subset: Annotated[float, within(0, None, ", up to 1 a fraction of the images", above=True)] = (
        ABSENT
    )
    split_seed: Index = ABSENT
    mean: list[Fraction] | None = ABSENT
    std: list[Annotated[float, within(0, 1, above=True)]] | None = ABSENT
    sampler: Literal["shuffled", "balanced"] = ABSENT
    repeats: Count = ABSENT
    flip: Fraction = ABSENT
    eval_batch_size: BatchSize = ABSENT
    num_workers: Annotated[int, within(0, 16 * PROCESSORS, ", 16 for each processor")] = ABSENT
    device: Literal["cpu", "cuda"] | None = ABSENT
    drop_last: bool = ABSENT
    root: Folder = ABSENT
    download: bool = ABSENT
    image_size: Count | None = ABSENT
    split: PartOfAll | list[PartOfAll] | Text | None = ABSENT
    view: Literal["resize", "random_resized_crop"] = ABSENT
    crop_scale: list[Annotated[float, within(0, 1, above=True)]] = ABSENT
    crop_ratio: list[Positive] = ABSENT
    crop_fraction: Annotated[float, within(0, 1, above=True)] | None = ABSENT
    interpolation: Literal["bilinear", "bicubic"] = ABSENT
    memory_gb: NonNegative = ABSENT
    skip_broken: bool = ABSENT


class Method(Section):
    """The keys of ``method``; ``SAMModule`` explains them."""

    name: Text
    perturbation: Perturbation
    rho: NonNegative
    rho_min: NonNegative | None = ABSENT
    passes: Positive | None = ABSENT
    perturbed_layers: Literal["all", "normalization"] = ABSENT
    decay_in_ascent: bool = ABSENT
    ascent_steps: Count = ABSENT
    every: Count = ABSENT
    ascent_fraction: PartOfBatch = ABSENT
    descent_fraction: PartOfBatch = ABSENT
    same_randomness: bool = ABSENT
    sync_perturbation: bool = ABSENT
    ascent_per_micro_batch: bool = ABSENT


class Optimizer(Section):
    """The keys of ``optimizer`` that PyTorch's optimizers share."""

    _target_: Annotated[
        Any,
        Rule(
            "an optimizer that takes dense gradients and no closure",
            lambda v: v not in ("torch.optim.LBFGS", "torch.optim.SparseAdam"),
        ),
    ]
    lr: Positive = ABSENT
    momentum: NonNegative = ABSENT
    nesterov: bool = ABSENT
    betas: tuple[BelowOne, BelowOne] = ABSENT
    weight_decay: NonNegative = ABSENT
    fused: bool | None = ABSENT


class Trainer(Section):
    """The keys of ``trainer`` in conf; the signature of ``lightning.Trainer`` has others."""

    accelerator: Literal["auto", "cpu", "cuda", "gpu", "mps"]
    devices: (
        Count | Annotated[list[Index], Rule("a list of device indices", distinct)] | Literal["auto"]
    )
    num_nodes: Count
    log_every_n_steps: Count
    gradient_clip_val: Positive | None
    accumulate_grad_batches: Count
    timeout: Annotated[float, within(1, 10**7, ", in seconds")] = ABSENT
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true", "32", "64", 32, 64] = ABSENT
    sync_batchnorm: bool = ABSENT
    deterministic: bool | Literal["warn"] = ABSENT
    check_val_every_n_epoch: Count | None = ABSENT
    val_check_interval: Positive | None = ABSENT
    min_epochs: Index | None = ABSENT
    min_steps: Index | None = ABSENT
    gradient_clip_algorithm: Literal["norm"] = ABSENT


class Train(Section):
    """The configuration of a run; conf/train.yaml explains the keys."""

    seed: Seed
    rho: NonNegative
    epochs: Count
    batch_size: BatchSize
    lr: Positive
    weight_decay: NonNegative
    label_smoothing: BelowOne
    compile: bool
    memory_format: Literal["auto", "contiguous", "channels_last"]
    max_skipped_steps: Count
    test: bool
    ckpt_path: Any
    checkpoint_every_n_steps: Count | None
    traceback: bool
    task_name: Any
    output_dir: Folder
    optimized_metric: Metric | None
    data: Data
    model: Model
    method: Method
    loss: Loss
    optimizer: Optimizer
    scheduler: Scheduler
    trainer: Trainer
    finetune: Finetune


HINTS = {key: hint for key, hint, _ in keys(Train)}
REQUIRED = [key for key, _, required in keys(Train) if required]


def check(cfg: DictConfig, top_level: Iterable[str]) -> None:
    """Check names, values and the files that a configuration points to.

    Args:
        cfg: the composed configuration.
        top_level: the keys that may stand at its top.

    Raises:
        ConfigError: names the first key that is wrong, its value and what is allowed.
    """
    known = list(top_level)
    for key in map(str, cfg):
        if key not in known:
            raise ConfigError(f"{key}={cfg[key]}: {no_such_key(key, known)}")
    given = flat(OmegaConf.to_container(cfg))
    for key in (*(k for k in known if k not in OPTIONAL), *REQUIRED, *given):
        if given.get(key, "???") == "???":
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    for key, value in given.items():
        try:
            if isinstance(value, str):
                OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:  # an interpolation of a missing key
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    values = flat(OmegaConf.to_container(cfg, resolve=True))
    for key, hint in HINTS.items():
        if key in values and not _is_of_others(values, key):
            check_value(key, values[key], hint)
    if str(values["optimized_metric"]).startswith("test/") and not values["test"]:
        raise ConfigError(f"optimized_metric={values['optimized_metric']}: needs test=true")
    _check_names(values)
    check_tuning(values)
    if (found := launched()) is None or found.rank == 0:  # the others write nothing
        _check_folders(values)
    _check_files(values)


def _is_of_others(values: Mapping[str, Any], key: str) -> bool:
    """Whether the key is an argument of foreign code, where it may mean something else."""
    owner, _, name = key.rpartition(".")
    target = values.get(f"{owner}._target_") if owner in TARGETS else None
    return name != "_target_" and target is not None and not is_in(TARGETS[owner], str(target))


def _check_names(values: Mapping[str, Any]) -> None:
    """Refuse a ``_target_`` that cannot be a class or function, or that nothing builds."""
    for key, value in values.items():
        owner, _, last = key.rpartition(".")
        if last != "_target_":
            continue
        within = [t for t in TARGETS if f"{owner}.".startswith(f"{t.rstrip('.*')}.")]
        if not within or f"{owner}.*" in within:
            raise ConfigError(f"{key}={value}: allowed is one in {', '.join(TARGETS)}")
        check_name(key, value)


def _check_folders(values: Mapping[str, Any]) -> None:
    """Refuse a folder of the run that cannot be made and written."""
    for key, path in values.items():
        of_others = key.startswith(("logger.", "callbacks.")) and path is not None
        if key != "output_dir" and not (of_others and key.rpartition(".")[2] in FOLDERS):
            continue
        if not isinstance(path, str) or not path:
            raise ConfigError(f"{key}={path}: allowed is the path of a folder")
        folder = Path(path).absolute()
        try:  # making it is the only sure test
            missing = [part for part in (folder, *folder.parents) if not part.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            raise ConfigError(f"{key}={path}: cannot be written ({error.strerror})") from error
        with suppress(OSError):  # a run that is refused later must leave no folder
            for part in missing:
                part.rmdir()


def _check_files(values: Mapping[str, Any]) -> None:
    checkpoint, given = values["ckpt_path"], str(values.get("data.root"))
    if checkpoint not in (None, "last") and not Path(str(checkpoint)).exists():
        raise ConfigError(f"ckpt_path={checkpoint}: no such file or folder")
    name = values["data.source._target_"].rpartition(".")[2]
    root = Path(os.path.expanduser(given))
    if name == "image_folder" and not root.is_dir():
        raise ConfigError(f"data.root={given}: no such folder")
    if name in OWN_FILES and not any(root.glob(OWN_FILES[name])):
        found = [p for pattern in PHOTOGRAPHS for p in islice(root.glob(pattern), 1000)]
        if any(p.suffix.lower() in (".jpg", ".jpeg", ".png") for p in found):
            raise ConfigError(
                f"data.root={given}: has photographs, which {name} does not read: add "
                f"data=image_folder, or give the folder that is to hold {name}"
            )
