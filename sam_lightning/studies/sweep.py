"""Sweeps: the names of their folders, jobs that fail alone, and a table of all at the end.

Jobs may run in other processes or on other machines, so what they did is read from their folders.
"""

import logging
import multiprocessing
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sam_lightning.config.cluster import launched
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.config.hydra_errors import COMPOSING
from sam_lightning.config.schema import Rule, check_values, one_line
from sam_lightning.runs.files import read_status, record_failure, write_json
from sam_lightning.runs.folder import refuse
from sam_lightning.runs.lock import OwnedError

log = logging.getLogger(__name__)

RULES: list[Rule] = [
    ("hydra.sweeper.n_trials", "a whole number >= 1"),
    (
        "hydra.sweeper.direction",
        lambda v: getattr(v, "name", v) in ("minimize", "maximize"),
        "minimize, maximize",
    ),
    ("hydra.sweeper.n_jobs", "a whole number >= 1"),
    ("hydra.sweeper.max_failure_rate", "a number from 0 to 1"),
    (
        "hydra.sweeper.storage",
        lambda v: v is None or isinstance(v, str) or OmegaConf.is_dict(v),
        "the URL of a database, or null",
    ),
    ("hydra.sweeper.storage.path", "the path of a file"),
    ("hydra.sweeper.max_batch_size", "a whole number >= 1, or null"),
    ("hydra.launcher.n_jobs", lambda v: v != 0, "a whole number other than 0"),
]
LONGEST_NAME = 255  # bytes that file systems allow a folder


def job_folder(number: int, overrides: str, first: int = 0) -> str:
    """``<number>_<overrides>`` as the name of one folder: without slashes, and not too long.

    The number alone tells jobs apart; all overrides are in ``.hydra/overrides.yaml``.
    """
    name = f"{first + number}_{overrides}".replace("/", "-").encode()
    if len(name) > LONGEST_NAME:
        return name[: LONGEST_NAME - 3].decode(errors="ignore") + "..."
    return name.decode()


def next_job(sweep: str) -> int:
    """The number after those of the jobs that are in the folder of a sweep already."""
    names = [started.parent.name for started in Path(sweep).glob("*/.hydra")]
    numbers = [int(found.group()) for name in names if (found := re.match(r"[0-9]+", name))]
    return max(numbers, default=-1) + 1


OmegaConf.register_new_resolver("job_folder", job_folder, replace=True)
# Cached, as Hydra's ``now`` is: the jobs of a sweep get the value that was found at its start.
OmegaConf.register_new_resolver("next_job", next_job, use_cache=True, replace=True)


class SweepFolder(Callback):
    """Remembers where a run or a sweep writes, and which jobs were there before the first one."""

    run: Path | None = None
    path: Path | None = None
    metric: str | None = None
    storage: str | None = None  # the URL of a search's database
    earlier: dict[Path, int]
    owned: ClassVar[dict[Path, str]] = {}  # jobs that another process is at

    def __init__(self, first_job: int = 0) -> None:
        self.first_job = first_job

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before it writes anything."""
        if config.hydra.output_subdir is None:  # the run goes on in the folder of an earlier one
            return
        with suppress(OmegaConfBaseException):  # ``RunFolder`` refuses it then
            SweepFolder.run = Path(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before the first job."""
        try:
            path = Path(config.hydra.sweep.dir)
        except OmegaConfBaseException:  # ``RunFolder`` refuses it
            return
        metric = OmegaConf.select(config, "optimized_metric")
        try:
            _check_processes(config)
            _check_overrides(config)
            check_values(config, RULES)
            if "n_trials" in config.hydra.sweeper and metric is None:
                raise ConfigError("optimized_metric=null: a search needs one, such as val/acc")
        except ConfigError as error:
            refuse(str(error))
        storage = OmegaConf.select(config, "hydra.sweeper.storage")
        if OmegaConf.is_dict(storage) and "path" in storage:
            storage = f"sqlite:///{storage.path}"
        SweepFolder.storage = storage if isinstance(storage, str) else None
        logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # Optuna's
        SweepFolder.path, SweepFolder.metric, SweepFolder.earlier = path, metric, _started(path)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that a job runs in."""
        # In joblib's workers new processes are started in joblib's way, which neither torch's
        # launcher nor its data loader can use: back to Python's.
        if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(None, force=True)


def _check_processes(config: DictConfig) -> None:
    if (found := launched()) is not None:
        raise ConfigError(
            f"a sweep is started by one process, and {found.launcher} has started "
            f"{found.processes}: leave it out, and give each job trainer.devices=N"
        )
    launcher, key = config.hydra.launcher, "hydra/launcher=submitit"
    if launcher._target_.endswith("SlurmLauncher") and shutil.which("srun") is None:
        advice = "start it where SLURM is, or take basic, joblib or submitit_local"
        raise ConfigError(f"{key}_slurm: there is no srun here; {advice}")
    tasks = launcher.get("tasks_per_node", 1) * launcher.get("nodes", 1)
    if tasks > 1 and launcher._target_.endswith("LocalLauncher"):
        advice = "leave tasks_per_node and nodes at 1 and give trainer.devices=N"
        raise ConfigError(f"{key}_local: would train each job {tasks} times; {advice}")


def _check_overrides(config: DictConfig) -> None:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    given: Any = OmegaConf.to_container(config.hydra.overrides.task)  # "${...}" as it stands
    for override in parser.parse_overrides(given):
        if not override.is_discrete_sweep():
            continue
        reason = "one at a time" if override.key_or_group == "sweep" else ""
        try:
            if next(iter(override.sweep_iterator()), None) is None:
                reason = "stands for no value"
        except ValueError as error:  # of range(...)
            reason = one_line(error)
        if reason:
            raise ConfigError(f"{override.input_line}: {reason}")


def fail(cfg: DictConfig, hydra: Any, error: Exception) -> None:
    """Leave in a job's folder why it failed; raise it for sweepers that have to know of it.

    What is raised can be sent from one process to another.
    """
    reason = f"{type(error).__name__}: {one_line(error)}"
    if isinstance(error, OwnedError):  # what is in the folder is another's
        SweepFolder.owned[Path(cfg.output_dir).resolve()] = f"ConfigError: {one_line(error)}"
    else:
        record_failure(cfg, reason, refused=isinstance(error, ConfigError))
    # Hydra's own sweeper would end the sweep at the next batch of jobs (max_batch_size).
    if not hydra.sweeper._target_.endswith(".BasicSweeper") or cfg.get("debug") is True:
        if isinstance(error, ConfigError | TrainingError):
            raise error
        raise TrainingError(reason) from error


@contextmanager
def summarized() -> Iterator[None]:
    """Around ``main``: however a sweep ends, print and write its table, and raise what failed."""
    early: Exception | None = None
    try:
        yield
    except Exception as error:  # a launcher's or sweeper's; after failed jobs, it is about them
        early = error
    finally:
        failure = _summarize()
    if early is not None and (failure is None or isinstance(early, COMPOSING)):
        raise early
    if failure is not None:
        if early is not None:
            log.error("the sweep has ended early: %s", one_line(early))
        raise failure from early


def _summarize() -> Exception | None:
    """Print and write the table of the sweep, if there was one; return what to say of failures."""
    if (sweep := SweepFolder.path) is None:
        return None
    started = _started(sweep)
    jobs = {file: _job(sweep, file) for file in started}
    new = [jobs[file] for file in jobs if started[file] != SweepFolder.earlier.get(file)]
    if not new:
        return None
    write_json(sweep / "sweep.json", {"jobs": [*jobs.values()]}, "hydra.sweep.dir")
    _print_table(sweep, [*jobs.values()])
    failed = [job for job in new if job["status"] != "completed"]
    if not failed:
        return None
    message = _reason(failed[0])
    if len(failed) < len(new) or len({*map(_reason, failed)}) > 1:
        message += f" (job {failed[0]['job']}; {len(failed)} of {len(new)} jobs failed)"
    refused = all(job["exit_reason"].startswith(f"{ConfigError.__name__}: ") for job in new)
    return ConfigError(message) if refused else TrainingError(message)


def _started(sweep: Path) -> dict[Path, int]:
    """The file that Hydra writes at the start of a job, and when it was written; by number."""
    files = [file for folder in sweep.rglob(".hydra") if (file := folder / "hydra.yaml").is_file()]
    files.sort(key=lambda file: [(len(part), part) for part in re.split(r"(\d+)", str(file))])
    return {file: file.stat().st_mtime_ns for file in files}


def _job(sweep: Path, started: Path) -> dict[str, Any]:
    """What a job's folder tells of it; ``status`` as in ``metrics.json``, or ``no result``."""
    folder = started.parent.parent
    file, found = folder / "metrics.json", read_status(folder)
    state, reason = found.state, found.reason or found.state
    if "refused" in found.summary:
        state, reason = "failed", found.summary["refused"]
    stale = file.is_file() and file.stat().st_mtime_ns < started.stat().st_mtime_ns
    if stale or not found.summary:
        state, reason = "no result", "the process ended and left no metrics.json"
    if folder.resolve() in SweepFolder.owned:
        state, reason = "failed", SweepFolder.owned[folder.resolve()]
    return {
        "job": folder.name.partition("_")[0],
        "overrides": OmegaConf.to_container(OmegaConf.load(started.with_name("overrides.yaml"))),
        "status": state,
        "exit_reason": reason,
        "metrics": {} if stale else found.metrics,
        "folder": str(folder.relative_to(sweep)),
    }


def _reason(job: dict[str, Any]) -> str:
    known = f"{ConfigError.__name__}|{TrainingError.__name__}"
    return re.sub(f"^({known}): ", "", job["exit_reason"])


def _print_table(sweep: Path, jobs: list[dict[str, Any]]) -> None:
    from sam_lightning.studies.table import Table, show  # not for a single run

    names = (SweepFolder.metric, "test/acc", "val/acc")
    metric = next((n for n in names if n and any(n in job["metrics"] for job in jobs)), "test/acc")
    shared = set.intersection(*(set(job["overrides"]) for job in jobs)) if len(jobs) > 1 else set()
    rows = []
    for job in jobs:
        own = " ".join(o for o in job["overrides"] if o not in shared)
        done = job["status"] == "completed"
        value = f"{job['metrics'][metric]:.4f}" if metric in job["metrics"] else ""
        status = job["status"] if done else f"{job['status']}: {_reason(job)}"
        rows.append((job["job"], own, status, value, job["folder"]))
    table = Table(("job", "overrides", "status", metric, "folder"), rows, left=5)
    show(table.terminal(f"{len(jobs)} jobs in {os.path.relpath(sweep)}"))
