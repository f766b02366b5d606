"""Records of a run without tokens and passwords."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sam_lightning.config.errors import ConfigError

HIDDEN = "***"  # in the place of a secret
# A key that names a secret, such as logger.wandb.api_key or aws_secret_access_key.
NAMED = (
    r"(?i:(?:^|(?<=[^a-zA-Z0-9]))(?:api|auth|access|client|private|secret)?"
    r"(?:key|tokens?|passwords?|passphrase|passwd|pwd|secrets?|credentials?))"
)
KEY = re.compile(rf"{NAMED}$")
# key=value and key: value, also in a URL or in braces.
QUOTED = r"""\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*'"""
GIVEN = re.compile(
    rf"({NAMED}[\"']?\s*[=:]\s*)(?!value\b)({QUOTED}|\[[^\]]*\]|(?:[^\s,&}}\])\"':]|:(?!\s))+)"
)
LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s]+@")  # user:password@ of a URL
SHORTEST = 8  # characters of a secret in the environment; shorter ones may be anywhere


_known: set[str] = set()  # secrets of this process's run


def given_again(content: Mapping[str, Any], how: str = "give it again, or") -> dict[str, str]:
    """The values that nested settings were stored without, by key, from the environment.

    Args:
        content: the settings.
        how: else they can be given, for the message.

    Raises:
        ConfigError: names the first that is not there.
    """
    found = {}
    for key, value in _texts(content):
        if HIDDEN in value:
            name = f"SAM_LIGHTNING_{re.sub(r'[^a-zA-Z0-9]', '_', key).upper()}"
            if name not in os.environ:
                advice = f"{how} set {name} in the environment"
                raise ConfigError(f"{key}={value}: was not stored; {advice}")
            found[key] = os.environ[name]
    return found


def hide_secrets_of(content: Mapping[str, Any]) -> None:
    """Keep the secrets in nested settings out of the log, and of all that is recorded from now."""
    for key, value in _texts(content):
        if len(value) >= SHORTEST and KEY.search(re.sub(r"(\.\d+)+$", "", key)):
            _known.add(value)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_hide)


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in nested settings, with its key; elements of lists are counted: tokens.0."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping | list):
        for name, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from _texts(child, f"{key}.{name}" if key else str(name))


def _hide(record: logging.LogRecord) -> bool:
    try:
        record.msg, record.args = without_secrets(record.getMessage()), None
    except Exception:  # of a wrong call, which the handler says
        return True
    if record.exc_info:
        text = logging.Formatter().formatException(record.exc_info)
        record.exc_text = without_secrets(text)
    return True


def without_secrets(content: Any) -> Any:
    """Texts, lists and dictionaries with ``***`` for every secret.

    Secrets are values of keys that are called key, token, password and the like, logins in URLs,
    the values of environment variables of such names, and what ``hide_secrets_of`` was given.
    """
    named = [v for k, v in os.environ.items() if KEY.search(k) and not v.startswith("/")]  # PWD
    known = {*_known, *(value for value in named if len(value) >= SHORTEST)}
    words = "|".join(map(re.escape, sorted(known, key=len, reverse=True)))
    anywhere = re.compile(rf"(?<!\w)(?:{words})(?!\w)") if words else None

    def cleaned(value: Any, key: str = "") -> Any:
        if KEY.search(key) and isinstance(value, str):
            return HIDDEN
        if isinstance(value, dict):
            return {k: cleaned(child, str(k)) for k, child in value.items()}
        if isinstance(value, list):
            return [cleaned(child, key) for child in value]
        if isinstance(value, str):
            if anywhere is not None:
                value = anywhere.sub(HIDDEN, value)
            value = LOGIN.sub(rf"\1{HIDDEN}@", GIVEN.sub(rf"\1{HIDDEN}", value))
        return value

    return cleaned(content)
