"""From the data group of a configuration to an ``ImageData``."""

from typing import Any, TypeVar

from omegaconf import DictConfig

from sam_lightning.config.errors import argument_errors
from sam_lightning.config.instantiate import check_names, factory
from sam_lightning.data.image_data import ImageData

# Keys of the data configuration that belong to its source; the rest are arguments of ImageData.
SOURCE_KEYS = {"source", "root", "download", "image_size", "cache_dir"}

Kind = TypeVar("Kind", bound=ImageData)


def build_data(cfg: DictConfig, kind: type[Kind]) -> Kind:
    """The data that ``cfg.data`` describes, not read yet.

    Args:
        cfg: has ``data``, ``batch_size`` and ``seed``.
        kind: ``ImageData``, or ``ImageDataModule`` for a trainer.

    Raises:
        ConfigError: a key does not exist, or its value is out of its range.
    """
    options = {str(k): v for k, v in cfg.data.items() if k not in SOURCE_KEYS}
    own: dict[str, Any] = {"source": factory(cfg, "data.source")}
    own |= {"batch_size": cfg.batch_size, "seed": cfg.seed}
    check_names("data", options, kind, own)
    with argument_errors("data"):
        return kind(**own, **options)
