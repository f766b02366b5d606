"""Small runs as users start them, and what they leave."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sam_lightning.config.conf import CONF, DEFAULTS
from sam_lightning.training.run import train

TRAIN = CONF.parent / "train.py"
# Two updates an epoch on 100 images.
WITH_DASHBOARD = ["data=digits", "data.subset=100", "model.width=4", "trainer=cpu", "epochs=2"]
WITH_DASHBOARD += ["batch_size=50", "trainer.log_every_n_steps=1", "data.eval_batch_size=1000"]
SMALL = [*WITH_DASHBOARD, "callbacks.dashboard=null"]  # its pictures take as long as the training


def configuration(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), **DEFAULTS):
        return compose("train", list(overrides))


def run(folder: Path, *overrides: str, small: Sequence[str] = SMALL) -> dict[str, float]:
    """A run in this process."""
    cfg = configuration(*small, *overrides)
    cfg.output_dir = str(folder)
    return train(cfg)


def command(cwd: Path, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A run as a user starts it."""
    return subprocess.run(
        [sys.executable, str(TRAIN), *arguments], cwd=cwd, capture_output=True, text=True, **options
    )


def started(cwd: Path, line: str, *arguments: str) -> subprocess.Popen[str]:
    """A run in a process of its own that has just printed a line that starts like ``line``."""
    process = subprocess.Popen(
        [sys.executable, "-u", str(TRAIN), *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and so would what the tests start from one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert any(printed.startswith(line) for printed in process.stdout)
    return process


def children(pid: int) -> list[int]:
    """The processes that a process has started, as Linux tells; elsewhere none."""
    told = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in told.read_text().split()] if told.is_file() else []


def wait_for_end(pids: list[int]) -> None:
    """Wait until none of these processes lives, at most a minute."""
    deadline = time.monotonic() + 60
    while any(map(_alive, pids)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def only_run(cwd: Path) -> Path:
    """The run folder below ``cwd``, beside which there is nothing."""
    (folder,) = cwd.glob("logs/train/runs/*")
    assert [p.name for p in cwd.iterdir()] == ["logs"]
    return folder


def jobs(cwd: Path) -> list[Path]:
    """The folders of a sweep's jobs, in their order, beside which there is nothing."""
    (sweep,) = cwd.glob("logs/train/multiruns/*")
    assert {p.name for p in cwd.rglob("multirun*")} == {"multiruns", "multirun.yaml"}
    assert [p.name for p in (cwd / "logs" / "train").iterdir()] == ["multiruns"]
    folders = [p for p in sweep.iterdir() if p.is_dir()]
    return sorted(folders, key=lambda p: int(p.name.partition("_")[0]))


def weights(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
    return checkpoint["state_dict"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in rows(folder) if row[name] != ""]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())
