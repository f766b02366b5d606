"""From names in a configuration to objects.

``trust.check_targets`` lets only the user's own code and our packages get here. A name in our
packages may come from a stranger's checkpoint, so its object must be defined there and be of the
kind that its key describes.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError, did_you_mean, no_such_key, one_line
from sam_lightning.config.trust import TARGETS, described, is_in
from sam_lightning.config.values import check_value, is_class

# What each key of ``trust.TARGETS`` describes, by name: to import it would load Lightning. A
# class counts if its package and its own name are these.
KINDS = {
    "model": "torch.nn.Module",
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "Callable[[int], float]",
    "data.source": "sam_lightning.data.ImageSource",
    "method.perturbation": "Callable",
    "method.descent": "Callable",
    "loss": "Callable",
    "augment.*": "Callable",
    "callbacks.*": "lightning.pytorch.Callback",
    "logger.*": "lightning.pytorch.loggers.Logger",
}
# What a model gets from the data, if it takes it.
SHAPE = ("num_classes", "in_channels", "image_size")
# What a model starts from: training puts that into the model when it is built.
WEIGHTS = ("pretrained", "weights", "weights_of")


def build(cfg: DictConfig, key: str, /, **kwargs: Any) -> Any:
    """Make the object that ``cfg[key]`` describes by ``_target_`` and arguments.

    Args:
        cfg: a configuration, or a part of one that a checkpoint holds.
        key: one of ``KINDS``, such as ``model`` or ``callbacks.last``.
        kwargs: further arguments, which the configuration cannot set.

    Raises:
        ConfigError: the target is missing or not allowed, or does not take its arguments.
    """
    make = factory(cfg, key, **kwargs)
    with errors_of(cfg, key):
        return make()


@contextmanager
def errors_of(cfg: DictConfig, key: str) -> Iterator[None]:
    """Turn any error of the object that ``cfg[key]`` describes into a ConfigError about its key."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # of the class named, so of any type
        text = one_line(error)
        passed_on = re.search(r"unexpected keyword argument '(\w+)'", text)
        if passed_on and passed_on[1] in (node := OmegaConf.select(cfg, key)):
            text = f"{key}.{passed_on[1]}={node[passed_on[1]]}: {text}"
        elif re.match(r"\w+=", text):  # of an argument
            text = f"{key}.{text}"
        elif not text.startswith(key):
            text = f"{key}: {text}"
        raise ConfigError(text) from error


def build_all(cfg: DictConfig, group: str) -> dict[str, Any]:
    """The objects of a group by name: ~callbacks leaves all out, callbacks.best=null one."""
    chosen = {str(n): node for n, node in (cfg.get(group) or {}).items() if node is not None}
    for name, node in chosen.items():
        if not OmegaConf.is_dict(node):
            raise ConfigError(f"{group}.{name}={node}: allowed is null, or keys below it")
    return {name: build(cfg, f"{group}.{name}") for name in chosen}


def factory(cfg: DictConfig, key: str, /, **kwargs: Any) -> Callable[..., Any]:
    """Like ``build``, but return a function that makes the object."""
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise ConfigError(f"{key}._target_: must be given, as in {key}._target_=...")
    options: Any = OmegaConf.to_container(node, resolve=True)
    target = options.pop("_target_")
    made, is_checked = _locate(key, target)
    stored = {}
    if key == "model":
        for name in WEIGHTS:
            if not _takes(made, name):
                options.pop(name, None)
        stored = {} if kwargs else {k: options.pop(k) for k in SHAPE if k in options}
    check_names(key, options, made, kwargs)
    given = stored or kwargs
    if key in ("model", "loss"):
        given = {name: value for name, value in given.items() if _takes(made, name)}
    if is_checked:
        return partial(made, **options, **given)
    return partial(_call, key, f"{key}._target_={target}", made, **options, **given)


def not_taken(cfg: DictConfig, shape: Mapping[str, int]) -> str:
    """A sentence on what the model does not take of the data's shape, or nothing."""
    made, _ = _locate("model", cfg.model._target_)
    names = [f"{name}={value}" for name, value in shape.items() if not _takes(made, name)]
    return f"model: {cfg.model._target_} has no parameter for {', '.join(names)}" if names else ""


def takes(cfg: DictConfig, name: str) -> bool:
    """Whether the model has this parameter."""
    return _takes(_locate("model", cfg.model.get("_target_"))[0], name)


def check_names(
    key: str, options: Mapping[Any, Any], made: Callable[..., Any], own: Mapping[str, Any]
) -> None:
    """Refuse options that ``made`` does not take, or that are ``own``: those the run sets.

    The values of our packages' classes are compared with their annotations too.
    """
    parameters = _parameters(made)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [name for name in parameters if name not in own]
    hints = _annotations(made)
    for name, value in options.items():
        if name in own or (name not in known and not takes_any):
            raise ConfigError(f"{key}.{name}={value}: {no_such_key(str(name), known)}")
        if name in hints and value != parameters[name].default:
            check_value(f"{key}.{name}", value, hints[name])


def _annotations(made: Callable[..., Any]) -> Mapping[str, Any]:
    if not is_in(("sam_lightning", "torch", "lightning"), str(getattr(made, "__module__", ""))):
        return {}  # others may be careless about them
    try:
        target = made.__init__ if inspect.isclass(made) else made
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        return {}


def _parameters(made: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(made).parameters
    except (TypeError, ValueError):  # some functions written in C have none
        return {}


def _takes(made: Callable[..., Any], name: str) -> bool:
    """Whether it has this parameter. ``**kwargs`` counts for num_classes, as torchvision's do."""
    parameters = _parameters(made)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (name == "num_classes" and takes_any)


def _locate(key: str, target: Any) -> tuple[Callable[..., Any], bool]:
    """The object that a target names, and whether it surely makes the right kind of object."""
    module_name, _, name = str(target).rpartition(".")
    said = f"{key}._target_={target}"
    try:
        module = import_module(module_name)
        made = getattr(module, name)
    except AttributeError as error:
        near = did_you_mean(name, vars(module))
        raise ConfigError(f"{said}: there is no {name} in {module_name}{near}") from error
    except Exception as error:  # an ImportError, or any error of the user's own module
        raise ConfigError(f"{said}: cannot import {module_name} ({one_line(error)})") from error
    kind, packages = KINDS[described(key)], TARGETS[described(key)]
    if is_in(packages, target):
        if not _is_annotated(made, kind) or not is_in(packages, made.__module__):
            raise ConfigError(
                f"{said}: must be a class of kind {kind}, or a function annotated to return one, "
                f"that is defined in {', '.join(packages)}"
            )
        return made, True
    is_class = inspect.isclass(made)
    if not (_is_kind(made, kind) if is_class else callable(made)):
        raise ConfigError(f"{said}: must be a class of kind {kind}, or a function that returns one")
    return made, is_class


def _is_annotated(made: Any, kind: str) -> bool:
    if not inspect.isclass(made):
        try:
            made = get_type_hints(made).get("return")
        except (NameError, TypeError):  # an annotation that cannot be read, or no function
            return False
    if is_class(made):
        return not kind.startswith("Callable[") and _is_kind(made, kind)
    return str(made).endswith(f".{kind}")


def _is_kind(made: type, kind: str) -> bool:
    if kind.startswith("Callable"):
        return issubclass(made, Callable)  # type: ignore[arg-type]
    package, *_, name = kind.split(".")
    return any(c.__module__.split(".")[0] == package and c.__name__ == name for c in made.__mro__)


def _call(key: str, said: str, made: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """The result of the user's own function, if it is of the kind that its key describes."""
    result = made(*args, **kwargs)
    kind = KINDS[described(key)]
    if not _is_kind(type(result), kind):
        raise ConfigError(f"{said}: returned a {type(result).__name__}; must be of kind {kind}")
    return result
