"""What torchrun or SLURM says about the processes it started, read without torch."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from sam_lightning.config.errors import ConfigError, Interrupted

log = logging.getLogger(__name__)

PLACE = ("RANK", "LOCAL_RANK")  # of a process among WORLD_SIZE ones


class Launched(NamedTuple):
    """This process is one of several; ``per_node`` is None if the launcher does not say."""

    launcher: str
    rank: int
    processes: int
    per_node: int | None


def launched() -> Launched | None:
    """What has started this process as one of several; None if it is alone.

    As in Lightning, torchrun comes before SLURM, and a SLURM job named ``bash`` or ``interactive``
    is a shell that the user starts processes from.

    Raises:
        ConfigError: SLURM has no number of tasks per node, one of torchrun's variables is missing,
            or a value is not a number.
    """
    env = os.environ
    given = [name for name in ("WORLD_SIZE", *PLACE, "GROUP_RANK", "NODE_RANK") if name in env]
    if _is_task():
        return _tasks()
    if given:
        processes = number("WORLD_SIZE", 1)
        # Without it every process would take itself for the first, or for the only one.
        missing = [name for name in ("WORLD_SIZE", *PLACE) if name not in env]
        if missing and not ("WORLD_SIZE" in env and processes == 1):
            advice = f"start the processes with torchrun, which sets both, or unset {given[0]}"
            raise ConfigError(f"{given[0]}={env[given[0]]}: there is no {missing[0]}; {advice}")
        if (rank := number("RANK", 0)) not in range(processes):
            raise ConfigError(f"RANK={rank}: must be from 0 to {processes - 1} (WORLD_SIZE - 1)")
        per_node = number("LOCAL_WORLD_SIZE", 0) or None
        return Launched("torchrun", rank, processes, per_node) if processes > 1 else None
    return None


def _tasks() -> Launched | None:
    tasks = number("SLURM_NTASKS", 1)
    if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise ConfigError(f"SLURM: give --nodes and --ntasks-per-node, not --ntasks={tasks}")
    per_node = number("SLURM_NTASKS_PER_NODE", tasks)
    found = Launched("SLURM", number("SLURM_PROCID", 0), tasks, per_node)
    return found if tasks > 1 else None


def _is_task() -> bool:
    env = os.environ
    shell = env.get("SLURM_JOB_NAME") in ("bash", "interactive")
    return "SLURM_NTASKS" in env and "WORLD_SIZE" not in env and not shell


def is_said_by_another() -> bool:
    """Whether another task of SLURM on this machine, its first, says what is wrong in all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():  # from now on one may fail alone
        return False
    return _is_task() and number("SLURM_LOCALID", 0) > 0


def number(variable: str, default: int) -> int:
    """The whole number in a variable of the environment; ``default`` where it is empty or missing.

    Raises:
        ConfigError: it is something else.
    """
    value = os.environ.get(variable) or default
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{variable}={value}: must be a whole number") from error


@contextmanager
def queued_again() -> Iterator[None]:
    """Around a run: if SLURM says by SIGUSR1 that its time is nearly up, start the job again.

    Training handles the signal itself, and saves first.
    """
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return

    def leave(signum: int, frame: object) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGUSR1, leave)
    try:
        yield
    except Interrupted as stopped:
        if stopped.signum == signal.SIGUSR1 and number("RANK", number("SLURM_PROCID", 0)) == 0:
            _requeue()
        raise


def _requeue() -> None:
    import subprocess  # each start would load it, and hardly any needs it

    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        log.error("scontrol requeue %s failed: %s", job, error)
