"""The processes (ranks) of a run on several devices.

Lightning repeats the command line to start processes, which repeats a whole sweep. Here every
process starts with the finished configuration, so it always belongs to its run, and the end of one
ends all. On one host they find each other through files in a private folder and talk over the
loopback interface, so no other host can reach them. On several hosts, on each of which the user
starts the run, they meet at MASTER_ADDR and MASTER_PORT.
"""

import logging.config
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing import (
    DefaultLogsSpecs,
    RunProcsResult,
    SignalException,
    start_processes,
)

from sam_lightning.config.cluster import check_node, is_first, launched, node_rank, number
from sam_lightning.config.errors import ConfigError, Interrupted, TrainingError
from sam_lightning.config.process import let_end, outlive_pipes
from sam_lightning.runs.files import record_failure
from sam_lightning.training.connected import connected
from sam_lightning.training.ranks import Ranks

log = logging.getLogger(__name__)

Work = Callable[[DictConfig], dict[str, float]]  # a function that other processes can import

# Data parallel, with a copy of the weights in every process.
STRATEGIES = ("auto", "ddp")


def local_processes(trainer: DictConfig) -> int:
    """Number of processes on this machine.

    Raises:
        ConfigError: there is no such accelerator here, there are fewer devices, the strategy does
            not keep whole weights, torchrun or SLURM has started another number of processes, or
            this one of several hosts has no number.
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
    check_node(nodes)
    return processes


def _devices_here(trainer: DictConfig) -> int:
    accelerator, devices = trainer.accelerator, trainer.devices
    gpus, mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    missing = {"mps": not mps and "Apple", "cuda": not gpus and "CUDA", "gpu": not gpus and "CUDA"}
    if kind := missing.get(accelerator):
        raise ConfigError(
            f"trainer.accelerator={accelerator}: there is no {kind} GPU here; use cpu or auto"
        )
    on_gpus = accelerator in ("cuda", "gpu") or (accelerator == "auto" and gpus > 0)
    apple = accelerator != "cpu" and mps
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


def launch(cfg: DictConfig, processes: int, work: Work) -> dict[str, float]:
    """Run ``work(cfg)`` in new processes on this machine and return what the first one returns.

    Raises:
        TrainingError: names the rank whose failure was noticed first, and its error.
    """
    Ranks.begun = True  # they tell the other hosts why they end
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").addFilter(_is_unexpected)
    # The others are ended, and the error says why.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    try:
        with TemporaryDirectory(prefix="sam_lightning_", ignore_cleanup_errors=True) as folder:
            result = _run_workers(cfg, processes, work, folder)
    except SignalException as error:  # the processes have been told, and have saved
        raise Interrupted(int(error.sigval)) from error
    if result.is_failed():
        # The first that was noticed; the others were then told to end.
        local, failure = next(iter(result.failures.items()))
        # It was told to stop, or one on another host.
        if failure.exitcode - 128 in signal.valid_signals():
            raise Interrupted(failure.exitcode - 128)
        text = failure.message
        reason = text.get("message", text) if isinstance(text, dict) else text
        if reason.startswith("ConfigError: "):
            raise ConfigError(reason.removeprefix("ConfigError: "))
        first, size = (node_rank() or 0) * processes, processes * cfg.trainer.num_nodes
        message = f"rank {first + local} of {size} failed: {reason}"
        if is_first():
            record_failure(cfg, message)
        raise TrainingError(message)
    return result.return_values[0]


def _run_workers(cfg: DictConfig, processes: int, work: Work, folder: str) -> RunProcsResult:
    """Start the processes and wait for them; terminate all if one fails or a signal comes."""
    # Otherwise each process would use as many threads as there are cores.
    share = max(1, (os.cpu_count() or 1) // processes)
    threads = cfg.threads or int(os.environ.get("OMP_NUM_THREADS", share))
    config = OmegaConf.to_container(cfg, resolve=True)
    logs: Any = None
    if HydraConfig.initialized():
        logs = HydraConfig.get().job_logging
        logs = OmegaConf.to_container(logs, resolve=True)
    ranks, run_id = range(processes), Path(folder).name
    # Ctrl-C while a new process imports would print a traceback. It waits for ``let_end``.
    resource_tracker.ensure_running()  # started later, it would let the signal through
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    context = start_processes(
        "run",
        _worker,
        args=dict.fromkeys(ranks, (work, config, logs, threads, folder, os.getpid())),
        envs={rank: _environment(rank, processes, cfg.trainer.num_nodes, run_id) for rank in ranks},
        logs_specs=DefaultLogsSpecs(folder),  # a process that fails writes its error there
    )
    if "SLURM_JOB_ID" in os.environ:  # it tells this process too that its time is nearly up
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGTERM))
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        result = context.wait(period=0.1)
        assert result is not None  # it waits as long as it takes
        return result
    except SignalException as error:
        context.close(error.sigval)
        raise
    finally:
        context.close()


def _environment(local: int, processes: int, nodes: int, run_id: str) -> dict[str, str]:
    """The environment of one process: torchrun's variables, and the network to use."""
    node = node_rank() or 0
    ours = {
        "RANK": str(node * processes + local),
        "LOCAL_RANK": str(local),
        "GROUP_RANK": str(node),
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        # Tells loaders that these processes share the processors of one task of SLURM.
        "TORCHELASTIC_RUN_ID": run_id,
    }
    return ours if nodes > 1 else ours | _loopback()


def _loopback() -> dict[str, str]:
    """The variables that keep gloo and NCCL where no other host can reach them.

    By default gloo listens on the address of the host's name, NCCL on any other interface. The run
    is on one machine, so this overrides what the user has set.
    """
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]  # Linux, macOS
    if not names:
        raise ConfigError("trainer.devices: several processes need the interface lo, or lo0")
    # "=": the whole name, not a prefix
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": f"={names[0]}"}


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Whether to show a process's traceback; an error of one line, or a signal, needs none."""
    if record.levelno < logging.ERROR:
        return False
    error = record.exc_info[1] if record.exc_info else None
    told = getattr(error, "exit_code", 0) - 128 in signal.valid_signals()
    return not told and f"{ConfigError.__module__}." not in str(error)


def _worker(
    work: Work, config: dict[str, Any], logs: Any, threads: int, folder: str, parent: int
) -> dict[str, float]:
    let_end()  # until training listens
    if logs and number("LOCAL_RANK", 0) == 0:  # the others would say the same
        logging.config.dictConfig(logs)
    if os.getppid() != parent:  # killed before torch could ask for a signal at its end
        raise SystemExit
    # Undo the start method of this process, with which each of its loading processes
    # would import everything again, to the platform's own.
    multiprocessing.set_start_method(None, force=True)
    outlive_pipes()
    torch.set_num_threads(threads)
    cfg = OmegaConf.create(config)
    one_host = cfg.trainer.num_nodes == 1
    store = dist.FileStore(f"{folder}/store", number("WORLD_SIZE", 1)) if one_host else None
    with connected(cfg.trainer, store):
        return work(cfg)
