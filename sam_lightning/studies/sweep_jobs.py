"""The jobs of a sweep: counted, composed and checked before the first one begins."""

import copy
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from tempfile import gettempdir
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sam_lightning.config.conf import is_group, top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import explain, key_of
from sam_lightning.config.progress import progress
from sam_lightning.config.schema import check
from sam_lightning.runs.secrets import given_again
from sam_lightning.studies.identical import acted_on, because, differing, unused

log = logging.getLogger(__name__)

MOST = 10_000  # jobs of a sweep, each of which is composed and checked at its start

DOTTED = re.compile(r"[^/@]+\.[^/@]+")  # a key that names no group


def checked(master: DictConfig) -> tuple[list[str], list[Sequence[str]]]:
    """What a sweep sweeps, and the overrides of its jobs, each of which ``train.py`` would take.

    Args:
        master: the configuration of the sweep, with Hydra's part.

    Returns:
        The keys with several values, and the jobs, without those that would repeat another. A
        search draws its jobs itself; here they are its choices and the ends of its ranges, one key
        at a time.

    Raises:
        ConfigError: names the first job that would be refused, or says that there are too many.
    """
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    params = OmegaConf.select(master, "hydra.sweeper.params") or {}
    of_file = [f"{key}={value}" for key, value in params.items()]
    given: Any = OmegaConf.to_container(master.hydra.overrides.task)  # "${...}" as it stands
    overrides = parser.parse_overrides([*of_file, *given])
    last = {override.key_or_group: override for override in overrides}
    swept = {key: override for key, override in last.items() if override.is_sweep_override()}
    sweeper: Any = get_class(master.hydra.sweeper._target_)
    searches = not hasattr(sweeper, "split_arguments")  # Hydra's own has it
    values = [_values(override, searches) for override in swept.values()]
    counts = [len(found) for found in values]
    if max(counts, default=0) > MOST or (not searches and math.prod(counts) > MOST):
        lines = " ".join(str(override.input_line) for override in swept.values())
        raise ConfigError(f"{lines}: more than {MOST:,} jobs, the most that a sweep may have")
    if not searches:
        (jobs,) = sweeper.split_arguments(overrides, None)
        return [*swept], _distinct(jobs, _checked(master, jobs))
    if master.get("optimized_metric") is None:
        raise ConfigError("optimized_metric=null: a search needs one, such as val/acc")
    spaces = ("search_space", "custom_search_space")
    if not swept and not any(map(master.hydra.sweeper.get, spaces)):
        advice = "as in hydra.sweeper.params.rho=interval(0.01,0.5)"
        raise ConfigError(f"hydra.sweeper.params: gives no key several values, {advice}")
    if why := unused(master, [*swept]):
        raise ConfigError(f"hydra.sweeper.params: {why}, so there is nothing to search")
    fixed = [str(override.input_line) for key, override in last.items() if key not in swept]
    first = [found[0] for found in values]
    trials = [[*fixed, *first]]
    for i, found in enumerate(values):
        trials += [[*fixed, *first[:i], other, *first[i + 1 :]] for other in found[1:]]
    for _ in _checked(master, trials):
        pass
    return [*swept], [*trials]


def _values(override: Override, searches: bool) -> list[str]:
    """The values of a swept key as overrides, but not many more than a sweep may have."""
    value: Any = override.value()
    if override.key_or_group == "sweep":
        raise ConfigError(f"{override.input_line}: one at a time")
    if isinstance(value, IntervalSweep) and not searches:
        raise ConfigError(f"{override.input_line}: is for a search, sweep=rho_optuna")
    try:
        found: Iterable[Any]
        if isinstance(value, IntervalSweep):
            found = [value.start, value.end]
        elif isinstance(value, RangeSweep):  # may have no end, and Hydra lists what it shuffles
            ends = searches and not value.shuffle
            found = [value.start, value.stop] if ends else value.range()
        else:
            found = override.sweep_string_iterator()
        key = override.get_key_element()
        listed = [f"{key}={each}" for each in islice(found, MOST + 1)]
    except (ValueError, ArithmeticError, HydraException) as error:
        allowed = "allowed is range(start,stop,step) of finite numbers with a step other than 0"
        raise ConfigError(f"{override.input_line}: {allowed}") from error
    if not listed:
        raise ConfigError(f"{override.input_line}: stands for no value")
    return listed


def _checked(master: DictConfig, jobs: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """The configuration of each job, once nothing is wrong in it that is found without torch."""
    hydra: Any = HydraConfig.instance()
    before, compose, known = hydra.cfg, composer(master), top_level()
    of_all = set[str].intersection(*map(set, jobs))
    try:
        with progress("checking the jobs", len(jobs)) as advance:
            for number, job in enumerate(jobs):
                try:
                    config = check(compose(number, job), known)
                    given_again(config)
                except Exception as error:
                    said = str(error) if isinstance(error, ConfigError) else explain(error, [*job])
                    own = [override for override in job if override not in of_all]
                    keys = {*map(key_of, own)}
                    at_fault = re.split("[=:]", said)[0].lstrip("+~") in keys
                    if at_fault or (own and number) or any(map(is_group, keys)):
                        said += f" (job {' '.join(own)})"
                    raise ConfigError(said) from error
                yield config
                advance()
    finally:
        hydra.cfg = before


def composer(master: DictConfig) -> Callable[[int, Sequence[str]], DictConfig]:
    """What composes a job as Hydra does, but once for all jobs with the same choices of groups.

    Hydra composes the files of groups first and sets values last, so that these can be set in a
    copy. Composing takes a few tenths of a second.
    """
    plain = {key for key in top_level() if not is_group(key)}
    parsed = cache(OverridesParser.create().parse_override)
    hydra: Any = HydraConfig.instance()

    @cache
    def composed(groups: tuple[str, ...]) -> tuple[Any, DictConfig]:
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_sweep_config(master, [*groups])
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.id, cfg.hydra.job.num = "0", 0
            cfg.hydra.runtime.output_dir = gettempdir()
            hydra.set_config(cfg)  # for "${hydra:...}"
            del cfg["hydra"]
        return hydra.cfg, cfg

    def compose(number: int, job: Sequence[str]) -> DictConfig:
        keys = [key_of(override) for override in job]
        values = [
            o for o, key in zip(job, keys, strict=True) if key in plain or DOTTED.fullmatch(key)
        ]
        hydra.cfg, base = composed(tuple(o for o in job if o not in values))
        with read_write(hydra.cfg.hydra):
            hydra.cfg.hydra.job.num = number
        cfg = copy.deepcopy(base)
        ConfigLoaderImpl._apply_overrides_to_config([parsed(value) for value in values], cfg)
        return cfg

    return compose


def _distinct(
    jobs: Sequence[Sequence[str]], configs: Iterable[dict[str, Any]]
) -> list[Sequence[str]]:
    """Leave out the jobs that repeat another job, and log both and the reason."""
    kept: dict[str, tuple[Sequence[str], dict[str, Any]]] = {}  # by what the job acts on
    repeats: dict[str, None] = {}  # but for the seed, they repeat
    of_all = set[str].intersection(*map(set, jobs))
    for job, config in zip(jobs, configs, strict=True):
        same, known = kept.setdefault(json.dumps(acted_on(config), default=str), (job, config))
        if same is job:
            continue
        names = []
        for overrides in (same, job):
            own = [o for o in overrides if o not in of_all and key_of(o) != "seed"]
            names.append(" ".join(own or overrides))
        why = because(config["method"], differing(known, config))
        repeats[f"{names[1]}: the same run as {names[0]}, trained once, because {why}"] = None
    for repeat in repeats:
        log.warning("%s", repeat)
    return [job for job, _ in kept.values()]
