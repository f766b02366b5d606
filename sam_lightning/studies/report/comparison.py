"""Group the runs of a study over seeds, choose rho on validation data, and test the methods."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sam_lightning.config.conf import CONF, DEFAULTS, choices, flat
from sam_lightning.config.schema import METRICS
from sam_lightning.studies.report.runs import COSTS, Run
from sam_lightning.studies.report.statistics import estimate, holm, paired
from sam_lightning.studies.table import title, typed

ABSENT = "–"  # the value of a setting that a run does not have
SHOWN = ("method", "rho", "epochs")  # columns even where all runs agree
TUNED = ("rho", "optimizer.lr")  # chosen on validation data where several were tried
SUBJECTS = ("data", "model")  # what is trained on what; other columns say how


@dataclass(frozen=True, eq=False)
class Study:
    """Runs in groups that differ in the seed only, and what follows from them.

    ``settings`` has a row per group, and a column for each setting that tells groups apart;
    ``common`` has the settings that all runs share. ``runs`` has folder, seed, device, costs and
    metrics of a run in a row, with the number of its group as index.
    """

    metric: str
    baseline: str
    settings: pd.DataFrame
    runs: pd.DataFrame
    common: Mapping[str, Any]
    repeats: Sequence[str]

    @cached_property
    def estimates(self) -> dict[str, pd.DataFrame]:
        """Of every cost and metric ``n``, ``mean``, ``sd`` and the interval, a row per group."""
        groups = self.runs.drop(columns=["folder", "seed", "device"]).groupby(level=0)
        return {
            name: pd.DataFrame([estimate([*values.dropna()]) for _, values in groups[name]])
            for name in groups.obj
        }

    @cached_property
    def choices(self) -> dict[tuple[int, ...], int | None]:
        """Of groups that differ in ``TUNED`` only, the best on validation data; None if unknown."""
        others = [column for column in self.settings if column not in TUNED]
        choices: dict[tuple[int, ...], int | None] = {}
        for _, variants in self.settings.groupby(others, sort=False, dropna=False):
            means = self.estimates["val/acc"]["mean"][variants.index]
            choosable = len(variants) > 1 and means.notna().all()
            choices[tuple(variants.index)] = int(means.idxmax()) if choosable else None
        return choices

    @property
    def leading(self) -> list[int]:
        """The best group of every choice, and all of a choice without one."""
        return [g for of, best in self.choices.items() for g in (of if best is None else [best])]

    @cached_property
    def comparisons(self) -> pd.DataFrame:
        """Leading groups against baselines of ``equal`` cost, by ``paired`` and ``holm``."""
        values = self.runs[["seed", self.metric]].dropna()
        rows = []
        for group, baseline in product(self.leading, repeat=2):
            if equal := self._equal(group, baseline):
                ours, theirs = (values[values.index == g] for g in (group, baseline))
                _, first, second = ours.merge(theirs, on="seed").to_numpy(float).T
                row = {"group": group, "baseline": baseline, "equal": equal}
                rows.append(row | paired(first, second))
        found = pd.DataFrame(rows)
        return found.assign(holm=holm(found["p"])) if rows else found

    def _equal(self, group: int, baseline: int) -> str:
        """In what two groups are equal that may be compared: epochs, passes, or both."""
        ours, theirs = self.settings.loc[group], self.settings.loc[baseline]
        passes = self.estimates["total_passes"]["mean"]
        free = [c for c in self.settings if c in SHOWN or c.startswith("method.")]
        unchosen = [of for of, best in self.choices.items() if best is None and len(of) > 1]
        if not {group, baseline} & {g for of in unchosen for g in of}:
            free += [c for c in TUNED if c in self.settings]
        comparable = theirs["method"] == self.baseline != ours["method"]
        if not comparable or [*ours.drop(free)] != [*theirs.drop(free)]:
            return ""
        same = {
            "epochs": ours["epochs"] == theirs["epochs"] != ABSENT,
            "passes": math.isclose(passes[group], passes[baseline], rel_tol=0.01),
        }
        return " and ".join(cost for cost, equal in same.items() if equal)

    @property
    def kind(self) -> str:
        """Whether tables and figures speak of ``acc`` or of ``error``, as the metric does."""
        return "error" if self.metric.endswith("/error") else "acc"

    @cached_property
    def subject(self) -> "pd.Series[str]":
        """The data and the model of every group in words."""
        groups = self.settings.index
        return pd.Series([self._words(group, self.subjects) for group in groups], groups)

    def best(self, metric: str) -> list[int]:
        """The groups with the best mean, as it is printed, of several with the same subject."""
        means = self.estimates[metric]["mean"].round(4)
        means = -means if metric.endswith(("error", "loss")) else means
        others = means.groupby(self.subject)
        best = (means == others.transform("max")) & (others.transform("count") > 1)
        return [*means.index[best]]

    @cached_property
    def warnings(self) -> list[str]:
        """Seeds that were run twice, and what makes groups hard to compare."""
        warnings = [*self.repeats]
        for group, devices in self.runs["device"].groupby(level=0):
            if len(found := sorted({*devices})) > 1:
                mean = f"seconds are a mean over different devices ({', '.join(found)})"
                warnings.append(f"{self.describe(group)}: {mean}")
        for groups, best in self.choices.items():
            seeds = [", ".join(map(str, self.runs["seed"][[group]])) for group in groups]
            if best is not None and len({*seeds}) > 1:
                tuned = [column for column in TUNED if column in self.settings]
                values = self.settings.loc[[*groups], tuned].map(typed).agg("/".join, axis=1)
                listed = "; ".join(map(": ".join, zip(values, seeds, strict=True)))
                name = self.describe(best, without=TUNED)
                keys = "/".join(title(column, self.settings) for column in tuned)
                warnings.append(f"{name}: not the same seeds at every {keys} ({listed})")
        return warnings

    @property
    def subjects(self) -> list[str]:
        """The settings of data and model."""
        return [c for c in self.settings if c.partition(".")[0] in SUBJECTS]

    def describe(self, group: int, without: Iterable[str] = ()) -> str:
        """A group in words: method, rho and what tells it from others, except ``without``."""
        columns = dict.fromkeys(["method", "rho", *self.settings])
        return self._words(group, [c for c in columns if c not in without])

    def _words(self, group: int, columns: Iterable[str]) -> str:
        return ", ".join(filter(None, self._said.loc[group, [*columns]]))

    @cached_property
    def _said(self) -> pd.DataFrame:
        """Every setting of every group in words, or nothing where it needs none.

        So it is if the method's file in ``conf`` says it, or if it tells the group from no other
        with the same data and model, and one that says how to train, with the same method too.
        """
        said = self.settings.map(typed)
        of_files = [_of_conf("method", name) for name in self.settings["method"]]
        for column, texts in said.items():
            of_file = [typed(keys.get(column, ABSENT)) for keys in of_files]
            unsaid = (texts == ABSENT) | (texts == of_file)
            if column == "rho":
                unsaid |= self.settings["method"] == "sgd"
            elif column != "method":
                among = [] if column in (*SUBJECTS, "epochs") else [*SUBJECTS, "method"]
                among = among[:2] if column in self.subjects else among
                same = [self.settings[c] for c in among if c in self.settings]
                others = self.settings.groupby(same or (lambda group: 0))[column]
                unsaid |= others.transform(lambda values: len({*values})) == 1
            if column == "epochs":
                texts = texts + " epochs"
            elif column not in ("method", *SUBJECTS):
                texts = f"{title(column, self.settings)} " + texts
            said[column] = texts.mask(unsaid, "")
        return said


def analyse(runs: Sequence[Run], metric: str, baseline: str) -> Study:
    """Group completed runs; of two with the same settings and seed, the later one counts."""
    columns, common = _columns([run.settings for run in runs])
    counted: dict[tuple[tuple[Any, ...], Any], Run] = {}
    repeats = []
    for run in sorted(runs, key=lambda run: (run.written, str(run.folder))):
        seed = run.folder if run.seed is None else run.seed  # an unknown seed is no repeat
        key = tuple(run.settings.get(c, ABSENT) for c in columns), seed
        if key in counted:
            counts = f"{run.folder} counts, the earlier {counted[key].folder} does not"
            repeats.append(f"seed {seed} was run twice: {counts}")
        counted[key] = run

    def order(key: tuple[tuple[Any, ...], Any]) -> list[tuple[Any, ...]]:
        values = dict(zip(columns, key[0], strict=True))
        values |= {"rho": values.pop("rho"), "seed": key[1]}  # come last
        return [(c == "method" and v != baseline, *numbers_first(v)) for c, v in values.items()]

    keys = sorted(counted, key=order)
    used = [counted[key] for key in keys]
    groups = list(dict.fromkeys(values for values, _ in keys))
    own = [{"folder": run.folder, "seed": run.seed, "device": run.device} for run in used]
    rows = [{**run.results, **names} for run, names in zip(used, own, strict=True)]
    frame = pd.DataFrame(rows, [groups.index(values) for values, _ in keys], dtype=object)
    frame = frame.reindex(columns=frame.columns.union([*COSTS, *METRICS], sort=False))
    settings = pd.DataFrame(groups, columns=columns, dtype=object)
    return Study(metric, baseline, settings, frame, common, repeats)


def numbers_first(value: Any) -> tuple[int, Any]:
    """The place of a setting's value in an order of values of all kinds."""
    return (0, value) if isinstance(value, int | float) else (1, str(value))


def _columns(settings: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, Any]]:
    """The keys that differ between runs, and the settings that are common to all.

    A key that some runs do not have differs only if those that have it disagree, or if ``_added``.
    """
    values = {
        key: {run.get(key, ABSENT) for run in settings if key in run or _added(key, run)}
        for key in dict.fromkeys(key for run in settings for key in run)
        if key not in SHOWN
    }
    differing = [k for k, found in values.items() if len(found) > 1 and not _implied(k, settings)]
    subjects = [c for c in differing if c.partition(".")[0] in SUBJECTS]
    columns = [*subjects, *SHOWN, *(c for c in differing if c not in subjects)]
    return columns, {k: next(iter(found)) for k, found in values.items() if len(found) == 1}


def _added(key: str, run: Mapping[str, Any]) -> bool:
    """Whether a run without this key differs from one that has it; else the key may be younger."""
    part, *names = key.split(".")
    if part == "callbacks":  # the arguments of one count where there is one
        return len(names) == 1 or f"{part}.{names[0]}" in run
    if part not in ("trainer", "optimizer"):
        return False
    return not any(key in _of_conf(part, name) for name in choices(part))


@cache
def _of_conf(part: str, name: str) -> dict[str, Any]:
    """The keys of ``conf/part/name.yaml`` in dotted form; none without such a file."""
    if name not in choices(part):
        return {}
    with initialize_config_dir(str(CONF), **DEFAULTS):
        found: Any = OmegaConf.to_container(compose(f"{part}/{name}"))
    return flat(found)


def _implied(key: str, settings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a key only spells out the name of the part that it belongs to."""
    if not key.endswith("._target_") and key not in ("data.mean", "data.std"):
        return False
    pairs = {(run.get(key.partition(".")[0]), run[key]) for run in settings if key in run}
    return len(pairs) == len({name for name, _ in pairs})
