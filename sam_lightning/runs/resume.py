"""The overrides that a run folder stores, and which of them another command may take up.

Whoever resumes a run may have been given its folder. Its overrides are arguments of Hydra, which
could name launchers, other configuration folders or a pickle to load; so only settings of a run
are taken, parsed as Hydra parses them.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import CONF, explain
from sam_lightning.runs.old_names import with_current_names


def replayable(file: Path, settings: Iterable[str], given: Collection[str] = ()) -> list[str]:
    """What ``.hydra/overrides.yaml`` of a run says, less the keys that are ``given`` anew.

    Args:
        file: the list of overrides as Hydra stored it.
        settings: the keys that may stand at the top of a configuration.
        given: keys whose stored values are not wanted, so they may be anything.

    Raises:
        ConfigError: the file cannot be read, or an override is none of the run's own settings: one
            of Hydra, a choice that is not in ``conf``, or a value that asks for more than other
            keys, such as ``${oc.env:...}``.
    """
    try:
        stored = with_current_names(OmegaConf.to_container(OmegaConf.load(file)))
        if not isinstance(stored, list) or not all(isinstance(text, str) for text in stored):
            raise TypeError("it is no list of texts")
        overrides = OverridesParser.create().parse_overrides([str(text) for text in stored])
    except Exception as error:  # of the file system, of YAML, of OmegaConf and of Hydra
        raise ConfigError(f"{file}: not a list of overrides ({explain(error, [])})") from error
    allowed = {*settings} - {"output_dir", "ckpt_path"}
    kept = [o for o in overrides if o.key_or_group not in (*given, "ckpt_path")]
    for override in kept:
        if not _is_setting(override, allowed):
            raise ConfigError(
                f"{file}: {override.input_line}: may not come out of a run folder; take it out "
                "there, or give that key yourself"
            )
    return [str(override.input_line) for override in kept]


def _is_setting(override: Override, allowed: set[str]) -> bool:
    key = override.key_or_group
    if override.package is not None or "/" in key or key.partition(".")[0] not in allowed:
        return False
    if override.is_sweep_override():
        return False
    texts = list(_texts(override.value()))
    if (CONF / key).is_dir():
        return all(re.fullmatch(r"\w+", text) for text in texts)  # else it could be a path
    return not any("${" in re.sub(r"\$\{[\w.]+\}", "", text) for text in texts)


def _texts(value: Any) -> Iterator[str]:
    """Every text in a parsed value, the keys of dictionaries included."""
    if isinstance(value, dict):
        for name, child in value.items():
            yield str(name)
            yield from _texts(child)
    elif isinstance(value, list):
        for child in value:
            yield from _texts(child)
    elif value is not None:
        yield str(value)
