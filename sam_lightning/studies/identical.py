"""Which runs are one and the same, because nothing uses the keys in which they differ."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.conf import flat
from sam_lightning.studies.report.runs import is_sgd

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


def acted_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that a run acts on: not those copied to others, nor those of a method at rho=0."""
    inert = {*COPIED, "task_name", "output_dir", "debug"}
    inert |= {k for k in _leaves(config) if is_sgd(config["method"]) and k.startswith(PERTURBING)}
    return {k: v for k, v in sorted(_leaves(config).items()) if k not in inert}


def _leaves(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in flat(config).items() if not isinstance(v, dict)}
