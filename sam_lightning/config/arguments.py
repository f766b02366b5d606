"""The arguments of ``python -m sam_lightning.NAME key=value``, checked before torch is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError, named_errors, no_such_key
from sam_lightning.config.trust import trust
from sam_lightning.config.values import ABSENT, check_values, fits

# For each key its default, an annotation and, if that is not enough, what the key means.
Keys = Mapping[str, tuple[Any, Any] | tuple[Any, Any, str]]
TRUST = (None, Any, "your own code that it names, as in trust=my_project.Net; conf is trusted")


def help_of(about: str, keys: Keys) -> str:
    """What a command does, and its keys with their defaults."""
    lines = [about.strip()]
    if keys:
        lines += ["", "Keys, here with their defaults (???: must be given):"]
    for key, (default, _, *meaning) in _with_trust(keys).items():
        shown = f"{key}={'null' if default is None else default}"
        lines.append(f"  {shown:<22} {''.join(meaning)}".rstrip())
    return "\n".join(lines)


def _with_trust(keys: Keys) -> Keys:
    return {**keys, "trust": TRUST} if "ckpt_path" in keys else keys


def parse(keys: Keys, argv: Sequence[str]) -> DictConfig:
    """Read ``key=value`` arguments.

    A command with ``ckpt_path`` also takes ``trust``: the user's own code that the checkpoint may
    name.

    Args:
        keys: every key; its default is ``"???"`` if it must be given.
        argv: the arguments.

    Raises:
        ConfigError: an argument is not ``key=value``, or its key or value is not allowed.
    """
    keys = _with_trust(keys)
    defaults = {key: default for key, (default, *_) in keys.items()}
    options = OmegaConf.create({})
    for key, default in defaults.items():
        OmegaConf.update(options, key, default)
    for argument in argv:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: not of the form key=value")
        if key not in defaults:
            raise ConfigError(f"{argument}: {no_such_key(key, defaults)}")
        with named_errors(argument, Exception):  # of YAML and OmegaConf
            OmegaConf.update(options, key, _read(text, keys[key][1]))
            OmegaConf.to_container(options, resolve=True)
    for key in defaults:
        if OmegaConf.select(options, key, default=ABSENT) is ABSENT:  # so is "???"
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    if "ckpt_path" in defaults:
        trust(options.pop("trust"))
    check_values(options, {key: hint for key, (_, hint, *_) in keys.items()})
    return options


def _read(text: str, hint: Any) -> Any:
    """The value of an argument: YAML, or where any text is allowed, the text itself.

    So a path may have any name. Lists, null and quotes are YAML where there is no such file.
    """
    is_text = fits(text, hint) and text != "null"
    if not text:  # YAML would make null of it
        return text
    if is_text and (text[:1] not in tuple("['\"") or Path(text).exists()):
        return text
    listed = yaml.safe_load(f"[{text}]") if text[:1] in tuple("'\"") else None
    if listed is not None:  # 'a', or 'a','b'
        return listed if len(listed) > 1 else listed[0]
    return OmegaConf.from_dotlist([f"key={text}"]).key
