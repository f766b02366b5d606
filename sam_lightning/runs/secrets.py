"""Records of a run without tokens and passwords."""

import os
import re
from collections.abc import Mapping
from typing import Any

from sam_lightning.config.conf import flat
from sam_lightning.config.errors import ConfigError

HIDDEN = "***"  # in the place of a secret
# A key that names a secret, such as logger.wandb.api_key or aws_secret_access_key.
NAMED = r"(?i:(?:^|(?<=[^a-zA-Z0-9]))(?:api)?(?:key|token|password|passwd|pwd|secret|credentials?))"
KEY = re.compile(rf"{NAMED}$")
# key=value and key: value, also in a URL or in braces.
GIVEN = re.compile(rf"({NAMED}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,&}}\])\"']+)")
LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")  # user:password@ of a URL
SHORTEST = 8  # characters of a secret in the environment; shorter ones may be anywhere


def check_whole(content: Mapping[str, Any]) -> None:
    """Refuse nested settings that were stored without a secret; names the first such key."""
    for key, value in flat(content).items():
        if isinstance(value, str) and HIDDEN in value:
            raise ConfigError(f"{key}={value}: was not stored; give it again")


def without_secrets(content: Any) -> Any:
    """Texts, lists and dictionaries with ``***`` for every secret.

    Secrets are values of keys that are called key, token, password and the like, logins in URLs,
    and the values of environment variables of such names.
    """
    named = {
        k: v for k, v in os.environ.items() if KEY.search(k) and k != "PWD"
    }  # that is a folder
    known = [value for value in named.values() if len(value) >= SHORTEST]

    def cleaned(value: Any, key: str = "") -> Any:
        if KEY.search(key) and type(value) in (str, int, float):
            return HIDDEN
        if isinstance(value, dict):
            return {k: cleaned(child, str(k)) for k, child in value.items()}
        if isinstance(value, list):
            return [cleaned(child) for child in value]
        if isinstance(value, str):
            for secret in known:
                value = value.replace(secret, HIDDEN)
            value = LOGIN.sub(rf"\1{HIDDEN}@", GIVEN.sub(rf"\1{HIDDEN}", value))
        return value

    return cleaned(content)
