"""Hydra's errors about a command line, in one line with a remedy."""

import os
import re
from argparse import Namespace
from contextlib import suppress
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from sam_lightning.config.conf import CONF, choices, flat, folders_given, is_group, top_level
from sam_lightning.config.errors import ConfigError, did_you_mean, no_such_key, one_line
from sam_lightning.config.trust import TARGETS, described

# Errors raised while Hydra composes a configuration from files and arguments.
COMPOSING = (HydraException, OmegaConfBaseException, YAMLError)
# Keys whose values are paths.
PATHS = (
    *("data.root", "data.source.root", "data.split", "data.cache_dir", "data.source.cache_dir"),
    "model.weights",
    *("ckpt_path", "hydra.run.dir", "hydra.sweep.dir"),
)


def key_of(override: str) -> str:
    """The key of ``key=value``, ``+key=value``, ``++key=value`` or ``~key``."""
    return override.partition("=")[0].lstrip("+~")


def check_flags(arguments: list[str]) -> Namespace:
    """Parse the flags; refuse what Hydra's own parser would refuse by listing all its flags."""
    parser = get_args_parser()
    known = parser._option_string_actions
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and flag not in known:
            hint = did_you_mean(flag, known) or "; a setting is given as key=value"
            raise ConfigError(f"{argument}: no such flag{hint}")
        if flag == "--experimental-rerun":  # it would unpickle a file
            raise ConfigError(f"{flag}: type python -m sam_lightning rerun RUN")
        if re.match(r"\++hydra\.", argument):  # Hydra would keep what it never reads
            try:
                OmegaConf.update(OmegaConf.structured(HydraConf), key_of(argument)[6:], "???")
            except (ConfigKeyError, ConfigAttributeError) as error:
                raise ConfigError(f"{argument}: no such key") from error
            except OmegaConfBaseException:  # of what is open
                pass

    def refuse(message: str) -> NoReturn:
        raise ConfigError(message)

    parser.error = refuse  # type: ignore[method-assign]
    flags = parser.parse_intermixed_args(arguments)
    if empty := [name for name, value in vars(flags).items() if value == ""]:
        raise ConfigError(f"--{empty[0].replace('_', '-')}=: must be given, or left out")
    return flags


def unreadable(arguments: list[str]) -> str | None:
    """Why the first unreadable YAML file of the configuration cannot be read."""
    for folder in (CONF, *folders_given(arguments)):
        for file in sorted(folder.rglob("*.yaml")):
            try:
                file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                return f"{file}: cannot be read ({one_line(error)})"
    return None


def explain(error: Exception, arguments: list[str]) -> str:
    """An error before a run, in one line, with the argument at fault and what is allowed."""
    text = str(error)
    # Of values that it did not expect Hydra says little, or raises an error of Python.
    of_group = not isinstance(error, COMPOSING) or re.search("force-add of|Parent traversal", text)
    for argument in arguments:
        key, choice = key_of(argument), argument.partition("=")[2]
        if not key.strip():
            return f"{argument!r}: not of the form key=value"
        if "deletion value must be a string" in text and argument[0] == "~" and choice:
            return f"{argument}: not of the form ~key, or ~group=choice"
        chosen = {*re.findall(r"[^\[\], ]+", choice)} or {choice}
        if of_group and is_group(key) and (argument[0] == "+" or not chosen <= {*choices(key)}):
            without = ", without +" if argument[0] == "+" else ""
            return f"{argument}: {_allowed(key)}{without}"
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"^Error parsing override .*", "", text, flags=re.MULTILINE)
        return f"{error.override}: not of the form key=value ({_shortened(reason)})"
    if found := re.search(r"Could not (?:override|delete from config\.) '([^']+)'", text):
        key = found[1]
        argument = next((a for a in arguments if key_of(a) == key), key)
        if is_group(key):
            return f"{argument}: {_allowed(key)}"
        known = [] if key.endswith("._target_") else top_level()
        if known and isinstance(error.__cause__, OmegaConfBaseException):
            whole: Any = error.__cause__.parent_node._get_root()  # what was composed until then
            composed = flat(OmegaConf.to_container(whole))
            known = sorted(composed, key=lambda k: k.partition(".")[0] == "hydra")
        said = no_such_key(key, known)
        is_open = described(key.rpartition(".")[0]) in TARGETS and "did you mean" not in said
        return f"{argument}: {said}" + (f"; to add it, type +{argument}" if is_open else "")
    if "--multirun" in text:
        argument = next((a for a in arguments if f"'{a}'" in text), text)
        others = "a list is [a,b], a text with a comma 'a,b'"
        return f"{argument}: several values are a sweep, python train.py -m; {others}"
    if "Could not find 'hydra/sweeper/optuna'" in text:
        return "sweep=rho_optuna: needs the Optuna sweeper; run pip install -e '.[sweep]'"
    if found := re.search(r"Could not (?:find|load) '([^']+)/([^'/]*)'", text):
        group, choice = found.groups()
        listed = re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE) or choices(group)
        allowed = [option for option in listed if option != "base"]
        return f"{group}={choice}: allowed are {', '.join(allowed)}{did_you_mean(choice, allowed)}"
    if str(error).startswith(("Unable to configure ", "Unsupported version")):  # Python's logging
        return f"hydra.job_logging: {one_line(error)} ({one_line(error.__cause__ or error)})"
    if error.__cause__ is not None:
        text = f"{text}: {error.__cause__}"
    text = re.split(r"\n *full_key: ", text)[0]
    at_fault = [a for a in arguments if key_of(a) == getattr(error, "full_key", None)][:1]
    if not isinstance(error, (*COMPOSING, ValueError)):
        at_fault, text = arguments, f"{type(error).__name__}: {text}"
    return _shortened(": ".join([*filter(None, [" ".join(at_fault)]), text]))


def _allowed(group: str) -> str:
    """What a group can be; ``debug=true`` had another meaning once, as it has elsewhere."""
    shown = "; tracebacks are shown by traceback=true" if group == "debug" else ""
    return f"allowed are {', '.join(choices(group))}{shown}"


def with_quoted_places(arguments: list[str]) -> list[str]:
    """The arguments, with paths in quotes that Hydra would read as something else.

    A file or folder that is there is meant, whatever its name; so is a value that Hydra could not
    read at all, such as ``~/photos`` or ``photos (1)``. Lists, as in ``a,b``, stay lists.
    """
    return [_quoted_place(argument) for argument in arguments]


def _quoted_place(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if key_of(argument) not in PATHS or not equals or value in ("null", "???", "last"):
        return argument
    if not (value and os.path.exists(os.path.expanduser(value))):
        try:
            OverridesParser.create().parse_override(argument)
            return argument
        except Exception:  # of its grammar
            pass
    plain = re.fullmatch(r"[A-Za-z_/.][\w./-]*", value, re.ASCII)
    return argument if plain else f"{key}={quoted(value)}"


def unquoted(value: str) -> str:
    """A value on a command line without the quotes around it, as Hydra reads it."""
    if value[:1] in ("'", '"'):
        with suppress(Exception):
            read = OverridesParser.create().parse_override(f"key={value}").value()
            if isinstance(read, str):
                return read
    return value.strip("'\"")


def quoted(text: str) -> str:
    """The text in quotes, as Hydra reads it on a command line."""
    # A backslash is literal, except before a quote or at the end, where it escapes.
    escaped = re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + m[2].replace("'", r"\'"), text)
    return f"'{escaped}'"


def _shortened(text: str) -> str:
    """The text on one line, without Hydra's search path and links."""
    text = re.sub(r"See https?://\S+ for details\.?", "", text.partition("Config search path:")[0])
    return " ".join(text.split())
