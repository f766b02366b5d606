"""Sharpness-Aware Minimization for image classifiers, in PyTorch Lightning.

The names below are imported when first used, so that ``import sam_lightning`` stays light and a
command can check its configuration before it loads torch.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_lightning.data.datamodule import ImageDataModule
    from sam_lightning.inference.load import load
    from sam_lightning.models import SAMResNet18
    from sam_lightning.optim import SAM, frozen_running_stats
    from sam_lightning.training.module import SAMModule

__version__ = "0.1.0"

__all__ = ["SAM", "ImageDataModule", "SAMModule", "SAMResNet18", "frozen_running_stats", "load"]

_HOME = {
    "SAM": "sam_lightning.optim",
    "ImageDataModule": "sam_lightning.data.datamodule",
    "SAMModule": "sam_lightning.training.module",
    "SAMResNet18": "sam_lightning.models",
    "frozen_running_stats": "sam_lightning.optim",
    "load": "sam_lightning.inference.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if sys.platform == "win32" and not _HOME[name].endswith((".optim", ".models")):
        raise ImportError(f"{name}: {import_module('sam_lightning.config.process').WINDOWS}")
    return getattr(import_module(_HOME[name]), name)
