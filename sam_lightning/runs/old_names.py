"""Names that earlier versions wrote into checkpoints and run folders, and their new names."""

import re
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
OLD_CLASSES = {"sam_lightning.optim.Reuse": "sam_lightning.optim.LookSAM"}
_OLD = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, OLD_NAMES))})(?=\.\w+$)")
_OLD_CLASS = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, OLD_CLASSES))})$")


def with_current_names(stored: Any) -> Any:
    """A stored configuration, or an override of one, with the names of this version."""
    if isinstance(stored, dict):
        return {key: with_current_names(value) for key, value in stored.items()}
    if isinstance(stored, list):
        return [with_current_names(value) for value in stored]
    if isinstance(stored, str):
        moved = _OLD.sub(lambda match: OLD_NAMES[match[1]], stored)
        return _OLD_CLASS.sub(lambda match: OLD_CLASSES[match[1]], moved)
    return stored
