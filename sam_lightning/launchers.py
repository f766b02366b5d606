"""What torchrun or SLURM says of the processes that it has started, read without torch."""

import os
from dataclasses import dataclass

from sam_lightning.errors import ConfigError


@dataclass(frozen=True)
class Launched:
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
        ConfigError: SLURM was not told the number of tasks per node.
    """
    env = os.environ
    if "WORLD_SIZE" in env:
        per_node = int(env["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in env else None
        found = Launched("torchrun", int(env.get("RANK", 0)), int(env["WORLD_SIZE"]), per_node)
    elif "SLURM_NTASKS" in env and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        tasks = int(env["SLURM_NTASKS"])
        if tasks > 1 and "SLURM_NTASKS_PER_NODE" not in env:
            raise ConfigError(f"SLURM: give --nodes and --ntasks-per-node, not --ntasks={tasks}")
        per_node = int(env.get("SLURM_NTASKS_PER_NODE", tasks))
        found = Launched("SLURM", int(env.get("SLURM_PROCID", 0)), tasks, per_node)
    else:
        return None
    return found if found.processes > 1 else None
