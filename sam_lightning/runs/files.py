"""Files of runs and commands: found before torch is loaded, and written all or nothing."""

import errno
import json
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.conf import LOADER, mapped
from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.text import clean
from sam_lightning.runs.secrets import without_secrets

# The largest files of a run that are read, and how deep what is in them may be. A run writes some
# kilobytes and three levels.
MOST_BYTES = 16 * 2**20
MOST_BYTES_OF_YAML = 2**14
MOST_LETTERS = 2**12  # of an override, which Hydra parses in the square of its length
MOST_LEVELS = 100


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint."""
    checkpoint = Path(os.path.abspath(checkpoint))
    return checkpoint.parents[1 if checkpoint.parent.name == "checkpoints" else 0]


def inside_run(place: Path, checkpoint: Path) -> Path:
    """The place, below the folder of a checkpoint's run, where nobody has named one to write to.

    Raises:
        ConfigError: a link, which may be a stranger's, leads out of the run's folder.
    """
    if not place.resolve().is_relative_to(run_folder(checkpoint).resolve()):
        raise ConfigError(f"{place}: leads out of the run's folder; put a copy in its place")
    return place


def checkpoint_file(ckpt_path: str) -> Path:
    """The file that ``ckpt_path`` names: a checkpoint, or the last one of a run's folder.

    Raises:
        ConfigError: there is none.
    """
    path = Path(os.path.expanduser(ckpt_path))
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.is_file():
            raise ConfigError(f"ckpt_path={ckpt_path}: there is no checkpoints/last.ckpt in it")
    elif not path.is_file():
        raise ConfigError(f"ckpt_path={ckpt_path}: no such file or folder")
    return path


@contextmanager
def replacing(path: Path, key: str = "out") -> Iterator[Path]:
    """A name beside ``path`` to write to; it becomes ``path`` if the block ends without an error.

    Raises:
        ConfigError: it cannot be written; names ``key``. An old file stays.
    """
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"{key}={path}: cannot be written ({one_line(error)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any], key: str = "out") -> None:
    """Write all or nothing; NaN and infinity, which JSON does not have, become null.

    Raises:
        ConfigError: as ``replacing``.
    """

    def number(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(mapped(number, content), indent=2, allow_nan=False)
    with replacing(path, key) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def make_folder(folder: Path, given: Path, key: str = "out") -> Path:
    """Make the folder of results before the work starts, and return it.

    Args:
        folder: the folder to make.
        given: the value of ``key``, shown in an error.
        key: the setting that names the folder.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}={given}: cannot be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{key}={given}: cannot be written")
    return folder


def record_failure(cfg: DictConfig, reason: str) -> None:
    """Write the first cause to ``metrics.json``: rank 0 may have written a later one, or nothing.

    A complete run stays complete; why it was not continued, or is of no use to a search, is beside
    it, as ``refused``.
    """
    path = Path(cfg.output_dir) / "metrics.json"
    summary = read_summary(path) or {"metrics": {}, "config": without_secrets(_plain(cfg))}
    if summary.get("status") == "completed":
        failed = {"refused": without_secrets(reason)}
    else:
        reason = without_secrets(reason)
        failed = {"status": "failed", "exit_reason": reason, "finished": now()}
    write_json(path, {**summary, **failed}, "output_dir")


def content(path: Path, most: int = MOST_BYTES) -> bytes:
    """What is in a regular file, or in one that a link leads to.

    Raises:
        OSError: it is something else, such as a pipe, which would wait for ever, or has more than
            ``most`` bytes.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file", str(path))
        if len(found := file.read(most + 1)) > most:
            raise OSError(errno.EFBIG, f"has more than {most:,} bytes", str(path))
        return found


def read_summary(path: Path) -> dict[str, Any] | None:
    """The dictionary in a JSON file such as ``metrics.json``; None if there is none to read."""
    try:
        found = json.loads(content(path).decode())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def stored_overrides(file: Path) -> list[str]:
    """The overrides in a run's ``.hydra/overrides.yaml``, as they stand there.

    Raises:
        ConfigError: the file cannot be read, or is no list of texts.
    """
    try:
        text = content(file, MOST_BYTES_OF_YAML).decode()
        stored = yaml.load(text, LOADER)
        # Aliases (*name) may repeat a text without end.
        plain = isinstance(stored, list) and all(isinstance(entry, str) for entry in stored)
        if not plain or sum(map(len, stored)) > len(text):
            raise TypeError("it is no list of texts")
        if any(len(entry) > MOST_LETTERS for entry in stored):
            raise ValueError(f"one has more than {MOST_LETTERS:,} letters")
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: not a list of overrides ({one_line(error)})") from error
    return stored


@dataclass(frozen=True)
class RunStatus:
    """What a run's folder says of it.

    ``state`` is ``completed``, ``failed``, ``interrupted``, ``unfinished``, ``damaged`` or
    ``missing``; ``metrics`` are those with a finite value, ``summary`` is all of metrics.json.
    """

    folder: Path
    state: str
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)

    @property
    def completed(self) -> bool:
        """Whether there is a result."""
        return self.state == "completed"


def read_status(folder: Path) -> RunStatus:
    """Read a run's ``metrics.json``; all text in it becomes one that can be shown."""
    path = folder / "metrics.json"
    if not path.is_file():
        if path.exists() or (folder / ".hydra").is_dir():
            return RunStatus(folder, "unfinished", "no metrics.json: running still, or killed")
        return RunStatus(folder, "missing")
    try:
        summary = _tamed(read_summary(path))
    except RecursionError:
        summary = None
    if summary is None:
        return RunStatus(folder, "damaged", "metrics.json is not a run's")
    found = summary.get("metrics")
    numbers = {k: finite(v) for k, v in found.items()} if isinstance(found, dict) else {}
    metrics = {name: value for name, value in numbers.items() if value is not None}
    state, reason = str(summary.get("status") or "unknown"), ""
    if state != "completed":
        unsaid = "metrics.json does not say that the run completed"
        reason = str(summary.get("exit_reason") or unsaid)
    elif not metrics:
        state, reason = "damaged", "metrics.json has no metrics"
    return RunStatus(folder, state, reason, metrics, summary)


def finite(value: Any) -> float | None:
    """A number as float, if it is one and finite."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and abs(value) <= sys.float_info.max else None


def _tamed(value: Any, depth: int = 0) -> Any:
    """Parsed JSON with ``clean`` texts, and floats for numbers that no table can hold as integers.

    Raises:
        RecursionError: it is deeper than what is done with it can go.
    """
    if depth > MOST_LEVELS:
        raise RecursionError
    if isinstance(value, dict):
        return {clean(key): _tamed(child, depth + 1) for key, child in value.items()}
    if isinstance(value, list):
        return [_tamed(child, depth + 1) for child in value]
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value) if abs(value) <= sys.float_info.max else math.inf
    return clean(value) if isinstance(value, str) else value


def now() -> str:
    """The time with its zone, in seconds: ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # this may be why the run was refused
        return OmegaConf.to_container(cfg)
