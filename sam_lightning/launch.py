"""Processes of a run on several devices.

Lightning starts them by repeating the command line, which under a sweep repeats the sweep. Here
torch's elastic launcher starts them with the finished configuration instead, so that a process is
always part of the run it was started for, and the end of one ends all.
"""

import logging
import multiprocessing
import os
import signal
import time
import uuid
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sam_lightning.errors import ConfigError, Interrupted, TrainingError
from sam_lightning.failures import record_failure
from sam_lightning.launchers import launched, number

log = logging.getLogger(__name__)

# Data parallel, with a copy of the weights in every process.
STRATEGIES = ("auto", "ddp")
NOTICED_WITHIN = 5.0  # seconds in which all that live notice that one does not answer


def externally_launched() -> bool:
    """Whether torchrun, SLURM or ``launch`` has started this process as one of several."""
    return launched() is not None


def local_processes(trainer: DictConfig) -> int:
    """Number of processes on this machine.

    Raises:
        ConfigError: there is no such accelerator here, there are fewer devices, the strategy does
            not keep whole weights, or torchrun or SLURM has started another number of processes.
    """
    strategy = trainer.get("strategy", "ddp")
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"trainer.strategy={strategy}: allowed is {', '.join(STRATEGIES)}: perturbing needs "
            "whole weights in every process"
        )
    processes, nodes = _devices_here(trainer), trainer.get("num_nodes", 1)
    found = launched()
    if found is not None and processes * nodes != found.processes:
        raise ConfigError(
            f"trainer.devices={trainer.devices}, trainer.num_nodes={nodes}: {found.launcher} has "
            f"started {found.processes} processes; leave both out, or give what makes that number"
        )
    return processes


def _devices_here(trainer: DictConfig) -> int:
    accelerator, devices = trainer.accelerator, trainer.devices
    gpus = torch.cuda.device_count()
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("trainer.accelerator=mps: there is no Apple GPU here; use cpu or auto")
    if accelerator in ("cuda", "gpu") and gpus == 0:
        raise ConfigError(
            f"trainer.accelerator={accelerator}: there is no CUDA GPU here; use cpu or auto"
        )
    on_gpus = accelerator in ("cuda", "gpu") or (accelerator == "auto" and gpus > 0)
    apple = accelerator != "cpu" and torch.backends.mps.is_available()
    if trainer.get("precision") == "16-mixed" and not (on_gpus or apple):
        raise ConfigError("trainer.precision=16-mixed: is for GPUs; use bf16-mixed or 32-true")
    if trainer.get("sync_batchnorm") and not on_gpus:
        raise ConfigError("trainer.sync_batchnorm=true: PyTorch has it for GPUs only; set false")
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


def init_process_group(trainer: DictConfig) -> None:
    """Connect the processes before Lightning does, for the data is prepared by one of them.

    Whatever they wait for each other later on, ``trainer.timeout`` seconds are the limit.
    """
    if dist.is_initialized():
        return
    options: dict[str, Any] = {}
    if "timeout" in trainer:
        options["timeout"] = timedelta(seconds=trainer.timeout)
    if "WORLD_SIZE" not in os.environ:
        slurm = SLURMEnvironment()
        # Reading them sets MASTER_ADDR and MASTER_PORT, which torch reads.
        log.debug("rank 0 is at %s:%d", slurm.main_address, slurm.main_port)
        options |= {"rank": slurm.global_rank(), "world_size": slurm.world_size()}
    cuda = trainer.accelerator != "cpu" and torch.cuda.is_available()
    if cuda:
        # NCCL takes the current device, which is the first one in every process until Lightning
        # sets it, later on.
        local = number("LOCAL_RANK", number("SLURM_LOCALID", 0))
        devices = trainer.devices
        torch.cuda.set_device(local if isinstance(devices, int | str) else devices[local])
    dist.init_process_group("nccl" if cuda else "gloo", **options)


def end_process_group() -> None:
    """Disconnect the processes, if they are connected; for a process that is about to end.

    Otherwise gloo's threads may let go of a tensor while Python is being taken apart, which aborts
    a process that has done all its work (pytorch issue 190489). Not after an error: it could wait
    for a process that has ended.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


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
        run_id=uuid.uuid4().hex,
    )
    # Otherwise each process would use as many threads as there are cores.
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // processes)))
    config = OmegaConf.to_container(cfg, resolve=True)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_unexpected)
    try:
        results = elastic_launch(options, _worker)(config, threads)
    except SignalException as error:  # the processes have been told, and have saved
        raise Interrupted(int(error.sigval)) from error
    except ChildFailedError as error:
        rank, failure = _first_failure(error)
        text = failure.message
        reason = text.get("message", text) if isinstance(text, dict) else text
        message = f"rank {rank} of {processes} failed: {reason}"
        record_failure(cfg, message)
        raise TrainingError(message) from error
    return results[0]


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Whether to show a process's traceback: not of an error that is said in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return f"{ConfigError.__module__}." not in str(error)


def _first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """The rank that failed first, and how.

    A process that was killed is found to be dead only after others have failed to reach it, so it
    goes before them. SIGTERM is how the launcher ends the others.
    """
    killed = {
        rank: failure
        for rank, failure in error.failures.items()
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
    }
    return next(iter(killed.items())) if killed else error.get_first_failure()


@record
def _worker(config: dict[str, Any], threads: int) -> dict[str, float]:
    from sam_lightning.training import train

    # Back from the way that this process was started in, by which each of its loading processes
    # would import everything anew, to the platform's own.
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(threads)
    try:
        metrics = train(OmegaConf.create(config))
    except RuntimeError as error:
        if "Timed out waiting" not in str(error):  # what gloo says
            raise
        raise TrainingError(
            f"{_silent()} within trainer.timeout={config['trainer']['timeout']} s"
        ) from error
    end_process_group()
    return metrics


def _silent() -> str:
    """Which ranks do not answer: those that do not wait for others themselves."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # That of the launcher, which no rank can take down.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    store.set(f"waits/{rank}", "")
    time.sleep(NOTICED_WITHIN)
    silent = [str(r) for r in range(ranks) if not store.check([f"waits/{r}"])]
    if not silent:
        return "the ranks have not reached each other"
    return f"rank {' and '.join(silent)} has not answered"
