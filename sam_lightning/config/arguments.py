"""The arguments of ``python -m sam_lightning.NAME key=value``, checked before torch is loaded."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sam_lightning.config.errors import ConfigError, no_such_key, one_line
from sam_lightning.config.trust import trust
from sam_lightning.config.values import ABSENT, check_values

Keys = Mapping[str, tuple[Any, Any]]  # of each key its default and an annotation


def parse(about: str, keys: Keys, argv: Sequence[str] | None = None) -> DictConfig:
    """Read ``key=value`` arguments; ``--help`` prints ``about`` and the defaults, and exits.

    A command with ``ckpt_path`` also takes ``trust``: the user's own code that the checkpoint may
    name.

    Args:
        about: what the command does, with an example.
        keys: every key with its default, ``"???"`` if it must be given, and an annotation.
        argv: ``sys.argv[1:]`` if None.

    Raises:
        ConfigError: an argument is not ``key=value``, or its key or value is not allowed.
    """
    argv = sys.argv[1:] if argv is None else argv
    defaults = {key: default for key, (default, _) in keys.items()}
    if "ckpt_path" in defaults:
        defaults["trust"] = None
    if {"-h", "--help"} & {*argv}:
        print(about.strip(), "", "Keys, here with their defaults (???: must be given):", sep="\n")
        print(*(f"  {k}={'null' if v is None else v}" for k, v in defaults.items()), sep="\n")
        if "trust" in defaults:
            print("\ntrust: your own code that the checkpoint names, as in trust=my_project.Net;")
            print("what is in conf is trusted already")
        sys.exit(0)
    options = OmegaConf.create({})
    for key, default in defaults.items():
        OmegaConf.update(options, key, default)
    for argument in argv:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: not of the form key=value")
        if key not in defaults:
            raise ConfigError(f"{argument}: {no_such_key(key, defaults)}")
        try:
            options.merge_with_dotlist([argument])
            OmegaConf.to_container(options, resolve=True)
        except Exception as error:  # an error of YAML or OmegaConf
            raise ConfigError(f"{argument}: {one_line(error)}") from error
    for key in defaults:
        if OmegaConf.select(options, key, default=ABSENT) is ABSENT:  # so is "???"
            raise ConfigError(f"{key}: must be given, as in {key}=...")
    if "ckpt_path" in defaults:
        trust(options.pop("trust"))
    check_values(options, {key: hint for key, (_, hint) in keys.items()})
    return options
