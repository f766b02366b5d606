"""From a configuration to objects, to trained weights, to the files of a run."""

import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from sam_lightning.building import build, check_names, factory
from sam_lightning.callbacks import MetricsCSV, Throughput
from sam_lightning.checkpoint import AtomicCheckpointIO, newest, read
from sam_lightning.configuration import one_line
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.errors import ConfigError, TrainingError
from sam_lightning.launch import externally_launched, init_process_group, launch, local_processes
from sam_lightning.module import SAMModule
from sam_lightning.results import Record
from sam_lightning.sam import SAM
from sam_lightning.saving import LastCheckpoint, StopSignal

log = logging.getLogger(__name__)

# Keys of the data configuration that belong to its source; the rest is the data module's.
SOURCE_KEYS = {"source", "root", "download", "image_size", "cache_dir"}
# Keys of the trainer configuration that the module acts on; Lightning would refuse them.
MODULE_KEYS = {"gradient_clip_val", "accumulate_grad_batches"}
# Keys of the method's configuration that are not passed on as they are.
OWN_KEYS = {"name", "perturbation", "descent", "passes"}


def train(cfg: DictConfig) -> dict[str, float]:
    """Fit, test and record one run.

    Several devices without a launcher around (torchrun, SLURM): starts a process for each.

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
    external = externally_launched()
    if world_size > 1 and external:
        init_process_group(cfg.trainer.accelerator)
    resume(cfg)
    if world_size > 1 and not external:
        data = make_data(cfg)  # what is wrong is said once, before processes start
        make_module(cfg, data)
        _check_metric(cfg, data)
        return launch(cfg, processes)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    throughput = Throughput()
    trainer = make_trainer(cfg, processes, throughput)
    data = make_data(cfg, trainer)
    module = make_module(cfg, data)
    _check_metric(cfg, data)
    return execute(cfg, trainer, data, module, throughput)


def resume(cfg: DictConfig) -> None:
    """Replace a ``ckpt_path`` that is ``last`` or a run's folder by the newest whole checkpoint.

    ``last`` is that of this run's own folder; where there is none yet, the run starts anew.

    Raises:
        ConfigError: the folder given has no checkpoint that is whole.
    """
    if cfg.ckpt_path is None or Path(cfg.ckpt_path).is_file():
        return
    found: list[str | None] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:  # rank 0 alone knows the run's folder
        own = cfg.ckpt_path == "last"
        folder = Path(cfg.output_dir if own else cfg.ckpt_path)
        path = newest(folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder)
        if path is None and not own:
            raise ConfigError(f"ckpt_path={cfg.ckpt_path}: there is no checkpoint in it")
        found = [None if path is None else str(path)]
        log.info("%s", "starting anew" if path is None else f"continuing from {path}")
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    cfg.ckpt_path = found[0]


def make_trainer(cfg: DictConfig, processes: int, throughput: Throughput) -> L.Trainer:
    """The trainer, with the loggers and callbacks that the configuration names."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    for key in MODULE_KEYS:
        options.pop(key)
    options.pop("strategy", None)  # one of launch.STRATEGIES: this one
    if processes * options["num_nodes"] > 1:
        # Running statistics stay local while training and are averaged for evaluation.
        options["strategy"] = DDPStrategy(broadcast_buffers=False)
    if options["accelerator"] == "auto" and not torch.cuda.is_available():
        options["accelerator"] = "mps" if torch.backends.mps.is_available() else "cpu"
    callbacks = _build_all(cfg, "callbacks")
    own = {
        "max_epochs": cfg.epochs,
        "default_root_dir": cfg.output_dir,
        "logger": _build_all(cfg, "logger"),
        "callbacks": [*callbacks, throughput],
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stdout.isatty(),
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "plugins": [AtomicCheckpointIO()],
    }
    check_names("trainer", options, L.Trainer, own)
    try:
        return L.Trainer(**own, **options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error


def make_data(cfg: DictConfig, trainer: L.Trainer | None = None) -> ImageDataModule:
    """The data module, set up: downloaded and decoded by one process, loaded by all."""
    options = {str(k): v for k, v in cfg.data.items() if k not in SOURCE_KEYS}
    own: dict[str, Any] = {"source": factory(cfg, "data.source")}
    own |= {"batch_size": cfg.batch_size, "seed": cfg.seed}
    check_names("data", options, ImageDataModule, own)
    data = ImageDataModule(**own, **options)
    data.trainer = trainer
    if trainer is None or trainer.local_rank == 0:
        data.prepare_data()
    if trainer is not None:
        trainer.strategy.barrier("data")
    data.setup("fit")
    return data


def make_module(cfg: DictConfig, data: ImageDataModule) -> SAMModule:
    """The model, its optimizer and schedule, and a checkpoint to resume that fits them."""
    shape = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    model = build(cfg, "model", **shape)
    if cfg.compile:
        model.compile()
    base_optimizer = factory(cfg, "optimizer")
    perturbation = build(cfg, "method.perturbation")
    try:
        SAM(model.parameters(), base_optimizer, perturbation=perturbation)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {one_line(error)}") from error
    updates = math.ceil(data.steps_per_epoch / cfg.trainer.accumulate_grad_batches)
    method = {str(k): v for k, v in cfg.method.items() if k not in OWN_KEYS}
    assert data.mean is not None
    assert data.std is not None
    model_config = {**_plain(cfg.model), **shape}
    hparams = {
        "model": model_config,
        "data": _plain(cfg.data),
        "method": _plain(cfg.method),
        "optimizer": _plain(cfg.optimizer),
        "seed": cfg.seed,
        "epochs": cfg.epochs,
        "batch_size": cfg.batch_size,
        "label_smoothing": cfg.label_smoothing,
        "image_size": list(data.train.images.shape[-2:]),
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    _check_checkpoint(cfg.ckpt_path, hparams, model)
    own = {
        "model": model,
        "num_classes": data.num_classes,
        "base_optimizer": base_optimizer,
        "perturbation": perturbation,
        "descent": build(cfg, "method.descent") if cfg.method.get("descent") else None,
        "lr_factor": build(
            cfg, "scheduler", total_steps=cfg.epochs * updates, steps_per_epoch=updates
        ),
        "label_smoothing": cfg.label_smoothing,
        "accumulate_grad_batches": cfg.trainer.accumulate_grad_batches,
        "gradient_clip_val": cfg.trainer.gradient_clip_val,
        "max_skipped_steps": cfg.max_skipped_steps,
        "memory_format": memory_format(cfg),
        "seed": cfg.seed,
        "hparams": hparams,
    }
    check_names("method", method, SAMModule, own)
    return SAMModule(**own, **method)


def memory_format(cfg: DictConfig) -> str:
    """The memory layout of weights and images; for ``auto`` what is fastest.

    On CPUs that is what ``benchmarks/layout.py`` measures, on CUDA what PyTorch's documentation
    recommends for its tensor cores.
    """
    if cfg.memory_format != "auto":
        return str(cfg.memory_format)
    apple = cfg.trainer.accelerator == "mps" or (
        cfg.trainer.accelerator == "auto" and torch.backends.mps.is_available()
    )
    return "contiguous" if apple else "channels_last"


def execute(
    cfg: DictConfig,
    trainer: L.Trainer,
    data: ImageDataModule,
    module: SAMModule,
    throughput: Throughput,
) -> dict[str, float]:
    """Fit and test, and leave ``metrics.json`` behind however that ends."""
    if data.val is None:  # nothing to choose the best by
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks[:] = [
            c for c in callbacks if not str(getattr(c, "monitor", "")).startswith("val/")
        ]
    savers = [c for c in trainer.callbacks if isinstance(c, LastCheckpoint)]  # type: ignore[attr-defined]
    stop = savers[0].stop if savers else StopSignal()
    with Record(cfg, trainer, throughput) as record, stop, _one_line_errors(cfg):
        _continue_logs(cfg, trainer)
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        for saver in savers:
            record.add(saver.metrics)
        record.add(trainer.callback_metrics)
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
            record.add(trainer.callback_metrics)
    return record.metrics


def _continue_logs(cfg: DictConfig, trainer: L.Trainer) -> None:
    """Drop from the logs in the run's folder what is behind the checkpoint: lost work."""
    step = -1
    if cfg.ckpt_path is not None:
        step = torch.load(cfg.ckpt_path, weights_only=True, mmap=True)["global_step"]
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV) and cfg.ckpt_path is not None:
            logger.continue_from(step)
        elif isinstance(logger, TensorBoardLogger):
            logger._kwargs["purge_step"] = step + 1


@contextmanager
def _one_line_errors(cfg: DictConfig) -> Iterator[None]:
    try:
        yield
    except MisconfigurationException as error:  # of the trainer or a callback
        raise ConfigError(one_line(error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise TrainingError(
                f"out of memory: lower batch_size={cfg.batch_size}, or divide it and raise "
                "trainer.accumulate_grad_batches="
                f"{cfg.trainer.accumulate_grad_batches} by as much ({one_line(error)})"
            ) from error
        raise


def _build_all(cfg: DictConfig, group: str) -> list[Any]:
    chosen = cfg.get(group) or {}  # ~callbacks leaves all out, callbacks.best=null one
    return [build(cfg, f"{group}.{name}") for name in chosen if chosen[name] is not None]


def _check_metric(cfg: DictConfig, data: ImageDataModule) -> None:
    metric = str(cfg.optimized_metric)
    if metric.startswith("val/") and data.val is None:
        raise ConfigError(
            f"optimized_metric={metric}: there is no validation data; set data.val_size"
        )
    if metric.endswith("/acc5") and data.num_classes < 10:
        raise ConfigError(f"optimized_metric={metric}: needs at least 10 classes")


def _check_checkpoint(path: str | None, hparams: dict[str, Any], model: Any) -> None:
    if path is None:
        return
    checkpoint = read(path, mmap=True)
    saved, now = checkpoint["hyper_parameters"], hparams
    keys = [("model", key) for key in sorted({*saved["model"], *now["model"]})]
    # Other settings may change; another optimizer could do nothing with the state of this one.
    for group, key in [*keys, ("optimizer", "_target_")]:
        of_run, given = saved.get(group, {}).get(key), now[group].get(key)
        if of_run != given:
            raise ConfigError(
                f"ckpt_path={path}: is of another {group}, with {group}.{key}={of_run}; "
                f"the configuration has {given}"
            )
    stored = {k: v.shape for k, v in checkpoint["state_dict"].items()}
    if stored != {f"model.{k}": v.shape for k, v in model.state_dict().items()}:
        raise ConfigError(f"ckpt_path={path}: its weights are not those of {now['model']}")


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def _quieten() -> None:
    """Leave out what Lightning says of every run; what matters is said by the run itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are reduced already
        ".*Detected call of `lr_scheduler.step.*",  # a loss scaler skipped the first step
        ".*broadcast_buffers.* is deprecated.*",
        ".*all_gather.* is deprecated.*",
        ".*Total length of `list` across ranks is zero.*",  # no validation data
    ):
        warnings.filterwarnings("ignore", message)
