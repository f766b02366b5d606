"""Sweeps: the names of their folders, jobs that fail alone, and a table of all at the end.

Jobs may run in other processes or on other machines, so what they did is read from their folders.
"""

import gc
import logging
import multiprocessing
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from hydra.experimental.callback import Callback
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from sam_lightning.config.conf import register_resolver
from sam_lightning.config.errors import ConfigError, TrainingError, one_line
from sam_lightning.config.hydra_errors import COMPOSING, key_of, quoted
from sam_lightning.config.values import Count, Fraction, Rule, check_values
from sam_lightning.runs.files import read_status, record_failure, stored_overrides, write_json
from sam_lightning.runs.folder import Started, folder_of, own, refuse
from sam_lightning.runs.lock import NAME, OwnedError, kept, owned
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.studies.launchers import check_launcher, refuse_launchers, share_processors

log = logging.getLogger(__name__)

HINTS = {
    "hydra.sweeper.n_trials": Count,
    "hydra.sweeper.direction": Annotated[
        Any,
        Rule("minimize, maximize", lambda v: getattr(v, "name", v) in ("minimize", "maximize")),
    ],
    "hydra.sweeper.n_jobs": Count,
    "hydra.sweeper.max_failure_rate": Fraction,
    "hydra.sweeper.max_batch_size": Count | None,
    "hydra.launcher.n_jobs": Annotated[Any, Rule("a whole number other than 0", bool)],
}


LONGEST_NAME = 255  # bytes that file systems allow a folder
OWN = "hydra.callbacks.sweep_folder"  # the keys of the callback below


def job_folder(number: int, *, _root_: DictConfig) -> str:
    """``<number>_<overrides>`` as the name of one folder: without slashes, and not too long.

    What is swept comes first, then method, rho and seed: TensorBoard and listings cut long names.
    The number alone tells jobs apart; all overrides are in ``.hydra/overrides.yaml``. A job of a
    sweep that an earlier version began keeps its folder, whose overrides are sorted by key.

    Args:
        number: of the job in this start of the sweep.
        _root_: the job's configuration, with Hydra's part.
    """
    hydra = _root_.hydra
    excluded = {*hydra.job.config.override_dirname.exclude_keys}
    given: Any = OmegaConf.to_container(hydra.overrides.task)  # "${...}" as it stands
    overrides = {
        key_of(o): o.lstrip("+~")
        for o in sorted(given, key=key_of)
        if key_of(o) not in excluded and without_secrets(o) == o
    }
    swept = OmegaConf.select(_root_, f"{OWN}.swept") or []
    order = dict.fromkeys([*swept, "method", "rho", "seed", *overrides])
    number += OmegaConf.select(_root_, f"{OWN}.first_job") or 0
    before = _folder_name(f"{number}_{hydra.job.override_dirname}")
    if Path(hydra.sweep.dir, before, ".hydra").is_dir():
        return before
    return _folder_name(f"{number}_{','.join(overrides[k] for k in order if k in overrides)}")


def _folder_name(text: str) -> str:
    name = text.replace("/", "-").encode()
    if len(name) > LONGEST_NAME:
        return name[: LONGEST_NAME - 3].decode(errors="ignore") + "..."
    return name.decode()


def next_job(sweep: str) -> int:
    """The number after the last job in the folder of a sweep."""
    names = [started.parent.name for started in Path(sweep).glob("*/.hydra")]
    numbers = [int(found.group()) for name in names if (found := re.match(r"[0-9]+", name))]
    return max(numbers, default=-1) + 1


register_resolver("job_folder", job_folder, replace=True)
# Cached, as Hydra's ``now`` is: the jobs of a sweep get the value that was found at its start.
register_resolver("next_job", next_job, use_cache=True, replace=True)


class SweepFolder(Callback):
    """Remembers where a sweep writes, and which jobs were there before the first one."""

    path: Path | None = None
    started: Started | None = None
    metric: str | None = None
    storage: str | None = None  # the URL of a search's database
    earlier: dict[Path, int]

    def __init__(self, first_job: int = 0, swept: Sequence[str] = ()) -> None:
        self.first_job, self.swept = first_job, swept  # read by ``job_folder``

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before the first job."""
        gc.enable()  # every job makes a configuration of its own
        path = folder_of(config, "hydra.sweep.dir")
        metric = OmegaConf.select(config, "optimized_metric")
        try:
            refuse_launchers("sweep")
            check_launcher(config)
            check_values(config, HINTS)
            storage: Any = OmegaConf.select(config, "hydra.sweeper.storage")
            from sam_lightning.studies.sweep_jobs import checked  # no single run needs it here

            swept, jobs = checked(config)
            subdir = str(OmegaConf.to_container(config.hydra.sweep)["subdir"])  # type: ignore
            shared = "${" not in subdir and len(jobs) > 1
            if shared or Path(subdir).is_absolute() or ".." in Path(subdir).parts:
                advice = "a folder of each job within the sweep's, as '${hydra.job.num}'"
                raise ConfigError(f"hydra.sweep.subdir={subdir}: allowed is {advice}")
        except ConfigError as error:
            refuse(str(error))
        elsewhere = not config.hydra.launcher._target_.endswith(".BasicLauncher")
        started = Started(path, f"{config.hydra.job.name}.log", True, elsewhere)
        own(path, "hydra.sweep.dir")
        SweepFolder.started = started
        try:
            for lock in path.rglob(NAME):  # of jobs that outlive their sweep
                with owned(lock.parent):
                    pass
        except ConfigError as error:
            refuse(str(error))
        SweepFolder.storage = storage and str(storage)
        logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)  # Optuna's
        SweepFolder.path, SweepFolder.metric, SweepFolder.earlier = path, metric, _started(path)
        with read_write(config.hydra), open_dict(config.hydra):  # for jobs in any process
            named = ",".join(map(quoted, swept))
            config.hydra.overrides.hydra.append(f"++{OWN}.swept=[{named}]")
        sweeper: Any = get_class(config.hydra.sweeper._target_)
        if split := getattr(sweeper, "split_arguments", None):  # Hydra's own, not one that searches
            # Hydra takes no sweeper of ours, as it wants all in a package called hydra_plugins.
            chunks, compose = sweeper.split_overrides_to_chunks, sweeper.validate_batch_is_legal
            kept.callback(setattr, sweeper, "split_arguments", staticmethod(split))
            kept.callback(setattr, sweeper, "validate_batch_is_legal", compose)
            sweeper.split_arguments = staticmethod(lambda _, size: [*chunks(jobs, size)])
            sweeper.validate_batch_is_legal = lambda _, batch: None  # all are composed by now

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra in the process that a job runs in."""
        # In joblib's workers new processes are started in joblib's way, which neither torch's
        # launcher nor its data loader can use: back to Python's.
        if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
            multiprocessing.set_start_method(None, force=True)
            share_processors(config.hydra.launcher.n_jobs)


def fail(cfg: DictConfig, hydra: Any, error: Exception) -> None:
    """Leave in a job's folder why it failed; raise it for sweepers that have to know of it.

    What is raised can be sent from one process to another.
    """
    reason = f"{type(error).__name__}: {one_line(error)}"
    if not isinstance(error, OwnedError):  # else what is in the folder is another's
        record_failure(cfg, reason)
    # Hydra's own sweeper would end the sweep at the next batch of jobs (max_batch_size).
    if not hydra.sweeper._target_.endswith(".BasicSweeper") or cfg.get("traceback") is True:
        if isinstance(error, ConfigError | TrainingError):
            raise error
        raise TrainingError(reason) from error


@contextmanager
def summarized() -> Iterator[None]:
    """Around ``main``: however a sweep ends, print and write its table, and raise what failed."""
    early: Exception | None = None
    try:
        yield
    except KeyboardInterrupt:
        if SweepFolder.started is not None:  # before the table of what may be nothing
            SweepFolder.started.discard()
        raise
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
    found = without_secrets({"jobs": [*jobs.values()]})
    write_json(sweep / "sweep.json", found, "hydra.sweep.dir")
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
    return {
        "job": folder.name.partition("_")[0],
        "overrides": stored_overrides(started.with_name("overrides.yaml")),
        "status": state,
        "exit_reason": reason,
        "metrics": {} if stale else found.metrics,
        "folder": str(folder.relative_to(sweep)),
    }


def _reason(job: dict[str, Any]) -> str:
    known = f"{ConfigError.__name__}|{TrainingError.__name__}"
    return re.sub(f"^({known}): ", "", job["exit_reason"])


def _print_table(sweep: Path, jobs: list[dict[str, Any]]) -> None:
    """A line per job with what varies; below it the folder, and why jobs failed."""
    from sam_lightning.runs.terminal import show  # not for a single run
    from sam_lightning.studies.table import Table, title

    names = (SweepFolder.metric, "test/acc", "val/acc")
    metric = next((n for n in names if n and any(n in job["metrics"] for job in jobs)), "test/acc")
    given = [{key_of(o): o.partition("=")[2] for o in job["overrides"]} for job in jobs]
    keys = [*dict.fromkeys(key for of_job in given for key in of_job)]
    varying = [k for k in keys if len({of_job.get(k) for of_job in given}) > 1]
    rows: list[tuple[str, ...]] = []
    reasons: dict[str, list[str]] = {}
    for job, of_job in zip(jobs, given, strict=True):
        value = f"{job['metrics'][metric]:.4f}" if metric in job["metrics"] else ""
        rows.append((job["job"], *(of_job.get(k, "") for k in varying), job["status"], value))
        if job["status"] != "completed":
            reasons.setdefault(f"{job['status']}: {_reason(job)}", []).append(job["job"])
    head = ("job", *(title(k, varying) for k in varying), "status", metric)
    show(
        f"{len(jobs)} jobs in {os.path.relpath(sweep)}",
        Table(head, rows, left=range(len(head) - 1)).terminal(),
        *(
            f"job{'s' * (len(numbers) > 1)} {', '.join(numbers)} {reason}"
            for reason, numbers in reasons.items()
        ),
        width=80,
    )
