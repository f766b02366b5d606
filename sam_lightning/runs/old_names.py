"""Names that earlier versions wrote into checkpoints and run folders, and their new names."""

import re
from typing import Any

from sam_lightning.config.conf import mapped

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


# Keys of ``data`` that were an augmentation, as overrides and with their objects of today.
_MOVED = (
    (r"data\.crop_padding=", "augment.crop.padding="),
    (r"data\.cutout=", "augment.cutout.side="),
    (r"data\.flip=(?i:true)$", "data.flip=0.5"),
    (r"data\.flip=(?i:false)$", "data.flip=0"),
    (r"data\.policy=null$", "augment.policy=null"),
    (r"data\.policy=", "augment="),
)
_AUGMENT = "sam_lightning.data.augment."
_POLICIES = {
    "autoaugment": {"_target_": f"{_AUGMENT}AutoAugment", "policy": "cifar10"},
    "autoaugment_svhn": {"_target_": f"{_AUGMENT}AutoAugment", "policy": "svhn"},
    "randaugment": {"_target_": f"{_AUGMENT}RandAugment"},
    "trivialaugment": {"_target_": f"{_AUGMENT}TrivialAugment"},
}
# What a setting of null, or a checkpoint of before there was the key, stands for.
DEFAULTS = {
    "cuda_graph": False,
    **{"model.pretrained": False, "model.weights": None, "model.weights_of": None},
    **{f"data.{source}interpolation": "bilinear" for source in ("", "source.")},
    **{f"data.{source}crop_mode": "center" for source in ("", "source.")},
}


def with_current_names(stored: Any) -> Any:
    """A stored configuration, or an override of one, with the names of this version."""

    def current(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        moved = _OLD.sub(lambda match: OLD_NAMES[match[1]], value)
        for old, new in _MOVED:
            moved = re.sub(rf"^(\+*){old}", rf"\g<1>{new}", moved)
        return _DEBUG.sub(r"\1traceback=", _REUSE.sub("sam_lightning.optim.LookSAM", moved))

    return _with_augment(mapped(current, stored))


def _with_augment(config: Any) -> Any:
    """A whole configuration with the augmentation out of its ``data``; all else as it is."""
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, dict) or "crop_padding" not in data:
        return config
    kept = {k: v for k, v in data.items() if k not in ("crop_padding", "cutout", "policy")}
    kept["flip"] = 0.5 if data.get("flip") else 0.0
    augment = {
        "crop": {"_target_": f"{_AUGMENT}RandomCrop", "padding": data["crop_padding"]},
        "flip": {"_target_": f"{_AUGMENT}RandomHorizontalFlip", "p": kept["flip"]},
        "policy": _POLICIES.get(str(data.get("policy"))),
        "cutout": {"_target_": f"{_AUGMENT}Cutout", "side": data.get("cutout", 0)},
    }
    return {**config, "data": kept, "augment": augment}
