"""The model of a run: built, started from weights, tried, in the memory layout that is fastest."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from sam_lightning.config.errors import ConfigError, one_line
from sam_lightning.config.instantiate import build, not_taken, takes
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.inference.load import misfit, try_without_memory
from sam_lightning.models.onednn import reaches_fault, subsample_first
from sam_lightning.runs.checkpoint import read
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.training.weights import start_from_weights

log = logging.getLogger(__name__)

# Keys of the configuration that checkpoints keep.
SAVED_PARTS = ("model", "data", "method", "optimizer", "loss")
SAVED_NUMBERS = ("seed", "epochs", "batch_size", "label_smoothing")


def make_model(
    cfg: DictConfig, data: ImageDataModule, trainer: L.Trainer
) -> tuple[nn.Module, str, dict[str, Any]]:
    """The model, its memory layout, and what checkpoints keep to build model and data again.

    Raises:
        ConfigError: the model does not take the data's images, its layout would be wrong, or the
            weights that it starts or continues from are of another model.
    """
    ours = cfg.model._target_.startswith("sam_lightning.")
    shape: dict[str, Any] = {"num_classes": data.num_classes, "in_channels": data.in_channels}
    image_size = list(data.train.shape[-2:])
    if ours and takes(cfg, "image_size"):
        shape["image_size"] = image_size
    hparams = _hparams(cfg, data, shape)
    stored = None if cfg.ckpt_path is None else read(cfg.ckpt_path, mmap=True)
    weights = None if stored is None else _checked_weights(cfg, stored, shape)
    model = build(cfg, "model", **shape)
    if stored is None:
        started = start_from_weights(cfg, model, shape, data.classes, trainer)
    else:
        started = stored["hyper_parameters"].get("weights")
    if started is not None:
        hparams["weights"] = started
    if not ours or "name" in cfg.model:  # others than those written here
        _try_model(cfg, model, (data.in_channels, *image_size), data.num_classes)
    for name in subsample_first(model):
        log.info("layer %s subsamples before its convolution (oneDNN issue 6035)", name)
    if weights not in (None, {k: v.shape for k, v in model.state_dict().items()}):
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: {misfit(hparams)}")
    device = trainer.strategy.root_device.type
    layout = memory_format(cfg.memory_format, model, (data.in_channels, *image_size), device)
    if cfg.compile:
        batch = data.largest_batch
        torch.compiler.reset()  # graphs of earlier runs of this process count towards its limit
        method = (cfg.method.get("ascent_fraction", 1), cfg.method.get("descent_fraction", 1))
        compile_training(model, {math.ceil(part * batch) for part in (1, *method)}, layout)
    return model, layout, hparams


def compile_training(model: nn.Module, sizes: set[int], layout: str) -> None:
    """Compile the training passes over batches of these sizes; all else stays eager.

    Evaluation and the smaller last batch of an epoch would need graphs of their own, and to
    compile these takes longer than they save. What is eager depends on the batch alone, so a
    resumed run computes as an unbroken one.
    """
    # On CPUs it would arrange images in channels_last.
    model.compile(options={"layout_optimization": layout != "contiguous"})
    compiled = model._compiled_call_impl
    assert compiled is not None

    def call(images: Tensor) -> Any:
        if not (model.training and len(images) in sizes):
            return model._call_impl(images)
        torch._dynamo.mark_static(images)  # or a second size would get kernels for any
        return compiled(images)

    model._compiled_call_impl = call
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_say_limit)


def _say_limit(record: logging.LogRecord) -> bool:
    """Say in one line, not in dynamo's five, that it compiles no more."""
    if not str(record.msg).startswith("torch._dynamo hit"):
        return True
    reason = record.getMessage().partition("last reason:")[2].partition("To log all")[0]
    why = " ".join(reason.split())
    log.warning("compile=true: too many graphs, so passes that need another are eager (%s)", why)
    return False


def _hparams(cfg: DictConfig, data: ImageDataModule, shape: dict[str, Any]) -> dict[str, Any]:
    hparams: dict[str, Any] = {
        **{p: without_secrets(OmegaConf.to_container(cfg[p], resolve=True)) for p in SAVED_PARTS},
        **{name: cfg[name] for name in SAVED_NUMBERS},
        "image_size": list(data.train.shape[-2:]),
        **{name: list(getattr(data, name)) for name in ("classes", "mean", "std")},
    }
    hparams["model"] |= shape
    # A checkpoint has all weights, so who builds the model again needs no others.
    without: dict[str, Any] = {"pretrained": False}
    if not takes(cfg, "weights"):  # an argument of the user's own
        without |= {"weights": None, "weights_of": None}
    hparams["model"] |= {k: v for k, v in without.items() if k in hparams["model"]}
    return hparams


def _checked_weights(
    cfg: DictConfig, stored: dict[str, Any], shape: dict[str, Any]
) -> dict[str, torch.Size]:
    """The shapes of the weights to resume from, before a model of any size is built."""
    weights = {k.removeprefix("model."): w.shape for k, w in stored["state_dict"].items()}
    try:
        try_without_memory(cfg, weights, **shape)
    except ConfigError as error:
        had, has = stored["hyper_parameters"].get("image_size"), shape.get("image_size")
        why = error if None in (had, has) or had == has else f"is of images of {had}, not {has}"
        raise ConfigError(f"ckpt_path={cfg.ckpt_path}: {why}") from error
    return weights


def _try_model(cfg: DictConfig, model: nn.Module, shape: Sequence[int], num_classes: int) -> None:
    """Try a model on black images, and log which of the data's numbers it does not take."""
    untold = not_taken(cfg, {"num_classes": num_classes, "in_channels": shape[0]})
    said, why = f"model._target_={cfg.model._target_}", untold.replace("model: ", "; ")
    training = {module: module.training for module in model.modules()}
    weight = next(model.parameters(), torch.zeros(0))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model.eval()(torch.zeros(2, *shape, dtype=weight.dtype))
    except Exception as error:  # whatever the model raises
        size, text = " x ".join(map(str, shape)), one_line(error)
        raise ConfigError(f"{said}: does not take images of {size} ({text}){why}") from error
    finally:
        for module, was in training.items():
            module.training = was
    found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if found != (2, num_classes):
        must = f"must be (2, {num_classes}), a logit for each class"
        raise ConfigError(f"{said}: returns {found} for 2 images; {must}{why}")
    if untold:
        log.info("%s", untold)


def memory_format(asked: str, model: nn.Module, shape: Sequence[int], device: str) -> str:
    """The memory layout for images of shape C x H x W; ``auto``: the fastest that is right.

    That is channels_last: ``benchmarks/levers.py`` measures it as faster on CPUs, and PyTorch's
    documentation recommends it for CUDA's tensor cores. A ConfigError refuses it where it was
    asked for and its gradients are wrong on this CPU.
    """
    wrong = device == "cpu" and asked != "contiguous" and reaches_fault(model, shape)
    if wrong and asked == "channels_last":
        raise ConfigError(
            "memory_format=channels_last: on this CPU the gradient of a 1x1 convolution in this "
            "model would be wrong, by a fault of oneDNN (its issue 6035); allowed are auto, "
            "contiguous"
        )
    if asked != "auto":
        return asked
    if wrong:
        log.info("memory_format=auto: contiguous, as channels_last trains this model wrongly here")
    return "contiguous" if wrong or device == "mps" else "channels_last"
