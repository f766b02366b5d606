"""Names, types and ranges of a configuration, checked before torch is loaded.

Other arguments of ``_target_``s are checked by the signatures of their classes, in ``instantiate``.
"""

import errno
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import is_first
from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError, LocalError, no_such_key
from sam_lightning.config.trust import TARGETS, check_name, is_in
from sam_lightning.config.tuning import FINETUNE, check_tuning
from sam_lightning.config.values import (
    BelowOne,
    Count,
    Folder,
    Fraction,
    Index,
    NonNegative,
    Positive,
    Rule,
    Seed,
    Text,
    check_value,
    distinct,
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
WHOLE = ("digits", *OWN_FILES)  # data sets without validation images of their own
# Names of the keys for folders that loggers and callbacks write to.
FOLDERS = ("save_dir", "root_dir", "dirpath")
Metric = Literal[
    "val/acc", "val/acc5", "val/error", "val/loss", "test/acc", "test/acc5", "test/error",
    "test/loss", "train/acc", "train/loss",
]  # fmt: skip
MethodName = Annotated[str, Rule("the name of a method", bool)]
ModelName = Annotated[
    str, Rule("a name of letters, digits, _ and .", lambda v: bool(re.fullmatch(r"[\w.]+", v)))
]
METRICS: tuple[str, ...] = get_args(Metric)
BatchSize = Annotated[int, within(1, 10**9)]
Devices = Annotated[list[Index], Rule("a list of device indices", distinct)]
PartOfAll = Annotated[float, Rule("a fraction below 1", lambda v: 0 < v < 1)]
Part = Annotated[float, within(0, 1, above=True)]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true", "32", "64", 32, 64]
_MOST = 16 * (os.cpu_count() or 1)
Workers = Annotated[int, within(0, _MOST, ", 16 for each processor")]
Threads = Annotated[int, within(1, _MOST, ", 16 for each processor")]


# The keys that every configuration has, and what they allow; conf/train.yaml and the files of the
# groups explain them.
REQUIRED: dict[str, Any] = {
    "seed": Seed,
    "rho": NonNegative,
    "epochs": Count,
    "batch_size": BatchSize,
    "lr": Positive,
    "weight_decay": NonNegative,
    "label_smoothing": BelowOne,
    "threads": Threads | None,
    "compile": bool,
    "cuda_graph": bool | Literal["auto"],
    "memory_format": Literal["auto", "contiguous", "channels_last"],
    "max_skipped_steps": Count,
    "test": bool,
    "ckpt_path": Any,
    "checkpoint_every_n_steps": Count | None,
    "traceback": bool,
    "task_name": Any,
    "output_dir": Folder,
    "optimized_metric": Metric | None,
    "data.source._target_": Any,
    "data.label_noise": Annotated[float, within(0, 1, ", a fraction of the labels")],
    "model._target_": Any,
    "method.name": Text,
    "method.perturbation._target_": Any,
    "method.rho": NonNegative,
    "loss._target_": Any,
    "optimizer._target_": Annotated[
        Any,
        Rule(
            "an optimizer that takes dense gradients and no closure",
            lambda v: v not in ("torch.optim.LBFGS", "torch.optim.SparseAdam"),
        ),
    ],
    "scheduler._target_": Any,
    "trainer.accelerator": Literal["auto", "cpu", "cuda", "gpu", "mps"],
    "trainer.devices": Count | Devices | Literal["auto"],
    "trainer.num_nodes": Count,
    "trainer.log_every_n_steps": Count,
    "trainer.gradient_clip_val": Positive | None,
    "trainer.accumulate_grad_batches": Count,
}
# Keys that only some files of a group have, or that can be added: of our own classes, of PyTorch's
# optimizers and of ``lightning.Trainer``.
HINTS: dict[str, Any] = REQUIRED | {
    **dict.fromkeys(("model.width", "model.depth", "model.widen_factor", "model.alpha"), Count),
    "model.bottleneck": bool,
    "model.zero_init_residual": bool,
    **dict.fromkeys(("model.drop_rate", "model.drop_path_rate", "model.dropout"), BelowOne | None),
    "model.stochastic_depth_prob": BelowOne | None,
    "model.batch_norm_momentum": Part | None,
    "model.name": ModelName,
    "model.pretrained": bool,
    "model.weights": Text | None,
    "model.weights_of": ModelName | None,
    "model.p_last": Fraction,
    "loss.smoothing": BelowOne,
    "loss.class_weights": list[NonNegative] | Literal["balanced"] | None,
    "scheduler.warmup_epochs": NonNegative,
    "scheduler.final": Fraction,
    "scheduler.milestones": list[Fraction],
    "scheduler.gamma": Positive,
    "data.val_size": Annotated[
        float,
        Rule(
            "a fraction of the images below 1, or a number of images",
            lambda v: 0 <= v < 1 or (v >= 1 and v % 1 == 0 and repr(v) != "1.0"),
        ),
    ],
    "data.subset": Annotated[
        float,
        Rule(
            "a fraction of the images up to 1, or a number of images",
            lambda v: 0 < v < 1 or (v >= 1 and v % 1 == 0),
        ),
    ],
    "data.split_seed": Index,
    "data.mean": list[Fraction] | None,
    "data.std": list[Part] | None,
    "data.sampler": Literal["shuffled", "balanced"],
    "data.repeats": Annotated[int, within(1, 1000)],
    "data.window": Count | None,
    "data.flip": Fraction,
    "data.eval_batch_size": BatchSize,
    "data.num_workers": Workers | Literal["auto"],
    "data.device": Literal["cpu", "cuda"] | None,
    "data.drop_last": bool,
    "data.root": Folder,
    "data.download": bool,
    "data.image_size": Count | None,
    "data.split": PartOfAll | list[PartOfAll] | Text | None,
    "data.view": Literal["resize", "random_resized_crop"],
    "data.crop_scale": list[Part],
    "data.crop_ratio": list[Positive],
    "data.crop_fraction": Part | None,
    "data.interpolation": Literal["bilinear", "bicubic"] | None,
    "data.crop_mode": Literal["center", "squash"] | None,
    "data.memory_gb": NonNegative,
    "data.cache_gb": Positive | None,
    "data.fetch_threads": Count,
    "data.skip_broken": bool,
    "method.perturbation.eta": NonNegative,
    "method.perturbation.sigma": NonNegative,
    "method.perturbation.decay": BelowOne,
    "method.perturbation.beta": Part,
    "method.perturbation.theta": Part,
    "method.perturbation.normalize_bias": bool,
    "method.descent.decouple": bool,
    "method.rho_min": NonNegative | None,
    "method.passes": Positive | None,
    "method.perturbed_layers": Literal["all", "normalization"],
    "method.decay_in_ascent": bool | Literal["both"],
    "method.ascent_steps": Count,
    "method.every": Count,
    "method.ascent_fraction": Part,
    "method.descent_fraction": Part,
    "method.same_randomness": bool,
    "method.sync_perturbation": bool,
    "method.ascent_per_micro_batch": bool,
    "optimizer.lr": Positive,
    "optimizer.momentum": NonNegative,
    "optimizer.nesterov": bool,
    "optimizer.betas": tuple[BelowOne, BelowOne],
    "optimizer.weight_decay": NonNegative,
    "optimizer.fused": bool | None,
    "trainer.timeout": Annotated[float, within(1, 10**7, ", in seconds")],
    "trainer.precision": Precision,
    "trainer.sync_batchnorm": bool,
    "trainer.deterministic": bool | Literal["warn"],
    "trainer.check_val_every_n_epoch": Count | None,
    "trainer.val_check_interval": Positive | None,
    "trainer.min_epochs": Index | None,
    "trainer.min_steps": Index | None,
    "trainer.gradient_clip_algorithm": Literal["norm"],
    **FINETUNE,
}


def check(cfg: DictConfig, top_level: Iterable[str]) -> dict[str, Any]:
    """Check names, values and the files that a configuration points to.

    Args:
        cfg: the composed configuration.
        top_level: the keys that may stand at its top.

    Returns:
        The configuration with all values resolved.

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
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:  # an interpolation of a missing key
        key, said = str(error.full_key).partition("[")[0], str(error).splitlines()[0]
        raise ConfigError(f"{key}={given.get(key)}: {said}") from error
    values = flat(plain)
    for key, hint in HINTS.items():
        if key in values and not _is_of_others(values, key):
            check_value(key, values[key], hint)
    metric, source = str(values["optimized_metric"]), str(values["data.source._target_"])
    if metric.startswith("test/") and not values["test"]:
        raise ConfigError(f"optimized_metric={metric}: needs test=true")
    whole = source.rpartition(".")[2] in WHOLE and not values.get("data.val_size")
    if metric.startswith("val/") and whole:
        missing = "there is no validation data; set data.val_size"
        raise ConfigError(f"optimized_metric={metric}: {missing}")
    _check_names(values)
    check_tuning(values)
    try:
        if is_first():  # the others write nothing
            _check_folders(values)
        _check_files(values)
    except ConfigError as error:
        raise LocalError(str(error)) from error
    return dict(plain)


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
    weights = values.get("model.weights")  # a resumed run needs none
    ours = is_in(TARGETS["model"], values["model._target_"])
    if ours and weights and not checkpoint and not Path(os.path.expanduser(weights)).exists():
        raise ConfigError(f"model.weights={weights}: no such file, and no folder of a run")
    name = values["data.source._target_"].rpartition(".")[2]
    root = Path(os.path.expanduser(given))
    if name == "image_folder" and "://" not in given and not root.is_dir():
        raise ConfigError(f"data.root={given}: no such folder")
    if name in OWN_FILES and not any(root.glob(OWN_FILES[name])):
        found = [p for pattern in PHOTOGRAPHS for p in islice(root.glob(pattern), 1000)]
        if any(p.suffix.lower() in (".jpg", ".jpeg", ".png") for p in found):
            raise ConfigError(
                f"data.root={given}: has photographs, which {name} does not read: add "
                f"data=image_folder, or give the folder that is to hold {name}"
            )
