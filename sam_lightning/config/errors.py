"""The errors that end a command with one clear line instead of a traceback."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from sam_lightning.config.process import outlive_pipes
from sam_lightning.config.text import clean

# Keys of earlier versions.
MOVED = {
    "data.crop_padding": "it is augment.crop.padding now",
    "data.cutout": "it is augment.cutout.side now",
    "data.policy": "it is a choice of the group augment now, as in augment=randaugment",
}


class ConfigError(ValueError):
    """A setting or an input file is wrong.

    The message is one line that names the key, its value and what is allowed; commands print it
    without a traceback and end with exit code 2.
    """


class LocalError(ConfigError):
    """A file or folder is wrong, which other processes of the run may not see."""


class TrainingError(RuntimeError):
    """Training cannot continue, as when every gradient is non-finite (exit code 1)."""


class Interrupted(SystemExit):
    """A signal has ended the run; the exit code is 128 + its number, as in shells."""

    def __init__(self, signum: int, where: str = "") -> None:
        super().__init__(128 + signum)
        self.signum, self.where = signum, where  # such as " on HOST"

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}{self.where}"


class Ended(SystemExit):
    """A command has said in a line why it ends."""

    def __init__(self, code: int, reason: Exception) -> None:
        super().__init__(code)
        self.reason = reason


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


@contextmanager
def named_errors(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, by default ConfigErrors, into a ConfigError ``name: ...``."""
    caught = kinds or (ConfigError,)
    try:
        yield
    except caught as error:
        raise ConfigError(f"{name}: {one_line(error)}") from error


@contextmanager
def one_line_errors(quiet: Callable[[], bool] = bool) -> Iterator[None]:
    """End the process with one line on stderr, as ``train.py`` does.

    Args:
        quiet: whether another process says what setting is wrong.

    Exit codes: 2 for a wrong setting or file, 1 for work that failed, 130 after Ctrl-C. That who
    reads the output has gone, as ``| head`` does, is no error.
    """
    outlive_pipes()
    try:
        for argument in sys.argv:
            os.fsencode(argument)
        yield
    except (ConfigError, TrainingError) as error:
        if isinstance(error, TrainingError) or not quiet():
            print(f"error: {one_line(error)}", file=sys.stderr)
        raise Ended(1 if isinstance(error, TrainingError) else 2, error) from error
    except OSError as error:  # such as a full disk; a name that is too long is a wrong setting
        if error.strerror is None:
            raise
        named = "" if error.filename is None else f"{error.filename}: "
        print(f"error: {clean(named)}{error.strerror}", file=sys.stderr)
        raise Ended(2 if error.errno == errno.ENAMETOOLONG else 1, error) from error
    except UnicodeEncodeError as error:
        print(f"error: {clean(error.object)}: has what no name can have", file=sys.stderr)
        raise Ended(2, error) from error
    except KeyboardInterrupt:
        stopped = Interrupted(signal.SIGINT)
        print(f"error: {stopped}", file=sys.stderr)
        raise stopped from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest known name as the end of a message, or nothing."""
    near = get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def no_such_key(key: str, known: Iterable[str]) -> str:
    """The end of a message: the key that may be meant, or all of them at the same level."""
    if key in MOVED:
        return f"no such key; {MOVED[key]}"
    known = list(known)
    parent, _, name = key.rpartition(".")
    beside = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    elsewhere = [k for k in known if k.endswith(f".{name}")]
    near = get_close_matches(name.lower(), beside, n=1)
    if meant := [beside[n] for n in near] or elsewhere[:1]:
        return f"no such key; did you mean {meant[0]}?"
    if not beside:
        return f"no such key{did_you_mean(key, known)}"
    where = f" in {parent}" if parent else ""
    return f"no such key; allowed{where} are {', '.join(beside)}"


def one_line(error: BaseException) -> str:
    """An error's text on one line that a terminal can show, or its type if the text is empty."""
    return " ".join(clean(error).split()) or type(error).__name__
