"""Which runs are one and the same, because nothing uses the keys in which they differ."""

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sam_lightning.config.conf import flat
from sam_lightning.config.hydra_errors import key_of
from sam_lightning.studies.report.runs import is_sgd

log = logging.getLogger(__name__)

# Keys that only other keys refer to.
COPIED = ("rho", "lr", "weight_decay")
# What switches an augmentation on.
SWITCHES = {
    **{f"augment.{name}": "p" for name in ("flip", "erasing")},
    **{f"augment.{name}": "alpha" for name in ("mixup", "cutmix")},
}
# Beginnings of keys that nothing uses where no weight is perturbed.
PERTURBING = ("method.", "finetune.head_rho")
# Keys of the method that count where it is the base optimizer alone.
NAMING = ("method.name", "method.rho", "method.passes")
OWN_KEYS = ("output_dir", "ckpt_path")
MISSING = "-"  # the value of a key that only the other configuration has


def differing(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """The dotted keys of two nested dictionaries whose values differ, with both values.

    Those of a run's own places are left out. What is no dictionary has no keys.
    """
    first, second = (_leaves(node) if isinstance(node, dict) else {} for node in (one, other))
    pairs = {key: (first.get(key, MISSING), second.get(key, MISSING)) for key in first | second}
    return {key: (a, b) for key, (a, b) in pairs.items() if a != b and key not in OWN_KEYS}


def because(method: Mapping[str, Any], keys: Collection[str]) -> str:
    """Why two runs are the same although these keys differ; ``method`` is the method of one."""
    if not keys:
        return "it is given twice"
    if "method.name" in keys:
        return "with rho=0 every method is the base optimizer alone"
    where = f"with method={method['name']}" if method.get("name") == "sgd" else "with rho=0"
    return f"{', '.join(keys)} changes nothing {where if is_sgd(method) else 'here'}"


def unused(cfg: DictConfig, given: Sequence[str]) -> str | None:
    """In words, which of the keys that are given change nothing; None if all do."""
    plain: Any = OmegaConf.to_container(cfg, resolve=False)
    method: Any = OmegaConf.to_container(cfg.method, resolve=True)
    references = [v for v in flat(plain).values() if isinstance(v, str)]
    idle = [
        key
        for key in dict.fromkeys(given)
        if (key in COPIED and not any(f"${{{key}}}" in v for v in references))
        or (is_sgd(method) and key.startswith(PERTURBING) and key not in NAMING)
    ]
    off = [key for key in dict.fromkeys(given) if _is_off(cfg, key)]
    said = [because(method, idle)] if idle else []
    return "; ".join(said + [f"{', '.join(off)} changes nothing here"] * bool(off)) or None


def _is_off(cfg: DictConfig, key: str) -> bool:
    """Whether a key belongs to an augmentation that is switched off, or to flips that are."""
    if key == "data.flip":
        return not OmegaConf.select(cfg, "augment.flip.p") and bool(cfg.data.flip)
    entry, _, name = key.rpartition(".")
    switch = SWITCHES.get(entry)
    return switch not in (None, name) and not OmegaConf.select(cfg, f"{entry}.{switch}")


def distinct(master: DictConfig, jobs: Sequence[Sequence[str]]) -> list[list[str]]:
    """Leave out the jobs of a sweep that repeat another job, and log both and the reason.

    Args:
        master: the configuration of the sweep, with Hydra's part.
        jobs: the overrides of each job.
    """
    configs: dict[tuple[str, ...], dict[str, Any] | None] = {}
    kept: dict[str, tuple[Sequence[str], dict[str, Any] | None]] = {}  # by what the job acts on
    repeats: dict[str, None] = {}  # but for the seed, they repeat
    of_all = set[str].intersection(*map(set, jobs))
    for number, job in enumerate(jobs):
        seed = [o for o in job if key_of(o) == "seed"]
        seedless = tuple(o for o in job if o not in seed)
        if seedless not in configs:  # seeds need no composing
            configs[seedless] = _composed(master, seedless)
        config = configs[seedless]
        acts = json.dumps([_acted_on(config), seed]) if config else str(number)
        same, known = kept.setdefault(acts, (job, config))
        if same is not job and config and known:
            own = [[o for o in j if o not in {*of_all, *seed}] for j in (same, job)]
            names = [" ".join(o or job) for o in own]
            why = because(config["method"], differing(known, config))
            repeats[f"{names[1]}: the same run as {names[0]}, trained once, because {why}"] = None
    for repeat in repeats:
        log.warning("%s", repeat)
    return [[*job] for job, _ in kept.values()]


def _composed(master: DictConfig, overrides: Sequence[str]) -> dict[str, Any] | None:
    """The configuration of a job; None if it has none, of which the job's own error will tell."""
    try:
        loader = GlobalHydra.instance().config_loader()
        cfg = loader.load_sweep_config(master, [*overrides])
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
            cfg.output_dir = ""
        config: Any = OmegaConf.to_container(cfg, resolve=True)
        _acted_on(config)
    except Exception:  # whatever a user's configuration raises
        return None
    return config


def _acted_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a run acts on: not those copied to others, nor those of a method at rho=0."""
    inert = {*COPIED, "task_name", "output_dir", "debug"}
    inert |= {k for k in _leaves(config) if is_sgd(config["method"]) and k.startswith(PERTURBING)}
    return {k: v for k, v in sorted(_leaves(config).items()) if k not in inert}


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat(config).items() if not isinstance(v, dict)}
