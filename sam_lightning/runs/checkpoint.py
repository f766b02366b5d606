"""Checkpoints as files: written whole, checked when read, and only data."""

import logging
import os
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.runs.files import MOST_LEVELS
from sam_lightning.runs.old_names import with_current_names

log = logging.getLogger(__name__)

RESUMED = ("last", "new", "previous")  # the names of those that ``LastCheckpoint`` writes
MOST_DESCRIBED = 2**22  # bytes beside the tensors; the names of 20,000 classes are a part of it
MOST_VALUES = 2**19  # in a checkpoint, where 16 letters of a text count as one


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

    Only tensors and plain values are loaded (``weights_only``), so a file cannot run code. They
    take no more memory than a few times what the file has.

    Args:
        path: the file.
        mmap: leave the tensors in the file until they are used; it must stay as it is.

    Raises:
        ConfigError: the file is not there, is damaged, or is not a checkpoint of a run.
    """
    try:
        found = os.stat(path)
        stamp = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        _check_archive(Path(path), stamp)
        # Read into memory, a tensor could claim more bytes than the file has of it.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if type(checkpoint["global_step"]) is not int:
            raise TypeError
        dict(checkpoint["hyper_parameters"])["model"]
        _check_size(checkpoint)
        _check_weights(checkpoint["state_dict"], 2 * os.path.getsize(path))
        checkpoint["hyper_parameters"] = with_current_names(checkpoint["hyper_parameters"])
    except ConfigError as error:
        raise ConfigError(f"ckpt_path={path}: {error}") from error
    except Exception as error:  # zip, pickle and torch each fail in their own ways
        if not Path(path).is_file():
            raise ConfigError(f"ckpt_path={path}: no such file") from error
        raise ConfigError(
            f"ckpt_path={path}: not a readable checkpoint of a run ({type(error).__name__})"
        ) from error
    return checkpoint if mmap else tree_map_only(Tensor, Tensor.clone, checkpoint)


@cache
def _check_archive(path: Path, stamp: tuple[int, ...]) -> None:
    """Refuse an archive that torch would not have written, before anything is unpacked.

    A run that continues reads its checkpoint several times; the file is compared again only if its
    ``stamp`` is another.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise FileNotFoundError
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        unpacked = sum(entry.file_size for entry in entries)
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not stored or unpacked > path.stat().st_size:
            raise ConfigError(f"is packed, to {unpacked:,} bytes; checkpoints of runs are not")
        # Everything but the tensors, in a language that says much with a byte.
        described = sum(e.file_size for e in entries if e.filename.lower().endswith(".pkl"))
        if described > MOST_DESCRIBED + 2**10 * len(entries):
            raise ConfigError(f"has {described:,} bytes beside {len(entries)} tensors")
        if (damaged := archive.testzip()) is not None:
            raise ConfigError(f"is damaged ({damaged} is not what was saved)")


def _check_size(content: Any) -> None:
    """Refuse values that are nested too deep or, as they repeat each other, too many."""
    left, values = MOST_VALUES, [(content, 0)]
    while values:
        value, depth = values.pop()
        left -= 1 + (len(value) // 16 if isinstance(value, str | bytes) else 0)
        if left < 0 or depth > MOST_LEVELS:
            raise ConfigError("has too many values, or they are nested too deep")
        if isinstance(value, dict):
            values += [(child, depth + 1) for pair in value.items() for child in pair]
        elif isinstance(value, list | tuple | set):
            values += [(child, depth + 1) for child in value]
        elif isinstance(value, int) and abs(value) >= 2**64:
            raise ConfigError("has a number of more than 64 bits")


def _check_weights(state_dict: Any, most: int) -> None:
    """Refuse weights that are no ordinary tensors, or come to more than ``most`` bytes."""
    named = isinstance(state_dict, dict) and all(isinstance(name, str) for name in state_dict)
    if not named or not all(map(_is_ordinary, state_dict.values())):
        raise ConfigError("state_dict: must be tensors by name")
    if (total := sum(weight.nbytes for weight in state_dict.values())) > most:
        raise ConfigError(f"state_dict: stands for {total:,} bytes, more than the file has")


def _is_ordinary(value: Any) -> bool:
    usual = type(value) in (Tensor, Parameter) and value.layout == torch.strided
    return usual and not value.is_quantized and value.device.type == "cpu"


def newest(folder: Path) -> Path | None:
    """The whole checkpoint in ``folder`` to continue from, or None; the log names damaged ones.

    Checkpoints of ``LastCheckpoint`` come first, since only their place in the run is exact. Of
    several, the one with the most steps counts.

    Raises:
        ConfigError: there are checkpoints, and all are damaged.
    """
    found, damaged = [], []
    for path in folder.glob("*.ckpt"):
        try:
            step, name = read(path, mmap=True)["global_step"], path.stem
            found.append((name in RESUMED, step, name == "last", path))
        except ConfigError as error:
            log.warning("%s", one_line(error))
            damaged.append(path.name)
    if damaged and not found:
        raise ConfigError(f"ckpt_path={folder}: damaged are {', '.join(sorted(damaged))}")
    return max(found)[-1] if found else None
