"""A trained checkpoint as a plain module: names, normalisation and data of its run included."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_torch
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from sam_lightning.config.errors import ConfigError, argument_errors, named_errors, one_line
from sam_lightning.config.instantiate import build
from sam_lightning.config.trust import TARGETS, check_places, check_targets, is_in
from sam_lightning.config.trust import trust as trust_names
from sam_lightning.data.augment import BatchAugment
from sam_lightning.data.image_data import SOURCE_KEYS, ImageData, build_data
from sam_lightning.data.pixels import visible
from sam_lightning.data.views import evaluation_view
from sam_lightning.models.onednn import reaches_fault, subsample_first
from sam_lightning.runs.checkpoint import read
from sam_lightning.runs.secrets import given_again, without_secrets

SPLIT = "split.json"  # of a run whose splits were drawn: the names of each one's images
DOWNLOADS = "data"  # where conf has data sets downloaded to; no other place that is stored will do
MOST_PIXELS = 8192  # height or width of the images of a run
# What a model calls as it gets its parts.
REGISTRATIONS = (
    hooks_of_torch.register_module_parameter_registration_hook,
    hooks_of_torch.register_module_buffer_registration_hook,
    hooks_of_torch.register_module_module_registration_hook,
)

Images = Image.Image | Tensor | Sequence[Image.Image | Tensor]


class TrainedClassifier(nn.Module):
    """The classifier of a checkpoint, in eval mode, in float32, on the CPU.

    Args:
        checkpoint: as ``checkpoint.read`` returns it.

    Attributes:
        classes: names, in the order of the logits.
        in_channels: channels of an image: 3 for colour, 1 for grey.
        image_size: (height, width) of the images it was trained on; None if that is not known.
        mean, std: per channel, of pixels in 0..1.
        config: what the run was configured with: model, data, method, seed and so on.
        normalize: uint8 N x in_channels x H x W -> what the model takes, of any size.

    Raises:
        ConfigError: the checkpoint does not say all of this, or its weights are of another model.
    """

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        super().__init__()
        config = self.config = checkpoint["hyper_parameters"]
        try:
            self.classes: list[str] = [str(name) for name in config["classes"]]
            self.mean = tuple(map(float, config["mean"]))
            self.std = tuple(map(float, config["std"]))
            self.in_channels = int(config["model"]["in_channels"])
            height, width = config.get("image_size") or [config["data"].get("image_size")] * 2
            self.image_size = None if height is None else (int(height), int(width))
            outputs = int(config["model"]["num_classes"])
            if not all(1 <= side <= MOST_PIXELS for side in self.image_size or ()):
                raise ValueError(f"image_size={self.image_size}: must be 1 to {MOST_PIXELS}")
        except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
            text = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"hyper_parameters: {text}") from error
        if len(self.classes) != outputs or len(self.mean) != self.in_channels:
            raise ConfigError(
                f"hyper_parameters: {len(self.classes)} classes and {len(self.mean)} means do not "
                f"fit a model of {outputs} classes and {self.in_channels} channels"
            )
        with argument_errors("data"):
            self.normalize = BatchAugment(self.mean, self.std).normalize
        stored = _stored(config, "model")
        for key, secret in given_again({"model": config["model"]}, how="").items():
            OmegaConf.update(stored, key, secret)
        named = checkpoint["state_dict"].items()
        weights = {name.removeprefix("model."): weight for name, weight in named}
        try_without_memory(stored, {name: weight.shape for name, weight in weights.items()})
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn, and replaced
            self.model: nn.Module = build(stored, "model")
        subsample_first(self.model)
        self._load_weights(weights)
        self.eval()

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        try:  # the stored tensors themselves, in the memory layout that they were trained in
            self.model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ConfigError(misfit(self.config)) from error
        self.model.float()  # from trainer.precision=64-true they are float64; images are float32
        channels_last = any(
            not w.is_contiguous() and w.is_contiguous(memory_format=torch.channels_last)
            for w in weights.values()
            if w.ndim == 4
        )
        size = self.image_size or (64, 64)
        if channels_last and not reaches_fault(self.model, (self.in_channels, *size)):
            self.memory_format = torch.channels_last
        else:
            self.memory_format = torch.contiguous_format
            self.model.to(memory_format=torch.contiguous_format)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images N x in_channels x H x W -> logits N x number of classes."""
        return self.model(images.contiguous(memory_format=self.memory_format))

    def preprocess(self, images: Images) -> Tensor:
        """What the model takes, computed as the run's evaluation does.

        Args:
            images: a PIL image, a uint8 tensor C x H x W or N x C x H x W, or a list of images.
                Others than ``in_channels`` become grey or RGB, as ``data.pixels.visible`` says.
                Other sizes than ``image_size`` are resized until they cover it, and the centre is
                cropped.

        Returns:
            float32, N x in_channels x H x W, on the model's device.

        Raises:
            ValueError: no image, not such an image, or images of different size where
                ``image_size`` is None.
        """
        if not (isinstance(images, Tensor) and images.ndim == 4 and self._fits(images)):
            single = isinstance(images, Image.Image) or getattr(images, "ndim", 4) == 3
            listed: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
            each = [self._pixels(image) for image in listed]
            sizes = {tuple(image.shape[-2:]) for image in each}
            if len(sizes) != 1:
                raise ValueError(f"images: must be some, of one size, not {sorted(sizes)}")
            images = torch.stack(each)
        return self.normalize(images.to(next(self.parameters()).device))

    def _fits(self, pixels: Tensor) -> bool:
        """Whether C x H x W or N x C x H x W bytes are as those that were trained on."""
        size = self.image_size or tuple(pixels.shape[-2:])
        return pixels.dtype == torch.uint8 and pixels.shape[-3:] == (self.in_channels, *size)

    def _pixels(self, image: Any) -> Tensor:
        """uint8, in_channels x H x W."""
        if isinstance(image, Tensor):
            if image.dtype != torch.uint8 or image.ndim != 3:
                raise ValueError(
                    f"images: a tensor must be uint8, C x H x W or N x C x H x W, not {image.dtype}"
                    f" of shape {tuple(image.shape)}"
                )
            if self._fits(image):
                return image
            image = to_pil_image(image)
        if not isinstance(image, Image.Image):
            raise ValueError(f"images: must be PIL images or uint8 tensors, not {type(image)}")
        if self.in_channels not in (1, 3):
            raise ValueError(f"images: must be tensors of {self.in_channels} channels")
        image = visible(image)
        image = image.convert("L") if self.in_channels == 1 else image
        if self.image_size is not None:
            image = evaluation_view(self.image_size, **self.config["data"])(image)
        return pil_to_tensor(image)


def try_without_memory(cfg: DictConfig, weights: Mapping[str, torch.Size], **shape: Any) -> None:
    """Refuse a model that does not have these weights before it takes memory or much time.

    It is built on torch's meta device, whose tensors have only a shape, and left unfinished once
    it has several times as many parts as there are weights. A model of the user's own that cannot
    be built there is not tried.

    Args:
        cfg: with the description of the model, whose target is trusted.
        weights: the shapes of parameters and buffers by name.
        shape: what the model gets from the data, where ``cfg`` does not say it.

    Raises:
        ConfigError: it has other weights.
    """
    left = 4 * len(weights) + 500

    def count(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConfigError(misfit(cfg))

    hooks = [register(count) for register in REGISTRATIONS]
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made = build(cfg, "model", **shape).state_dict()
        shapes = {name: weight.shape for name, weight in made.items()}
    except Exception:
        if left < 0 or is_in(TARGETS["model"], str(cfg.model.get("_target_"))):
            raise
        return
    finally:
        for hook in hooks:
            hook.remove()
    if shapes != weights:
        raise ConfigError(misfit(cfg))


def misfit(config: Mapping[Any, Any]) -> str:
    """What to say where weights and model do not belong together."""
    return f"weights are not of {without_secrets({**config['model']})}"


def torch_device(name: str) -> torch.device:
    """The device of that name; ``auto``: a CUDA device if there is one, and else the CPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: there is no CUDA device here; allowed are auto, cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load(
    ckpt_path: str | Path, *, trust: Iterable[str] = (), device: str = "cpu"
) -> TrainedClassifier:
    """The classifier of a checkpoint: ``load`` it, ``preprocess`` images, call it on them.

    Args:
        ckpt_path: a file such as ``RUN/checkpoints/last.ckpt``.
        trust: names of your own code that the checkpoint may use, such as ``my_project.Net``.
            Names in ``conf`` need not be given.
        device: as ``torch_device`` takes it.

    Raises:
        ConfigError: the file is not there, is damaged, or is not a checkpoint of a run.
    """
    trust_names(trust)
    where = torch_device(device)
    checkpoint = read(ckpt_path)
    with named_errors(f"ckpt_path={ckpt_path}"):
        return TrainedClassifier(checkpoint).to(where)


def data_of(
    config: dict[str, Any], root: Any = None, run: Path | None = None, **overrides: Any
) -> ImageData:
    """The data of a run, read, in host memory: its split, its label noise, its normalisation.

    Args:
        config: of the run, as ``TrainedClassifier.config``.
        root: where the files are now; None: where the run found them.
        run: the run's folder, whose ``split.json`` says which image is in which split.
        overrides: other keys of the data configuration.

    Raises:
        ConfigError: the data are not there, an override does not exist or is out of its range,
            or the classes are not the ones of the run.
    """
    stored = _stored(config, "data", "batch_size", "seed", "classes", "mean", "std")
    if run and (run / SPLIT).is_file() and "split" in stored.data.get("source", {}):
        # These are the run's splits after all was drawn from them.
        overrides = {"split": str(run / SPLIT), "val_size": 0, "subset": 1.0, **overrides}
    try:
        return _read_data(stored, {} if root is None else {"root": str(root)}, overrides)
    except ConfigError as error:
        advice = "give data.root=FOLDER, where they are downloaded to"
        raise ConfigError(str(error).replace("set data.download=true", advice)) from error
    except Exception as error:  # of values that no run would have stored
        raise ConfigError(f"data: {type(error).__name__}: {one_line(error)}") from error


def _read_data(stored: DictConfig, root: dict[str, str], overrides: dict[str, Any]) -> ImageData:
    stored.data.update(mean=stored.mean, std=stored.std, device=None, num_workers=0)
    if "cache_dir" in stored.data.source:
        overrides = {"cache_dir": None, **overrides}  # the default: any may be stored
    if (
        not root
        and stored.data.source.get("root") != DOWNLOADS
        and "download" in stored.data.source
    ):
        overrides = {"download": False, **overrides}
    if not root and "://" in (address := str(stored.data.source.get("root"))):
        raise ConfigError(f"data.root={address}: is an address, which has to be typed")
    for key, value in {**root, **overrides}.items():
        if key in SOURCE_KEYS:
            if key not in stored.data.source:
                raise ConfigError(f"data.{key}={value}: {stored.data.source._target_} has none")
            stored.data.source[key] = value
        stored.data[key] = value
    plain: Any = OmegaConf.to_container(stored.data)
    check_places({"data": plain})
    plain = {"data": dict(sorted(plain.items(), key=lambda item: item[0] == "source"))}
    for key, secret in given_again(plain).items():
        OmegaConf.update(stored, key, secret)
    data = build_data(stored, ImageData)
    with argument_errors("data"):
        data.read()
    if data.classes != list(stored.classes):
        at = f"data.root={stored.data.root}" if "root" in stored.data else "data.source"
        raise ConfigError(
            f"{at}: has the classes {', '.join(data.classes)}; those of the checkpoint are "
            f"{', '.join(map(str, stored.classes))}"
        )
    return data


def _stored(config: dict[str, Any], *keys: str) -> DictConfig:
    """Parts of a stored configuration, which anyone may have written, if they are safe to build."""
    try:
        plain = {key: config[key] for key in keys}
        stored = OmegaConf.create(plain)
    except (KeyError, OmegaConfBaseException) as error:
        raise ConfigError(f"hyper_parameters: {type(error).__name__}: {one_line(error)}") from error
    if "${" in repr(plain):  # it would be replaced by what this machine has to say
        raise ConfigError("hyper_parameters: must be values, without ${...}")
    check_targets(stored)
    return stored
