"""Records of a run without tokens and passwords."""

import os
import re
from typing import Any

HIDDEN = "***"  # in the place of a secret
# A key that names a secret, such as logger.wandb.api_key or aws_secret_access_key.
NAMED = r"(?i:(?:^|(?<=[^a-zA-Z0-9]))(?:api)?(?:key|token|password|passwd|pwd|secret|credentials?))"
KEY = re.compile(rf"{NAMED}$")
# key=value and key: value, also in a URL or in braces.
GIVEN = re.compile(rf"({NAMED}[\"']?\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,&}}\])\"']+)")
LOGIN = re.compile(r"(\w[\w+.-]*://)[^/\s@]+@")  # user:password@ of a URL
SHORTEST = 8  # characters of a secret in the environment; shorter ones may be anywhere


def without_secrets(content: Any) -> Any:
    """Texts, lists and dictionaries with ``***`` for every secret.

    Secrets are values of keys that are called key, token, password and the like, logins in URLs,
    and the values of environment variables of such names.
    """
    if isinstance(content, dict):
        return {
            key: HIDDEN
            if KEY.search(str(key)) and type(value) in (str, int, float)
            else without_secrets(value)
            for key, value in content.items()
        }
    if isinstance(content, list):
        return [*map(without_secrets, content)]
    if not isinstance(content, str):
        return content
    for name, value in os.environ.items():
        if KEY.search(name) and name != "PWD" and len(value) >= SHORTEST:  # the working folder
            content = content.replace(value, HIDDEN)
    return LOGIN.sub(rf"\1{HIDDEN}@", GIVEN.sub(rf"\1{HIDDEN}", content))
