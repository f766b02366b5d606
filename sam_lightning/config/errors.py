"""The errors that end a command with one clear line instead of a traceback."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A setting or an input file is wrong.

    The message is one line that names the key, its value and what is allowed; commands print it
    without a traceback and end with exit code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot continue, as when every gradient is non-finite (exit code 1)."""


class Interrupted(SystemExit):
    """A signal has ended the run; the exit code is 128 + its number, as in shells."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


@contextmanager
def argument_errors(key: str) -> Iterator[None]:
    """Turn a ValueError about an argument, ``depth=7: ...``, into a ConfigError about its key.

    Args:
        key: what the argument belongs to: ``model`` makes it ``model.depth=7: ...``.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        if not re.match(r"\w+=", str(error)):
            raise
        raise ConfigError(f"{key}.{error}") from error
