"""Checkpoints as files: written whole, checked when read, and only data."""

import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.config.schema import one_line
from sam_lightning.runs.old_names import with_current_names

log = logging.getLogger(__name__)


def write(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write beside the file and rename, so that ``path`` is the old checkpoint or the new one.

    Raises:
        TrainingError: an error, such as a full disk; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as out:
            torch.save(checkpoint, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        cause: BaseException = error  # behind the RuntimeError of torch's writer
        while cause.__context__ is not None:
            cause = cause.__context__
        raise TrainingError(
            f"cannot save {path} ({one_line(cause)}); checkpoints that were there still are"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint of a run onto the CPU, after comparing its bytes with their checksums.

    Only tensors and plain values are loaded (``weights_only``), so a file cannot run code.

    Raises:
        ConfigError: the file is not there, is damaged, or is not a checkpoint of a run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ConfigError(f"ckpt_path={path}: is damaged ({damaged} is not what was saved)")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        checkpoint["state_dict"], checkpoint["global_step"], checkpoint["hyper_parameters"]["model"]
        checkpoint["hyper_parameters"] = with_current_names(checkpoint["hyper_parameters"])
    except ConfigError:
        raise
    except Exception as error:  # zip, pickle and torch each fail in their own ways
        if not Path(path).is_file():
            raise ConfigError(f"ckpt_path={path}: no such file") from error
        raise ConfigError(
            f"ckpt_path={path}: not a readable checkpoint of a run ({type(error).__name__})"
        ) from error
    return checkpoint


def newest(folder: Path) -> Path | None:
    """The whole checkpoint in ``folder`` to continue from, or None; the log names damaged ones.

    It is the one with the most steps of those that ``LastCheckpoint`` saves, as their place in the
    run is exact; if there is none, then of any.

    Raises:
        ConfigError: there are checkpoints, and all are damaged.
    """
    found, damaged = [], []
    for path in folder.glob("*.ckpt"):
        try:
            step, name = read(path, mmap=True)["global_step"], path.stem
            found.append((name in ("last", "new", "previous"), step, name == "last", path))
        except ConfigError as error:
            log.warning("%s", error)
            damaged.append(path.name)
    if damaged and not found:
        raise ConfigError(f"ckpt_path={folder}: damaged are {', '.join(sorted(damaged))}")
    return max(found)[-1] if found else None
