"""What Hydra says of a command line that it cannot compose, in one line with a remedy."""

import re
from pathlib import Path
from typing import Any

from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from sam_lightning.configuration import did_you_mean, flat, no_such_key

CONF = Path(__file__).parent.parent / "conf"


def key_of(override: str) -> str:
    """The key of ``key=value``, ``+key=value``, ``++key=value`` or ``~key``."""
    return override.partition("=")[0].lstrip("+~")


def explain(error: Exception, arguments: list[str]) -> str:
    """Hydra's composition errors in one line, with the argument at fault and what is allowed."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"^Error parsing override .*", "", text, flags=re.MULTILINE)
        return f"{error.override}: not of the form key=value ({_without_link(reason)})"
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        argument = next((a for a in arguments if key_of(a) == key), key)
        known = [k for k in _known_keys(arguments) if k != key]
        return f"{argument}: {no_such_key(key, known)}"
    null = [a for a in arguments if a.endswith("=null") and _is_group(key_of(a))]
    if "Config group override must be" in text and null:
        argument = null[0]
        allowed = sorted({f.stem for f in (CONF / key_of(argument)).glob("*.yaml")} - {"base"})
        return f"{argument}: allowed are {', '.join(allowed)}"
    if "Could not find 'hydra/sweeper/optuna'" in text:
        return "sweep=rho_optuna: needs the Optuna sweeper; run pip install -e '.[sweep]'"
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = found.groups()
        options = re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE)
        allowed = [option for option in options if option != "base"]
        hint = did_you_mean(choice, allowed)
        return f"{group}={choice}: allowed are {', '.join(allowed)}{hint}"
    return _without_link(text)


def _without_link(text: str) -> str:
    return re.sub(r" ?See https?://\S+ for details\.?", "", " ".join(text.split()))


def _is_group(key: str) -> bool:
    return bool(key) and (CONF / key).is_dir()


def _known_keys(arguments: list[str]) -> list[str]:
    """The keys of the configuration with the groups as chosen, in dotted form.

    They are read from the files, for to compose again would double the time of a typing error.
    """
    primary = OmegaConf.load(CONF / "train.yaml")
    defaults: Any = OmegaConf.to_container(primary)
    choices = _choices(defaults["defaults"])
    given = {key_of(a): a.partition("=")[2] for a in arguments if _is_group(key_of(a))}
    experiment = given.get("experiment", choices["experiment"])
    choices |= _choices(_load("experiment", experiment).get("defaults", [])) | given
    parts = [
        primary,
        *(part for group, choice in choices.items() for part in _parts(group, choice)),
    ]
    known: Any = OmegaConf.to_container(OmegaConf.merge(*parts))
    return [key for key in flat(known) if key.partition(".")[0] not in ("defaults", "hydra")]


def _choices(defaults: list[Any]) -> dict[str, str]:
    """The groups in a defaults list, ``override /group: choice`` among them."""
    groups = [entry for entry in defaults if isinstance(entry, dict)]
    return {
        key.partition("/")[2] or key: choice for entry in groups for key, choice in entry.items()
    }


def _parts(group: str, choice: str) -> list[Any]:
    """What a choice adds to the configuration: its file, after those that it builds upon."""
    node = _load(group, choice)
    parents = [name for name in node.pop("defaults", []) if isinstance(name, str)]
    parts = [part for name in parents for part in _parts(group, name)]
    return [*parts, node if node.pop("is_global", False) else {group: node}]


def _load(group: str, choice: str) -> dict[str, Any]:
    file = CONF / group / f"{choice}.yaml"
    if not file.is_file():
        return {}
    node: Any = OmegaConf.to_container(OmegaConf.load(file))
    return node | {"is_global": file.read_text().startswith("# @package _global_")}
