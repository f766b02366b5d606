"""A run: fitted, tested, recorded, and continued where an earlier one stopped."""

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.cluster import is_first, launched, node_rank, number
from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.config.instantiate import errors_of
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.data.remote import digest
from sam_lightning.data.splitting import split_names
from sam_lightning.inference.load import SPLIT
from sam_lightning.runs.checkpoint import newest
from sam_lightning.runs.files import write_json
from sam_lightning.runs.lock import joined, owned
from sam_lightning.runs.parts import changes, settings_of
from sam_lightning.runs.record import Record
from sam_lightning.runs.secrets import hide_secrets_of, without_secrets
from sam_lightning.training.build import make_data, make_module, make_trainer, prepare_data
from sam_lightning.training.callbacks.last_checkpoint import LastCheckpoint, StopSignal
from sam_lightning.training.callbacks.progress import MetricsCSV, Throughput
from sam_lightning.training.connected import (
    agree,
    connected,
    is_lost,
    named_lost,
    shared_settings,
)
from sam_lightning.training.launch import launch, local_processes
from sam_lightning.training.watched import check_watched
from sam_lightning.training.weights import prepare_as_weights

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, float]:
    """Fit, test and record one run; write ``metrics.json`` however that ends.

    Without a launcher (torchrun, SLURM) it starts a process for each device of this host.

    Args:
        cfg: a configuration as composed from ``conf/train.yaml``.

    Returns:
        the final metrics by name, such as ``test/acc``.

    Raises:
        ConfigError: a setting does not fit this machine, the data or the checkpoint.
        TrainingError: the run could not go on.
    """
    processes = local_processes(cfg.trainer)
    world_size = processes * cfg.trainer.num_nodes
    if cfg.batch_size % world_size:
        raise ConfigError(
            f"batch_size={cfg.batch_size}: is over all devices together, and must be a "
            f"multiple of their number, {world_size}"
        )
    _quieten()
    found = launched()  # torchrun or SLURM has started this process as one of several
    together = nullcontext() if found is None else connected(cfg.trainer)
    folder = owned(Path(cfg.output_dir)) if is_first() else nullcontext()
    with together, folder, _threads(cfg.threads):
        if node_rank() is not None:
            # The processes that this one starts prepare the run, as they know of the other hosts.
            # They cannot tell a path in the run's folder from others: theirs are resolved.
            return launch(cfg, processes, partial(_train_rank, shared_settings(cfg)))
        _prepare(cfg, shared_settings(cfg))
        if world_size > 1 and found is None:
            prepare_data(cfg)  # only in this process, so that no other waits
            return launch(cfg, processes, partial(_train_rank, None))
        return _train(cfg)


def _prepare(cfg: DictConfig, settings: dict[str, Any]) -> None:
    resume(cfg)
    agree(lambda: settings)
    prepare_as_weights(cfg)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many in the block; the next run of a sweep may be in this process too."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _train_rank(settings: dict[str, Any] | None, cfg: DictConfig) -> dict[str, float]:
    """One process of a run that another one has started.

    Args:
        settings: what all hosts must share; None: the process that started this one has prepared
            the run.
    """
    _quieten()
    hide_secrets_of(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
    with joined(Path(cfg.output_dir)) if number("GROUP_RANK", 0) == 0 else nullcontext():
        if settings is not None:
            _prepare(cfg, settings)
        return _train(cfg)


def _train(cfg: DictConfig) -> dict[str, float]:
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    throughput = Throughput()
    trainer: Any = make_trainer(cfg, local_processes(cfg.trainer), throughput)
    data = make_data(cfg, trainer)
    config = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    settings = settings_of(config, data.classes, data.train.labels.cpu().numpy())
    agree(lambda: _contents(data))
    changed, ended = changes(cfg.ckpt_path, settings)
    # Before Lightning does, which first loads a checkpoint's float64 into float32.
    module = trainer.precision_plugin.convert_module(make_module(cfg, data, trainer))
    module.settings = settings
    if started := module.hparams.get("weights"):
        agree(lambda: {"model.weights": f"a file of SHA-256 {started['sha256'][:12]}"})
    check_watched(cfg, trainer, data)
    _check_images(cfg, data, trainer.world_size)
    savers = [c for c in trainer.callbacks if isinstance(c, LastCheckpoint)]
    stop = savers[0].stop if savers else StopSignal()
    _open_loggers(cfg, trainer)
    _write_split(cfg, trainer, data)
    record = Record(cfg, trainer, throughput, data, module, changed=changed, only_test=ended)
    connector = trainer._checkpoint_connector
    for owner, method in (
        (connector, "_restore_modules_and_callbacks"),
        (connector, "restore_training_state"),
        (module, "on_train_start"),
    ):  # Lightning, and the module, take up what anyone may have written
        setattr(owner, method, _restoring(cfg.ckpt_path)(getattr(owner, method)))
    with record, stop, _one_line_errors(cfg), named_lost():
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        if trainer.global_step == 0:
            raise TrainingError("the trainer stopped before the first step; nothing was trained")
        record.add(trainer.callback_metrics)
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
            record.add(trainer.callback_metrics)
    return record.metrics


def _contents(data: ImageDataModule) -> dict[str, str]:
    """What must be the same wherever the data are read."""
    images = {f"images of {k}": f"{len(v)} of hash {v.digest()}" for k, v in data.splits.items()}
    return {"classes": ", ".join(data.classes), **images}


def resume(cfg: DictConfig) -> None:
    """Replace a ``ckpt_path`` that is ``last`` or a run's folder by the newest whole checkpoint.

    ``last`` is in this run's own folder. If there is none yet, the run starts from scratch.

    Raises:
        ConfigError: the folder given has no checkpoint that is whole.
    """
    agree(lambda: {"ckpt_path": cfg.ckpt_path})
    if cfg.ckpt_path is None:
        return
    found: list[str | ConfigError | None] = [cfg.ckpt_path]
    if not dist.is_initialized() or dist.get_rank() == 0:  # rank 0 alone knows the run's folder
        try:
            found = [cfg.ckpt_path if Path(cfg.ckpt_path).is_file() else _newest_of_run(cfg)]
        except ConfigError as error:
            found = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], ConfigError):  # on all, or the others would wait
        raise found[0]
    cfg.ckpt_path = found[0]
    if cfg.ckpt_path is not None and dist.is_initialized():  # all load it, from their own disks
        agree(partial(_file, Path(cfg.ckpt_path)))


def _file(path: Path) -> dict[str, str]:
    there = f"a file of SHA-256 {digest(path)[:12]}" if path.is_file() else "no file"
    return {f"ckpt_path={path}": there}


def _newest_of_run(cfg: DictConfig) -> str | None:
    own = cfg.ckpt_path == "last"
    folder = Path(cfg.output_dir if own else cfg.ckpt_path)
    path = newest(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
    if path is None and not own:
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: there is no checkpoint in it")
    log.info("%s", "starting from scratch" if path is None else f"continuing from {path}")
    return None if path is None else str(path)


def _open_loggers(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Let the loggers begin to write, without rows after the checkpoint's step: lost work.

    Raises:
        ConfigError: one of them cannot.
    """
    path = cfg.ckpt_path
    checkpoint: Any = torch.load(path, weights_only=True, mmap=True) if path else {}
    step = checkpoint.get("global_step", -1)
    saved = checkpoint.get("callbacks", {}).get(LastCheckpoint.__qualname__, {})
    chosen = [name for name, node in (cfg.get("logger") or {}).items() if node is not None]
    for name, logger in zip(chosen, trainer.loggers, strict=False):  # debug=fast has none
        if isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step + 1
        with errors_of(cfg, f"logger.{name}"):
            getattr(logger, "experiment", None)  # made here
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV) and path:
            logger.continue_from(step, next(iter(saved.get("rows", [])), None))


@contextmanager
def _one_line_errors(cfg: DictConfig) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:  # of a loading process, which puts its traceback before it
        if " in DataLoader worker process " not in str(error):
            raise
        last = str(error).rpartition(f"{ConfigError.__name__}: ")[2]
        raise ConfigError(last.strip()) from error
    except MisconfigurationException as error:  # of the trainer or a callback
        raise ConfigError(one_line(error)) from error
    except ValueError as error:
        if "`val_check_interval`" not in str(error):
            raise
        raise ConfigError(f"trainer.val_check_interval: {one_line(error)}") from error
    except RuntimeError as error:
        *_, raised = traceback.extract_tb(error.__traceback__)
        if "lightning/pytorch/callbacks" in Path(raised.filename).as_posix():
            raise ConfigError(one_line(error)) from error  # one that cannot work in this run
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            batches = f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches}"
            raise TrainingError(
                f"out of memory: lower batch_size={cfg.batch_size}, or divide it and raise "
                f"{batches} by as much ({one_line(error)})"
            ) from error
        raise


@contextmanager
def _restoring(path: str | None) -> Iterator[None]:
    """Name the checkpoint, if there is one, in an error of what takes it up."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ConfigError) or path is None or is_lost(error):
            raise
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"ckpt_path={path}: cannot be continued ({reason})") from error


def _write_split(cfg: DictConfig, trainer: L.Trainer, data: ImageDataModule) -> None:
    """Note which image is in which split, if that was drawn, for who evaluates the run."""
    if data.drawn and trainer.is_global_zero:
        splits = {name: getattr(data, name) for name in ("train", "val", "test")}
        names = {name: split and split.names for name, split in splits.items()}
        write_json(Path(cfg.output_dir, SPLIT), split_names(names), "output_dir")


def _check_images(cfg: DictConfig, data: ImageDataModule, processes: int) -> None:
    if cfg.test and data.test is None:
        raise ConfigError("test=true: the data have no test set; set test=false")
    for key, split in (
        ("data.val_size", data.val),
        ("test=true: data.test", cfg.test and data.test),
    ):
        if split and len(split) < processes:  # one that has none would not wait for the others
            raise ConfigError(f"{key}: has {len(split)} images for {processes} processes")


def _quieten() -> None:
    """Hide messages that Lightning prints for every run."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # their tables
    if logging.getLogger().handlers:  # else Lightning's own handler would say all of it again
        logging.getLogger("lightning").handlers.clear()
    for message in (
        ".*does not have many workers.*",
        ".*`srun` command is available.*",  # a login node; the launchers are told apart by us
        ".*directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are reduced already
        ".*Detected call of `lr_scheduler.step.*",  # a loss scaler skipped the first step
        ".*(isinstance.treespec, LeafSpec|broadcast_buffers|all_gather).* is deprecated.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # LastCheckpoint says it
        ".*Glyph .* missing from font.*",  # names of classes, in pictures for TensorBoard
        ".*Total length of `list` across ranks is zero.*",  # no validation data
    ):
        warnings.filterwarnings("ignore", message)
