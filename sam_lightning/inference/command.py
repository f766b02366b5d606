"""What the commands on checkpoints share: their keys, where they write, and their tables.

Nothing here loads torch: a wrong argument is refused at once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.table import Column

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import Rule
from sam_lightning.runs.terminal import Table, show

__all__ = ["CKPT_PATH", "DEVICE", "OUT", "ROOT", "keys", "out_folder", "show", "table"]

CKPT_PATH = {"ckpt_path": ("???",)}
ROOT = {"data.root": (None,)}
DEVICE = {"device": ("auto", "auto, cpu, cuda")}
OUT = {"out": (None, "a folder, as in ./figures, or null")}


def keys(given: Mapping[str, tuple[Any, ...]]) -> tuple[dict[str, Any], list[Rule]]:
    """What ``parse`` takes, of keys with their default and, as in a ``Rule``, what is allowed."""
    rules: list[Any] = [(key, *rule) for key, (_, *rule) in given.items() if rule]
    return {key: default for key, (default, *_) in given.items()}, rules


def out_folder(options: DictConfig) -> Path | None:
    """The folder that ``out`` names, or None; a ``ConfigError`` if it is a file."""
    out = None if options.out is None else Path(options.out).expanduser()
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: is not a folder")
    return out


def table(head: str, *numbers: str, **options: Any) -> Table:
    """An empty table: a column of names, then columns of numbers."""
    return Table(
        head, *(Column(name, justify="right", no_wrap=True) for name in numbers), **options
    )
