"""Images in a file that all processes of a machine map, so that they share one copy in memory.

The file has nothing but bytes, N x C x H x W. A JSON file beside it has the shape, a checksum, and
inode, size and times of the file when the checksum was compared with its content: it is compared
when the file was written, and again only where those differ.
"""

import errno
import fcntl
import json
import logging
import math
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_lightning.config.errors import ConfigError, one_line

log = logging.getLogger(__name__)

CHUNK = 2**25  # bytes of which a checksum is computed at a time

Notes = dict[str, Any]
Write = Callable[[np.ndarray], object]
Fill = Callable[[Write], Notes]


def opened(path: Path) -> tuple[Tensor, Notes] | None:
    """The images of a file, and its notes; None if there is none that is whole.

    They are mapped: read from the disk as they are used. What is written to them stays in this
    process.
    """
    try:
        notes = json.loads(path.with_suffix(".json").read_bytes())
        images = _map(path, notes["shape"])
        if notes["status"] != _status(path):  # it is a copy, or something has written to it
            if _checksum(images) != notes["crc"]:
                raise ValueError("its checksum is not that of what was written")
            with suppress(OSError):  # a folder that may only be read: compared each time
                _note(path, notes)
        return torch.from_numpy(images), notes
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:  # it does not fit into memory
        raise
    except Exception as error:  # a damaged file can be wrong in many ways
        warnings.warn(f"{path} is damaged and made anew: {one_line(error)}", stacklevel=2)
        return None


def made(path: Path, shape: tuple[int, ...], fill: Fill) -> tuple[Tensor, Notes]:
    """Make the file, unless another process does so at the same time; then open it.

    Args:
        path: of the file.
        shape: N x C x H x W, of which N may become less.
        fill: calls what it is given with images in turn, and returns notes. If it raises an error,
            nothing is left behind.

    Without a place to write to, with a warning, the images are in this process's memory.
    """
    try:
        with alone(path):
            if (found := opened(path)) is not None:
                return found
            _write(path, shape, fill)
            if (found := opened(path)) is not None:
                return found
            raise OSError("what was written cannot be read")
    except OSError as error:
        warnings.warn(
            f"cannot keep decoded images in {path.parent}: {one_line(error)}", stacklevel=2
        )
    try:
        memory = torch.empty(shape, dtype=torch.uint8)
    except RuntimeError as error:
        raise _too_large(shape) from error
    done = 0

    def write(images: np.ndarray) -> None:
        nonlocal done
        memory[done : done + len(images)] = torch.from_numpy(images)
        done += len(images)

    notes = fill(write)
    return memory[:done], notes


@contextmanager
def alone(path: Path, level: int = logging.INFO) -> Iterator[None]:
    """Let one process at a time make the file; leave no new folder that stays empty."""
    new = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.log(level, "another process makes %s; waiting for it", path)
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                pass  # a file system without locks: both do the work, and one file stays
            yield
    finally:
        with suppress(OSError):
            path.with_suffix(".lock").unlink()
            for folder in new:  # a run that is refused leaves none
                folder.rmdir()


def _write(path: Path, shape: tuple[int, ...], fill: Fill) -> None:
    checksum = 0
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder, path.name)
        with new.open("wb") as file:
            _reserve(file.fileno(), math.prod(shape))

            def write(images: np.ndarray) -> None:
                nonlocal checksum
                checksum = zlib.crc32(images.data, checksum)
                file.write(images.data)

            notes = fill(write)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
            count = file.tell() // math.prod(shape[1:])
        notes |= {"shape": [count, *shape[1:]], "crc": checksum}
        if _checksum(_map(new, notes["shape"])) != checksum:
            raise OSError("what was read back is not what was written")
        os.replace(new, path)  # readers see all of it or nothing
    _note(path, notes)


def _reserve(descriptor: int, size: int) -> None:
    """Take the room on the disk, so that a full one is noticed now and not after hours."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except (AttributeError, OSError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # else there is no such call here


def _note(path: Path, notes: Notes) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        new = Path(folder, "notes.json")
        new.write_text(json.dumps({**notes, "status": _status(path)}))
        os.replace(new, path.with_suffix(".json"))


def _status(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _map(path: Path, shape: list[int]) -> np.ndarray:
    if (size := path.stat().st_size) != math.prod(shape):
        raise ValueError(f"{size} bytes are not {' x '.join(map(str, shape))}")
    try:
        return np.memmap(path, np.uint8, "c", shape=tuple(shape))
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise _too_large(shape) from error
        raise


def _checksum(images: np.ndarray) -> int:
    checksum = 0
    for part in np.array_split(images.reshape(-1), max(1, images.size // CHUNK)):
        checksum = zlib.crc32(part.data, checksum)
    return checksum


def _too_large(shape: Any) -> ConfigError:
    count, _, height, width = shape
    return ConfigError(
        f"data.image_size: {count:,} images of {width} x {height} take "
        f"{math.prod(shape) / 1e9:.1f} GB, which are not there; set a smaller one"
    )
