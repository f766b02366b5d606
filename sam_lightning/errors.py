"""The errors that end a command with one clear line instead of a traceback."""


class ConfigError(ValueError):
    """A setting or an input file is wrong.

    The message is one line that names the key, its value and what is allowed; commands print it
    without a traceback and end with exit code 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on, for instance because every gradient is non-finite (exit code 1)."""
