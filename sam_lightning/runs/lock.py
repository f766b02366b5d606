"""One owner of a run's folder, by a lock that ends with its process."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.runs.files import now

log = logging.getLogger(__name__)

NAME = ".lock"
PATIENCE = 1.0  # seconds: a process that was killed keeps its locks for a moment
# What the file systems say that have no locks.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class OwnedError(ConfigError):
    """Another process works in the folder."""


# Left at the end of the process, or of a ``with`` block of it.
kept = ExitStack()
_owned: set[tuple[int, Path]] = set()  # by process


@contextmanager
def owned(folder: Path, key: str = "output_dir") -> Iterator[None]:
    """Keep other processes out of the folder of a run or sweep, which is made if it is not there.

    A process that owns the folder already keeps it until the first of its blocks ends.

    POSIX record locks: they belong to one process, so what it forks, as to load data, does not
    hold them, and they work on NFS. Byte 0 of the file is for the process that starts the run,
    byte 1 for the processes that it starts, which ``joined`` locks.

    Raises:
        OwnedError: names ``key``, the folder and the process that works there.
        ConfigError: the folder cannot be written.
    """
    if (own := (os.getpid(), folder.resolve())) in _owned:
        yield
        return
    path = folder / NAME
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(path, key)
        file.truncate(0)
        file.write(f"host {socket.gethostname()}, process {os.getpid()}, since {now()}")
        file.flush()
        _lock(file, fcntl.LOCK_UN, start=1)
    except OSError as error:
        raise ConfigError(f"{key}={folder}: cannot be written ({one_line(error)})") from error
    _owned.add(own)
    with file:
        try:
            yield
        finally:
            _owned.discard(own)
            with suppress(OSError):
                path.unlink()
                for part in made:  # a run that is refused leaves no folder
                    part.rmdir()


def _locked(path: Path, key: str) -> IO[str]:
    """The file with both bytes locked, and surely the one that others find there."""
    end = time.monotonic() + PATIENCE
    while True:
        file = _opened(path)
        try:
            _lock(file, fcntl.LOCK_EX, length=2)
            with suppress(FileNotFoundError):  # its owner has removed it since it was opened
                if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                    return file
        except BlockingIOError:
            file.seek(0)
            owner = file.read(200) or "a process that starts"
            if time.monotonic() > end:
                file.close()
                raise OwnedError(
                    f"{key}={path.parent}: another process is at work there ({owner}); wait for "
                    "its end, or name another folder"
                ) from None
            time.sleep(PATIENCE / 20)
        file.close()


@contextmanager
def joined(folder: Path) -> Iterator[None]:
    """Hold the folder too, in a process that its owner has started: it may outlive the owner."""
    with _opened(folder / NAME) as file:
        _lock(file, fcntl.LOCK_SH, start=1)
        yield


def _opened(path: Path) -> IO[str]:
    """The file, made if it is not there. A link, which may come from a stranger, is an error."""

    def open_file(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW, 0o666)

    return open(path, "a+", encoding="utf-8", opener=open_file)


def _lock(file: IO[str], kind: int, start: int = 0, length: int = 1) -> None:
    """Lock or unlock bytes of a file at once.

    Raises:
        BlockingIOError: another process has locked one of them.
    """
    wait = 0 if kind == fcntl.LOCK_UN else fcntl.LOCK_NB
    try:
        fcntl.lockf(file, kind | wait, length, start)
    except PermissionError as error:  # on some systems that is how a lock is refused
        raise BlockingIOError(*error.args) from error
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s: this file system has no locks; start one run in this folder", file.name)
