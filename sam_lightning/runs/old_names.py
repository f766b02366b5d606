"""Names that earlier versions wrote into checkpoints and run folders, and their new names."""

import re
from collections.abc import Callable
from typing import Any

OLD_NAMES = {
    "sam_lightning.callbacks": "sam_lightning.training.callbacks.progress",
    "sam_lightning.dashboard": "sam_lightning.training.callbacks.tensorboard",
    "sam_lightning.data.sources": "sam_lightning.data",
    "sam_lightning.methods.esam": "sam_lightning.optim",
    "sam_lightning.methods.friendly": "sam_lightning.optim",
    "sam_lightning.methods.gsam": "sam_lightning.optim",
    "sam_lightning.methods.linf": "sam_lightning.optim",
    "sam_lightning.methods.looksam": "sam_lightning.optim",
    "sam_lightning.methods.msam": "sam_lightning.optim",
    "sam_lightning.perturbations": "sam_lightning.optim",
    "sam_lightning.saving": "sam_lightning.training.callbacks.last_checkpoint",
    "sam_lightning.schedules": "sam_lightning.optim",
    "sam_lightning.sharpness_monitor": "sam_lightning.training.callbacks.sharpness",
}
_OLD = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, OLD_NAMES))})(?=\.\w+$)")
_REUSE = re.compile(r"(?<![\w.])sam_lightning\.optim\.Reuse$")  # its older name

_DEBUG = re.compile(r"^(\+*)debug=(?=(true|false)$)", re.IGNORECASE)  # now a group of short runs


def with_current_names(stored: Any) -> Any:
    """A stored configuration, or an override of one, with the names of this version."""

    def current(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        moved = _OLD.sub(lambda match: OLD_NAMES[match[1]], value)
        return _DEBUG.sub(r"\1traceback=", _REUSE.sub("sam_lightning.optim.LookSAM", moved))

    return mapped(current, stored)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested dictionaries and lists with every key and value changed."""
    if isinstance(value, dict):
        return {change(key): mapped(change, child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [mapped(change, child) for child in value]
    return change(value)
