"""What starts many runs at a time: Hydra's launchers, and what they do not do by themselves."""

import os
import shutil
from collections.abc import MutableMapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.cluster import launched
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs.secrets import without_secrets


def refuse_launchers(what: str) -> None:
    """Refuse torchrun and SLURM's srun around what starts many runs."""
    if (found := launched()) is not None:
        raise ConfigError(
            f"a {what} is started by one process, and {found.launcher} has started "
            f"{found.processes}: leave it out, and give each run trainer.devices=N"
        )


def check_launcher(config: DictConfig) -> None:
    """Refuse a launcher that cannot do its work here, or would store what is secret."""
    launcher, key = config.hydra.launcher, "hydra/launcher=submitit"
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        advice = "start it where SLURM is, or take basic, joblib or submitit_local"
        raise ConfigError(f"{key}_slurm: there is no srun here; {advice}")
    given: Any = OmegaConf.to_container(config.hydra.overrides)  # "${...}" as it stands
    secrets = [
        o
        for part in given.values()
        for o in part
        if without_secrets(o) != o and "${oc.env:" not in o
    ]
    if secrets and "submitit" in launcher._target_:
        advice = "take it from the environment, as '${oc.env:NAME}'"
        raise ConfigError(f"{secrets[0]}: submitit would keep it in a file; {advice}")
    tasks = launcher.get("tasks_per_node", 1) * launcher.get("nodes", 1)
    if tasks > 1 and launcher._target_.endswith("LocalLauncher"):
        advice = "leave tasks_per_node and nodes at 1 and give trainer.devices=N"
        raise ConfigError(f"{key}_local: would train each job {tasks} times; {advice}")


def share_processors(jobs: int, env: MutableMapping[str, str] = os.environ) -> None:
    """Let a job start as many loading processes as its share of the processors allows.

    Args:
        jobs: how many run at a time; joblib's -1 is one for each processor.
        env: the environment of the job.
    """
    from joblib import cpu_count  # which heeds this variable, as ``suggested_workers`` does

    jobs = jobs if jobs > 0 else max(1, cpu_count() + 1 + jobs)
    env.setdefault("LOKY_MAX_CPU_COUNT", str(max(1, cpu_count() // jobs)))
