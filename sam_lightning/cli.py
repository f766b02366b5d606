"""The command line around a run: errors in one line, no folder left by a refused run, resume."""

import gc
import logging
import math
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import (
    is_first,
    is_said_by_another,
    launched,
    node_rank,
    queued_again,
)
from sam_lightning.config.conf import top_level, usage
from sam_lightning.config.errors import (
    ConfigError,
    Ended,
    LocalError,
    TrainingError,
    one_line,
    one_line_errors,
)
from sam_lightning.config.hydra_errors import (
    COMPOSING,
    check_flags,
    explain,
    key_of,
    unreadable,
    with_quoted_places,
)
from sam_lightning.config.process import importing, outlive_pipes
from sam_lightning.runs.secrets import given_again, hide_secrets_of, without_secrets

log = logging.getLogger(__name__)

_begun = False  # whether ``run`` was called in this process


def guarded(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; end with one line on stderr if the user can fix the cause.

    Exit codes: 2 for a wrong setting or file, 1 for a run that failed. ``traceback=true``
    shows tracebacks instead.
    """
    try:
        with nullcontext() if _traceback() else one_line_errors(is_said_by_another):
            _guarded(main)
    except (Ended, Exception) as error:
        with suppress(KeyboardInterrupt):  # who does not want to wait for the others
            _tell(error.reason if isinstance(error, Ended) else error)
        raise


def _traceback() -> bool:
    return any(re.fullmatch(r"\+*traceback=true", a, re.IGNORECASE) for a in sys.argv)


def _guarded(main: Callable[[], Any]) -> None:
    outlive_pipes()
    if {"-h", "--help"} & {*sys.argv}:
        print(usage())
        return
    gc.disable()  # until a run trains or a sweep begins: what composing and imports make stays
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints and exits by itself
    threading.excepthook = threading.__excepthook__ if _traceback() else _say
    try:
        arguments = with_quoted_places(settings_first(sys.argv[1:]))
        flags = check_flags(arguments)
        if "ckpt_path" in map(key_of, arguments):
            from sam_lightning.runs.resume import resumed

            arguments = resumed(arguments)
        sys.argv[1:] = settings_first(without_ghosts(as_launched(as_asked(arguments))))
        if flags.cfg:
            main()
            return
        # Not to print a configuration.
        from sam_lightning.runs.lock import kept
        from sam_lightning.studies.sweep import summarized

        with queued_again(), kept, summarized():
            main()
    except KeyboardInterrupt:  # before there is anything to save
        _discard_started()
        raise
    except Exception as error:
        said = error if _traceback() else _explained(error)
        if said is not error:
            raise said from error
        raise


def _tell(error: Exception) -> None:
    """Tell the other processes, which may not see this error and would wait for this one."""
    given = [a.partition("=")[2] for a in sys.argv if key_of(a) == "trainer.num_nodes"]
    nodes = next((int(text) for text in given if text.isdecimal()), 1)
    try:
        found = launched()
        several = found is not None or node_rank() is not None or nodes > 1
    except ConfigError:  # of the launcher's variables, which may be right on the other hosts
        found, several = None, True
    if found is not None and found.launcher == "SLURM":
        # Its tasks share a command line, and see the same error in it.
        tells = isinstance(error, LocalError) or "torch" in sys.modules
    else:
        tells = several and "MASTER_ADDR" in os.environ
    if tells:
        from sam_lightning.training.connected import tell

        tell(error, max(nodes, 2))


def _say(failure: threading.ExceptHookArgs) -> None:
    """Log what ended a thread; TensorBoard raises it again in the run."""
    if isinstance(failure.exc_value, OSError):
        log.error("%s", one_line(failure.exc_value))
    else:
        threading.__excepthook__(failure)


def _explained(error: Exception) -> Exception:
    """An error that the user can fix as a ConfigError of one line; any other as it is.

    Until a run begins, all that can go wrong is what was given.
    """
    composing = isinstance(error, COMPOSING)
    if isinstance(error, ConfigError | TrainingError) or (_has_begun() and not composing):
        return error
    if isinstance(error, OSError | UnicodeDecodeError) and not composing:
        said = unreadable(sys.argv[1:])  # Hydra's error would not name the file
    else:
        storage = not composing or "hydra.sweeper.storage" in str(error)
        said = (storage and _cannot_store()) or explain(error, sys.argv[1:])
    _discard_started()
    return ConfigError(without_secrets(said)) if said else error


def _has_begun() -> bool:
    """Whether a run has, in this process or in another one of a sweep."""
    from sam_lightning.studies.sweep import SweepFolder

    return _begun or (SweepFolder.path is not None and any(SweepFolder.path.rglob(".hydra")))


def _cannot_store() -> str | None:
    """The message if the database of a search cannot be opened."""
    from sam_lightning.studies.sweep import SweepFolder

    if (url := SweepFolder.storage) is None:
        return None
    from optuna.storages import get_storage

    try:
        get_storage(url)
    except Exception as error:  # errors of SQLAlchemy, Optuna and drivers
        reason = str(error).partition("\n")[0]
        return (
            f"hydra.sweeper.storage={url}: cannot be opened ({reason}); allowed is null, or a URL "
            "such as sqlite:////home/me/optuna.db"
        )
    return None


def run(cfg: DictConfig) -> float | None:
    """Check a configuration, train, and return ``cfg.optimized_metric`` of the results.

    A refused single run leaves no folder. A refused job of a sweep keeps its folder, whose log says
    why, and the other jobs continue.
    """
    outlive_pipes()  # also in a worker of joblib or submitit
    from sam_lightning.config.schema import check
    from sam_lightning.studies.sweep import fail

    global _begun
    _begun = True
    hydra = HydraConfig.get()
    try:
        with suppress(OmegaConfBaseException):  # it cannot be resolved, which is refused next
            hide_secrets_of(OmegaConf.to_container(cfg, resolve=True))  # type: ignore[arg-type]
        for key, secret in given_again(check(cfg, top_level())).items():
            OmegaConf.update(cfg, key, secret)
        from sam_lightning.studies.identical import unused

        why = unused(cfg, [key_of(o) for o in hydra.overrides.task])
        if why and is_first():
            log.warning("%s", why)
        if hydra.mode == RunMode.MULTIRUN and cfg.ckpt_path is None:
            _check_job(Path(hydra.runtime.output_dir))
        with importing(_discard_started):  # torch and Lightning, only now
            from sam_lightning.training.run import train
        gc.enable()

        metrics = train(cfg)
        if cfg.optimized_metric is None:
            return None
        if cfg.optimized_metric not in metrics:
            raise ConfigError(
                f"optimized_metric={cfg.optimized_metric}: this run logged {', '.join(metrics)}"
            )
        value = metrics[cfg.optimized_metric]
        if math.isnan(value):  # no sweeper could compare it
            raise TrainingError(f"optimized_metric={cfg.optimized_metric}: came out as nan")
        return value
    except (ConfigError, TrainingError, OmegaConfBaseException, OSError) as error:
        if hydra.mode == RunMode.MULTIRUN:
            log.error("%s", one_line(error))
            fail(cfg, hydra, error)
            return None
        os.chdir(hydra.runtime.cwd)  # leave that folder: hydra.job.chdir=true
        _discard_started()
        if cfg.get("traceback") is True:
            raise
        if not (isinstance(error, ConfigError) and is_said_by_another()):
            said = without_secrets(one_line(error))
            print(f"error: {said}", file=sys.stderr)  # Hydra would print another line
        raise Ended(1 if isinstance(error, TrainingError | OSError) else 2, error) from error
    except Exception as error:
        log.exception("the run failed")  # Hydra leaves the log of a failed job empty
        if hydra.mode == RunMode.MULTIRUN:
            fail(cfg, hydra, error)
            return None
        if cfg.get("traceback") is True:
            raise
        # Python would print the traceback once more, with secrets.
        said = without_secrets(f"{type(error).__name__}: {one_line(error)}")
        print(f"error: {said}", file=sys.stderr)
        raise Ended(1, error) from error


def _check_job(folder: Path) -> None:
    """Refuse to train over an earlier sweep's run in the folder of a job."""
    from sam_lightning.runs.files import read_summary
    from sam_lightning.runs.lock import owned

    with owned(folder):  # else another process is at work there
        summary = read_summary(folder / "metrics.json") or {}
    if summary.get("status") == "completed" or any(folder.glob("checkpoints/*.ckpt")):
        raise ConfigError(
            f"hydra.sweep.dir={folder.parent}: job {folder.name} has a run already; continue it "
            "with ckpt_path=last, or name another folder"
        )


def _discard_started() -> None:
    """Leave the folder of the run or sweep that this process has started as it was before."""
    from sam_lightning.runs.folder import RunFolder
    from sam_lightning.studies.sweep import SweepFolder

    for folder in filter(None, (RunFolder.started, SweepFolder.started)):
        folder.discard()


def settings_first(arguments: list[str]) -> list[str]:
    """Put settings before Hydra's flags and their values: its parser wants them on one side."""
    actions = get_args_parser()._option_string_actions
    settings: list[str] = []
    flags: list[str] = []
    takes = False
    for argument in arguments:
        (flags if takes or argument.startswith("-") else settings).append(argument)
        takes = argument in actions and actions[argument].nargs is None
    return settings + flags


def as_asked(arguments: list[str]) -> list[str]:
    """``sweep=...`` asks for several runs; Hydra 1.4 does not take that from a file of a group."""
    given = {key_of(a): a.partition("=")[2] for a in arguments}
    if given.get("sweep", "null") == "null" or "hydra.mode" in given:
        return arguments
    return [*arguments, "hydra.mode=MULTIRUN"]


def as_launched(arguments: list[str]) -> list[str]:
    """Under torchrun or SLURM, take the numbers of devices and nodes from them unless given."""
    found = launched()
    if found is None or found.per_node is None:
        return arguments
    counts = {"devices": found.per_node, "num_nodes": found.processes // found.per_node}
    given = [key_of(a) for a in arguments]
    added = [f"trainer.{k}={n}" for k, n in counts.items() if f"trainer.{k}" not in given]
    return [*arguments, *added]


def without_ghosts(arguments: list[str]) -> list[str]:
    """Let only rank 0 have a folder where every process, or every host, starts a run."""
    if is_first():
        return arguments
    nowhere = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    return [*arguments, *nowhere]
