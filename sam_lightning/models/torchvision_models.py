"""Classification models of torchvision, and the weights it publishes, for our ResNets too."""

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_lightning.models.timm_models import NAME, checked_rates, set_momentum
from sam_lightning.models.weights import download, url_file, with_channels

# Layers of losses that only their authors' training used, and names of the oldest files.
AUXILIARY = re.compile(r"^(aux1|aux2|AuxLogits)\.")
DENSE_LAYER = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
OURS = {"SAMResNet18": "resnet18", "SAMResNet34": "resnet34", "SAMResNet50": "resnet50"}


def torchvision_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: Sequence[int] | None = None,
    dropout: float | None = None,
    stochastic_depth_prob: float | None = None,
    batch_norm_momentum: float | None = None,
) -> nn.Module:
    """A classification model of torchvision, with random weights and one output.

    Args:
        name: as in ``torchvision.models``, with or without the name of weights behind a dot:
            ``resnet50``, ``resnet50.IMAGENET1K_V1``.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: their height and width in pixels, for models that are made for one size; None:
            torchvision's default.
        dropout: before the last layer, in [0, 1); None: torchvision's default, as below.
        stochastic_depth_prob: probability to leave out a block's branch, in [0, 1).
        batch_norm_momentum: of all BatchNorms: how much a batch counts in the running statistics.

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: torchvision has no such model, or the model does not take this.
    """
    from torchvision.models import get_model

    architecture = known(name)
    asked = checked_rates(dropout=dropout, stochastic_depth_prob=stochastic_depth_prob)
    options: dict[str, Any] = {**asked, **_size(architecture, image_size)}
    if architecture in ("googlenet", "inception_v3"):
        # Their weights come from TensorFlow's, which knew other means.
        options |= {"aux_logits": False, "init_weights": True, "transform_input": in_channels == 3}
    try:
        model = get_model(architecture, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        for key, value in asked.items():
            if f"'{key}'" in str(error):
                raise ValueError(f"{key}={value}: {architecture} takes none") from error
        raise
    except (AssertionError, ValueError) as error:
        raise ValueError(f"name={name}: {error}") from error
    if in_channels != 3:
        _take_channels(model, in_channels)
    set_momentum(model, architecture, batch_norm_momentum)
    return model


def known(name: str) -> str:
    """The architecture in a name such as ``resnet50.IMAGENET1K_V1``."""
    from torchvision import models

    architecture = name.partition(".")[0]
    names = models.list_models(module=models)
    if not NAME.fullmatch(name) or architecture not in names:
        near = get_close_matches(architecture, names, 1)
        hint = f"; did you mean {near[0]}?" if near else "; python -m sam_lightning list-models"
        raise ValueError(f"name={name}: torchvision has no such classification model{hint}")
    return architecture


def _size(architecture: str, image_size: Sequence[int] | None) -> dict[str, Any]:
    """The argument of a model that is made for one size of images."""
    if image_size is None or not architecture.startswith(("vit_", "maxvit_")):
        return {}
    height, width = map(int, image_size)
    if architecture.startswith("maxvit_"):
        return {"input_size": (height, width)}
    if height != width:
        raise ValueError(f"name={architecture}: takes squares only, not {height} x {width} pixels")
    return {"image_size": height}


def _take_channels(model: nn.Module, channels: int) -> None:
    """Put a first convolution for other channels in the place of the one for three."""
    name, old = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    new = nn.Conv2d(
        channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.copy_(torch.randn_like(new.weight) * old.weight.std())
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)


class Torchvision:
    """Where weights of ``torchvision_model`` come from, and how they become those of a model."""

    def architecture(self, config: Mapping[str, Any]) -> str:
        """The architecture of a configured model, such as ``resnet50``."""
        ours = OURS.get(str(config["_target_"]).rpartition(".")[2])
        return ours or known(str(config["name"]))

    def _entry(self, config: Mapping[str, Any], file: Path | None = None) -> Any:
        """torchvision's entry for the weights that are named, else those in a file of its name."""
        from torchvision.models import get_model_weights

        architecture = self.architecture(config)
        entries = get_model_weights(architecture)
        named = str(config.get("name", "")).partition(".")[2]
        if named and named not in entries.__members__:
            allowed = ", ".join(entries.__members__)
            raise ValueError(f"name={config['name']}: no such weights; allowed are {allowed}")
        of_file = (e for e in entries if file is not None and e.url.endswith(f"/{file.name}"))
        return entries[named] if named else next(of_file, entries.DEFAULT)

    def published(self, config: Mapping[str, Any]) -> str:
        """What the published weights are called."""
        return f"torchvision {self.architecture(config)}.{self._entry(config).name}"

    def cached(self, config: Mapping[str, Any]) -> Path | None:
        """The published weights, if they are on this machine."""
        return path if (path := url_file(self._entry(config).url)).is_file() else None

    def fetched(self, config: Mapping[str, Any]) -> Path:
        """The published weights, downloaded if they are not on this machine."""
        return download(self._entry(config).url)

    def preprocessing(self, config: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
        """See ``pretrained.preprocessing``."""
        transforms = self._entry(config, file).transforms()
        (crop,), (resize,) = transforms.crop_size, transforms.resize_size
        fraction = crop / resize
        while math.floor(crop / fraction) < resize:  # as floats are
            fraction = math.nextafter(fraction, 0)
        return {
            "image_size": [crop, crop],
            "mean": [*transforms.mean],
            "std": [*transforms.std],
            "interpolation": transforms.interpolation.value,
            "crop_fraction": fraction,
            "crop_mode": "center",
        }

    def converted(
        self, tensors: dict[str, Tensor], model: nn.Module, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The tensors under today's names, for this model's channels and image size."""
        state = {DENSE_LAYER.sub(r"\1\2", k): v for k, v in tensors.items()}
        state = {k: v for k, v in state.items() if not AUXILIARY.match(k)}
        if (size := getattr(model, "image_size", None)) and "encoder.pos_embedding" in state:
            from torchvision.models.vision_transformer import interpolate_embeddings

            patch: Any = model.patch_size
            state = dict(interpolate_embeddings(size, patch, state))
        return with_channels(state, model)
