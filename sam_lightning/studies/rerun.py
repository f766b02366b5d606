"""The command ``rerun``: the settings of a run once more, in a new folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sam_lightning.config.conf import CONF, DEFAULTS, top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.hydra_errors import COMPOSING, check_flags
from sam_lightning.config.trust import trust_arguments
from sam_lightning.runs.old_names import with_current_names
from sam_lightning.runs.resume import replayable
from sam_lightning.studies.identical import MISSING, differing
from sam_lightning.studies.runner import TRAIN

ABOUT = """
Train with the settings of a run once more, from the start and in a new folder.

  python -m sam_lightning rerun RUN
  python -m sam_lightning rerun RUN rho=0.1 seed=1
  python -m sam_lightning rerun RUN -m seed=1,2,3

The settings are those that were given on the command line of RUN. What stands in conf counts as it
is now; a line names what has changed there. All other arguments are for train.py, and replace
the settings of RUN.
"""


def main(argv: Sequence[str]) -> None:
    """Become ``train.py`` with the stored overrides, checked as a resume does, and those given."""
    run, *given = argv or [""]
    if given in (["-m"], ["--multirun"]):
        raise ConfigError(f"{given[0]}: needs a setting with several values, as in seed=1,2,3")
    stored = Path(os.path.expanduser(run)) / ".hydra" / "overrides.yaml"
    if not run or not stored.is_file():
        raise ConfigError(f"{run or 'RUN'}: must be the folder of a run, with {stored.name} in it")
    check_flags(given)
    trust_arguments(given)
    kept = replayable(stored, top_level(), given)
    if changed := changed_since(stored):
        print(f"conf has changed since: {changed}", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, str(TRAIN), *kept, *given])


def changed_since(stored: Path) -> str:
    """The settings beside a run's overrides that the same overrides do not make any more."""
    config = stored.with_name("config.yaml")
    try:
        before = with_current_names(OmegaConf.to_container(OmegaConf.load(config)))
        with initialize_config_dir(str(CONF), **DEFAULTS):
            now = OmegaConf.to_container(compose("train", replayable(stored, top_level())))
    except (OSError, ValueError, RecursionError, *COMPOSING):
        return ""  # what is given replaces what cannot be composed, or train.py says what is wrong
    # What there was not then is as it was: a new key's default changes nothing.
    changed = {k: pair for k, pair in differing(before, now).items() if pair[0] != MISSING}
    return "; ".join(f"{k} was {a!r}, is {b!r}" for k, (a, b) in changed.items())
