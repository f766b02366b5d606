"""From a configuration to the trainer, the data and the module of a run."""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError, argument_errors, one_line
from sam_lightning.config.instantiate import (
    build,
    build_all,
    check_names,
    errors_of,
    factory,
)
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.data.image_data import build_data
from sam_lightning.optim.param_groups import trainable
from sam_lightning.runs.checkpoint import RESUMED, read
from sam_lightning.training.callbacks.last_checkpoint import LastCheckpoint
from sam_lightning.training.callbacks.progress import Throughput, steps
from sam_lightning.training.checkpoint_io import AtomicCheckpointIO
from sam_lightning.training.finetune import fine_tuning
from sam_lightning.training.fit_loop import FitLoop
from sam_lightning.training.groups import Groups
from sam_lightning.training.losses import Loss, check_loss
from sam_lightning.training.model import make_model
from sam_lightning.training.module import SAMModule

log = logging.getLogger(__name__)

# Keys of the trainer configuration that the module acts on; Lightning would refuse them.
MODULE_KEYS = ("gradient_clip_val", "accumulate_grad_batches")
# Keys of the method's configuration that are not passed on as they are.
OWN_KEYS = {"name", "perturbation", "descent", "passes"}


def make_trainer(cfg: DictConfig, processes: int, throughput: Throughput) -> L.Trainer:
    """The trainer, with the loggers and callbacks that the configuration names."""
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    # The strategy is one of launch.STRATEGIES: this one. connected has the timeout.
    for key in (*MODULE_KEYS, "strategy", "timeout"):
        options.pop(key, None)
    if processes * options["num_nodes"] > 1:
        # Running statistics stay local while training and are averaged for evaluation. Gradients in
        # the memory of DDP's messages save a copy; but an averaged first one would be overwritten
        # by the second, which it is combined or compared with.
        kept = cfg.method.get("descent") or cfg.method.get("sync_perturbation")
        options["strategy"] = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=not kept)
    environment = TorchElasticEnvironment if "WORLD_SIZE" in os.environ else LightningEnvironment
    callbacks = build_all(cfg, "callbacks")
    for name, callback in callbacks.items():  # what it passes on may be wrong too
        callback.setup = errors_of(cfg, f"callbacks.{name}")(callback.setup)
    own = {
        "max_epochs": cfg.epochs,
        "default_root_dir": cfg.output_dir,
        "logger": [*build_all(cfg, "logger").values()],
        "callbacks": [*callbacks.values(), throughput],
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "enable_progress_bar": sys.stdout.isatty(),
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks.values()),
        # Lightning would look for TORCHELASTIC_RUN_ID and at the name of SLURM's job.
        "plugins": [AtomicCheckpointIO(), environment()],
    }
    check_names("trainer", options, L.Trainer, own)
    try:
        trainer = L.Trainer(**own, **options)
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {one_line(error)}") from error
    trainer.fit_loop = FitLoop(trainer)
    _check_checkpoints(callbacks, trainer)
    return trainer


def _check_checkpoints(callbacks: Mapping[str, Any], trainer: L.Trainer) -> None:
    """Refuse a callback that would write over the checkpoints that a run continues from."""
    own = {c.dirpath.resolve() for c in callbacks.values() if isinstance(c, LastCheckpoint)}
    for name, callback in callbacks.items():
        if not isinstance(callback, ModelCheckpoint):
            continue
        folder = Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]
        files = {"filename": callback.filename in RESUMED, "save_last": callback.save_last}
        for key, value in files.items():
            if value and folder.resolve() in own:
                raise ConfigError(
                    f"callbacks.{name}.{key}={getattr(callback, key)}: would write over the run's "
                    f"own {folder / 'last.ckpt'}; leave it out, or give another dirpath"
                )


def prepare_data(cfg: DictConfig) -> ImageDataModule:
    """The data module, its files downloaded and decoded."""
    data = build_data(cfg, ImageDataModule)
    with argument_errors("data"):
        data.prepare_data()
    return data


def make_data(cfg: DictConfig, trainer: L.Trainer) -> ImageDataModule:
    """The data module, set up: one process downloads and decodes, all processes load."""
    first = trainer.local_rank == 0
    data = prepare_data(cfg) if first else build_data(cfg, ImageDataModule)
    data.trainer = trainer
    with argument_errors("data"):
        trainer.strategy.barrier("data")
        data.setup("fit")
    return data


def make_module(cfg: DictConfig, data: ImageDataModule, trainer: L.Trainer) -> SAMModule:
    """The model, its optimizer and schedule, and a checkpoint to resume that fits them."""
    model, layout, hparams = make_model(cfg, data, trainer)
    tuning: Any = OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["finetune", "param_groups"]))
    settings, freezing = fine_tuning(tuning, model, cfg.epochs)
    base_optimizer = factory(cfg, "optimizer")
    perturbation = build(cfg, "method.perturbation")
    per_epoch, total = planned_steps(cfg, data, trainer)
    method = {str(k): v for k, v in cfg.method.items() if k not in OWN_KEYS}
    own = {
        "model": model,
        "num_classes": data.num_classes,
        "base_optimizer": base_optimizer,
        "perturbation": perturbation,
        "gradient_transform": build(cfg, "method.descent") if cfg.method.get("descent") else None,
        "loss": _make_loss(cfg, data),
        "param_settings": settings,
        "freezing": freezing,
        "lr_factor": build(cfg, "scheduler", total_steps=total, steps_per_epoch=per_epoch),
        "memory_format": layout,
        "hparams": hparams,
        **{key: cfg[key] for key in ("max_skipped_steps", "cuda_graph", "seed")},
        **{key: cfg.trainer[key] for key in MODULE_KEYS},
    }
    check_names("method", method, SAMModule, own)
    module = SAMModule(**own, **method)
    try:
        sam = module.make_sam(trainable(model))
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optimizer: {one_line(error)}") from error
    if sam.defaults["rho"] > 0:
        groups = Groups(sam)
        if groups.counts()[1] == 0:
            raise ConfigError(
                f"rho={cfg.rho}: no weight that trains is perturbed, by finetune, param_groups or "
                "method.perturbed_layers; method=sgd says so"
            )
        if (first := groups.perturbed_from()) > 0:
            log.warning("epochs 1 to %d perturb nothing: what is to be perturbed is frozen", first)
    if cfg.ckpt_path is not None:
        _try_optimizer(cfg, module)
    return module


def _try_optimizer(cfg: DictConfig, module: SAMModule) -> None:
    """Take a step from the optimizer's stored state: on tensors that have only a shape, if it can.

    Otherwise on zeros, which take memory and time. An optimizer of the user's own that cannot take
    a step on those either is not tried.

    Raises:
        ConfigError: the state is not one that this optimizer can go on from.
    """

    def step(device: str, state: Any = None) -> None:
        named = module.model.named_parameters()
        weights = [(n, torch.zeros_like(p, device=device)) for n, p in named if p.requires_grad]
        sam = module.make_sam([(name, weight.requires_grad_()) for name, weight in weights])
        state = state or sam.state_dict()
        names = [
            [g.get("param_names") for g in s["param_groups"]] for s in (sam.state_dict(), state)
        ]
        if None not in names[1] and names[0] != names[1]:
            raise ValueError("the parameters are in other groups now")
        kernels = {"fused": False, "foreach": False}  # others do not take tensors without memory
        groups = [{**group, **kernels} for group in state["param_groups"]]
        sam.load_state_dict({**state, "param_groups": groups})
        for values in sam.state.values() if device == "meta" else ():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.ndim == 0:  # a number, which is read
                    values[name] = torch.ones((), dtype=value.dtype)
        for _, weight in weights:
            weight.grad = torch.zeros_like(weight)
            for value in sam.method_state[weight].values():
                torch.broadcast_to(value, weight.shape)
        sam.base_optimizer.step()

    for device in ("meta", "cpu"):
        with suppress(Exception):
            step(device)
            break
    else:
        return
    try:
        step(device, read(cfg.ckpt_path, mmap=True)["optimizer_states"][0])
    except Exception as error:  # of whatever anyone may have written
        reason = f"optimizer: {type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: cannot be continued ({reason})") from error


def _make_loss(cfg: DictConfig, data: ImageDataModule) -> Loss:
    """The loss of each image, tried on two."""
    counts = data.train.labels.bincount(minlength=data.num_classes).tolist()
    # Losses of torch.nn would return a mean.
    loss: Loss = build(cfg, "loss", class_counts=counts, reduction="none")
    check_loss(loss, data.num_classes)
    if cfg.label_smoothing and cfg.loss.get("smoothing") != cfg.label_smoothing:
        smoothing = cfg.loss.get(
            "smoothing", f"null, as loss._target_={cfg.loss._target_} has none"
        )
        raise ConfigError(
            f"label_smoothing={cfg.label_smoothing}: must be 0 with loss.smoothing={smoothing}"
        )
    return loss


def planned_steps(cfg: DictConfig, data: ImageDataModule, trainer: Any) -> tuple[int, int]:
    """Steps of an epoch and of the run, before the trainer has the data."""
    batches, limit = data.steps_per_epoch, trainer.limit_train_batches  # a float is a fraction
    batches = min(batches, limit if isinstance(limit, int) else int(limit * batches))
    return steps(trainer, batches, cfg.trainer.accumulate_grad_batches)
