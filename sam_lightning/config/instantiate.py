"""From names in a configuration to objects, and to no code but what the keys are meant for.

A configuration may come out of a checkpoint of unknown origin. So a name has to be in a package
that is trusted before anything is imported, and what it stands for has to be defined in such a
package and to be of the kind that its key describes before it is called.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError, argument_errors
from sam_lightning.config.schema import did_you_mean, no_such_key, one_line
from sam_lightning.config.trust import check_target, described, is_in, trusted

# What each key of ``targets.TARGETS`` describes. A class has to be a subclass of it, a
# function has to be annotated to return it: def photos(root: str) -> ImageSource. These are names,
# since building a model needs neither Lightning nor data.
KINDS = {
    "model": "torch.nn.Module",
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "sam_lightning.optim.schedules.LRFactor",
    "data.source": "sam_lightning.data.source.ImageSource",
    "method.perturbation": "collections.abc.Callable",
    "method.descent": "collections.abc.Callable",
    "callbacks.*": "lightning.pytorch.callbacks.Callback",
    "logger.*": "lightning.pytorch.loggers.Logger",
}


def build(cfg: DictConfig, key: str, /, **kwargs: Any) -> Any:
    """Make the object that ``cfg[key]`` describes by ``_target_`` and arguments.

    Args:
        cfg: a configuration, or a part of one that a checkpoint holds.
        key: one of ``KINDS``, such as ``model`` or ``callbacks.last``.
        kwargs: further arguments, which the configuration cannot set.

    Raises:
        ConfigError: what is named is not there or not allowed, or does not take its arguments.
    """
    make = factory(cfg, key, **kwargs)
    try:
        with argument_errors(key):
            return make()
    except ConfigError:
        raise
    except Exception as error:  # of the class named, so of any type
        text = one_line(error)
        raise ConfigError(text if text.startswith(key) else f"{key}: {text}") from error


def factory(cfg: DictConfig, key: str, /, **kwargs: Any) -> Callable[..., Any]:
    """As ``build``, but a function that makes the object when it is called."""
    node = OmegaConf.select(cfg, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise ConfigError(f"{key}._target_: must be given, as in {key}._target_=...")
    options: Any = OmegaConf.to_container(node, resolve=True)
    made = _locate(key, options.pop("_target_"))
    check_names(key, options, made, kwargs)
    return partial(made, **options, **kwargs)


def check_names(
    key: str, options: Mapping[Any, Any], made: Callable[..., Any], own: Mapping[str, Any]
) -> None:
    """Refuse options that ``made`` does not take, or that are ``own``: those the run sets."""
    parameters = inspect.signature(made).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = [name for name in parameters if name not in own]
    for name, value in options.items():
        if name in own or (name not in known and not takes_any):
            raise ConfigError(f"{key}.{name}={value}: {no_such_key(str(name), known)}")


def _locate(key: str, target: str) -> Callable[..., Any]:
    check_target(key, target)
    module_name, _, name = target.rpartition(".")
    said = f"{key}._target_={target}"
    try:
        module = import_module(module_name)
        made = getattr(module, name)
    except AttributeError as error:
        near = did_you_mean(name, vars(module))
        raise ConfigError(f"{said}: there is no {name} in {module_name}{near}") from error
    except Exception as error:  # an ImportError, or whatever a module of the user's own raises
        raise ConfigError(f"{said}: cannot import {module_name} ({one_line(error)})") from error
    home, _, kind_name = KINDS[described(key)].rpartition(".")
    kind = getattr(import_module(home), kind_name)
    packages = trusted(key)
    if not _makes(made, kind) or not is_in(packages, made.__module__):
        name = kind.__name__ if inspect.isclass(kind) else kind
        raise ConfigError(
            f"{said}: must be a class of kind {name}, or a function annotated to return one, that "
            f"is defined in {', '.join(packages)}"
        )
    return made


def _makes(made: Any, kind: Any) -> bool:
    if not inspect.isclass(made):
        try:
            made = get_type_hints(made).get("return")
        except (NameError, TypeError):  # an annotation that cannot be read, or no function
            return False
    return made == kind or (
        inspect.isclass(made) and inspect.isclass(kind) and issubclass(made, kind)
    )
