"""``metrics.json`` of a run that failed, written without torch: a refused run never loads it."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.runs.files import write_json


def record_failure(cfg: DictConfig, reason: str, *, refused: bool = False) -> None:
    """Name the first cause in ``metrics.json``: rank 0 may have written a later one, or nothing.

    A run that was complete stays so where it was ``refused`` to be continued.
    """
    path = Path(cfg.output_dir) / "metrics.json"
    summary = read_summary(path) or {"metrics": {}, "config": _plain(cfg)}
    failed = {"status": "failed", "exit_reason": reason, "finished": now()}
    if refused and summary.get("status") == "completed":
        failed = {"refused": reason}
    write_json(path, {**summary, **failed}, "output_dir")


def read_summary(path: Path) -> dict[str, Any] | None:
    """What a run has left in ``metrics.json``; None if there is none that is whole."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def now() -> str:
    """The time with its zone, in seconds: ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(cfg: DictConfig) -> Any:
    try:
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # that may be what the run was refused for
        return OmegaConf.to_container(cfg)
