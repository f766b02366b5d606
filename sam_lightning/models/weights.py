"""Weights that somebody has trained: from a file into a model, and what of them does not fit."""

import argparse
import hashlib
import json
import re
import socket
import urllib.request
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_lightning.models.head import head_of

# Where training scripts keep the weights in what they save; averaged ones first, as in timm.
INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model")
WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of data parallelism
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in a folder, as the hub has it
COUNTERS = "num_batches_tracked"  # old files have none
NAMED = 3  # names in an error


@dataclass(frozen=True)
class Weights:
    """Tensors by name, their file, its SHA-256, and the architecture that the file names."""

    tensors: dict[str, Tensor]
    file: Path
    sha256: str
    architecture: str | None


def read_weights(path: Path) -> Weights:
    """Read .safetensors, or what ``torch.save`` wrote; nothing but tensors and plain values.

    Raises:
        ValueError: the file cannot be read, or has no tensors by name.
    """
    said: Mapping[str, Any] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            content: Any = load_file(path)
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's options
                content = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"weights={path}: needs pip install {error.name}") from error
    except Exception as error:  # of zip, pickle, torch and safetensors
        if not path.is_file():
            raise ValueError(f"weights={path}: no such file") from error
        reason = f"{type(error).__name__}; allowed are .safetensors and state dicts of torch.save"
        raise ValueError(f"weights={path}: is not a file of weights alone ({reason})") from error
    inside = content if isinstance(content, Mapping) else {}
    found = next((inside[k] for k in INSIDE if isinstance(inside.get(k), Mapping)), inside)
    tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
    tensors.pop("n_averaged", None)  # of torch's AveragedModel
    if not tensors:
        raise ValueError(f"weights={path}: has no tensors by name")
    named = described(path).get("architecture") or said.get("architecture") or inside.get("arch")
    return Weights(tensors, path, sha256(path), None if named is None else str(named))


def unwrapped(tensors: Mapping[str, Tensor], own: Collection[str]) -> dict[str, Tensor]:
    """The tensors without what wrappers put before every name, if none is the model's ``own``."""
    found = dict(tensors)
    while not {*own} & {*found}:
        prefix = next((w for w in WRAPPERS if all(k.startswith(w) for k in found)), None)
        if prefix is None:
            break
        found = {k.removeprefix(prefix): v for k, v in found.items()}
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def described(path: Path) -> dict[str, Any]:
    """What the ``config.json`` beside a file says, as timm's do on Hugging Face's hub."""
    try:
        content = json.loads(path.with_name("config.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def put(model: nn.Module, tensors: Mapping[str, Tensor], *, lenient: bool = False) -> list[str]:
    """Load weights into a model. A head that does not fit is new, and all its logits are 0.

    So a new head starts at a loss of log(classes). One that feeds a ReLU keeps its random weights:
    behind zeros it would never learn.

    Args:
        model: is changed in place.
        tensors: as the model names them; with its number of channels.
        lenient: leave out tensors that the model does not have.

    Returns:
        the names of the tensors that are new.

    Raises:
        ValueError: names or shapes of others than a head are not the model's.
    """
    own, given = model.state_dict(), dict(tensors)
    new = []
    for head in head_of(model):
        parts = [name for name in own if name.startswith(f"{head}.".lstrip("."))]
        if any(name not in given or given[name].shape != own[name].shape for name in parts):
            new += parts
    given = {k: v for k, v in given.items() if k not in new}
    missing = [k for k in own if k not in given and k not in new and not k.endswith(COUNTERS)]
    unknown = [] if lenient else [k for k in given if k not in own]
    shapes = [
        f"{k} is {tuple(v.shape)}, in the model {tuple(own[k].shape)}"
        for k, v in given.items()
        if k in own and own[k].shape != v.shape
    ]
    faults = {"it has no": missing, "the model has no": unknown, "of another shape:": shapes}
    if any(faults.values()):
        said = (f"{why} {_some(names)}" for why, names in faults.items() if names)
        raise ValueError(f"weights of another model: {'; '.join(said)}")
    state = OrderedDict((k, given.get(k, own[k])) for k in own)
    state._metadata = own._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)
    with torch.no_grad():
        for head in head_of(model):
            if not _feeds_relu(model, head):
                for name in ("weight", "bias"):
                    if (part := f"{head}.{name}".lstrip(".")) in new:
                        model.get_parameter(part).zero_()
    return new


def with_channels(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors with the first convolution's weights for the channels of a model, as in timm.

    One channel: their sum over the channels. Others: repeated and cut, times old over new number.
    """
    convs = (n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1)
    name = f"{next(convs, '')}.weight"
    weight, channels = tensors.get(name), model.state_dict().get(name)
    if weight is None or channels is None or weight.ndim != 4:
        return dict(tensors)
    had, has = weight.shape[1], channels.shape[1]
    if had != has:
        summed = weight.float().sum(1, keepdim=True)
        repeated = weight.float().repeat(1, -(-has // had), 1, 1)[:, :has] * (had / has)
        weight = (summed if has == 1 else repeated).to(weight.dtype)
    return {**tensors, name: weight}


def url_file(url: str) -> Path:
    """Where torch.hub keeps what it downloads from there."""
    return Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])


def download(url: str) -> Path:
    """The file of a URL, in torch.hub's folder.

    Raises:
        ValueError: it cannot be downloaded.
    """
    path = url_file(url)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = re.search(r"-([0-9a-f]{8,})\.", path.name)
        with downloading(url):
            torch.hub.download_url_to_file(url, str(path), digest and digest[1], progress=False)
    return path


@contextmanager
def downloading(url: str, *, offline: bool = False) -> Iterator[None]:
    """Turn errors into a ValueError, at once where a library would try on without a network."""
    try:
        if not offline:
            _ask(url)
        yield
    except Exception as error:  # of torch.hub, of huggingface_hub, and of what they use
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"pretrained=true: the weights are not on this machine, and {url} cannot be downloaded "
            f"({reason}); give model.weights=FILE"
        ) from error


def _ask(url: str) -> None:
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10).close()
    except OSError as error:
        reason = getattr(error, "reason", error)  # a text where somebody has answered
        if isinstance(reason, socket.gaierror | ConnectionError | TimeoutError):
            raise reason from error


def _feeds_relu(model: nn.Module, head: str) -> bool:
    parent, _, name = head.rpartition(".")
    around = model.get_submodule(parent)
    if not isinstance(around, nn.Sequential):
        return False
    layers = dict(around.named_children())
    behind = [*layers].index(name) + 1
    return any(isinstance(layer, nn.ReLU) for layer in [*layers.values()][behind:])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
