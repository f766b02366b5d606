"""The command: folders in, ``report.md`` and what belongs to it out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from sam_lightning.config.arguments import Keys, parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import METRICS, MethodName, Metric
from sam_lightning.config.values import Rule

ABOUT = """
Tables and figures of runs and sweeps: means and 95 % intervals over seeds, the best rho on
validation data, paired tests against a baseline, and what it cost.

  python -m sam_lightning report FOLDER... [key=value]
  python -m sam_lightning report logs/train/multiruns/2025-01-01_12-00-00 baseline=sgd
  python -m sam_lightning report FOLDER columns=method,rho,n,test/acc metric=test/error

Writes report.md, report.tex, report.csv (a row per run), summary.csv (a row per group) and figures
to a folder, by default report in the first of those given. Failed runs are named and left out.
Tables and figures speak of accuracy or error, as the metric does. Columns of the table of results
are settings (rho, optimizer.lr or lr), metrics, n, passes, total_passes, train_seconds and
images_per_second; null: what differs, the metrics and costs.
"""
KEYS: Keys = {
    "metric": ("test/acc", Metric, "what is compared"),
    "baseline": ("sgd", MethodName, "the method that others are tested against"),
    "columns": (
        None,
        Annotated[str, Rule("as in method,rho,test/acc", bool)] | None,
        "of the table of results; null: what differs",
    ),
    "out": (
        None,
        Annotated[str, Rule("a folder", bool)] | None,
        "the folder to write to; null: report in the first FOLDER",
    ),
    "formats": ("png,svg", Literal["png,svg", "png", "svg", "pdf"] | None, "of figures"),
}


def main(argv: Sequence[str]) -> None:
    """Read the runs, compare them, and write and print the report."""
    # Names of folders may have "=" in them, as those of a sweep's jobs do.
    own = [a for a in argv if "=" in a and "/" not in a.partition("=")[0] and not Path(a).exists()]
    options = parse(KEYS, own)
    folders = [Path(a) for a in argv if a not in own]
    if not folders:
        raise ConfigError("FOLDER: must be given, as in python -m sam_lightning report logs")
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")
    from sam_lightning.studies.report.comparison import analyse  # pandas and scipy, only now
    from sam_lightning.studies.report.files import report
    from sam_lightning.studies.report.runs import counts, read_runs

    runs, left_out, warnings = read_runs(folders)
    if not runs:
        where = ", ".join(map(str, folders))
        raise ConfigError(f"{where}: no completed run there{counts(left_out)}")
    known = {name for run in runs for name in run.results} & {*METRICS}
    if options.metric not in known:
        raise ConfigError(f"metric={options.metric}: these runs have {', '.join(sorted(known))}")
    methods = {str(run.settings["method"]) for run in runs if "method" in run.settings}
    if options.baseline not in (*methods, KEYS["baseline"][0]):
        have = ", ".join(sorted(methods))
        raise ConfigError(f"baseline={options.baseline}: these runs have {have}")
    out = folders[0] / "report" if options.out is None else Path(options.out)
    columns = [c.strip() for c in options.columns.split(",")] if options.columns else None
    formats = options.formats.split(",") if options.formats else []
    try:
        study = analyse(runs, options.metric, options.baseline)
        report(study, left_out, warnings, out, formats, columns)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror or error}") from error
