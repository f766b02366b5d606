"""The weights that a run starts from: published ones, those of a file, or those of another run."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from sam_lightning.config.errors import ConfigError, argument_errors, one_line
from sam_lightning.config.instantiate import takes
from sam_lightning.data.views import CROP_MODES, evaluation_view
from sam_lightning.models import preprocessing
from sam_lightning.models.head import head_of
from sam_lightning.models.pretrained import architecture, load_weights, published
from sam_lightning.models.weights import HUB_FILES, Weights, read_weights, sha256
from sam_lightning.runs.checkpoint import newest, read

log = logging.getLogger(__name__)

# Keys of ``data`` that weights have a value for.
PREPARED = ("image_size", "mean", "std", "interpolation", "crop_fraction", "crop_mode")


def prepare_as_weights(cfg: DictConfig) -> None:
    """Set the keys of ``data`` that are null to the values that the model's weights need.

    Data sets without ``image_size`` keep their own size, mean and std, and may be grey. A run that
    continues goes on with what it had. What differs from the weights is logged.

    Args:
        cfg: the run's configuration, whose ``ckpt_path`` is null or a file; is changed in place.

    Raises:
        ConfigError: as of ``weights_preprocessing``; or the images must have another shape than
            ``data`` can make; or a model of torchvision is to get weights without our function.
    """
    config: Any = OmegaConf.to_container(cfg.model, resolve=True)
    if not config.get("pretrained") and config.get("weights") is None:
        return
    if not config["_target_"].startswith("sam_lightning.") and takes(cfg, "weights"):
        if config["_target_"].startswith("torchvision.") and cfg.ckpt_path is None:
            # It would take them for their own classes alone, and download them whenever it is made.
            key = "pretrained" if config.get("weights") is None else "weights"
            raise ConfigError(
                f"model.{key}={config[key]}: give model=torchvision "
                f"model.name={config['_target_'].rpartition('.')[2]} and model.pretrained=true, or "
                "model.weights=FILE"
            )
        return  # an argument of the user's own
    if cfg.ckpt_path is not None:
        hparams = read(cfg.ckpt_path, mmap=True)["hyper_parameters"]
        had = {
            **(hparams.get("data") or {}),
            "mean": hparams.get("mean"),
            "std": hparams.get("std"),
        }
        wanted = {key: had[key] for key in PREPARED if cfg.data.get(key, 0) is None and key in had}
    else:
        wanted = weights_preprocessing(config) or {}
        if wanted:
            sides = wanted["image_size"]
            wanted["image_size"] = sides[0] if sides[0] == sides[1] else sides
            for key, supported, allowed in (
                ("image_size", sides[0] == sides[1], "one number"),
                ("crop_fraction", wanted["crop_fraction"] <= 1, "at most 1"),
                ("crop_mode", wanted["crop_mode"] in CROP_MODES, " or ".join(CROP_MODES)),
            ):
                if not supported and cfg.data.get(key, 0) is None:
                    raise ConfigError(
                        f"data.{key}=null: the weights were trained with {wanted[key]}, which is "
                        f"not supported; give {allowed}"
                    )
    for key in (key for key in PREPARED if key in cfg.data and key in wanted):
        if cfg.data[key] is None and "image_size" in cfg.data:
            cfg.data[key] = wanted[key]
        elif cfg.data[key] != wanted[key]:
            given = "null" if cfg.data[key] is None else cfg.data[key]
            log.info("data.%s=%s: the weights were trained with %s", key, given, wanted[key])


def start_from_weights(
    cfg: DictConfig,
    model: nn.Module,
    shape: Mapping[str, Any],
    classes: Sequence[str],
    trainer: Any,
) -> dict[str, Any] | None:
    """Put the weights into a new model that ``model.pretrained`` or ``model.weights`` name.

    Args:
        cfg: the configuration of a run that does not continue another.
        model: built from it; is changed in place.
        shape: what the model got from the data.
        classes: of the data; a run of others has no head for these, also if there are as many.
        trainer: one process of a machine downloads.

    Returns:
        what the record says of them: ``from``, ``sha256`` of the file, and ``new``, the tensors
        that they do not have; None if the model starts from random weights.

    Raises:
        ConfigError: there are no such weights, or they are of another model.
    """
    config: Any = {**OmegaConf.to_container(cfg.model, resolve=True), **shape}  # type: ignore[dict-item]
    given = None if takes(cfg, "weights") else config.get("weights")
    asked = bool(config.get("pretrained")) and not takes(cfg, "pretrained")
    if given is None and not asked:
        if config.get("weights_of") is not None:
            said = f"model.weights_of={config['weights_of']}"
            raise ConfigError(f"{said}: is about model.weights or model.pretrained=true; give one")
        return None
    with argument_errors("model"):
        if given is not None:
            key, name = f"model.weights={given}", str(given)
            weights = _read(name, model, classes)
        else:
            if trainer.local_rank == 0:
                published(config)
            trainer.strategy.barrier("weights")
            name, file = published(config)
            key, weights = "model.pretrained=true", read_weights(file)
    try:
        new = load_weights(model, weights, config, of=config.get("weights_of"))
    except ValueError as error:
        raise ConfigError(f"{key}: {one_line(error)}") from error
    had = len(model.state_dict()) - len(new)
    log.info(
        "starting from %s (SHA-256 %s): %d tensors; new: %s",
        *(name, weights.sha256[:12], had, ", ".join(new) or "none"),
    )
    return {"from": name, "sha256": weights.sha256, "new": new}


def weights_preprocessing(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """As ``models.preprocessing``, also for ``weights=RUN``, whose images were prepared so.

    Raises:
        ConfigError: no such model or run, or the model's package is not installed.
    """
    file = None if config.get("weights") is None else _located(config["weights"])
    if file is None or file.suffix != ".ckpt":
        with argument_errors("model"):
            return preprocessing({**config, "weights": file and str(file)})
    hparams = read(file, mmap=True)["hyper_parameters"]
    try:
        height, width = (int(side) for side in hparams["image_size"])
        view = evaluation_view((height, width), **hparams["data"])
        return {
            "image_size": [height, width],
            "mean": [float(v) for v in hparams["mean"]],
            "std": [float(v) for v in hparams["std"]],
            "interpolation": view.interpolation,
            "crop_fraction": view.fraction,
            "crop_mode": view.mode,
        }
    except (LookupError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError(f"model.weights={config['weights']}: {said}") from error


def _located(given: Any) -> Path:
    """The file that ``weights`` names: of weights, or the checkpoint (.ckpt) of a run."""
    path = Path(os.path.expanduser(str(given)))
    if not path.is_dir():
        return path
    inside = path / "checkpoints"
    of_hub = (path / name for name in HUB_FILES if (path / name).is_file())
    found = newest(inside if inside.is_dir() else path) or next(of_hub, None)
    if found is None:
        raise ConfigError(
            f"model.weights={given}: there is no checkpoint of a run in it, nor {HUB_FILES[0]}"
        )
    return found


def _read(given: str, model: nn.Module, classes: Sequence[str]) -> Weights:
    file = _located(given)
    if file.suffix != ".ckpt":
        return read_weights(file)
    try:
        checkpoint = read(file)
        tensors = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
        hparams = checkpoint["hyper_parameters"]
        theirs = architecture(hparams["model"])
        if [*hparams["classes"]] != [*classes]:
            others = tuple(f"{head}.".lstrip(".") for head in head_of(model))
            tensors = {k: v for k, v in tensors.items() if not k.startswith(others)}
    except (ConfigError, LookupError, TypeError, ValueError) as error:
        reason = one_line(error).removeprefix(f"ckpt_path={file}: ")
        raise ConfigError(f"model.weights={given}: {reason}") from error
    return Weights(tensors, file, sha256(file), theirs)
