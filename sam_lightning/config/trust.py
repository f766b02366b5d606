"""Whose code a configuration may run, and where it may write.

The user's command line and ``conf`` may name any code and any place. A checkpoint and a run's
folder may be somebody else's: a ``_target_`` there must be in the packages below, or be named in
``conf`` below the same key, or on the command line; a place to write to must be in the run.
"""

import os
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sam_lightning.config.conf import CONF, flat, folders_given, package_of
from sam_lightning.config.errors import ConfigError

# The keys that describe an object, and the packages that anybody may name there.
# ``instantiate.KINDS`` says what the object has to be.
TARGETS = {
    "model": ("sam_lightning",),
    "optimizer": ("torch.optim", "sam_lightning"),
    "scheduler": ("sam_lightning",),
    "data.source": ("sam_lightning",),
    "method.perturbation": ("sam_lightning",),
    "method.descent": ("sam_lightning",),
    "loss": ("sam_lightning", "torch.nn"),
    "augment.*": ("sam_lightning", "torchvision.transforms.v2"),
    "callbacks.*": ("sam_lightning", "lightning.pytorch.callbacks"),
    "logger.*": ("sam_lightning", "lightning.pytorch.loggers"),
}
# Groups whose places are read, as ``data.root`` is, but for arguments with one of these words in
# their names, such as ``cache_dir``.
READ = ("data", "model")
WRITING = {"cache", "dump", "log", "logs", "out", "output", "save", "temp", "tmp", "write"}
# How arguments are called that are places; other texts, such as ``filename``, are below one.
PLACE = re.compile(r"(dir|path|root|folder|directory|location|uri|url)s?$", re.IGNORECASE)
NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
_typed: set[str] = set()  # on the command line of this process


def check_name(key: str, name: Any) -> None:
    """Refuse what cannot be the full name of a class or function."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{key}={'null' if name is None else name}: allowed is the full name of a class or "
            "function, as in my_project.Net"
        )


def trust(names: Any) -> None:
    """Let checkpoints name these classes and functions, until this process ends.

    Args:
        names: as in ``my_project.Net``; a list, or one text with commas; None: nothing.

    Raises:
        ConfigError: one of them is not a full name.
    """
    if names is None or isinstance(names, str):
        names = [] if names is None else names.split(",")
    for name in names if isinstance(names, Iterable) else [names]:
        check_name("trust", name)
        _typed.add(name)


def trust_arguments(arguments: list[str]) -> None:
    """Trust the targets that a command line of ``train.py`` types, and its own configuration."""
    for argument in arguments:
        _typed.update(re.findall(r"_target_\s*[=:]\s*['\"]?([\w.]+)", argument))
    for folder in folders_given(arguments):
        _typed.update(target for _, target in _named_in(folder))


def check_targets(node: Any, key: str = "", remedy: str = "add trust={target}") -> None:
    """Refuse a stored configuration, or a part of one, that names strangers' code.

    Args:
        node: the stored configuration.
        key: its place in the whole configuration.
        remedy: what the user can type if the code is theirs.

    Raises:
        ConfigError: names the first such target.
    """
    if OmegaConf.is_dict(node) or isinstance(node, dict):
        for name, child in node.items():
            if name == "_target_":
                _check_target(key, child, remedy)
            else:
                check_targets(child, f"{key}.{name}" if key else str(name), remedy)
    elif OmegaConf.is_list(node) or isinstance(node, list):
        for i, child in enumerate(node):
            check_targets(child, f"{key}.{i}", remedy)


def _check_target(key: str, target: Any, remedy: str) -> None:
    check_name(f"{key}._target_", target)
    kind = described(key)
    ours = is_in(TARGETS.get(kind, ()), target) and not re.search(r"\b_", target)
    if not ours and target not in _typed and (kind, target) not in _named_in(CONF):
        told = remedy.format(key=key, target=target)
        raise ConfigError(f"{key}._target_={target}: is not trusted; if this code is yours, {told}")


def check_places(node: Any, folder: Path | None = None) -> None:
    """Refuse a stored configuration, or a part of one, that names a place to write to.

    A text must not lead out of where it is put: it has no ``..``, no address and no absolute path,
    and repeats no other key that may have one. An argument that is a place has to say that it is
    in the run. What is only read may be anywhere.

    Args:
        node: dictionaries and lists with whole keys: ``{"callbacks": {"last": ...}}``.
        folder: of the run, absolute: places in it are allowed, and those in ``${output_dir}``.

    Raises:
        ConfigError: names the first such key.
    """
    for key, text in _texts(node):
        group, name = key.partition(".")[0], key.rpartition(".")[2]
        if name == "_target_" or (folder is not None and _is_inside(text, folder)):
            continue
        if group in READ:
            leads_out = not WRITING.isdisjoint(name.lower().split("_"))
        else:
            leads_out = PLACE.search(name) is not None or _leads_out(text)
        if leads_out:
            raise ConfigError(f"{key}={text}: may name a place to write to outside of the run")


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in dictionaries and lists, with the key that it belongs to."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from _texts(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for child in node:
            yield from _texts(child, key)
    elif isinstance(node, str):
        yield key, node


def _is_inside(text: str, folder: Path) -> bool:
    place = re.sub(r"^\$\{output_dir\}(?=/|$)", lambda _: str(folder), text)
    inside = Path(place).is_absolute() and Path(os.path.normpath(place)).is_relative_to(folder)
    return inside and "$" not in place[len(str(folder)) :]


def _leads_out(text: str) -> bool:
    if "$" in text:
        whole = re.fullmatch(r"\$\{(\w+)(\.\w+)*\}", text)
        return whole is None or whole[1] in (*READ, "ckpt_path", "hydra")
    if not text.isprintable() or text.startswith(("/", "~")):
        return True
    return ".." in re.split(r"[/\\]", text) or "://" in text or "::" in text


@cache
def _named_in(folder: Path) -> set[tuple[str, str]]:
    """The targets in the YAML files of a folder, each with its entry of ``TARGETS``."""
    found = set()
    for file in folder.rglob("*.yaml"):
        try:
            content: Any = OmegaConf.to_container(OmegaConf.load(file))
            named = flat(content, package_of(file, folder))
        except Exception:  # Hydra names the file once it is chosen
            continue
        for key, value in named.items():
            key, dot, last = key.rpartition(".")
            kinds = [kind for kind in TARGETS if fnmatch(f".{key}", f"*.{kind}")]
            if dot and last == "_target_" and kinds:
                values = value if isinstance(value, list) else [value]
                found |= {(kinds[0], str(v)) for v in values}
    return found


def is_in(packages: Iterable[str], name: str) -> bool:
    """Whether a dotted name is one of the packages or inside one."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def described(key: str) -> str:
    """The entry of ``TARGETS`` that is about ``key``: ``callbacks.*`` for ``callbacks.last``."""
    return key if key in TARGETS else f"{key.rpartition('.')[0]}.*"
