"""The files of a report, and the tables on the terminal."""

import re
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from rich.console import Console

from sam_lightning.files import replacing
from sam_lightning.report import FORMATS, tables
from sam_lightning.report.comparison import SELECTION, Choice, Study, show, title
from sam_lightning.report.runs import LeftOut
from sam_lightning.report.tables import interval, spoken

# What readers ask of an experiment first; everything else is in each run's metrics.json.
NOTABLE = (
    *("data", "data.image_size", "data.label_noise", "data.subset", "data.val_size"),
    *("data.crop_padding", "data.flip"),
    *("data.cutout", "data.policy", "model", "model.width", "model.depth", "model.widen_factor"),
    *("batch_size", "optimizer", "optimizer.lr", "optimizer.momentum", "optimizer.weight_decay"),
    *("scheduler", "scheduler.warmup_epochs", "label_smoothing", "trainer.precision"),
)
READING = (
    "Mean ± half of the 95 % interval of the mean over n seeds (Student's t; none for one seed). "
    "A pass is one forward and backward of every training image; seconds are those of training "
    "batches, evaluation left out. In bold: the rho with the best validation accuracy."
)
TESTING = (
    "The difference is a mean over pairs of runs with the same seed, with its 95 % interval. "
    "p (t): paired t test, two-sided; p (Holm): the same, adjusted for all comparisons here; "
    "p (Wilcoxon): exact signed-rank test, from 6 pairs on."
)


def write(
    study: Study,
    left_out: Sequence[LeftOut],
    warnings: Sequence[str],
    out: Path,
    formats: Sequence[str],
) -> None:
    """Write every file of the report into ``out``, each of them whole or not at all.

    Raises:
        ConfigError, OSError: ``out`` cannot be made or written to.
    """
    out.mkdir(parents=True, exist_ok=True)
    figures: list[tuple[str, str]] = []
    stale: list[Path] = []
    if formats:
        from sam_lightning.report.figures import KINDS, draw  # matplotlib, only if it is needed

        figures = draw(study, out, formats)
        stale = _stale(out, KINDS, {name for name, _ in figures})
    images = [(f"{name}.{formats[0]}", caption) for name, caption in figures]
    _write_text(out / "report.csv", tables.runs_csv(study))
    _write_text(out / "summary.csv", tables.groups_csv(study))
    _write_text(out / "report.tex", _latex(study))
    _write_text(out / "report.md", _markdown(study, left_out, warnings, images))
    for path in stale:
        path.unlink(missing_ok=True)


def _stale(out: Path, kinds: Iterable[str], drawn: Collection[str]) -> list[Path]:
    """The figures that the earlier report in ``out`` shows, and this one has by other names."""
    earlier = out / "report.md"
    shown = earlier.read_text(encoding="utf-8", errors="replace") if earlier.is_file() else ""
    figure = rf"^!\[.*\]\(((?:{'|'.join(kinds)})(?:_\d+)?)\.\w+\)$"
    names = {*re.findall(figure, shown, re.MULTILINE)} - {*drawn}
    return [out / f"{name}.{form}" for name in names for form in FORMATS]


def print_tables(study: Study) -> None:
    """Show the tables and which rho is chosen on the terminal."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(tables.terminal(tables.results(study), "mean ± half of 95 % interval over seeds"))
    for choice in study.choices:
        if line := chosen(study, choice):
            console.print(line, markup=False, highlight=False)
    if study.comparisons:
        caption = f"{spoken(study.metric)} against {study.baseline}, pairs with the same seed"
        console.print(tables.terminal(tables.comparisons(study), caption))
    for line in uncompared(study):
        console.print(line, markup=False, highlight=False)


def chosen(study: Study, choice: Choice) -> str | None:
    """Which rho is best on validation data, in a sentence; None where there is one only."""
    if len(choice.groups) == 1:
        return None
    name = study.describe(choice.groups[0], without=["rho"])
    rhos = [show(group.values["rho"]) for group in choice.groups]
    if choice.best is None:
        return (
            f"{name}: no validation data ({SELECTION}), so no rho is chosen of {', '.join(rhos)}; "
            "the test set is not for choosing"
        )
    best = show(choice.best.values["rho"])
    text = interval(choice.best.estimate(SELECTION), SELECTION)
    line = f"{name}: rho {best} is best on validation data ({text} %), of {', '.join(rhos)}"
    if best in (rhos[0], rhos[-1]):
        line += f"; it is the {'smallest' if best == rhos[0] else 'largest'} tried"
    return line


def uncompared(study: Study) -> list[str]:
    """Which of the leading groups have no baseline to be compared with, in sentences."""
    methods = {group.values["method"] for group in study.groups}
    if study.baseline not in methods:
        return [f"No runs of baseline={study.baseline}, so nothing is compared."]
    compared = [id(comparison.group) for comparison in study.comparisons]
    return [
        f"{study.describe(group)}: no {study.baseline} with the same settings and as many epochs "
        "or passes"
        for group in study.leading
        if group.values["method"] != study.baseline and id(group) not in compared
    ]


def _markdown(
    study: Study,
    left_out: Sequence[LeftOut],
    warnings: Sequence[str],
    images: Sequence[tuple[str, str]],
) -> str:
    runs = sum(len(group.runs) for group in study.groups)
    common = [
        f"{title(key, NOTABLE)} {show(study.common[key])}" for key in NOTABLE if key in study.common
    ]
    choices = [line for choice in study.choices if (line := chosen(study, choice))]
    parts = [
        "# Report",
        f"{runs} runs in {len(study.groups)} groups; {len(left_out)} left out.",
        f"Common to all: {', '.join(common)}." if common else "",
        *_listed("Warnings", warnings),
        "## Results",
        tables.markdown(tables.results(study)),
        READING,
        *_listed("Choice of rho", choices),
        f"## {spoken(study.metric).capitalize()} against {study.baseline}",
        *([tables.markdown(tables.comparisons(study)), TESTING] if study.comparisons else []),
        *uncompared(study),
        "## Figures" if images else "",
        *(
            f"![{caption}]({name})\n\n{caption[0].upper()}{caption[1:]}."
            for name, caption in images
        ),
        *_listed("Left out", [f"{run.status}: `{run.folder}`: {run.reason}" for run in left_out]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(heading: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    texts = (" ".join(line.split()).replace("<", "\\<") for line in lines)  # no HTML
    return [f"## {heading}", "\n".join(f"- {text}" for text in texts)]


def _latex(study: Study) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    parts.append(tables.latex(tables.results(study), READING, "tab:sam-results"))
    if study.comparisons:
        heading = f"{spoken(study.metric).capitalize()} against {study.baseline}. {TESTING}"
        table = tables.comparisons(study)
        parts.append(tables.latex(table, heading, "tab:sam-comparisons"))
    return "\n\n".join(parts) + "\n"


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
