"""Shards at an address that fsspec reads, copied to this machine when they are first needed.

A copy is made by one process for all, compared with the SHA-256 in the index, and then renamed.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from pathlib import Path

from sam_lightning.config.errors import ConfigError, named_errors, one_line
from sam_lightning.data.index import ARRAYS, FILE
from sam_lightning.data.mapped import alone

PROTOCOLS = ("https", "http", "s3", "gs", "hf")
TRIES = 5
WAIT = 1.0  # seconds before the second try; before each later one twice as long
LASTING = (ImportError, FileNotFoundError, PermissionError, ValueError)  # trying again is no use


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
    fetch(f"{root}/{ARRAYS}", kept / ARRAYS, sha256)
    with tempfile.TemporaryDirectory(dir=kept) as folder:
        new = Path(folder, FILE)
        new.write_bytes(text)
        os.replace(new, kept / FILE)
    return kept


def fetch(address: str, path: Path, sha256: str | None = None) -> None:
    """Copy a file to ``path``, unless it is there or another process does so.

    Raises:
        ConfigError: it is not there, or ``TRIES`` times it could not be read or was another one.
        OSError: there is no room on the disk.
    """
    import fsspec  # type: ignore[import-untyped]  # slow to import

    with alone(path, logging.DEBUG):  # readers wait often
        for left in reversed(range(TRIES)):
            if path.is_file():
                return
            try:
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    new = Path(folder, path.name)
                    system, place = fsspec.url_to_fs(address)
                    system.get_file(place, str(new))
                    if sha256 and digest(new) != sha256:
                        raise OSError("its SHA-256 differs from the index")
                    os.replace(new, path)
            except Exception as error:  # of as many kinds as there are protocols
                if not left or isinstance(error, LASTING):
                    gone = isinstance(error, FileNotFoundError)  # which says only the address
                    said = "is not there" if gone else one_line(error)
                    raise ConfigError(f"data.root: {address}: {said}") from error
                time.sleep(WAIT * 2 ** (TRIES - 1 - left))


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            found.update(chunk)
    return found.hexdigest()
