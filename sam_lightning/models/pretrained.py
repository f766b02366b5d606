"""Which weights a model can start from, whose they are, and how their images are prepared."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam_lightning.models.lite import Lite
from sam_lightning.models.timm_models import Timm, timm_package
from sam_lightning.models.torchvision_models import OURS, Torchvision
from sam_lightning.models.weights import Weights, put, unwrapped, with_channels

FAMILIES: dict[str, Timm | Torchvision] = {
    "sam_lightning.models.timm_model": Timm(),
    "sam_lightning.models.efficientnet_lite": Lite(),
    "sam_lightning.models.torchvision_model": Torchvision(),
    **{f"sam_lightning.models.{name}": Torchvision() for name in OURS},
}
log = logging.getLogger(__name__)

# The first running means of weights whose names and shapes two architectures share: with the
# other one's padding their logits would be wrong by about 3.
KNOWN = {
    "tf_efficientnet_lite0": (-0.001975, 1.130856, -0.508354, -0.374677),
    "tf_efficientnet_lite1": (0.301406, 0.543667, 0.0, -0.399633),
    "tf_efficientnet_lite2": (1.476351, -0.145988, 0.0, 0.000979),
}


def family(config: Mapping[str, Any]) -> Timm | Torchvision | None:
    """What knows the published weights of a model, if there are any."""
    return FAMILIES.get(str(config["_target_"]))


def architecture(config: Mapping[str, Any]) -> str:
    """The name by which the weights of a model are told from others of the same shapes."""
    known = family(config)
    return str(config["_target_"]) if known is None else known.architecture(config)


def published(config: Mapping[str, Any]) -> tuple[str, Path]:
    """The name and the file of a model's published weights, downloaded if need be.

    Args:
        config: of the model, with its ``_target_``.

    Raises:
        ValueError: nobody has published any, or they can neither be found nor downloaded.
    """
    known = family(config)
    if known is None:
        raise ValueError(
            f"pretrained=true: nobody publishes weights of {config['_target_']}; give "
            "model.weights=FILE"
        )
    return known.published(config), known.fetched(config)


def preprocessing(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How images are prepared for the weights that a model starts from, by their own description.

    No model is built. For a run's weights (``weights=RUN``), ask ``training.weights``.

    Args:
        config: the configuration of a model, with its ``_target_``.

    Returns:
        None for random weights and for those of models that nobody describes. Else

        - ``image_size``: [height, width] that the model takes, in pixels,
        - ``mean``, ``std``: of each channel, of pixels in 0..1,
        - ``interpolation``: ``bilinear`` or ``bicubic``,
        - ``crop_fraction``: side of the crop divided by side of the resized image: images are
          resized to ``floor(side / crop_fraction)`` before they are cropped; above 1 for a border,
        - ``crop_mode``: ``center``: the shorter side is resized, and the centre cropped;
          ``squash``: both sides are resized, so that shapes change, and the centre cropped;
          ``border``: the longer side is resized, and the rest is black.

    Raises:
        ValueError: no such model, or its package is not installed.
    """
    known, weights = family(config), config.get("weights")
    if known is None or not (weights or config.get("pretrained")):
        return None
    return known.preprocessing(config, Path(weights).expanduser() if weights else None)


def load_weights(
    model: nn.Module, weights: Weights, config: Mapping[str, Any], *, of: str | None = None
) -> list[str]:
    """Start a model from weights. A head for other classes is new: see ``weights.put``.

    Args:
        model: built from ``config``; is changed in place.
        weights: as ``read_weights`` returns them.
        config: of the model, with its ``_target_``, ``num_classes`` and ``in_channels``.
        of: the architecture that the weights are of, whatever they say themselves.

    Returns:
        the names of the tensors that are new.

    Raises:
        ValueError: the weights are of another model, by their names and shapes or by what they
            say; the message begins with the reason.
    """
    known, ours = family(config), architecture(config)
    weights = replace(weights, tensors=unwrapped(weights.tensors, model.state_dict()))
    published_ones = bool(config.get("pretrained") and not config.get("weights"))
    twin = known.twin(config) if isinstance(known, Timm) else None
    theirs = of or _known(weights) or _said(weights, known is not None, not published_ones)
    if theirs is None and twin is not None and not published_ones:
        log.warning(
            "%s: does not say whether it is of %s or of %s, whose weights have the same names",
            *(weights.file, ours, twin),
        )
    if theirs is not None and theirs != ours:
        raise ValueError(
            f"weights of {theirs}, not of {ours}; if they do belong to it, set "
            f"model.weights_of={ours}"
        )
    if known is None:
        tensors = with_channels(weights.tensors, model)
    else:
        try:
            tensors = known.converted(weights.tensors, model, config)
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"weights of another model: {reason}") from error
    return put(model, tensors, lenient=published_ones)


def _said(weights: Weights, named: bool, by_file: bool) -> str | None:
    """The architecture that weights name themselves, or by what their file's name begins with.

    Args:
        weights: of a run, or of a file.
        named: names of torchvision and timm count, and not only targets of runs.
        by_file: the file's name counts.
    """
    names: set[str] = set()
    if named:
        from torchvision import models

        names |= {*models.list_models(module=models)}
        with suppress(ValueError):
            names |= {*timm_package("weights").list_models()}
    word, file = weights.architecture or "", weights.file.name
    if (name := word.partition(".")[0]) in names:  # timm's may have a tag behind a dot
        return name
    if "." in word:
        return word
    begin = [n for n in names if file.startswith(n) and file[len(n) :][:1] in ("", *"_.-")]
    return max(begin, key=len) if begin and by_file else None


def _known(weights: Weights) -> str | None:
    """The architecture of weights that are well known."""
    means = [weights.tensors.get(name) for name in ("bn1.running_mean", "_bn0.running_mean")]
    first = next((m for m in means if m is not None), torch.empty(0)).flatten()[:4].float()
    for name, values in KNOWN.items():
        if len(first) == 4 and torch.allclose(first, torch.tensor(values), atol=1e-5, rtol=1e-3):
            return name
    return None
