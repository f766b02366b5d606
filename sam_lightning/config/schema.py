"""Names, types and ranges of a configuration, checked before torch is loaded."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import launched
from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.text import clean
from sam_lightning.config.trust import TARGETS, check_name, is_in

METRICS = (
    *(f"{split}/{name}" for split in ("val", "test") for name in ("acc", "acc5", "error", "loss")),
    *("train/acc", "train/loss"),
)
# Top-level keys that are optional, and other keys that are required.
OPTIONAL = ("logger", "callbacks", "experiment", "sweep")
REQUIRED = """
data.source._target_ data.label_noise model._target_ optimizer._target_ scheduler._target_
method.name method.rho method.perturbation._target_ trainer.accelerator trainer.devices
trainer.num_nodes trainer.log_every_n_steps trainer.gradient_clip_val
trainer.accumulate_grad_batches
"""
# Names of the keys for folders that loggers and callbacks write to.
FOLDERS = ("save_dir", "root_dir", "dirpath")

Holds = Callable[[Any], bool]
# A key, and the allowed values in words; between them a test if ``allows`` has none.
Rule = tuple[str, Holds, str] | tuple[str, str]
# The allowed values, in words that ``allows`` reads, and their keys.
TABLE = f"""
true, false: compile test debug model.bottleneck model.zero_init_residual data.flip data.download
  data.drop_last optimizer.nesterov trainer.sync_batchnorm method.perturbation.normalize_bias
  method.sync_perturbation method.decay_in_ascent method.ascent_per_micro_batch
  method.same_randomness
true, false, null: optimizer.fused trainer.benchmark trainer.inference_mode trainer.detect_anomaly
  trainer.barebones trainer.enable_autolog_hparams
true, false, warn: trainer.deterministic
a whole number >= 1: epochs max_skipped_steps model.width model.depth model.widen_factor model.alpha
  method.ascent_steps method.every trainer.num_nodes trainer.accumulate_grad_batches
  trainer.log_every_n_steps
a whole number >= 1, or null: checkpoint_every_n_steps trainer.check_val_every_n_epoch
  data.image_size
a whole number >= 0: data.crop_padding data.cutout data.split_seed
a whole number >= 0, or null: trainer.min_epochs trainer.min_steps
a whole number >= -1; -1 is no limit: trainer.max_steps
a whole number from 0 to {2**32 - 1}: seed
a whole number from 1 to {10**9}: batch_size data.eval_batch_size
a whole number from 0 to {16 * (os.cpu_count() or 1)}, 16 for each processor: data.num_workers
a number >= 0: rho weight_decay method.rho method.perturbation.eta method.perturbation.sigma
  method.descent.alpha optimizer.weight_decay optimizer.momentum scheduler.warmup_epochs
  trainer.overfit_batches
a number >= 0, or null: method.rho_min trainer.limit_train_batches trainer.limit_val_batches
  trainer.limit_test_batches
a number >= 0, below 1 a fraction of the images: data.val_size
a number > 0: lr optimizer.lr scheduler.gamma
a number > 0, or null: method.passes trainer.gradient_clip_val trainer.val_check_interval
a number > 0, up to 1 a fraction of the images: data.subset
a number from 0 to below 1: label_smoothing model.dropout method.perturbation.decay
a number from 0 to 1: model.p_last
a number from above 0 to 1: method.perturbation.beta method.ascent_fraction method.descent_fraction
a fraction from 0 to 1: scheduler.final data.label_noise
a number of seconds from 1 to {10**7}: trainer.timeout
two numbers from 0 to below 1: optimizer.betas
a list of fractions of the run, from 0 to 1: scheduler.milestones
a list of numbers from 0 to 1, or null: data.mean
a list of numbers from above 0 to 1, or null: data.std
auto, contiguous, channels_last: memory_format
null, {", ".join(METRICS)}: optimized_metric
all, normalization: method.perturbed_layers
auto, cpu, cuda, gpu, mps: trainer.accelerator
32-true, 16-mixed, bf16-mixed, 64-true, 32, 64: trainer.precision
norm: trainer.gradient_clip_algorithm
null, simple, advanced, pytorch: trainer.profiler
null, autoaugment, autoaugment_svhn, trivialaugment, randaugment: data.policy
null, cpu, cuda: data.device
the path of a folder: output_dir data.root
a text: method.name
a text, or null: trainer.model_registry
"""


def allows(text: str) -> Holds:
    """The test that ``a whole number >= 1, or null`` describes; see ``TABLE`` for other words."""
    words = text.removesuffix(", or null")
    if found := re.match(
        r"(a list of|two|an odd|a) (whole )?(?:number|fraction)s?\b.*?"
        r"(?:(>=?)|from( above)?) (-?\d+)(?: to (below )?(\d+))?",
        words,
    ):
        many, whole, sign, above, least, below, most = found.groups()
        low, high = int(least), float(most or sys.float_info.max)
        excluded = {low} if sign == ">" or above else {high} if below else set()
        kinds = (int,) if whole or many == "an odd" else (int, float)

        def one(v: Any) -> bool:
            inside = type(v) in kinds and low <= v <= high and v not in excluded
            return inside and (many != "an odd" or v % 2 == 1)

        def some(v: Any) -> bool:
            return OmegaConf.is_list(v) and all(map(one, v)) and (many != "two" or len(v) == 2)

        holds: Holds = some if many in ("a list of", "two") else one
    elif words.startswith(("a text", "a fi", "a fo", "the ")):
        holds = _text
    else:
        known = {"true": True, "false": False, "null": None, "32": 32, "64": 64}
        values = [known.get(word, word) for word in words.split(", ")]
        holds = lambda v: any(type(v) is type(a) and v == a for a in values)  # noqa: E731
    return holds if words == text else lambda v: v is None or holds(v)


def _text(v: Any) -> bool:
    return isinstance(v, str) and v != ""


def _devices(v: Any) -> bool:
    listed = allows("a list of whole numbers >= 0")(v) and 0 < len(v) == len({*v})
    return v == "auto" or listed or allows("a whole number >= 1")(v)


RULES: list[Rule] = [
    *(
        (key, text)
        for text, keys in re.findall(r"^(\S.*?): ((?:.|\n )*)", TABLE, re.M)
        for key in keys.split()
    ),
    ("trainer.devices", _devices, "a whole number >= 1, a list of device indices, or auto"),
    ("logger.tensorboard.name", lambda v: v is None or isinstance(v, str), "a text, or null"),
    (
        "optimizer._target_",
        lambda v: v not in ("torch.optim.LBFGS", "torch.optim.SparseAdam"),
        "an optimizer that takes dense gradients and no closure",
    ),
]


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
    plain = flat(OmegaConf.to_container(cfg, resolve=False))
    for key in (*(k for k in known if k not in OPTIONAL), *REQUIRED.split(), *plain):
        if plain.get(key, "???") == "???":
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    for key, value in plain.items():
        try:
            OmegaConf.select(cfg, key)
        except OmegaConfBaseException as error:  # an interpolation of a missing key
            raise ConfigError(f"{key}={value}: {str(error).splitlines()[0]}") from error
    OmegaConf.resolve(copy := cfg.copy())
    check_values(copy, [rule for rule in RULES if not _is_of_others(copy, rule[0])])
    if str(copy.optimized_metric).startswith("test/") and not copy.test:
        raise ConfigError(f"optimized_metric={copy.optimized_metric}: needs test=true")
    plain = flat(OmegaConf.to_container(copy))
    _check_names(plain)
    if (found := launched()) is None or found.rank == 0:  # the others write nothing
        _check_folders(plain)
    _check_files(copy)


def check_values(cfg: DictConfig, rules: Iterable[Rule]) -> None:
    """Refuse the first value that breaks its rule; a key that is not there breaks none."""
    for key, *test, allowed in rules:
        value = OmegaConf.select(cfg, key, default=(absent := object()))
        if value is absent:
            continue
        holds = test[0] if test else allows(allowed)
        if not holds(value):
            shown = "null" if value is None else value
            raise ConfigError(f"{key}={shown}: allowed is {allowed}")


def _is_of_others(cfg: DictConfig, key: str) -> bool:
    """Whether the key is an argument of foreign code, where it may mean something else."""
    owner = key.rpartition(".")[0]
    target = OmegaConf.select(cfg, f"{owner}._target_") if owner in TARGETS else None
    return target is not None and not is_in(TARGETS[owner], str(target))


def _check_names(plain: dict[str, Any]) -> None:
    """Refuse a ``_target_`` that cannot be a class or function, or that nothing builds."""
    for key, value in plain.items():
        owner, _, last = key.rpartition(".")
        if last != "_target_":
            continue
        within = [t for t in TARGETS if f"{owner}.".startswith(f"{t.rstrip('.*')}.")]
        if not within or f"{owner}.*" in within:
            raise ConfigError(f"{key}={value}: allowed is one in {', '.join(TARGETS)}")
        check_name(key, value)


def _check_folders(plain: dict[str, Any]) -> None:
    """Refuse a folder of the run that cannot be made and written."""
    for key, path in plain.items():
        of_others = key.startswith(("logger.", "callbacks.")) and path is not None
        if key != "output_dir" and not (of_others and key.rpartition(".")[2] in FOLDERS):
            continue
        if not _text(path):
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


def one_line(error: BaseException) -> str:
    """An error's text on one line that a terminal can show, or its type if the text is empty."""
    return " ".join(clean(error).split()) or type(error).__name__
