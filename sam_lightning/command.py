"""The command line around a run: errors in one line, no folder left by a refused run, resume."""

import logging
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.configuration import check, did_you_mean, flat_keys, one_line
from sam_lightning.errors import ConfigError, TrainingError

CONF = Path(__file__).parent.parent / "conf"
log = logging.getLogger(__name__)


def guarded(main: Callable[[], Any]) -> None:
    """Call a Hydra main function; end with one line on stderr where the user can mend the cause.

    Exit codes: 2 for a wrong setting or file, 1 for a run that failed. ``debug=true`` shows
    tracebacks instead.
    """
    sys.argv[1:] = resumed(sys.argv[1:])
    if "debug=true" in sys.argv:
        main()
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints and exits by itself
    try:
        main()
    except ConfigError as error:
        _fail(one_line(error), 2)
    except TrainingError as error:
        _fail(one_line(error), 1)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error), 2)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def run(cfg: DictConfig) -> float | None:
    """Check a configuration, train, and return ``cfg.optimized_metric`` of the results.

    A single run that is refused leaves no folder. In a sweep the job keeps its folder, whose log
    says why, and the others go on.
    """
    single = HydraConfig.get().mode == RunMode.RUN
    try:
        check(cfg, _top_level())
        from sam_lightning.training import train  # torch and Lightning, only now

        metrics = train(cfg)
        if cfg.optimized_metric is None:
            return None
        if cfg.optimized_metric not in metrics:
            raise ConfigError(
                f"optimized_metric={cfg.optimized_metric}: allowed are {', '.join(metrics)}"
            )
        return metrics[cfg.optimized_metric]
    except (ConfigError, TrainingError, OmegaConfBaseException) as error:
        if cfg.debug is True:
            raise
        if not single:
            log.error("%s", one_line(error))
            raise
        if isinstance(error, TrainingError):
            _fail(one_line(error), 1)
        _discard(Path(HydraConfig.get().runtime.output_dir))
        _fail(one_line(error), 2)
        raise AssertionError from error  # not reached
    except Exception:
        log.exception("the run failed")  # Hydra itself leaves the log of a failed job empty
        raise


def _top_level() -> set[str]:
    primary = OmegaConf.load(CONF / "train.yaml")
    groups = {str(key) for entry in primary.defaults if OmegaConf.is_dict(entry) for key in entry}
    return groups | {str(key) for key in primary} - {"defaults", "hydra"}


def _discard(folder: Path) -> None:
    """Remove a run folder that holds nothing but what Hydra wrote at the start."""
    if not {entry.name for entry in folder.iterdir()} <= {".hydra", "train.log"}:
        return
    shutil.rmtree(folder)
    for parent in folder.parents:
        if parent == Path.cwd() or any(parent.iterdir()):
            break
        parent.rmdir()


def resumed(arguments: list[str]) -> list[str]:
    """Complete ``ckpt_path=RUN/checkpoints/NAME.ckpt`` with what that run was started with.

    The run's stored overrides come first, then those given now, which win; the output goes on in
    the run's own folder, and its stored configuration is not written again.
    """
    keys = [re.split(r"=", a, maxsplit=1)[0].lstrip("+~") for a in arguments]
    if "ckpt_path" not in keys or {"-m", "--multirun"} & {*arguments}:
        return arguments
    given = arguments[keys.index("ckpt_path")].partition("=")[2].strip("'\"")
    folder = Path(given).resolve().parent.parent
    stored = folder / ".hydra" / "overrides.yaml"
    if not stored.is_file():
        return arguments
    kept = [
        str(o)
        for o in OmegaConf.load(stored)
        if str(o).partition("=")[0].lstrip("+~") not in (*keys, "ckpt_path")
    ]
    if "hydra.run.dir" not in keys:
        arguments = [*arguments, f"hydra.run.dir='{folder}'", "hydra.output_subdir=null"]
    return [*kept, *arguments]


def explain(error: Exception) -> str:
    """Hydra's composition errors in one line, with the nearest valid name."""
    text = str(error)
    if found := re.search(r"Could not override '([^']+)'", text):
        key = found.group(1)
        return f"{key}: no such key{did_you_mean(key, _known_keys())}"
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, choice = found.groups()
        options = re.findall(r"^\t(\w+)$", text, flags=re.MULTILINE)
        allowed = [option for option in options if option != "base"]
        hint = did_you_mean(choice, allowed)
        return f"{group}={choice}: allowed are {', '.join(allowed)}{hint}"
    return re.sub(r" ?See https?://\S+ for details", "", one_line(error))


def _known_keys() -> list[str]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return flat_keys(compose("train"))
