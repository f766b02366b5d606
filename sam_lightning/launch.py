"""Processes of a run on several devices.

Lightning starts them by repeating the command line, which under a sweep repeats the sweep. Here
torch's elastic launcher starts them with the finished configuration instead, so that a process is
always part of the run it was started for, and the end of one ends all.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sam_lightning.errors import ConfigError, TrainingError
from sam_lightning.results import record_failure


def externally_launched() -> bool:
    """Whether torchrun, SLURM or ``launch`` has started this process as one of several."""
    return "WORLD_SIZE" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1


def local_processes(trainer: DictConfig) -> int:
    """Number of processes on this machine.

    Raises:
        ConfigError: there is no such accelerator here, or there are fewer devices.
    """
    accelerator, devices = trainer.accelerator, trainer.devices
    gpus = torch.cuda.device_count()
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("trainer.accelerator=mps: there is no Apple GPU here; use cpu or auto")
    if accelerator in ("cuda", "gpu") and gpus == 0:
        raise ConfigError(
            f"trainer.accelerator={accelerator}: there is no CUDA GPU here; use cpu or auto"
        )
    on_gpus = accelerator in ("cuda", "gpu") or (accelerator == "auto" and gpus > 0)
    if devices == "auto":
        return gpus if on_gpus else 1
    if not isinstance(devices, int):
        if not on_gpus:
            raise ConfigError(f"trainer.devices={devices}: indices are for GPUs; give a number")
        if max(devices) >= gpus:
            raise ConfigError(f"trainer.devices={devices}: the GPUs here are 0 to {gpus - 1}")
        return len(devices)
    if on_gpus and devices > gpus:
        raise ConfigError(f"trainer.devices={devices}: there are {gpus} GPUs here")
    return devices


def init_process_group(accelerator: str) -> None:
    """Connect the processes before Lightning does, for the data is prepared by one of them."""
    if not dist.is_initialized() and "MASTER_ADDR" in os.environ:
        cuda = accelerator != "cpu" and torch.cuda.is_available()
        dist.init_process_group("nccl" if cuda else "gloo")


def launch(cfg: DictConfig, processes: int) -> dict[str, float]:
    """Run ``training.train`` in new processes on this machine and return rank 0's metrics.

    Raises:
        TrainingError: names the rank that failed first, and its error.
    """
    if cfg.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: start every node's processes with "
            "torchrun or SLURM"
        )
    options = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    # Otherwise each process would use as many threads as there are cores.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    config = OmegaConf.to_container(cfg, resolve=True)
    try:
        results = elastic_launch(options, _worker)(config, threads)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        text = failure.message
        reason = text.get("message", text) if isinstance(text, dict) else text
        message = f"rank {rank} of {processes} failed: {reason}"
        record_failure(cfg, message)
        raise TrainingError(message) from error
    return results[0]


@record
def _worker(config: dict[str, Any], threads: int) -> dict[str, float]:
    from sam_lightning.training import train

    torch.set_num_threads(threads)
    return train(OmegaConf.create(config))
