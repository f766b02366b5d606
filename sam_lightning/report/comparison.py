"""Group the runs of a study over seeds, choose rho on validation data, and test the methods."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pandas as pd
from omegaconf import OmegaConf

from sam_lightning.configuration import flat
from sam_lightning.explain import CONF
from sam_lightning.report.runs import Run
from sam_lightning.report.statistics import Estimate, Paired, estimate, holm, paired

ABSENT = "–"  # the value of a setting that a run does not have
SHOWN = ("method", "rho", "epochs")  # columns even where all runs agree
SELECTION = "val/acc"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed only: ``values`` of the columns, runs in order of seeds."""

    values: Mapping[str, Any]
    runs: Sequence[Run]

    @cached_property
    def results(self) -> pd.DataFrame:
        """Metrics and costs of every run, by seed."""
        seeds = [run.identity for run in self.runs]
        return pd.DataFrame([run.results for run in self.runs], index=seeds, dtype=float)

    def result(self, name: str) -> "pd.Series[float]":
        """A metric or a cost by seed, of the runs that have it."""
        return self.results.get(name, pd.Series(dtype=float)).dropna()

    def estimate(self, name: str) -> Estimate:
        """Mean and interval of a metric or a cost."""
        return estimate(self.result(name).tolist())


@dataclass(frozen=True)
class Choice:
    """Groups that differ in rho only; ``best`` has the highest mean validation accuracy.

    It is None where some group has none, or where there is only one group.
    """

    groups: Sequence[Group]
    best: Group | None


@dataclass(frozen=True)
class Comparison:
    """A group against a baseline of ``equal`` cost; ``holm`` is the adjusted p value."""

    group: Group
    baseline: Group
    equal: str
    test: Paired
    holm: float


@dataclass(frozen=True)
class Study:
    """Everything that tables and figures show.

    ``columns`` tell the groups apart, ``common`` settings are the same in all runs, ``leading`` are
    the chosen groups, and all where none is chosen.
    """

    metric: str
    baseline: str
    columns: Sequence[str]
    common: Mapping[str, Any]
    groups: Sequence[Group]
    choices: Sequence[Choice]
    leading: Sequence[Group]
    comparisons: Sequence[Comparison]
    warnings: Sequence[str]

    @property
    def differing(self) -> list[str]:
        """The columns with more than one value."""
        return [c for c in self.columns if len({g.values[c] for g in self.groups}) > 1]

    def describe(self, group: Group, without: Iterable[str] = ()) -> str:
        """A group in words: method, rho and all that differs, except ``without``."""
        columns = dict.fromkeys(["method", "rho", *self.differing])
        return self.words(group, [c for c in columns if c not in without])

    def words(self, group: Group, columns: Iterable[str]) -> str:
        """The values that a group has in these columns, in words."""
        words = []
        for column in columns:
            value = group.values[column]
            if value == ABSENT or (column == "rho" and group.values["method"] == "sgd"):
                continue
            if column == "epochs":
                words.append(f"{show(value)} epochs")
            elif column in ("method", "data", "model"):
                words.append(show(value))
            else:
                words.append(f"{title(column, self.columns)} {show(value)}")
        return ", ".join(words)


def analyse(runs: Sequence[Run], metric: str, baseline: str) -> Study:
    """Group the runs, choose rho, and compare every method with the baseline.

    Args:
        runs: completed runs.
        metric: what is compared, such as ``test/acc``.
        baseline: the name of the method that others are compared with.
    """
    columns, common = _columns([run.settings for run in runs])
    groups, warnings = _groups(runs, columns, baseline)
    choices = _choices(groups)
    leading = [g for c in choices for g in (c.groups if c.best is None else [c.best])]
    tests = _comparisons(leading, columns, metric, baseline)
    study = Study(metric, baseline, columns, common, groups, choices, leading, tests, warnings)
    for group in groups:
        if len(devices := sorted({run.device for run in group.runs})) > 1:
            mixed = f"seconds are a mean over different devices ({', '.join(devices)})"
            warnings.append(f"{study.describe(group)}: {mixed}")
    for choice in choices:
        seeds = [", ".join(str(run.seed) for run in group.runs) for group in choice.groups]
        if choice.best is not None and len({*seeds}) > 1:
            rhos = [show(group.values["rho"]) for group in choice.groups]
            listed = "; ".join(map(": ".join, zip(rhos, seeds, strict=True)))
            name = study.describe(choice.best, without=["rho"])
            warnings.append(f"{name}: not the same seeds at every rho ({listed})")
    return study


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def title(column: str, columns: Iterable[str]) -> str:
    """A column's name without its parents, unless another one ends the same way."""
    name = column.rpartition(".")[2]
    return name if [c.rpartition(".")[2] for c in columns].count(name) == 1 else column


def is_subject(column: str) -> bool:
    """Whether a column says what is trained on what, rather than how."""
    return column.partition(".")[0] in ("data", "model")


def _columns(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The keys that differ between runs, and the settings that are common to all.

    A key that some runs do not have, because they are of another method, data set or version,
    differs only if those that have it disagree, or if ``_added``.
    """
    values = {
        key: {run.get(key, ABSENT) for run in settings if key in run or _added(key, run)}
        for key in dict.fromkeys(key for run in settings for key in run)
        if key not in SHOWN
    }
    differing = [k for k, found in values.items() if len(found) > 1 and not _implied(k, settings)]
    subjects = [c for c in differing if is_subject(c)]
    columns = [*subjects, *SHOWN, *(c for c in differing if c not in subjects)]
    return columns, {k: next(iter(found)) for k, found in values.items() if len(found) == 1}


def _added(key: str, run: Mapping[str, Any]) -> bool:
    """Whether a run without this key differs from one that has it.

    It does without a callback, or an argument of trainer or optimizer that no file of ``conf`` has.
    Any other key may be younger than the run.
    """
    part, *names = key.split(".")
    if part == "callbacks":  # the arguments of one count where there is one
        return len(names) == 1 or f"{part}.{names[0]}" in run
    return part in ("trainer", "optimizer") and key not in _defaults(part)


@cache
def _defaults(part: str) -> set[str]:
    """The keys of ``conf/part``, in dotted form; some of its files name the part, some do not."""
    files: list[Any] = [OmegaConf.load(file) for file in (CONF / part).glob("*.yaml")]
    keys = {key for file in files for key in flat(OmegaConf.to_container(file))}
    return {f"{part}.{key.removeprefix(f'{part}.')}" for key in keys}


def _implied(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key only spells out the name of the part that it belongs to."""
    if not key.endswith("._target_") and key not in ("data.mean", "data.std"):
        return False
    pairs = {(run.get(key.partition(".")[0]), run[key]) for run in settings if key in run}
    return len(pairs) == len({name for name, _ in pairs})


def _groups(
    runs: Iterable[Run], columns: Sequence[str], baseline: str
) -> tuple[list[Group], list[str]]:
    """Runs with equal values in the columns; of two with the same seed the later one counts."""
    found: dict[tuple[Any, ...], dict[Any, Run]] = {}
    warnings = []
    for run in sorted(runs, key=lambda run: (run.written, str(run.folder))):
        seeds = found.setdefault(tuple(run.settings.get(c, ABSENT) for c in columns), {})
        if (earlier := seeds.get(run.identity)) is not None:
            counts = f"{run.folder} counts, the earlier {earlier.folder} does not"
            warnings.append(f"seed {run.seed} was run twice: {counts}")
        seeds[run.identity] = run

    def order(group: Group) -> list[tuple[bool, Any]]:
        values = [(c, group.values[c]) for c in columns if c != "rho"]
        ranks = [(c == "method" and value != baseline, _rank(value)) for c, value in values]
        return [*ranks, (False, _rank(group.values["rho"]))]

    groups = [
        Group(dict(zip(columns, key, strict=True)), [seeds[s] for s in sorted(seeds, key=_rank)])
        for key, seeds in found.items()
    ]
    return sorted(groups, key=order), warnings


def _rank(value: Any) -> tuple[bool, float, str]:
    """A key to sort by: numbers by size, then everything else as text."""
    number = isinstance(value, int | float)
    return not number, value if number else 0, "" if number else str(value)


def _choices(groups: Iterable[Group]) -> list[Choice]:
    """The rho with the best validation accuracy; of equals the smallest."""
    variants: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        key = tuple(value for column, value in group.values.items() if column != "rho")
        variants.setdefault(key, []).append(group)
    choices = []
    for variant in variants.values():
        means = [group.estimate(SELECTION).mean for group in variant]
        choosable = len(means) > 1 and not any(map(math.isnan, means))
        choices.append(Choice(variant, variant[means.index(max(means))] if choosable else None))
    return choices


def _comparisons(
    leading: Sequence[Group], columns: Iterable[str], metric: str, baseline: str
) -> list[Comparison]:
    """Every group with every baseline of the same settings and as many epochs or passes."""
    same = [c for c in columns if c not in SHOWN and not c.startswith("method.")]
    pairs = [
        (group, other, equal)
        for group in leading
        for other in leading
        if other.values["method"] == baseline != group.values["method"]
        and all(group.values[c] == other.values[c] for c in same)
        and (equal := _equal_cost(group, other))
    ]
    tests = [_test(group, other, metric) for group, other, _ in pairs]
    adjusted = holm([test.p for test in tests])
    return [
        Comparison(*pair, test, p) for pair, test, p in zip(pairs, tests, adjusted, strict=True)
    ]


def _equal_cost(group: Group, other: Group) -> str:
    passes = [g.estimate("total_passes").mean for g in (group, other)]
    same_epochs = group.values["epochs"] == other.values["epochs"] != ABSENT
    same = {"epochs": same_epochs, "passes": math.isclose(*passes, rel_tol=0.01)}
    return " and ".join(name for name, equal in same.items() if equal)


def _test(group: Group, other: Group, metric: str) -> Paired:
    """The paired test over the seeds that both groups have."""
    first, second = group.result(metric), other.result(metric)
    seeds = [seed for seed in first.index if seed in second.index]
    return paired(first[seeds].tolist(), second[seeds].tolist())
