"""What the commands on checkpoints share: their keys, where they write, and their tables.

Nothing here loads torch: a wrong argument is refused at once.
"""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig
from rich.table import Column

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.values import Rule
from sam_lightning.runs.terminal import Table

Folder = Annotated[str, Rule("a folder, as in ./figures", bool)]
CKPT_PATH = {
    "ckpt_path": ("???", Any, "a checkpoint, or a run's folder for its checkpoints/last.ckpt")
}
ROOT = {"data.root": (None, Any, "where the data are now; null: where the run found them")}
DEVICE = {"device": ("auto", Literal["auto", "cpu", "cuda"], "auto, cpu or cuda")}
OUT = {"out": (None, Folder | None, "the folder to write to; null: the run's")}


def out_folder(options: DictConfig) -> Path | None:
    """The folder that ``out`` names, or None; a ``ConfigError`` if it is a file."""
    out = None if options.out is None else Path(os.path.expanduser(options.out))
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"out={out}: is not a folder")
    return out


def table(head: str, *numbers: str, **options: Any) -> Table:
    """An empty table: a column of names, then columns of numbers."""
    return Table(
        head, *(Column(name, justify="right", no_wrap=True) for name in numbers), **options
    )
