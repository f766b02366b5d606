"""Files of commands: found before torch is loaded, and whole whenever they are there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sam_lightning.configuration import one_line
from sam_lightning.errors import ConfigError


def checkpoint_file(ckpt_path: str) -> Path:
    """The file that ``ckpt_path`` names: a checkpoint, or the last one of a run's folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(ckpt_path).expanduser()
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise ConfigError(f"ckpt_path={ckpt_path}: there is no checkpoints/last.ckpt in it")
    elif not path.is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file or folder")
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` if the block ends without an error.

    Raises:
        ConfigError: it cannot be written; what was there stays.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({one_line(error)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write all or nothing: to a temporary name beside ``path``, which is then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
