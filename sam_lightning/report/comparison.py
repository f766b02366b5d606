"""Which runs repeat each other, which radius is best, and what is compared with what."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from sam_lightning.configuration import flat
from sam_lightning.explain import CONF
from sam_lightning.report.runs import Run
from sam_lightning.report.statistics import Estimate, Paired, estimate, holm, paired

ABSENT = "–"  # the value of a setting that a run does not have
SHOWN = ("method", "rho", "epochs")  # columns also where all runs agree
SELECTION = "val/acc"


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in the seed only: ``values`` of the columns, runs in order of seeds."""

    values: Mapping[str, Any]
    runs: Sequence[Run]

    def estimate(self, metric: str) -> Estimate | None:
        """Mean and interval of a final metric, over the runs that have it."""
        return estimate([v for run in self.runs if (v := run.metric(metric)) is not None])

    def mean(self, attribute: str) -> float | None:
        """The mean of an attribute of the runs, such as ``train_seconds``."""
        found = estimate([v for run in self.runs if (v := getattr(run, attribute)) is not None])
        return None if found is None else found.mean


@dataclass(frozen=True)
class Choice:
    """Groups that differ in rho only; ``best`` has the highest mean validation accuracy.

    It is None where some group has none, or there is one group and so nothing to choose.
    """

    groups: Sequence[Group]
    best: Group | None


@dataclass(frozen=True)
class Comparison:
    """A group against a baseline with as many epochs or passes; ``result`` is None without pairs.

    ``holm`` is the p value of the t test, adjusted for all comparisons of the report.
    """

    group: Group
    baseline: Group
    equal: str
    result: Paired | None
    holm: float | None = None


@dataclass(frozen=True)
class Study:
    """Everything that tables and figures show."""

    metric: str
    baseline: str
    columns: Sequence[str]
    common: Mapping[str, Any]
    groups: Sequence[Group]
    choices: Sequence[Choice]
    comparisons: Sequence[Comparison]
    warnings: Sequence[str]

    @property
    def differing(self) -> list[str]:
        """The columns that tell groups apart."""
        return [c for c in self.columns if len({g.values[c] for g in self.groups}) > 1]

    def describe(self, group: Group, without: Iterable[str] = ()) -> str:
        """A group in words: method, rho, and what else tells it from others, except ``without``."""
        others = [c for c in self.differing if c not in ("method", "rho")]
        return self.words(group, [c for c in ("method", "rho", *others) if c not in without])

    def words(self, group: Group, columns: Iterable[str]) -> str:
        """The values of a group in these columns, as far as it has them."""
        bare = ("method", "data", "model")
        words = []
        for column in columns:
            value = group.values[column]
            if value == ABSENT or (column == "rho" and group.values["method"] == "sgd"):
                continue
            name, text = title(column, self.columns), show(value)
            form = "{1}" if column in bare else "{1} epochs" if column == "epochs" else "{0} {1}"
            words.append(form.format(name, text))
        return ", ".join(words)

    @property
    def leading(self) -> list[Group]:
        """Of every method the chosen group, or all groups where none is chosen."""
        return leading(self.choices)


def analyse(runs: Sequence[Run], metric: str, baseline: str) -> Study:
    """Group the runs, choose radii and compare methods with the baseline.

    Args:
        runs: completed runs.
        metric: what is compared, such as ``test/acc``.
        baseline: the name of the method that others are compared with.
    """
    columns, common = _columns([run.settings for run in runs])
    groups, warnings = _groups(runs, columns, baseline)
    choices = _choices(groups, columns)
    comparisons = _comparisons(leading(choices), columns, metric, baseline)
    study = Study(metric, baseline, columns, common, groups, choices, comparisons, warnings)
    for group in groups:
        if len(devices := sorted({run.device for run in group.runs})) > 1:
            name = study.describe(group)
            warnings.append(
                f"{name}: seconds are a mean over different devices ({', '.join(devices)})"
            )
    for choice in choices:
        seeds = [", ".join(str(run.seed) for run in group.runs) for group in choice.groups]
        if choice.best is not None and len({*seeds}) > 1:
            rhos = [show(group.values["rho"]) for group in choice.groups]
            listed = "; ".join(f"{rho}: {of_rho}" for rho, of_rho in zip(rhos, seeds, strict=True))
            name = study.describe(choice.best, without=["rho"])
            warnings.append(f"{name}: not the same seeds at every rho ({listed})")
    return study


def leading(choices: Iterable[Choice]) -> list[Group]:
    """Of every choice the best group, or all of its groups where none is chosen."""
    return [g for c in choices for g in ([c.best] if c.best is not None else c.groups)]


def show(value: Any) -> str:
    """A value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def title(column: str, columns: Iterable[str]) -> str:
    """A column's name without its parents, unless another one ends the same way."""
    name = column.rpartition(".")[2]
    same = [c for c in columns if c.rpartition(".")[2] == name]
    return name if len(same) == 1 else column


def _columns(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The keys that differ between runs, which have a column, and those that are common to all.

    A key that some runs do not have, because they are of another method, data set or version,
    differs only if those that have it disagree, or if ``_added``.
    """
    keys = list(dict.fromkeys(key for run in settings for key in run))
    values = {
        key: {run.get(key, ABSENT) for run in settings if key in run or _added(key, run)}
        for key in keys
    }
    differing = [
        key
        for key in keys
        if key in SHOWN or (len(values[key]) > 1 and not _implied(key, settings))
    ]
    columns = [*(c for c in differing if c not in SHOWN and _is_subject(c)), *SHOWN]
    columns += [c for c in differing if c not in columns]
    common = {key: next(iter(values[key])) for key in keys if len(values[key]) == 1}
    return columns, {key: value for key, value in common.items() if key not in SHOWN}


def _added(key: str, run: Mapping[str, Any]) -> bool:
    """Whether a run without this key differs by that from one which has been given it.

    So it is with callbacks, and with arguments of trainer and optimizer that no file of ``conf``
    has. Any other key may be younger than the run.
    """
    part, *names = key.split(".")
    if part == "callbacks":  # what one is made of counts where there is one
        return len(names) == 1 or f"{part}.{names[0]}" in run
    return part in ("trainer", "optimizer") and key not in _defaults(part)


@cache
def _defaults(part: str) -> set[str]:
    """The keys of ``conf/part``, in dotted form, whether or not its files are global."""
    files = (CONF / part).glob("*.yaml")
    contents: list[Any] = [OmegaConf.to_container(OmegaConf.load(file)) for file in files]
    return {f"{part}.{key.removeprefix(f'{part}.')}" for found in contents for key in flat(found)}


def _is_subject(column: str) -> bool:
    """Whether a column says what is trained on what, rather than how."""
    return column.partition(".")[0] in ("data", "model")


def _implied(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key only spells out the name of the part that it belongs to."""
    part = key.partition(".")[0]
    if not key.endswith("._target_") and key not in ("data.mean", "data.std"):
        return False
    pairs = {(run.get(part), run[key]) for run in settings if key in run}
    return len(pairs) == len({name for name, _ in pairs})


def _groups(
    runs: Sequence[Run], columns: Sequence[str], baseline: str
) -> tuple[list[Group], list[str]]:
    found: dict[tuple[Any, ...], dict[Any, Run]] = {}
    warnings = []
    for run in sorted(runs, key=lambda r: (r.written, str(r.folder))):
        key = tuple(run.settings.get(column, ABSENT) for column in columns)
        seeds = found.setdefault(key, {})
        seed = run.folder if run.seed is None else run.seed  # one that is not known is no repeat
        if seed in seeds:
            warnings.append(
                f"seed {seed} was run twice: {run.folder} counts, "
                f"the earlier {seeds[seed].folder} does not"
            )
        seeds[seed] = run
    order = [c for c in columns if c != "rho"] + ["rho"]
    groups = []
    for key, seeds in found.items():
        ordered = sorted(seeds.items(), key=lambda item: _sortable(item[0]))
        groups.append(Group(dict(zip(columns, key, strict=True)), [run for _, run in ordered]))
    groups.sort(
        key=lambda g: [
            (c == "method" and g.values[c] != baseline, _sortable(g.values[c])) for c in order
        ]
    )
    return groups, warnings


def _sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers in front, by size; then everything else, as text."""
    number = isinstance(value, int | float)
    return not number, value if number else 0, "" if number else str(value)


def _choices(groups: Sequence[Group], columns: Sequence[str]) -> list[Choice]:
    """For all but rho: the radius with the best validation accuracy; of equals the smallest."""
    variants: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        key = tuple(group.values[column] for column in columns if column != "rho")
        variants.setdefault(key, []).append(group)
    choices = []
    for variant in variants.values():
        estimates = [group.estimate(SELECTION) for group in variant]
        best = None
        if len(variant) > 1 and None not in estimates:
            means = [found.mean for found in estimates if found is not None]
            best = variant[means.index(max(means))]
        choices.append(Choice(variant, best))
    return choices


def _comparisons(
    candidates: Sequence[Group], columns: Sequence[str], metric: str, baseline: str
) -> list[Comparison]:
    """Every candidate with every baseline of the same settings and as many epochs or passes."""
    baselines = [g for g in candidates if g.values["method"] == baseline]
    same = [c for c in columns if c not in SHOWN and not c.startswith("method.")]
    comparisons = []
    for group in candidates:
        for other in baselines if group.values["method"] != baseline else []:
            equal = _equal_cost(group, other)
            if equal and all(group.values[c] == other.values[c] for c in same):
                comparisons.append(Comparison(group, other, equal, _pair(group, other, metric)))
    tested = [
        (i, c.result.p)
        for i, c in enumerate(comparisons)
        if c.result is not None and c.result.p is not None
    ]
    for (i, _), adjusted in zip(tested, holm([p for _, p in tested]), strict=True):
        comparisons[i] = replace(comparisons[i], holm=adjusted)
    return comparisons


def _equal_cost(group: Group, other: Group) -> str:
    passes = group.mean("total_passes"), other.mean("total_passes")
    equal = []
    if group.values["epochs"] == other.values["epochs"] != ABSENT:
        equal.append("epochs")
    if None not in passes and math.isclose(*passes, rel_tol=0.01):  # type: ignore[arg-type]
        equal.append("passes")
    return " and ".join(equal)


def _pair(group: Group, other: Group, metric: str) -> Paired | None:
    values = [
        {run.seed: v for run in g.runs if (v := run.metric(metric)) is not None}
        for g in (group, other)
    ]
    seeds = [seed for seed in values[0] if seed is not None and seed in values[1]]
    return paired([values[0][s] for s in seeds], [values[1][s] for s in seeds])
