"""What torchrun, SLURM or the user says about processes and hosts, read without torch."""

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from sam_lightning.config.errors import ConfigError, Interrupted, one_line

log = logging.getLogger(__name__)

PLACE = ("RANK", "LOCAL_RANK")  # of a process among WORLD_SIZE ones
# How many processes mpirun or jsrun has started.
OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE")
# Names that SLURM gives to the job of a shell, from which the user starts processes.
SHELLS = ("bash", "interactive")


class Launched(NamedTuple):
    """This process is one of several; ``per_node`` is None if the launcher does not say."""

    launcher: str
    rank: int
    processes: int
    per_node: int | None


def launched() -> Launched | None:
    """What has started this process as one of several; None if it is alone.

    torchrun comes before SLURM, because it also runs in a task of SLURM.

    Raises:
        ConfigError: SLURM has started several tasks, but not this process, or another number on
            each node; one of torchrun's variables is missing, or a value is not a number.
    """
    env = os.environ
    if "WORLD_SIZE" not in env and (found := _tasks()):
        return found
    given = [name for name in ("WORLD_SIZE", *PLACE, "GROUP_RANK") if name in env]
    if given:
        processes = number("WORLD_SIZE", 1)
        # Without it every process would take itself for the first, or for the only one.
        missing = [name for name in ("WORLD_SIZE", *PLACE) if name not in env]
        if missing and not ("WORLD_SIZE" in env and processes == 1):
            advice = f"start the processes with torchrun, which sets both, or unset {given[0]}"
            raise ConfigError(f"{given[0]}={env[given[0]]}: there is no {missing[0]}; {advice}")
        if (rank := number("RANK", 0)) not in range(processes):
            raise ConfigError(f"RANK={rank}: must be from 0 to {processes - 1} (WORLD_SIZE - 1)")
        _check_hosts()
        per_node = number("LOCAL_WORLD_SIZE", 0) or None
        return Launched("torchrun", rank, processes, per_node) if processes > 1 else None
    for name in OF_MPI:
        if number(name, 1) > 1 and "SLURM_STEP_ID" not in env:
            raise ConfigError(
                f"{name}={env[name]}: each process would train alone; start them with torchrun, or "
                "set WORLD_SIZE, RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too"
            )
    return None


def _check_hosts() -> None:
    """Refuse fewer hosts than torchrun was told to wait for, which it does not do by itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    asked, hosts = _asked_hosts(), number("GROUP_WORLD_SIZE", 1)
    if hosts < asked:
        raise ConfigError(
            f"--nnodes={asked}: torchrun goes on with {hosts}; with --rdzv_backend=c10d it drops a "
            "host whose clock is behind, so set the clocks, or give --master_addr, --master_port "
            "and --node_rank instead"
        )


def _asked_hosts() -> int:
    """The least number of hosts that torchrun was told: by its arguments, or by PET_NNODES."""
    process = os.getppid()  # torchrun, or a script that it has started
    with suppress(OSError):  # there is no /proc
        while process:
            line = Path(f"/proc/{process}/cmdline").read_bytes()
            if told := re.search(rb"\0--nnodes[=\0](\d+)", line):
                return int(told[1])
            about = Path(f"/proc/{process}/stat").read_bytes()  # number (name) state parent ...
            process = int(about.rpartition(b")")[2].split()[1])
    told_all = re.match(r"\d+", os.environ.get("PET_NNODES", ""))
    return int(told_all[0]) if told_all else 1


def node_rank() -> int | None:
    """The number of this host, where the user starts ``train.py`` once on each; else None."""
    alone = launched() is None and "WORLD_SIZE" not in os.environ
    return number("NODE_RANK", 0) if alone and os.environ.get("NODE_RANK") else None


def check_node(nodes: int) -> None:
    """Refuse several hosts of which this one, which no launcher has started, has no number.

    Raises:
        ConfigError: names ``NODE_RANK``, or ``trainer.num_nodes``.
    """
    if launched() is not None:
        return
    host = node_rank()
    if host is None and nodes > 1:
        if "RANK" in os.environ:
            raise ConfigError(f"trainer.num_nodes={nodes}: torchrun has started one process")
        raise ConfigError(
            f"trainer.num_nodes={nodes}: NODE_RANK is not set on {os.uname().nodename}; give each "
            f"host one from 0 to {nodes - 1}, and the same MASTER_ADDR and MASTER_PORT"
        )
    if host is not None and host not in range(nodes):
        raise ConfigError(
            f"NODE_RANK={host}: must be from 0 to {nodes - 1} (trainer.num_nodes - 1)"
        )


def is_first() -> bool:
    """Whether this process is rank 0, or will start it: that one alone has a folder."""
    found = launched()
    return (found.rank if found else node_rank() or 0) == 0


def _tasks() -> Launched | None:
    """This task among those of its step, the tasks of one ``srun``."""
    env = os.environ
    if "SLURM_PROCID" not in env or _is_shell():
        return None
    if "SLURM_STEP_ID" not in env:
        if (tasks := number("SLURM_NTASKS", 1)) > 1:
            raise ConfigError(
                f"SLURM_NTASKS={tasks}: the script of sbatch started this process itself, so it is "
                "none of the tasks; start it with srun, or give --ntasks=1"
            )
        return None
    tasks = number("SLURM_STEP_NUM_TASKS", 1)
    layout = env.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))  # such as 4, 4(x2), or 4(x2),3
    if "," in layout:
        raise ConfigError(
            f"SLURM_STEP_TASKS_PER_NODE={layout}: must be as many on every node; give --nodes and "
            "--ntasks-per-node"
        )
    per_node = int(layout.partition("(")[0])
    return Launched("SLURM", number("SLURM_PROCID", 0), tasks, per_node) if tasks > 1 else None


def _is_shell() -> bool:
    """Whether this process was started from a shell in a job.

    The tasks that ``srun`` starts from there have the name too, but no terminal.
    """
    if os.environ.get("SLURM_JOB_NAME") not in SHELLS:
        return False
    if "SLURM_STEP_ID" not in os.environ:
        return True
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        return False
    return True


def as_torchrun() -> None:
    """Give a task of SLURM the variables that torchrun would set; all else reads these."""
    env = os.environ
    if "WORLD_SIZE" in env or not (found := _tasks()):
        return
    nodes = re.sub(r"\[(\w+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"])  # of node[1-4,7],other
    # Jobs with numbers in a row, and the steps of a job, run side by side.
    place = number("SLURM_JOB_ID", 0) + 2503 * number("SLURM_STEP_ID", 0)
    env.setdefault("MASTER_ADDR", nodes.partition(",")[0])
    env.setdefault("MASTER_PORT", str(15000 + place % 10000))
    env["RANK"], env["LOCAL_RANK"] = str(found.rank), env["SLURM_LOCALID"]
    env["GROUP_RANK"] = env["SLURM_NODEID"]
    env["WORLD_SIZE"], env["LOCAL_WORLD_SIZE"] = str(found.processes), str(found.per_node)


def is_said_by_another() -> bool:
    """Whether another task of SLURM on this machine, its first, says what is wrong in all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():  # from now on one may fail alone
        return False
    return number("SLURM_LOCALID", 0) > 0


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
    """Around a run: let the job start again if SLURM says that its time here is nearly up.

    SLURM says so by SIGUSR1, or if another job is to have its place, by SIGTERM. Training handles
    the signals itself, and saves first.
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
        by = stopped.signum
        if is_first() and (by == signal.SIGUSR1 or (by == signal.SIGTERM and _is_preempted())):
            _requeue()
        raise


def _is_preempted() -> bool:
    """Whether this job has a time of grace. SLURM forgets one that ends within it."""
    import subprocess

    with suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "--oneliner", "show", "job", os.environ["SLURM_JOB_ID"]]
        said = subprocess.run(command, check=True, timeout=10, capture_output=True).stdout
        return b" JobState=RUNNING " in said and bool(re.search(rb" PreemptTime=\d", said))
    return False


def _requeue() -> None:
    import subprocess  # each start would load it, and hardly any needs it

    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True, timeout=60, capture_output=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace")
        reason = " ".join(said.split()) or one_line(error)
        log.error("scontrol requeue %s: %s; nothing starts the job again", job, reason)
