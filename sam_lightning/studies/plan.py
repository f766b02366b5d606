"""The file of a study: from arms, settings and seeds to runs, each checked without torch."""

import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.conf import CONF, DEFAULTS, top_level
from sam_lightning.config.errors import ConfigError, named_errors, no_such_key, one_line
from sam_lightning.config.hydra_errors import explain, key_of, quoted, with_quoted_places
from sam_lightning.config.schema import MethodName, Metric, check
from sam_lightning.config.values import Rule, Seed, check_value, check_values, distinct
from sam_lightning.runs.resume import resumed
from sam_lightning.studies.identical import because, differing
from sam_lightning.studies.report.runs import passes_per_step, settings
from sam_lightning.studies.sweep import LONGEST_NAME

FOLDER = Path("logs") / "studies"
# The parts of a file, and what they are if they are not given.
PARTS: dict[str, Any] = {"common": {}, "seeds": None, "settings": {}, "arms": None}
PARTS |= {"metric": "test/acc", "baseline": "sgd"}
CONTENT = {
    "seeds": Annotated[list[Any], Rule("a list, each seed once, as in [0, 1, 2]", distinct)],
    "arms": Annotated[
        Any,
        Rule("a mapping from names to overrides", lambda v: OmegaConf.is_dict(v) and len(v) > 0),
    ],
    "metric": Metric,
    "baseline": MethodName,
}

# Keys of train.py that the study sets for each run, and what to give instead.
OWN = {
    "seed": "list them in seeds",
    "sweep": "a list of values is a grid here",
    "ckpt_path": "a run goes on from its own last checkpoint",
    "output_dir": "runs have folders in the study's",
    "hydra": "the study starts the runs itself",
}


@dataclass(frozen=True)
class RunSpec:
    """A run of a study.

    ``choice`` has the values of the arm's grid and of the settings, which tell the run from others
    of its arm; ``overrides`` the arguments of ``train.py``, value by key; ``passes`` is its cost.
    """

    arm: str
    choice: Mapping[str, Any]
    seed: int
    overrides: Mapping[str, str]
    folder: Path
    passes: float = 0

    @property
    def arguments(self) -> list[str]:
        """What ``train.py`` is started with, whether for the first time or to go on."""
        own = [f'hydra.run.dir="{self.folder}"', "hydra.mode=RUN", "ckpt_path=last"]
        return [*(f"{key}={value}" for key, value in self.overrides.items()), *own]


@dataclass(frozen=True)
class Plan:
    """A study as its file (``content``) and the command line say it."""

    name: str
    content: Mapping[str, Any]
    overrides: Sequence[str]
    runs: Sequence[RunSpec]


def read(path: Path, given: Sequence[str] = ()) -> Plan:
    """Expand a study's file and check every run; overrides that are ``given`` win over the file's.

    All arms of a seed come before the next seed: a study that stops early has some of each.
    """
    extra = {key: value for key, _, value in (argument.partition("=") for argument in given)}
    for key, value in extra.items():
        _check_own(f"{key}={value}", key)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    with named_errors(str(path)):
        _check_name(path.stem)
        content = _content(path)
        runs = list(_checked(_expanded({**PARTS, **content}, extra, FOLDER / path.stem)))
    return Plan(path.stem, content, given, runs)


def split(keys: Keys, argv: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """A command's own options, and its other arguments, which are for ``train.py``."""
    own = [a for a in argv if a.partition("=")[0] in keys]
    options, others = parse(keys, own), [a for a in argv if a not in own]
    if flags := [a for a in others if a.startswith("-")]:
        raise ConfigError(f"{flags[0]}: no such flag; a setting is given as key=value")
    return options, others


def configuration(overrides: Sequence[str], output_dir: str | None = None) -> DictConfig:
    """What ``train.py`` would run with, checked; with ``ckpt_path``, as that run continues."""
    arguments = resumed(with_quoted_places(list(overrides)))
    try:
        with initialize_config_dir(str(CONF), **DEFAULTS):
            cfg = compose("train", arguments)
    except Exception as error:
        raise ConfigError(explain(error, list(overrides))) from error
    cfg.output_dir = output_dir or tempfile.gettempdir()  # Hydra sets it only for a run
    check(cfg, top_level())
    if cfg.ckpt_path is not None and "hydra.mode=RUN" not in arguments:
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: is not the folder of a run, and in none")
    return cfg


def text(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower()
    reserved = ("null", "true", "false", "inf", "nan")
    if re.fullmatch(r"[A-Za-z_/.][\w./-]*", value) and value.lower() not in reserved:
        return value
    return quoted(value)


def folder_name(arm: str, choice: Mapping[str, Any], seed: int) -> str:
    """The name of a run's folder, which tells it from all others of its study."""
    named = [arm, *(f"{key}={text(value)}" for key, value in choice.items()), f"seed={seed}"]
    return re.sub(r"[^\w.,=+-]", "-", ",".join(named))


def _content(path: Path) -> dict[str, Any]:
    """The file, once its parts are of the right kinds."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # of the file system, of YAML and of OmegaConf
        raise ConfigError(one_line(error)) from error
    if not isinstance(content, dict):
        raise ConfigError(f"must be a mapping with seeds and arms, not {type(content).__name__}")
    for key in content:
        if key not in PARTS:
            raise ConfigError(f"{key}: {no_such_key(str(key), PARTS)}")
    check_values(OmegaConf.create({**PARTS, **content}), CONTENT)
    for seed in content["seeds"]:
        check_value("seed", seed, Seed)
    return content


def _expanded(
    content: Mapping[str, Any], given: Mapping[str, str], folder: Path
) -> Iterator[RunSpec]:
    common, crossed = (_overrides(part, content[part]) for part in ("common", "settings"))
    arms = {str(arm): _overrides(f"arms.{arm}", own) for arm, own in content["arms"].items()}
    for arm, own in arms.items():  # names of folders must tell what the runs are
        _check_name(arm)
        parts = {key_of(key): "settings" for key in crossed}
        for key in own:
            if key_of(key) in parts:
                raise ConfigError(f"arms.{arm}.{key}: is in settings too")
        parts |= {key_of(key): f"arms.{arm}" for key, v in own.items() if isinstance(v, list)}
        for key, value in given.items():
            if part := parts.get(bare := key_of(key)):
                has = "has values already, so not"
                raise ConfigError(f"{part}.{bare}: {has} {key}={value} for all")
    for seed, setting, (arm, own) in product(content["seeds"], list(_grid(crossed)), arms.items()):
        for values in _grid(own):
            choice = {k: v for k, v in values.items() if isinstance(own[k], list)} | setting
            texts = {k: text(v) for k, v in (common | values | setting).items()}
            overrides = {**texts, **given, "seed": str(seed)}
            yield RunSpec(arm, choice, seed, overrides, folder / folder_name(arm, choice, seed))


def _overrides(part: str, content: Any) -> dict[str, Any]:
    """A part of the file that holds overrides."""
    if not isinstance(content, dict):
        raise ConfigError(f"{part}={content}: allowed is a mapping, as in {{rho: 0.1}}")
    for key, value in content.items():
        _check_own(f"{part}.{key}", str(key))
        if value == [] or _has_mapping(value):
            allowed = "numbers, texts and lists of them, and keys such as model.width"
            raise ConfigError(f"{part}.{key}={value}: allowed are {allowed}")
    return {str(key): value for key, value in content.items()}


def _has_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_mapping, value)))


def _check_own(where: str, key: str) -> None:
    instead = OWN.get(re.split(r"[./@]", key_of(key))[0])
    if instead is not None:
        raise ConfigError(f"{where}: may not be given; {instead}")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"{name}: must be a name of letters, digits, -, _, + and .")


def _grid(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the elements of lists."""
    for combination in product(*(v if isinstance(v, list) else [v] for v in values.values())):
        yield dict(zip(values, combination, strict=True))


def _checked(runs: Iterable[RunSpec]) -> Iterator[RunSpec]:
    """Refuse what train.py refuses, and runs with equal names or results; add the passes."""
    names: set[str] = set()
    known: dict[str, tuple[Any, Any]] = {}  # what a run acts on, and its configuration
    for run in runs:
        name = run.folder.name
        with named_errors(f"arms.{run.arm}"):
            if len(name.encode()) > LONGEST_NAME:
                raise ConfigError(f"{name}: too long for the name of a folder")
            if name in names:
                raise ConfigError(f"two runs would be called {name}")
            names.add(name)
            if (name := name.rpartition(",")[0]) not in known:  # another seed of it is checked
                overrides = [f"{key}={value}" for key, value in run.overrides.items()]
                cfg = configuration(overrides, str(run.folder.parent))
                config: Any = OmegaConf.to_container(cfg, resolve=True)
                # Arms may be alike, as with epochs=1 for all; the values of a grid may not.
                effective = run.arm, settings(config)
                for other, (found, before) in known.items():
                    if found == effective:
                        why = because(config["method"], differing(before, config))
                        same = f"{name} and {other} are identical runs"
                        raise ConfigError(f"{same}, because {why}; remove one")
                known[name] = effective, config
        _, config = known[name]
        yield replace(run, passes=(passes_per_step(config["method"]) or 2) * config["epochs"])
