"""From a configuration to objects, to trained weights, to the files of a run."""

import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

from sam_lightning.callbacks import MetricsCSV, Throughput
from sam_lightning.configuration import no_such_key, one_line
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.errors import ConfigError
from sam_lightning.launch import externally_launched, init_process_group, launch, local_processes
from sam_lightning.module import SAMModule
from sam_lightning.results import Record

# Keys of the data configuration that belong to its source; the rest is the data module's.
SOURCE_KEYS = {"source", "root", "download", "image_size", "cache_dir"}
# Keys of the trainer configuration that the module acts on; Lightning would refuse them.
MODULE_KEYS = {"gradient_clip_val", "accumulate_grad_batches"}


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
    if world_size > 1 and not externally_launched():
        data = make_data(cfg)  # what is wrong is said once, before processes start
        make_module(cfg, data)
        _check_metric(cfg, data)
        return launch(cfg, processes)
    if world_size > 1:
        init_process_group(cfg.trainer.accelerator)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    throughput = Throughput()
    trainer = make_trainer(cfg, processes, throughput)
    data = make_data(cfg, trainer)
    module = make_module(cfg, data)
    _check_metric(cfg, data)
    return execute(cfg, trainer, data, module, throughput)


def make_trainer(cfg: DictConfig, processes: int, throughput: Throughput) -> L.Trainer:
    """The trainer, with the loggers and callbacks that the configuration names."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    for key in MODULE_KEYS:
        options.pop(key)
    if processes * options["num_nodes"] > 1:
        # Running statistics stay local while training and are averaged for evaluation.
        options.setdefault("strategy", DDPStrategy(broadcast_buffers=False))
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
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
    }
    _check_names("trainer", options, L.Trainer, own)
    try:
        return L.Trainer(**own, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error


def make_data(cfg: DictConfig, trainer: L.Trainer | None = None) -> ImageDataModule:
    """The data module, set up: downloaded and decoded by one process, loaded by all."""
    options = {str(k): v for k, v in cfg.data.items() if k not in SOURCE_KEYS}
    own = {"source": build(cfg, "data.source", _partial_=True)}
    own |= {"batch_size": cfg.batch_size, "seed": cfg.seed}
    _check_names("data", options, ImageDataModule, own)
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
    base_optimizer = build(cfg, "optimizer", _partial_=True)
    try:
        base_optimizer(model.parameters())
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer: {one_line(error)}") from error
    updates = math.ceil(data.steps_per_epoch / cfg.trainer.accumulate_grad_batches)
    method = {str(k): v for k, v in cfg.method.items() if k not in ("name", "perturbation")}
    assert data.mean is not None
    assert data.std is not None
    model_config = {**_plain(cfg.model), **shape}
    hparams = {
        "model": model_config,
        "data": _plain(cfg.data),
        "method": _plain(cfg.method),
        "seed": cfg.seed,
        "epochs": cfg.epochs,
        "batch_size": cfg.batch_size,
        "label_smoothing": cfg.label_smoothing,
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
    }
    _check_checkpoint(cfg.ckpt_path, model_config, model)
    own = {
        "model": model,
        "num_classes": data.num_classes,
        "base_optimizer": base_optimizer,
        "perturbation": build(cfg, "method.perturbation"),
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
    _check_names("method", method, SAMModule, own)
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
    with Record(cfg, trainer, throughput) as record:
        if cfg.ckpt_path is not None:
            step = torch.load(cfg.ckpt_path, weights_only=True, mmap=True)["global_step"]
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.continue_from(step)
                elif isinstance(logger, TensorBoardLogger):  # likewise drops what lost work drew
                    logger._kwargs["purge_step"] = step + 1
        trainer.fit(module, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
        record.add(trainer.callback_metrics)
        if cfg.test:
            trainer.test(module, datamodule=data, verbose=False)
            record.add(trainer.callback_metrics)
    return record.metrics


def build(cfg: DictConfig, key: str, /, **kwargs: Any) -> Any:
    """Make the object that ``cfg[key]`` describes; its errors become ones about ``key``."""
    node = OmegaConf.select(cfg, key)
    try:
        made = get_object(node._target_)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={node._target_}: {one_line(error)}") from error
    _check_names(key, {k: v for k, v in node.items() if not str(k).startswith("_")}, made, kwargs)
    try:
        return instantiate(node, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from error
        if isinstance(cause, ValueError | TypeError):
            text = one_line(cause)
            raise ConfigError(text if text.startswith(key) else f"{key}: {text}") from error
        raise


def _build_all(cfg: DictConfig, group: str) -> list[Any]:
    chosen = cfg.get(group) or {}  # ~callbacks leaves all out, callbacks.best=null one
    return [build(cfg, f"{group}.{name}") for name in chosen if chosen[name] is not None]


def _check_names(
    key: str, options: Mapping[Any, Any], made: Callable[..., Any], own: Mapping[str, Any]
) -> None:
    """Refuse options that ``made`` does not take, or that are ``own``: those the run sets."""
    parameters = inspect.signature(made).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in own]
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{key}.{name}={value}: {no_such_key(str(name), known)}")


def _check_metric(cfg: DictConfig, data: ImageDataModule) -> None:
    metric = str(cfg.optimized_metric)
    if metric.startswith("val/") and data.val is None:
        raise ConfigError(
            f"optimized_metric={metric}: there is no validation data; set data.val_size"
        )
    if metric.endswith("/acc5") and data.num_classes < 10:
        raise ConfigError(f"optimized_metric={metric}: needs at least 10 classes")


def _check_checkpoint(path: str | None, model_config: dict[str, Any], model: Any) -> None:
    if path is None:
        return
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stored = {k: v.shape for k, v in checkpoint["state_dict"].items()}
        saved_config = checkpoint["hyper_parameters"]["model"]
    except Exception as error:
        raise ConfigError(
            f"ckpt_path={path}: not a readable checkpoint of a run ({type(error).__name__})"
        ) from error
    for key in sorted({*saved_config, *model_config}):
        saved, now = saved_config.get(key), model_config.get(key)
        if saved != now:
            raise ConfigError(
                f"ckpt_path={path}: is of another model, with model.{key}={saved}; "
                f"the configuration has {now}"
            )
    if stored != {f"model.{k}": v.shape for k, v in model.state_dict().items()}:
        raise ConfigError(f"ckpt_path={path}: its weights are not those of {model_config}")


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


def _quieten() -> None:
    """Leave out what Lightning says of every run; what matters is said by the run itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # its errors are raised too
    for message in (
        ".*does not have many workers.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        ".*number of training batches .* is smaller than the logging interval.*",
        ".*isinstance.treespec, LeafSpec.* is deprecated.*",
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are reduced already
        ".*Detected call of `lr_scheduler.step.*",  # a loss scaler skipped the first step
        ".*Total length of `list` across ranks is zero.*",  # no validation data
    ):
        warnings.filterwarnings("ignore", message)
