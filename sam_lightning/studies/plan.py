"""The file of a study: from arms, settings and seeds to runs, each checked without torch."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sam_lightning.config.conf import top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import COMPOSING, CONF, OF_ARGUMENTS, explain, key_of
from sam_lightning.config.schema import METRICS, RULES, check, check_values, did_you_mean, one_line
from sam_lightning.studies.report.runs import passes_per_step, settings
from sam_lightning.studies.sweep import LONGEST_NAME

FOLDER = Path("logs") / "studies"
PARTS = ("common", "seeds", "settings", "arms", "metric", "baseline")
# Keys of train.py that the study sets for each run, and what to give instead.
OWN = {
    "seed": "list them in seeds",
    "sweep": "a list of values is a grid here",
    "ckpt_path": "a run goes on from its own last checkpoint",
    "output_dir": "runs have folders in the study's",
    "hydra": "the study starts the runs itself",
}


@dataclass(frozen=True)
class Planned:
    """A run of a study.

    ``choice`` has the values of the arm's grid and of the settings, which tell the run from others
    of its arm; ``overrides`` the arguments of ``train.py``, value by key; ``cost`` its passes over
    the training images.
    """

    arm: str
    choice: Mapping[str, Any]
    seed: int
    overrides: Mapping[str, str]
    folder: Path
    cost: float = 0.0

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
    runs: Sequence[Planned]

    @property
    def metric(self) -> str:
        """What the report compares."""
        return str(self.content.get("metric", "test/acc"))

    @property
    def baseline(self) -> str:
        """The method that the report compares others with."""
        return str(self.content.get("baseline", "sgd"))


def read(path: Path, given: Sequence[str] = ()) -> Plan:
    """Expand a study's file and check the configuration of every run.

    All arms of a seed come before the next seed, so that a study that is stopped early has
    something of each.

    Args:
        path: the YAML file; its name without the ending is that of the study.
        given: overrides of every run, which win over those of the file.

    Raises:
        ConfigError: names the part of the file, the arm or the override that is wrong.
    """
    extra = _given(given)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        _check_name(path.stem)
        content = _content(path)
        runs = list(_expanded(content, extra, FOLDER / path.stem))
        _check_folders(runs)
        return Plan(path.stem, content, given, _checked(runs))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def text(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(text, value))}]"
    plain = re.fullmatch(r"[A-Za-z_/.][\w./-]*", str(value))
    if isinstance(value, int | float) or (
        plain and value.lower() not in ("null", "true", "false", "inf", "nan")
    ):
        return str(value)
    # A backslash counts as one, but in front of a quote or at the end, where it escapes.
    escaped = re.sub(r'(\\*)("|$)', lambda m: 2 * m[1] + m[2].replace('"', r"\""), str(value))
    return f'"{escaped}"'


def folder_name(arm: str, choice: Mapping[str, Any], seed: int) -> str:
    """The name of a run's folder, which tells it from all others of its study."""
    named = [arm, *(f"{key}={text(value)}" for key, value in choice.items()), f"seed={seed}"]
    return re.sub(r"[^\w.,=+-]", "-", ",".join(named))


def _given(arguments: Sequence[str]) -> dict[str, str]:
    """Overrides of the command line, value by key."""
    found = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: not of the form key=value")
        _check_own(argument, key)
        found[key] = value
    return found


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
            hint = did_you_mean(str(key), PARTS) or f"; allowed are {', '.join(PARTS)}"
            raise ConfigError(f"{key}: no such key{hint}")
    seeds = content.get("seeds")
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise ConfigError(f"seeds={seeds}: must be a list, each seed once, as in [0, 1, 2]")
    for seed in seeds:
        check_values(OmegaConf.create({"seed": seed}), RULES)
    if not isinstance(content.get("arms"), dict) or not content["arms"]:
        raise ConfigError("arms: must be a mapping from names to overrides")
    if (metric := content.get("metric", "test/acc")) not in METRICS:
        hint = did_you_mean(str(metric), METRICS) or f"; allowed are {', '.join(METRICS)}"
        raise ConfigError(f"metric={metric}: no such metric{hint}")
    return content


def _expanded(
    content: Mapping[str, Any], given: Mapping[str, str], folder: Path
) -> Iterator[Planned]:
    common = _overrides("common", content.get("common", {}))
    crossed = _overrides("settings", content.get("settings", {}))
    arms = {}
    for arm, own in content["arms"].items():
        _check_name(str(arm))
        arms[str(arm)] = _overrides(f"arms.{arm}", own)
        _check_apart(f"arms.{arm}", arms[str(arm)], crossed, given)
    for seed, setting, (arm, own) in product(content["seeds"], list(_grid(crossed)), arms.items()):
        for values in _grid(own):
            choice = {k: v for k, v in values.items() if isinstance(own[k], list)} | setting
            texts = {k: text(v) for k, v in (common | values | setting).items()}
            overrides = {**texts, **given, "seed": str(seed)}
            yield Planned(arm, choice, seed, overrides, folder / folder_name(arm, choice, seed))


def _overrides(part: str, content: Any) -> dict[str, Any]:
    """A part of the file that holds overrides."""
    if not isinstance(content, dict):
        raise ConfigError(f"{part}: must be a mapping of overrides, as in {{rho: 0.1}}")
    for key, value in content.items():
        _check_own(f"{part}.{key}", str(key))
        if isinstance(value, dict):
            inner = next(iter(value), "key")
            raise ConfigError(f"{part}.{key}: is a mapping; write {key}.{inner}: value")
        if value == []:
            raise ConfigError(f"{part}.{key}: is an empty list")
        if _has_mapping(value):
            raise ConfigError(f"{part}.{key}: a list may hold numbers, texts and lists, no mapping")
    return {str(key): value for key, value in content.items()}


def _has_mapping(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_has_mapping, value)))


def _check_own(where: str, key: str) -> None:
    instead = OWN.get(re.split(r"[./@]", key_of(key))[0])
    if instead is not None:
        raise ConfigError(f"{where}: may not be given; {instead}")


def _check_apart(
    part: str, own: Mapping[str, Any], crossed: Mapping[str, Any], given: Mapping[str, str]
) -> None:
    """Refuse an override that would make runs equal which their names tell apart."""
    in_settings = {key_of(key) for key in crossed}
    lists = {key_of(key) for key, value in own.items() if isinstance(value, list)}
    for key in own:
        if key_of(key) in in_settings:
            raise ConfigError(f"{part}.{key}: is in settings too")
    for key, value in given.items():
        if (bare := key_of(key)) in in_settings | lists:
            where = "settings" if bare in in_settings else part
            raise ConfigError(f"{where}.{bare}: has values already, so not {key}={value} for all")


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(f"{name}: must be a name of letters, digits, -, _, + and .")


def _grid(values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of the elements of lists."""
    for combination in product(*(v if isinstance(v, list) else [v] for v in values.values())):
        yield dict(zip(values, combination, strict=True))


def _check_folders(runs: Sequence[Planned]) -> None:
    names: set[str] = set()
    for run in runs:
        name = run.folder.name
        if len(name.encode()) > LONGEST_NAME:
            raise ConfigError(f"arms.{run.arm}: {name}: too long for the name of a folder")
        if name in names:
            raise ConfigError(f"arms.{run.arm}: two runs would be called {name}")
        names.add(name)


def _checked(runs: Sequence[Planned]) -> list[Planned]:
    """The runs with their costs; of those that differ in the seed only, the first is composed."""
    known = top_level()
    costs: dict[str, float] = {}
    effective: dict[str, tuple[str, dict[str, Any]]] = {}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for run in runs:
            if (name := _seedless(run)) in costs:
                continue
            try:
                config = _composed(run, known)
                # Arms may be alike, as with epochs=1 for all; the values of a grid may not.
                own = run.arm, settings(config)
                if same := [other for other, found in effective.items() if found == own]:
                    raise ConfigError(
                        f"{name} would be trained as {same[0]} is: they differ in nothing that "
                        "matters to the result"
                    )
            except ConfigError as error:
                raise ConfigError(f"arms.{run.arm}: {error}") from error
            effective[name] = own
            costs[name] = config["epochs"] * (passes_per_step(config["method"]) or 2)
    return [replace(run, cost=costs[_seedless(run)]) for run in runs]


def _seedless(run: Planned) -> str:
    return run.folder.name.rpartition(",")[0]


def _composed(run: Planned, known: Sequence[str]) -> dict[str, Any]:
    """Compose and check as ``train.py`` does."""
    overrides = [f"{key}={value}" for key, value in run.overrides.items()]
    try:
        cfg = compose("train", overrides)
    except Exception as error:
        if isinstance(error, COMPOSING) or any(said in str(error) for said in OF_ARGUMENTS):
            raise ConfigError(explain(error, overrides)) from error
        raise
    cfg.output_dir = str(run.folder.parent)
    check(cfg, known)
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return dict(config)
