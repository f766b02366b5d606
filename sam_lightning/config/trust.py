"""What a configuration may name: objects of trusted packages, below the keys meant for them."""

import os
import re
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from sam_lightning.config.errors import ConfigError

# What `_target_` may name, below each key that may have one: a configuration names objects, it does
# not run code. `building.KINDS` says what these objects have to be.
TARGETS = {
    "model": ("sam_lightning",),
    "optimizer": ("torch.optim", "sam_lightning"),
    "scheduler": ("sam_lightning",),
    "data.source": ("sam_lightning",),
    "method.perturbation": ("sam_lightning",),
    "method.descent": ("sam_lightning",),
    "callbacks.*": ("sam_lightning", "lightning.pytorch.callbacks"),
    "logger.*": ("sam_lightning", "lightning.pytorch.loggers"),
}
# Names the user's own packages, as in my_project,other. An environment variable, for it must be out
# of reach of checkpoints and of the overrides that a run folder stores.
TRUST = "SAM_LIGHTNING_TRUST"


def check_targets(node: Any, key: str = "") -> None:
    """Refuse every ``_target_`` in a configuration, or in a part of one, that ``TARGETS`` does not.

    Raises:
        ConfigError: names the first one and what is allowed there.
    """
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            check_target(key, node["_target_"])
        for name, child in node.items():
            check_targets(child, f"{key}.{name}" if key else str(name))
    elif OmegaConf.is_list(node):
        for i, child in enumerate(node):
            check_targets(child, f"{key}.{i}")


def check_target(key: str, target: Any) -> None:
    """Refuse a ``_target_`` below ``key`` unless it is a name in a package that is trusted."""
    packages = trusted(key)
    if not packages:
        raise ConfigError(f"{key}._target_={target}: allowed is one in {', '.join(TARGETS)}")
    dotted = re.fullmatch(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", str(target))  # no private name
    if not dotted or not is_in(packages, target):
        raise ConfigError(
            f"{key}._target_={target}: allowed are names in {', '.join(packages)} and in packages "
            f"of your own that the environment variable {TRUST} lists"
        )


def trusted(key: str) -> tuple[str, ...]:
    """The packages that a ``_target_`` below ``key`` may be in; none if there may not be one."""
    known = TARGETS.get(described(key), ())
    return known and (*known, *re.findall(r"[\w.]+", os.environ.get(TRUST, "")))


def is_in(packages: Iterable[str], name: str) -> bool:
    """Whether a dotted name is that of one of the packages or of something in it."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def described(key: str) -> str:
    """The entry of ``TARGETS`` that is about ``key``: ``callbacks.*`` for ``callbacks.last``."""
    return key if key in TARGETS else f"{key.rpartition('.')[0]}.*"
