"""The command line around a run: errors in one line, no folder left by a refused run, resume."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.configuration import check, one_line
from sam_lightning.errors import ConfigError, TrainingError
from sam_lightning.explain import CONF, explain, key_of
from sam_lightning.usage import usage

log = logging.getLogger(__name__)


class SweepFolder(Callback):
    """Remembers where a sweep writes, for one that cannot be composed leaves no folder either."""

    path: Path | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before the first job."""
        SweepFolder.path = Path(config.hydra.sweep.dir)


def guarded(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; end with one line on stderr where the user can mend the cause.

    Exit codes: 2 for a wrong setting or file, 1 for a run that failed. ``debug=true`` shows
    tracebacks instead.
    """
    if {"-h", "--help"} & {*sys.argv}:
        print(usage(CONF))
        return
    sys.argv[1:] = without_ghosts(resumed(multirun_first(sys.argv[1:])))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints and exits by itself
    if any(re.fullmatch(r"\+*debug=true", a, re.IGNORECASE) for a in sys.argv):
        main()
        return
    try:
        main()
    except ConfigError as error:
        _fail(one_line(error), 2)
    except TrainingError as error:
        _fail(one_line(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        if SweepFolder.path is not None:
            _discard(SweepFolder.path)
        _fail(explain(error, sys.argv[1:]), 2)
    except ValueError as error:
        if "Config group override must be" not in str(error):
            raise
        _fail(explain(error, sys.argv[1:]), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def run(cfg: DictConfig) -> float | None:
    """Check a configuration, train, and return ``cfg.optimized_metric`` of the results.

    A single run that is refused leaves no folder. In a sweep the job keeps its folder, whose log
    says why, and the others go on.
    """
    hydra = HydraConfig.get()
    try:
        check(cfg, _top_level())
        from sam_lightning.training import train  # torch and Lightning, only now

        metrics = train(cfg)
        if cfg.optimized_metric is None:
            return None
        if cfg.optimized_metric not in metrics:
            raise ConfigError(
                f"optimized_metric={cfg.optimized_metric}: this run logged {', '.join(metrics)}"
            )
        return metrics[cfg.optimized_metric]
    except (ConfigError, TrainingError, OmegaConfBaseException) as error:
        if hydra.mode == RunMode.MULTIRUN:
            log.error("%s", one_line(error))
            raise
        if hydra.output_subdir is not None:  # else the folder is that of an earlier run
            _discard(Path(hydra.runtime.output_dir))
        if cfg.get("debug") is True:
            raise
        _fail(one_line(error), 1 if isinstance(error, TrainingError) else 2)
    except Exception:
        log.exception("the run failed")  # Hydra itself leaves the log of a failed job empty
        raise


def _top_level() -> list[str]:
    primary = OmegaConf.load(CONF / "train.yaml")
    groups = [str(key) for entry in primary.defaults if OmegaConf.is_dict(entry) for key in entry]
    return [*groups, *(str(key) for key in primary if key not in ("defaults", "hydra"))]


def _discard(folder: Path) -> None:
    """Remove a folder that holds nothing but what Hydra wrote at the start."""
    if not {entry.name for entry in folder.iterdir()} <= {".hydra", "train.log", "multirun.yaml"}:
        return
    shutil.rmtree(folder)
    for parent in folder.absolute().parents:
        if Path.cwd() not in parent.parents or any(parent.iterdir()):
            break
        parent.rmdir()


def multirun_first(arguments: list[str]) -> list[str]:
    """Put ``-m`` in front, for behind some overrides argparse would not take any more of them."""
    return sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))


def sqlite(path: str) -> str:
    """The URL of a database that Optuna may make at ``path``, in a folder that is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path}"


def resumed(arguments: list[str]) -> list[str]:
    """Complete ``ckpt_path=RUN/checkpoints/NAME.ckpt`` with what that run was started with.

    The run's stored overrides come first, then those given now, which win; the output goes on in
    the run's own folder, and its stored configuration is not written again.
    """
    keys = [key_of(a) for a in arguments]
    if "ckpt_path" not in keys or "-m" in arguments or "--multirun" in arguments:
        return arguments
    at = keys.index("ckpt_path")
    before, _, given = arguments[at].partition("=")
    path = Path(given.strip("'\""))
    if path.is_file():  # quoted, for the name of a sweep's folder has "=" and "," in it
        arguments = [*arguments[:at], f"{before}={_quoted(path)}", *arguments[at + 1 :]]
    folder = path.resolve().parent.parent
    stored = folder / ".hydra" / "overrides.yaml"
    if not stored.is_file():
        return arguments
    kept = [str(o) for o in OmegaConf.load(stored) if key_of(str(o)) not in (*keys, "ckpt_path")]
    if "hydra.run.dir" not in keys:
        into = [f"hydra.run.dir={_quoted(folder)}", "hydra.output_subdir=null"]
        arguments = [*arguments, *into]
    # One run, also where the checkpoint is of a sweep that its configuration asked for.
    return [*kept, *arguments, "hydra.mode=RUN"]


def without_ghosts(arguments: list[str]) -> list[str]:
    """Under torchrun or SLURM, where every process composes for itself, rank 0 alone has a folder.

    What the others are told to write goes nowhere: loggers and checkpoints are rank 0's.
    """
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if int(rank) == 0:
        return arguments
    nowhere = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=stdout"]
    return [*arguments, *nowhere]


def _quoted(path: Path) -> str:
    escaped = str(path).replace("'", r"\'")
    return f"'{escaped}'"
