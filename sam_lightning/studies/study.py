"""The command: a study's file in; runs, report and evidence out."""

import io
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

from omegaconf import DictConfig

from sam_lightning.config.arguments import Keys
from sam_lightning.config.conf import top_level
from sam_lightning.config.errors import ConfigError, TrainingError, did_you_mean, no_such_key
from sam_lightning.config.hydra_errors import key_of, with_quoted_places
from sam_lightning.config.values import Folder, Rule, within
from sam_lightning.runs.files import make_folder, read_status, read_summary, stored_overrides
from sam_lightning.runs.secrets import without_secrets
from sam_lightning.runs.terminal import show
from sam_lightning.studies.launchers import OF_STUDY, is_sbatch, refuse_launchers
from sam_lightning.studies.plan import FOLDER, PARTS, Plan, RunSpec, folder_name, read, split
from sam_lightning.studies.report.runs import PLACES
from sam_lightning.studies.runner import TRAIN, Runner, begun, status
from sam_lightning.studies.table import WIDTH, Table

ABOUT = """
A study: methods, settings and seeds in one YAML file. Runs what is missing, then reports.

  python -m sam_lightning study FILE [key=value] [override of train.py for every run]
  python -m sam_lightning study conf/study/quick.yaml jobs=2
  python -m sam_lightning study conf/study/quick.yaml dry=true   # lists the runs only
  python -m sam_lightning study FILE only=sgd,sam seed=0 data.root=photos
  python -m sam_lightning study FILE launcher=submitit slurm='--gpus=1 --time=720'

Runs are in logs/studies/NAME; the same command goes on where it was stopped. What the
report makes of them, and runs.json with every run's results, goes to OUT/NAME.
"""
SBATCH = "options of sbatch, as in '--gpus=1 --time=720', but those of a study's own: "
SBATCH += ", ".join(OF_STUDY)
KEYS: Keys = {
    "jobs": (
        None,
        Annotated[int, within(1, None, ", of runs at a time")] | None,
        "runs at a time; null: 1, or with submitit all",
    ),
    "out": ("results", Folder, "the folder of the report"),
    "only": (
        None,
        Annotated[str | int, Rule("names of arms, as in sgd,sam", bool)] | None,
        "arms of the file, as in sgd,sam; null: all",
    ),
    "seed": (
        None,
        Annotated[str | int, Rule("seeds of the file, as in 0,1", lambda v: v != "")] | None,
        "seeds of the file, as in 0,1; null: all",
    ),
    "dry": (False, bool, "list the runs, start none"),
    "launcher": (
        "joblib",
        Literal["joblib", "submitit"],
        "joblib: on this machine; submitit: as one array of SLURM",
    ),
    "slurm": (
        None,
        Annotated[str, Rule(SBATCH, is_sbatch)] | None,
        "options of sbatch for a run; it has an hour unless they say",
    ),
}


def main(argv: Sequence[str]) -> None:
    """Check everything, run what is missing, report; an error where a run did not complete."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a line at a time, also into a file
        sys.stdout.reconfigure(line_buffering=True)
    path, options, overrides = arguments(argv)
    plan = read(path, overrides)
    runs = selected(plan, options)
    if options.dry:
        for run in runs:
            command = ["python", os.path.relpath(TRAIN), *run.arguments]
            print(f"{status(run).state:<11} {shlex.join(command)}")
    refuse_changed(plan)
    if options.dry:
        return
    runner = Runner(runs, options.jobs or 1)
    if options.launcher == "submitit":
        from sam_lightning.studies.array import Array  # submitit, only now

        runner = Array(runs, options.jobs, options.slurm)
    out = make_folder(Path(options.out) / plan.name, Path(options.out))
    refuse_loss(plan, out, runs)
    try:
        runner.run()
    except ConfigError:
        with suppress(OSError):  # it has results
            os.removedirs(out)
        raise
    refuse_changed(plan)  # another process may have been at a run
    report(plan, out)
    if left := [found for found in map(status, runs) if not found.completed]:
        rows = [(str(found.folder), found.state, found.reason) for found in left]
        table = Table(("run", "state", "reason"), rows, left=range(3))
        show(table.terminal("not completed"), width=WIDTH)
        raise TrainingError(f"{len(left)} of {len(runs)} runs did not complete")


def arguments(argv: Sequence[str]) -> tuple[Path, DictConfig, list[str]]:
    """The file, the study's own options, and overrides of every run."""
    options, others = split(KEYS, argv)
    files = [a for a in others if "=" not in a]
    overrides = with_quoted_places([a for a in others if "=" in a])
    known = [*KEYS, *top_level()]
    for a in overrides:
        if key_of(a).partition(".")[0] not in (*known, "hydra"):
            raise ConfigError(f"{a}: {no_such_key(key_of(a), known)}")
    if len(files) != 1:
        given = " and ".join(files) or "none"
        raise ConfigError(f"FILE: give one, as in conf/study/quick.yaml, not {given}")
    if options.slurm is not None and options.launcher != "submitit":
        raise ConfigError(f"slurm={options.slurm}: is for launcher=submitit")
    refuse_launchers("study")
    return Path(files[0]), options, overrides


def selected(plan: Plan, options: DictConfig) -> list[RunSpec]:
    """The runs that ``only`` and ``seed`` leave."""
    runs = list(plan.runs)
    for option, part in (("only", "arm"), ("seed", "seed")):
        known = list(dict.fromkeys(str(getattr(run, part)) for run in plan.runs))
        given = options[option]
        wanted = known if given is None else str(given).split(",")
        for name in wanted:
            if name not in known:
                hint = did_you_mean(name, known) or f"; the file has {', '.join(known)}"
                raise ConfigError(f"{option}={given}: no such {part}, {name}{hint}")
        runs = [run for run in runs if str(getattr(run, part)) in wanted]
    return runs


def refuse_changed(plan: Plan) -> None:
    """Never mix results: what is there must be of the overrides that the study has now."""
    changed = [f"{r.folder}: is of a run with {how}" for r in plan.runs if (how := _difference(r))]
    if changed:
        more = f" (and {len(changed) - 1} more folders)" if len(changed) > 1 else ""
        advice = "undo the change, or remove what is to run again"
        raise ConfigError(f"{changed[0]}{more}; {advice}")


def _difference(run: RunSpec) -> str | None:
    """How the overrides that a run was started with differ from those it has now."""
    file = run.folder / ".hydra" / "overrides.yaml"
    if not begun(run) or not file.is_file():
        return f"no {file.name}" if status(run).completed else None
    before = {key: value for key, _, value in (o.partition("=") for o in stored_overrides(file))}
    before.pop("ckpt_path", None)
    before, given = without_secrets(before), without_secrets({**run.overrides})
    for key in {**before, **given}:
        then, now = before.get(key), given.get(key)
        if then != now and not _moved(run, key, then, now):
            was, has = (f"{key}={v}" if v is not None else f"no {key}" for v in (then, now))
            return f"{was}, and the study has {has}"
    return None


def _moved(run: RunSpec, key: str, then: str | None, now: str | None) -> bool:
    """Whether a key tells only where the same images are, or how they are read."""
    names = {Path(str(value).strip("'\"")).name for value in (then, now)}
    if key_of(key) != "data.root" or len(names) == 1:
        return key_of(key) in PLACES
    config = run.folder / ".hydra" / "config.yaml"  # an image folder's name is the data set's
    return config.is_file() and ".image_folder" not in config.read_text(encoding="utf-8")


def refuse_loss(plan: Plan, out: Path, expected: Sequence[RunSpec] = ()) -> None:
    """Never lose results: a run that ``runs.json`` has must be here, or be ``expected``."""
    file, runs = out / "runs.json", FOLDER / plan.name
    try:
        lines = (read_summary(file) or {})["runs"]
        done = [line for line in lines if line["state"] == "completed"]
        names = [folder_name(line["arm"], line["settings"], line["seed"]) for line in done]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # there is none, or none of a study
    here = {run.folder.name for run in expected}
    if lost := [n for n in names if n not in here and not read_status(runs / n).completed]:
        which = f"{len(lost)} runs that are not in {runs}, the first is {lost[0]}"
        advice = "give out=FOLDER for a report without them"
        raise ConfigError(f"{file}: has results of {which}; {advice}")


def report(plan: Plan, out: Path) -> None:
    """Write and show what all completed runs of the file say, also of those not selected now."""
    from sam_lightning.studies.report import files  # pandas and scipy, only now
    from sam_lightning.studies.report.comparison import analyse
    from sam_lightning.studies.report.runs import read_runs

    statuses = [status(run) for run in plan.runs]
    runs, _, warnings = read_runs(found.folder for found in statuses if found.completed)
    if not runs:
        return
    refuse_loss(plan, out)
    files.write_runs(plan, statuses, runs, out / "runs.json")
    commits = sorted({str(run.summary.get("git_commit"))[:7] for run in runs})
    if len(commits) > 1:
        warnings.append(f"runs are of different commits ({', '.join(commits)})")
    # Folders that the file once had, or that someone has put there.
    folder = FOLDER / plan.name
    if others := sorted({*folder.iterdir()} - {found.folder for found in statuses}):
        uncounted = f"{len(others)} in {folder} are not of the file and not counted"
        warnings.append(f"{uncounted}: the first is {others[0].name}")
    if missing := len(plan.runs) - len(runs):
        warnings.append(f"{missing} of the file's {len(plan.runs)} runs have no result yet")
    left_out = [found for found in statuses if found.state not in ("completed", "missing")]
    parts = {**PARTS, **plan.content}
    files.report(
        analyse(runs, parts["metric"], parts["baseline"]), left_out, warnings, out, ["png"]
    )
