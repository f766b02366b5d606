"""Files at an address that fsspec reads, copied to this machine.

A copy is made by one process for all, compared with the SHA-256 in the index, and then renamed.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sam_lightning.config.errors import ConfigError, named_errors, one_line
from sam_lightning.data.index import ARRAYS, FILE
from sam_lightning.data.mapped import alone

log = logging.getLogger(__name__)

PROTOCOLS = ("https", "http", "s3", "gs", "hf")
TRIES = 5
WAIT = 1.0  # seconds before the second try; before each later one twice as long
LONGEST_WAIT = 10.0
SILENCE = 30.0  # seconds without a byte after which a try over HTTP has failed
POLL = 0.05  # seconds between two looks whether another process has made a copy
LASTING = (ImportError, FileNotFoundError, PermissionError, ValueError)  # trying again is no use
FULL = (errno.ENOSPC, errno.EDQUOT)


def is_address(root: str) -> bool:
    """Whether this is no folder of this machine but an address of one of ``PROTOCOLS``."""
    return root.partition("://")[0] in PROTOCOLS and "://" in root


def index_of(root: str, cache: Path) -> Path:
    """The folder below ``cache`` for a set, with its index; it has its name by what is in it.

    Raises:
        ConfigError: there is no index, or it cannot be read.
    """
    root = root.rstrip("/")
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, FILE)
        fetch(f"{root}/{FILE}", new)
        text = new.read_bytes()
    kept = cache / f"remote-{hashlib.sha256(text).hexdigest()[:32]}"
    with named_errors(f"data.root: {root}/{FILE} cannot be read", ValueError, KeyError, TypeError):
        sha256 = json.loads(text)["sha256"]
    with alone(kept / FILE):
        fetch(f"{root}/{ARRAYS}", kept / ARRAYS, sha256)
        with tempfile.TemporaryDirectory(dir=kept) as folder:
            new = Path(folder, FILE)
            new.write_bytes(text)
            os.replace(new, kept / FILE)
    return kept


def fetch(
    address: str,
    path: Path,
    sha256: str | None = None,
    make_room: Callable[[], None] | None = None,
    patience: float = 0.0,
) -> None:
    """Copy a file to ``path``, unless it is there or another process does so.

    Args:
        address, path, sha256, make_room: as for ``copy``.
        patience: seconds that it tries for, and at least ``TRIES`` times.

    Raises:
        ConfigError: it is not there, or for so long it could not be read or was another one.
    """
    failed, began, due = 0, 0.0, 0.0
    while not path.is_file():
        try:
            if time.monotonic() < due or not copy(address, path, sha256, make_room):
                time.sleep(POLL)
        except Exception as error:  # of as many kinds as there are protocols
            now = time.monotonic()
            failed, began = failed + 1, began if failed else now
            gone = isinstance(error, FileNotFoundError)  # which says only the address
            said = f"data.root: {address}: {'is not there' if gone else one_line(error)}"
            if _lasting(error) or (failed >= TRIES and now - began >= patience):
                raise ConfigError(said) from error
            if failed == TRIES:
                log.warning("%s; training waits for it, up to %d seconds", said, patience)
            due = now + wait(failed)


def copy(
    address: str, path: Path, sha256: str | None, make_room: Callable[[], None] | None = None
) -> bool:
    """Try once to copy a file, unless it is there.

    Args:
        address: of the file.
        path: of the copy.
        sha256: that it must have, in hexadecimal digits.
        make_room: called before.

    Returns:
        whether no other process is at it.

    Raises:
        Exception: whatever the protocol raises.
    """
    import fsspec  # type: ignore[import-untyped]  # slow to import

    with claimed(path) as mine:
        if mine and not path.is_file():
            if make_room:
                make_room()
            new = path.with_name(f"{path.name}.part")  # the next one takes what a kill leaves
            try:
                system, place = fsspec.url_to_fs(address, **_options(address))
                system.get_file(place, str(new))
                if sha256 and digest(new) != sha256:
                    raise OSError("its SHA-256 differs from the index")
                os.replace(new, path)
            finally:
                new.unlink(missing_ok=True)
    return mine


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether no other process has claimed this; a claim ends with its process at the latest."""
    name = path.with_name(f"{path.name}.lock")
    with name.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: what two then mix up has another SHA-256
        ours = False
        with suppress(FileNotFoundError):  # since it was opened, its owner may have removed it
            ours = os.path.samestat(os.fstat(lock.fileno()), name.stat())
        try:
            yield ours
        finally:
            if ours:
                name.unlink(missing_ok=True)
            fcntl.flock(lock, fcntl.LOCK_UN)  # also if a process that was forked has it open


def wait(failed: int) -> float:
    """Seconds before the next try after so many that failed."""
    return min(LONGEST_WAIT, WAIT * 2.0 ** (failed - 1))


def _lasting(error: Exception) -> bool:
    status = getattr(error, "status", None)  # of HTTP
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    full = isinstance(error, OSError) and error.errno in FULL
    return refused or full or isinstance(error, LASTING)


def _options(address: str) -> dict[str, Any]:
    """For HTTP no limit of the whole time, which a large file may need, but one of silence."""
    if not address.startswith("http"):
        return {}
    from aiohttp import ClientTimeout  # slow to import

    return {"timeout": ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)}


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
