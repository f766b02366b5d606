"""The command: folders in, ``report.md`` and what belongs to it out."""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sam_lightning.config.arguments import one_line_errors, parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import METRICS, Rule
from sam_lightning.studies.report import FORMATS

if TYPE_CHECKING:
    from sam_lightning.studies.report.runs import LeftOut

ABOUT = """
Tables and figures of runs and sweeps: means and 95 % intervals over seeds, the best rho on
validation data, paired tests against a baseline, and what it cost.

  python -m sam_lightning.studies.report FOLDER... [key=value]
  python -m sam_lightning.studies.report logs/train/multiruns/2025-01-01_12-00-00 baseline=sgd

Writes report.md, report.tex, report.csv (a row per run), summary.csv (a row per group) and figures
to a folder, by default report in the first of those given. Failed runs are named and left out.
"""
DEFAULTS = {"metric": "test/acc", "baseline": "sgd", "out": None, "formats": "png,svg"}
RULES: list[Rule] = [
    ("metric", ", ".join(METRICS)),
    ("baseline", lambda v: isinstance(v, str), "the name of a method"),
    ("out", "a folder, or null"),
    (
        "formats",
        lambda v: v is None or (isinstance(v, str) and {*v.split(",")} <= {*FORMATS}),
        f"some of {','.join(FORMATS)}, or null for no figures",
    ),
]


def main(argv: Sequence[str] | None = None) -> None:
    """Read the arguments, gather, analyse, write, and print the tables.

    Raises:
        ConfigError: an argument is not allowed, or there is no completed run.
    """
    folders, options = arguments(sys.argv[1:] if argv is None else argv)
    out = folders[0] / "report" if options.out is None else Path(options.out)
    from sam_lightning.studies.report.groups import analyse  # scipy, only now
    from sam_lightning.studies.report.runs import gather
    from sam_lightning.studies.report.write import print_tables, write

    runs, left_out, warnings = gather(folders)
    where = ", ".join(map(str, folders))
    if not runs:
        raise ConfigError(f"{where}: no completed run there{counted(left_out)}")
    if all(run.metric(options.metric) is None for run in runs):
        known = sorted({name for run in runs for name in run.metrics} & {*METRICS})
        raise ConfigError(f"metric={options.metric}: these runs have {', '.join(known)}")
    study = analyse(runs, options.metric, options.baseline)
    methods = sorted({str(group.values["method"]) for group in study.groups})
    if options.baseline not in (*methods, DEFAULTS["baseline"]):
        raise ConfigError(f"baseline={options.baseline}: these runs have {', '.join(methods)}")
    formats = options.formats.split(",") if options.formats else []
    try:
        write(study, left_out, [*warnings, *study.warnings], out, formats)
    except OSError as error:
        raise ConfigError(f"out={out}: {error.strerror or error}") from error
    print_tables(study)
    for warning in (*warnings, *study.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{len(runs)} runs{counted(left_out)}; see {os.path.relpath(out / 'report.md')}")


def arguments(argv: Sequence[str]) -> tuple[list[Path], DictConfig]:
    """Folders, which may have ``=`` in their names, and checked options."""
    given = [a for a in argv if a not in ("-h", "--help")]
    folders = [a for a in given if Path(a).exists() or "=" not in a or "/" in a.partition("=")[0]]
    options = parse(ABOUT, DEFAULTS, RULES, [a for a in argv if a not in folders])
    if not folders:
        raise ConfigError(
            "FOLDER: must be given, as in python -m sam_lightning.studies.report logs"
        )
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"{folder}: {'not a' if folder.exists() else 'no such'} folder")
    return [Path(folder) for folder in folders], options


def counted(left_out: Sequence["LeftOut"]) -> str:
    """How many are left out, by status, as the end of a sentence."""
    if not left_out:
        return ""
    counts = Counter(run.status for run in left_out)
    return f"; left out: {', '.join(f'{n} {status}' for status, n in sorted(counts.items()))}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # ± is not in ASCII
    with one_line_errors():
        main()
