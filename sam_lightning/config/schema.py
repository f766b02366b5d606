"""What a configuration may say, checked before torch is loaded."""

import contextlib
import errno
import math
import os
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import launched
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.trust import check_targets

ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "64-true", 32, 64)
POLICIES = (None, "autoaugment", "autoaugment_svhn", "trivialaugment", "randaugment")
PARTS = ("train", "val", "test")
METRICS = (
    *(f"{split}/{name}" for split in ("val", "test") for name in ("acc", "acc5", "error", "loss")),
    *("train/acc", "train/loss"),
)
# Top-level keys that a configuration can do without, and others that it cannot.
OPTIONAL = ("logger", "callbacks", "experiment", "sweep")
REQUIRED = (
    *(f"{key}._target_" for key in ("data.source", "model", "optimizer", "scheduler")),
    *(f"method.{key}" for key in ("name", "rho", "perturbation._target_")),
    *(f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "log_every_n_steps")),
    *(f"trainer.{key}" for key in ("gradient_clip_val", "accumulate_grad_batches")),
    "data.label_noise",
)
# What loggers and callbacks call a folder that they write to.
FOLDERS = ("save_dir", "root_dir", "dirpath")

Rule = tuple[str, Callable[[Any], bool], str]


def number(
    low: float, high: float = math.inf, *, open_low: bool = False, below: float = math.inf
) -> Callable[..., bool]:
    """A finite number from ``low`` (itself too, unless ``open_low``) to ``high``, < ``below``."""

    def holds(v: Any) -> bool:
        if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v):
            return False
        return (v > low if open_low else v >= low) and v <= high and v < below

    return holds


def integer(low: int, high: float = math.inf) -> Callable[[Any], bool]:
    """A whole number from ``low`` to ``high``."""
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _devices(v: Any) -> bool:
    indices = list(v) if OmegaConf.is_list(v) else []
    listed = bool(indices) and all(map(integer(0), indices)) and len({*indices}) == len(indices)
    return v == "auto" or integer(1)(v) or listed


def or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Null too."""
    return lambda v: v is None or holds(v)


def one_of(allowed: Iterable[Any]) -> tuple[Callable[[Any], bool], str]:
    """One of these, and how to say so."""
    return lambda v: v in allowed, ", ".join("null" if a is None else str(a) for a in allowed)


def boolean(v: Any) -> bool:
    """True or false."""
    return isinstance(v, bool)


def list_of(holds: Callable[[Any], bool], count: int | None = None) -> Callable[[Any], bool]:
    """A list of values that hold, and of so many of them."""
    return lambda v: OmegaConf.is_list(v) and all(map(holds, v)) and len(v) == (count or len(v))


def _text(v: Any) -> bool:
    return isinstance(v, str) and v != ""


WORKERS = 16 * (os.cpu_count() or 1)
BATCH_SIZE = (integer(1, 10**9), "a whole number from 1 to 1000000000")
PROFILERS = (None, "simple", "advanced", "pytorch")
# Arguments of lightning.Trainer that it would take as anything, and fail later on.
SWITCHES = ("benchmark", "inference_mode", "detect_anomaly", "barebones", "enable_autolog_hparams")

RULES: list[Rule] = [
    ("seed", lambda v: integer(0)(v) and v < 2**32, "a whole number from 0 to 4294967295"),
    ("rho", number(0), "a number >= 0"),
    ("method.rho", number(0), "a number >= 0"),
    ("epochs", integer(1), "a whole number >= 1"),
    ("batch_size", *BATCH_SIZE),
    ("lr", number(0, open_low=True), "a number > 0"),
    ("weight_decay", number(0), "a number >= 0"),
    ("label_smoothing", number(0, below=1), "a number from 0 to below 1"),
    ("memory_format", *one_of(("auto", "contiguous", "channels_last"))),
    ("compile", boolean, "true, false"),
    ("test", boolean, "true, false"),
    ("debug", boolean, "true, false"),
    ("max_skipped_steps", integer(1), "a whole number >= 1"),
    ("checkpoint_every_n_steps", or_null(integer(1)), "a whole number >= 1, or null"),
    ("output_dir", _text, "the path of a folder"),
    ("optimized_metric", *one_of((None, *METRICS))),
    ("model.width", integer(1), "a whole number >= 1"),
    ("model.depth", integer(1), "a whole number >= 1"),
    ("model.widen_factor", integer(1), "a whole number >= 1"),
    ("model.dropout", number(0, below=1), "a number from 0 to below 1"),
    ("model.alpha", integer(1), "a whole number >= 1"),
    ("model.bottleneck", boolean, "true, false"),
    ("model.p_last", number(0, 1), "a number from 0 to 1"),
    ("model.zero_init_residual", boolean, "true, false"),
    ("method.name", _text, "a text"),
    ("method.perturbation.eta", number(0), "a number >= 0"),
    ("method.perturbation.normalize_bias", boolean, "true, false"),
    ("method.perturbation.sigma", number(0), "a number >= 0"),
    ("method.perturbation.decay", number(0, below=1), "a number from 0 to below 1"),
    ("method.perturbation.beta", number(0, 1, open_low=True), "a number above 0 and up to 1"),
    ("method.descent.alpha", number(0), "a number >= 0"),
    ("method.passes", or_null(number(0, open_low=True)), "a number > 0, or null"),
    ("method.rho_min", or_null(number(0)), "a number >= 0, or null"),
    ("method.perturbed_layers", *one_of(("all", "normalization"))),
    ("method.sync_perturbation", boolean, "true, false"),
    ("method.decay_in_ascent", boolean, "true, false"),
    ("method.ascent_per_micro_batch", boolean, "true, false"),
    ("method.ascent_fraction", number(0, 1, open_low=True), "a number above 0 and up to 1"),
    ("method.ascent_steps", integer(1), "a whole number >= 1"),
    ("method.descent_fraction", number(0, 1, open_low=True), "a number above 0 and up to 1"),
    ("method.every", integer(1), "a whole number >= 1"),
    ("method.same_randomness", boolean, "true, false"),
    (
        "optimizer._target_",
        lambda v: v not in ("torch.optim.LBFGS", "torch.optim.SparseAdam"),
        "an optimizer that takes dense gradients and no closure",
    ),
    ("optimizer.lr", number(0, open_low=True), "a number > 0"),
    ("optimizer.weight_decay", number(0), "a number >= 0"),
    ("optimizer.momentum", number(0), "a number >= 0"),
    ("optimizer.nesterov", boolean, "true, false"),
    ("optimizer.fused", or_null(boolean), "true, false, null"),
    ("optimizer.betas", list_of(number(0, below=1), 2), "two numbers from 0 to below 1"),
    ("scheduler.warmup_epochs", number(0), "a number >= 0"),
    ("scheduler.milestones", list_of(number(0, 1)), "a list of fractions of the run, from 0 to 1"),
    ("scheduler.gamma", number(0, open_low=True), "a number > 0"),
    ("scheduler.final", number(0, 1), "a fraction from 0 to 1"),
    ("trainer.accelerator", *one_of(ACCELERATORS)),
    ("trainer.devices", _devices, "a whole number >= 1, a list of device indices, or auto"),
    ("trainer.num_nodes", integer(1), "a whole number >= 1"),
    ("trainer.timeout", number(1, 1e7), "a number of seconds from 1 to 10000000"),
    ("trainer.precision", *one_of(PRECISIONS)),
    (
        "trainer.gradient_clip_val",
        or_null(number(0, open_low=True)),
        "a number > 0, or null",
    ),
    ("trainer.gradient_clip_algorithm", *one_of(("norm",))),
    ("trainer.accumulate_grad_batches", integer(1), "a whole number >= 1"),
    ("trainer.log_every_n_steps", integer(1), "a whole number >= 1"),
    ("trainer.check_val_every_n_epoch", or_null(integer(1)), "a whole number >= 1, or null"),
    ("trainer.val_check_interval", or_null(number(0, open_low=True)), "a number > 0, or null"),
    ("trainer.profiler", *one_of(PROFILERS)),
    ("trainer.model_registry", or_null(_text), "a text, or null"),
    *((f"trainer.{key}", or_null(boolean), "true, false, null") for key in SWITCHES),
    *(
        (f"trainer.{key}", or_null(integer(0)), "a whole number >= 0, or null")
        for key in ("min_epochs", "min_steps")
    ),
    ("trainer.max_steps", integer(-1), "a whole number >= -1; -1 is no limit"),
    *((f"trainer.limit_{p}_batches", or_null(number(0)), "a number >= 0, or null") for p in PARTS),
    ("trainer.overfit_batches", number(0), "a number >= 0"),
    ("trainer.deterministic", lambda v: boolean(v) or v == "warn", "true, false, warn"),
    ("trainer.sync_batchnorm", boolean, "true, false"),
    ("data.root", _text, "the path of a folder"),
    ("data.val_size", number(0), "a number of images, or a fraction below 1"),
    ("data.subset", number(0, open_low=True), "a fraction up to 1, or a number of images"),
    ("data.label_noise", number(0, 1), "a fraction from 0 to 1"),
    ("data.mean", or_null(list_of(number(0, 1))), "a list of numbers from 0 to 1, or null"),
    ("data.std", or_null(list_of(number(0, 1, open_low=True))), "a list of numbers > 0, or null"),
    ("data.crop_padding", integer(0), "a whole number >= 0"),
    ("data.cutout", integer(0), "a whole number >= 0"),
    ("data.flip", boolean, "true, false"),
    ("data.policy", *one_of(POLICIES)),
    ("data.device", *one_of((None, "cpu", "cuda"))),
    ("data.image_size", or_null(integer(1)), "a whole number >= 1, or null"),
    ("data.split_seed", integer(0), "a whole number >= 0"),
    ("data.download", boolean, "true, false"),
    ("data.drop_last", boolean, "true, false"),
    (
        "data.num_workers",
        lambda v: integer(0)(v) and v <= WORKERS,
        f"a whole number from 0 to {WORKERS}, 16 for each processor",
    ),
    ("data.eval_batch_size", *BATCH_SIZE),
    ("logger.tensorboard.name", or_null(lambda v: isinstance(v, str)), "a text, or null"),
]


def check(cfg: DictConfig, top_level: Iterable[str]) -> None:
    """Check names, values and the files that a configuration points to.

    Args:
        cfg: the composed configuration.
        top_level: the keys that may stand at its top.

    Raises:
        ConfigError: names the first key that is wrong, its value and what is allowed.
    """
    top_level = list(top_level)
    for key in map(str, cfg):
        if key not in top_level:
            raise ConfigError(f"{key}={cfg[key]}: {no_such_key(key, top_level)}")
    for key in top_level:
        if key not in OPTIONAL and key not in cfg:
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    plain = flat(OmegaConf.to_container(cfg, resolve=False))
    for key in (*REQUIRED, *plain):
        if plain.get(key, "???") == "???":
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    for key, value in plain.items():
        try:
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:  # an interpolation that leads nowhere
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    OmegaConf.resolve(copy := cfg.copy())
    check_values(copy, RULES)
    if str(copy.optimized_metric).startswith("test/") and not copy.test:
        raise ConfigError(f"optimized_metric={copy.optimized_metric}: needs test=true")
    check_targets(copy)
    if (found := launched()) is None or found.rank == 0:  # the others write nothing
        for key, path in _folders(copy).items():
            _check_folder(key, path)
    _check_files(copy)


def check_values(cfg: DictConfig, rules: Iterable[Rule]) -> None:
    """Refuse the first value that breaks its rule; a key that is not there breaks none."""
    for key, holds, allowed in rules:
        value = OmegaConf.select(cfg, key, default=(absent := object()))
        if value is not absent and not holds(value):
            shown = "null" if value is None else value
            raise ConfigError(f"{key}={shown}: allowed is {allowed}")


def _folders(cfg: DictConfig) -> dict[str, Any]:
    """What a run writes to, by key."""
    of_others = {
        key: path
        for key, path in flat(OmegaConf.to_container(cfg)).items()
        if key.startswith(("logger.", "callbacks.")) and key.rpartition(".")[2] in FOLDERS
    }
    return {"output_dir": cfg.output_dir} | {k: v for k, v in of_others.items() if v is not None}


def _check_folder(key: str, path: Any) -> None:
    if not _text(path):
        raise ConfigError(f"{key}={path}: allowed is the path of a folder")
    folder = Path(path).absolute()
    try:  # to make it is the one sure test
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be written ({error.strerror})") from error
    with contextlib.suppress(OSError):  # the run may be refused yet, and then leaves none of it
        for part in missing:
            part.rmdir()


def _check_files(cfg: DictConfig) -> None:
    if cfg.ckpt_path not in (None, "last") and not Path(str(cfg.ckpt_path)).exists():
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: no such file or folder")
    source = cfg.data.source._target_
    if source.endswith(".image_folder") and not Path(str(cfg.data.root)).expanduser().is_dir():
        raise ConfigError(f"data.root={cfg.data.root}: no such folder")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a message, or nothing."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def no_such_key(key: str, known: Iterable[str]) -> str:
    """The end of a message: the key that may be meant, or all of them at the same level."""
    known = list(known)
    parent, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    elsewhere = [k for k in known if k.endswith(f".{name}")]
    near = get_close_matches(name, beside, n=1)
    if meant := [beside[n] for n in near] or elsewhere[:1]:
        return f"no such key; did you mean {meant[0]}?"
    if not beside:
        return f"no such key{did_you_mean(key, known)}"
    where = f" in {parent}" if parent else ""
    return f"no such key; allowed{where} are {', '.join(beside)}"


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every key of nested plain dictionaries in dotted form, with its value."""
    values: dict[str, Any] = {}
    for name, child in node.items():
        values[f"{prefix}{name}"] = child
        if isinstance(child, dict):
            values |= flat(child, f"{prefix}{name}.")
    return values


def one_line(error: BaseException) -> str:
    """An error's text on one line; its type where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
