"""Models of timm (github.com/huggingface/pytorch-image-models), and the weights it publishes."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_lightning.models.weights import HUB_FILES, described, download, downloading, url_file

NAME = re.compile(r"[\w.]+")  # timm would fetch code or files for hf-hub:, local-dir: and paths
HUB = "https://huggingface.co"
# What decides how an image is prepared.
PREPARED = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def timm_model(
    name: str,
    num_classes: int,
    in_channels: int = 3,
    image_size: Sequence[int] | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    batch_norm_momentum: float | None = None,
) -> nn.Module:
    """A model of timm, with random weights.

    Args:
        name: as ``timm.list_models`` has it, with or without a tag of weights behind a dot.
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: their height and width in pixels, for models that are made for one size; None:
            the size that timm names.
        drop_rate: dropout before the last layer, in [0, 1); None: timm's default, as below.
        drop_path_rate: probability to leave out a block's branch, in [0, 1).
        batch_norm_momentum: of all BatchNorms: how much a batch counts in the running statistics.

    Shapes: images N x in_channels x H x W -> logits N x num_classes.

    Raises:
        ValueError: timm is not installed or has no such model, or the model does not take this.
    """
    options = checked_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
    model = _create(name, num_classes, in_channels, image_size, options)
    set_momentum(model, name, batch_norm_momentum)
    return model


def checked_rates(**rates: float | None) -> dict[str, float]:
    """The probabilities that are given, by their names; a ``ValueError`` refuses other numbers."""
    given = {key: rate for key, rate in rates.items() if rate is not None}
    for key, rate in given.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{key}={rate}: must be in [0, 1)")
    return given


def set_momentum(model: nn.Module, name: str, momentum: float | None) -> None:
    """Set the momentum of every BatchNorm; None leaves it as it is."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if momentum is None:
        return
    if not norms or not 0 < momentum <= 1:
        allowed = "above 0, up to 1" if norms else f"null: {name} has no BatchNorm"
        raise ValueError(f"batch_norm_momentum={momentum}: allowed is {allowed}")
    for norm in norms:
        norm.momentum = momentum


def timm_package(why: str, extra: str = "timm") -> Any:
    """The package timm."""
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"{why}: needs pip install -e '.[{extra}]' ({error})") from error
    return timm


def described_by_timm(name: str, extra: str = "timm") -> dict[str, Any]:
    """What timm knows of a model and of its weights: size, mean, head, first convolution."""
    timm = timm_package(f"name={name}", extra)
    architecture, _, tag = name.partition(".")
    if not NAME.fullmatch(name) or not timm.list_models(architecture):
        near = get_close_matches(architecture, timm.list_models(), 1)
        hint = f"; did you mean {near[0]}?" if near else "; python -m sam_lightning list-models"
        raise ValueError(f"name={name}: timm has no such model{hint}")
    try:
        found = timm.models.get_pretrained_cfg(name)
    except (RuntimeError, KeyError):
        found = None
    if found is None and tag:
        tagged = [t.partition(".")[2] for t in timm.list_models(f"{architecture}.*")]
        tagged = tagged or [t.partition(".")[2] for t in timm.list_pretrained(f"{architecture}.*")]
        raise ValueError(f"name={name}: no such weights; allowed are {', '.join(tagged)}")
    return {} if found is None else found.to_dict()


def _create(
    name: str,
    num_classes: int,
    in_channels: int,
    image_size: Sequence[int] | None,
    options: Mapping[str, Any],
    load: Any = None,
) -> nn.Module:
    """What ``timm.create_model`` makes; ``load`` stands in for the function that loads weights."""
    about = described_by_timm(name)
    size = None if image_size is None else tuple(int(side) for side in image_size)
    if not about.get("fixed_input_size") or size == tuple(about["input_size"][-2:]):
        size = None  # a model that takes any has no such argument
    given = dict(options) if size is None else {**options, "img_size": size}
    given |= {"num_classes": num_classes, "in_chans": in_channels}
    timm = timm_package(f"name={name}")
    builder, original = timm.models._builder, timm.models._builder.load_pretrained
    try:
        builder.load_pretrained = load or original
        model = timm.create_model(name, pretrained=load is not None, **given)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        for key, value in options.items():
            if f"'{key}'" in reason:
                raise ValueError(f"{key}={value}: {name} takes none") from error
        if size is not None:
            pixels = " x ".join(map(str, size))
            raise ValueError(
                f"name={name}: cannot be built for images of {pixels} ({reason})"
            ) from error
        raise ValueError(f"name={name}: {reason}") from error
    finally:
        builder.load_pretrained = original
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None) or 1
    steps = patch if isinstance(patch, tuple) else (patch, patch)
    if size is not None and any(side % step for side, step in zip(size, steps, strict=True)):
        pixels, step = " x ".join(map(str, size)), " x ".join(map(str, steps))
        raise ValueError(
            f"name={name}: cannot be built for images of {pixels}, as its patches are {step}"
        )
    return model


class Timm:
    """Where weights of ``timm_model`` come from, and how they become those of a model."""

    extra = "timm"  # of this package's, which installs them

    def timm_name(self, config: Mapping[str, Any]) -> str:
        """The name of timm."""
        return str(config["name"])

    def architecture(self, config: Mapping[str, Any]) -> str:
        """Its name without the tag of weights."""
        return self.timm_name(config).partition(".")[0]

    def twin(self, config: Mapping[str, Any]) -> str | None:
        """The architecture that pads otherwise, with weights of the same names and shapes."""
        ours = self.architecture(config)
        twin = ours.removeprefix("tf_") if ours.startswith("tf_") else f"tf_{ours}"
        return twin if timm_package(f"name={ours}").list_models(twin) else None

    def published(self, config: Mapping[str, Any]) -> str:
        """What the published weights are called; a ``ValueError`` if ``fetched`` can get none."""
        name = self.timm_name(config)
        about = described_by_timm(name, self.extra)
        url = isinstance(about.get("url"), str) and not about.get("custom_load")
        if not about.get("hf_hub_id") and not url:
            raise ValueError(f"pretrained=true: timm has no weights of {name} as a file of PyTorch")
        tag = f".{about['tag']}" if about.get("tag") else ""
        return f"timm {self.architecture(config)}{tag}"

    def cached(self, config: Mapping[str, Any]) -> Path | None:
        """The published weights, if they are on this machine."""
        about = described_by_timm(self.timm_name(config), self.extra)
        if hub := about.get("hf_hub_id"):
            from huggingface_hub import try_to_load_from_cache

            repo, _, revision = hub.partition("@")
            for file in _hub_files(about):
                found = try_to_load_from_cache(repo, file, revision=revision or None)
                if isinstance(found, str):
                    return Path(found)
        url = about.get("url")
        if not isinstance(url, str) or about.get("custom_load"):
            return None
        return path if (path := url_file(url)).is_file() else None

    def fetched(self, config: Mapping[str, Any]) -> Path:
        """The published weights, downloaded if they are not on this machine."""
        if (found := self.cached(config)) is not None:
            return found
        about = described_by_timm(self.timm_name(config))
        if not (hub := about.get("hf_hub_id")):
            return download(str(about.get("url")))
        from huggingface_hub import constants, hf_hub_download

        repo, _, revision = hub.partition("@")
        *others, last = _hub_files(about)
        with downloading(f"{constants.ENDPOINT or HUB}/{repo}", offline=constants.HF_HUB_OFFLINE):
            for file in others:
                with suppress(Exception):  # of its own, and of what it uses
                    return Path(hf_hub_download(repo, file, revision=revision or None))
            return Path(hf_hub_download(repo, last, revision=revision or None))

    def preprocessing(self, config: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
        """See ``pretrained.preprocessing``."""
        about = described_by_timm(self.timm_name(config), self.extra)
        beside = described(file) if file else {}
        if beside.get("architecture") == self.architecture(config):
            said = beside.get("pretrained_cfg") or beside
            about = {**about, **{k: said[k] for k in PREPARED if k in said}}
        from timm.data import resolve_data_config

        found = resolve_data_config({}, pretrained_cfg=about)
        return {
            "image_size": [int(side) for side in found["input_size"][-2:]],
            "mean": [float(v) for v in found["mean"]],
            "std": [float(v) for v in found["std"]],
            "interpolation": found["interpolation"],
            "crop_fraction": float(found["crop_pct"]),
            "crop_mode": found["crop_mode"],
        }

    def converted(
        self, tensors: dict[str, Tensor], model: nn.Module, config: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """The tensors as timm would load them into this model.

        timm's own code renames those of the authors' files, resizes position embeddings, converts
        the first convolution and leaves out a head for other classes. Only the last step, which
        would pass over what is missing, is not timm's.
        """
        noted: dict[str, Any] = {}
        options = checked_rates(**{k: config.get(k) for k in ("drop_rate", "drop_path_rate")})
        shape = (int(config["num_classes"]), int(config.get("in_channels", 3)))
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            _create(
                self.timm_name(config),
                *shape,
                config.get("image_size"),
                options,
                load=lambda _, **given: noted.update(given),
            )
        about, rename = dict(noted["pretrained_cfg"]), noted.get("filter_fn")
        state = dict(tensors)
        if rename is not None:
            try:
                state = rename(state, model)
            except TypeError:  # those of some models take one argument
                state = rename(state)
        kept: dict[str, Tensor] = {}
        about |= {"state_dict": state, "source": "", "num_classes": _classes(state, about)}
        about["input_size"] = (_channels(state, model, about, shape[1]), *about["input_size"][1:])

        def keep(loaded: dict[str, Tensor], **_: Any) -> Any:
            kept.update(loaded)
            return torch.nn.modules.module._IncompatibleKeys([], [])

        from timm.models._builder import _logger, load_pretrained

        _logger.setLevel("WARNING")  # what is loaded is said by whoever loads it
        model.load_state_dict = keep  # type: ignore[method-assign, assignment]
        try:
            load_pretrained(model, about, num_classes=shape[0], in_chans=shape[1])
        finally:
            del model.load_state_dict
        return kept


def _hub_files(about: Mapping[str, Any]) -> Sequence[str]:
    return (about["hf_hub_filename"],) if about.get("hf_hub_filename") else HUB_FILES


def _classes(state: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """How many classes the weights know, without an extra one for the background."""
    named = about.get("classifier") or ()
    for head in [named] if isinstance(named, str) else named:
        if (weight := state.get(f"{head}.weight")) is not None:
            return len(weight) - (about.get("label_offset") or 0)
    return 0


def _channels(
    state: Mapping[str, Tensor], model: nn.Module, about: Mapping[str, Any], channels: int
) -> int:
    """How many channels the images had that the weights were trained on."""
    named = getattr(model, "_traits", {}).get("first_conv", about.get("first_conv")) or ()
    for conv in [named] if isinstance(named, str) else named:
        weight = state.get(f"{conv}.weight")
        try:
            layer = model.get_submodule(conv)
        except AttributeError:
            continue
        if weight is not None and weight.ndim == 4 and isinstance(layer, nn.Conv2d):
            return weight.shape[1] * layer.groups * channels // layer.in_channels
    return int(about["input_size"][0])
