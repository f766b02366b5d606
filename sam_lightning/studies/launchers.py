"""What starts many runs at a time: Hydra's launchers, and what they do not do by themselves."""

import os
import re
import shutil
from collections.abc import Iterable, MutableMapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.cluster import launched, node_rank
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs.secrets import without_secrets

# Options of sbatch that a study gives itself, or that would hide its jobs from it.
OF_STUDY = (
    *("array", "chdir", "error", "job-name", "nodes", "ntasks", "open-mode", "output"),
    *("parsable", "signal", "test-only", "wait", "wrap"),
)


def refuse_launchers(what: str) -> None:
    """Refuse torchrun, srun and NODE_RANK around what starts many runs."""
    if (found := launched()) is not None:
        raise ConfigError(
            f"a {what} is started by one process, and {found.launcher} has started "
            f"{found.processes}: leave it out, and give each run trainer.devices=N"
        )
    if (host := node_rank()) is not None:
        raise ConfigError(f"NODE_RANK={host}: a {what} is started on one host; unset it")


def check_launcher(config: DictConfig) -> None:
    """Refuse a launcher that cannot do its work here, or would store what is secret."""
    launcher, key = config.hydra.launcher, "hydra/launcher=submitit"
    if launcher._target_.endswith("SlurmLauncher"):
        folder = Path(config.hydra.sweep.dir).absolute()
        with_squeue(f"{key}_slurm", "basic, joblib or submitit_local", folder)
    if "submitit" in launcher._target_:
        given: Any = OmegaConf.to_container(config.hydra.overrides)  # "${...}" as it stands
        refuse_secrets(o for part in given.values() for o in part)
        _wait_for_all()
    tasks = launcher.get("tasks_per_node", 1) * launcher.get("nodes", 1)
    if tasks > 1 and launcher._target_.endswith("LocalLauncher"):
        advice = "leave tasks_per_node and nodes at 1 and give trainer.devices=N"
        raise ConfigError(f"{key}_local: would train each job {tasks} times; {advice}")


def _wait_for_all() -> None:
    """Let Hydra's launcher look at results only when all jobs have ended.

    By itself it ends the sweep at the first job that was killed, while later ones still run.
    """
    import submitit

    class Patient(submitit.AutoExecutor):
        def map_array(self, *given: Any) -> list[Any]:
            jobs: list[Any] = super().map_array(*given)
            for job in jobs:
                job.wait()
            return jobs

    submitit.AutoExecutor = Patient  # type: ignore[misc]


def is_sbatch(text: str) -> bool:
    """Whether a text is options of sbatch, ``--name=value`` each, but none of a study's own."""
    for word in text.split():
        found = re.fullmatch(r"--([a-z][a-z-]*)(=\S+)?", word)
        if found is None or found[1].startswith("ntasks"):
            return False
        if any(own.startswith(found[1]) for own in OF_STUDY):  # sbatch takes shortened names
            return False
    return True


def refuse_secrets(overrides: Iterable[str]) -> None:
    """Refuse what submitit would write into the file of a job."""
    for override in overrides:
        if without_secrets(override) != override and "${oc.env:" not in override:
            advice = "take it from the environment, as '${oc.env:NAME}'"
            raise ConfigError(f"{override}: submitit would keep it in a file; {advice}")


def with_squeue(key: str, instead: str, folder: Path) -> Any:
    """Submitit, which asks ``squeue`` what has become of its jobs.

    By itself it asks ``sacct``. Without accounting that fails, in three lines each time, and a job
    that was killed would be waited for without end.

    Raises:
        ConfigError: names ``key`` and what to take ``instead``: there is no SLURM, or no submitit;
            or SLURM could not find the ``folder`` of the jobs' output.
    """
    if shutil.which("srun") is None:
        advice = f"start it where SLURM is, or take {instead}"
        raise ConfigError(f"{key}: there is no srun here; {advice}")
    try:
        import submitit
    except ImportError as error:
        raise ConfigError(f"{key}: needs pip install -e '.[cluster]'") from error

    if "%" in str(folder):
        raise ConfigError(f"{key}: SLURM takes % for a pattern, and it is in {folder}; move that")
    for name in [name for name in os.environ if name.startswith("SQUEUE_")]:
        del os.environ[name]  # such as SQUEUE_STATES, which would hide jobs

    class Queue(type(submitit.SlurmJob.watcher)):  # type: ignore[misc]
        def _make_command(self) -> list[str] | None:
            ask = ["squeue", "--me", "--noheader", "--array", "--format=%i %r"]
            return ask if self._registered - self._finished else None

        def read_info(self, string: bytes) -> dict[str, dict[str, str]]:
            lines = [line.split(" ", 1) for line in string.decode().splitlines()]
            there = {job: {"Reason": reason.strip()} for job, reason in lines}  # why it waits
            return {job: there.get(job, {"State": "GONE"}) for job in self._registered}

    submitit.SlurmJob.watcher = Queue(delay_s=60)
    return submitit


def share_processors(jobs: int, env: MutableMapping[str, str] = os.environ) -> None:
    """Let a job start as many loading processes as its share of the processors allows.

    Args:
        jobs: how many run at a time; joblib's -1 is one for each processor.
        env: the environment of the job.
    """
    from joblib import cpu_count  # which heeds this variable, as ``suggested_workers`` does

    jobs = jobs if jobs > 0 else max(1, cpu_count() + 1 + jobs)
    env.setdefault("LOKY_MAX_CPU_COUNT", str(max(1, cpu_count() // jobs)))
