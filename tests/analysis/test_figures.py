"""Figures of the documentation: what they show is what the optimizer does."""

import json

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats
from sklearn.datasets import load_breast_cancer

import cheaper_sam
import overview
import sam_update as figures
from sam_lightning import plotting as plots
from sam_lightning.config.conf import CONF
from sam_lightning.config.errors import ConfigError


def gradient(w):
    """Of the mean logistic loss of w[0] * w[1] * radius."""
    bunch = load_breast_cancer()
    x = bunch.data[:, 0]
    x = (x - x.mean()) / x.std(ddof=1)
    malignant = bunch.target == 0
    slope = np.mean((1 / (1 + np.exp(-w[0] * w[1] * x)) - malignant) * x)
    return slope * np.array([w[1], w[0]])


def test_the_update_is_that_of_the_formula():
    options = OmegaConf.create({"start": [0.6, 1.8], "lr": 1.5})
    rho, expected = 0.4, [np.array([0.6, 1.8])]
    for _ in range(5):
        w = expected[-1]
        g = gradient(w)
        perturbed = w + rho * g / np.linalg.norm(g)
        expected += [perturbed, w - 1.5 * gradient(perturbed)]
    assert np.array(figures.walk(options, rho, 5)) == pytest.approx(np.array(expected), rel=1e-9)
    sgd = figures.walk(options, 0.0, 1)
    assert sgd[1] == sgd[0]
    assert sgd[2] == pytest.approx(expected[0] - 1.5 * gradient(expected[0]), rel=1e-9)


def test_sam_goes_on_to_where_the_valley_is_wide():
    """What the right panel shows: both end on the curve of minima, SAM at equal weights."""
    options = OmegaConf.create({key: default for key, (default, _) in figures.KEYS.items()})
    ends = [figures.walk(options, rho, 200)[-1] for rho in (0, 0.4)]
    assert np.linalg.norm(gradient(ends[0])) < 1e-6
    assert [b - a for a, b in ends] == [pytest.approx(0.67, abs=0.01), pytest.approx(0, abs=0.1)]


def test_the_command(tmp_path, capsys):
    figures.main([f"out={tmp_path}/folder/name", "steps=3"])
    assert capsys.readouterr().out.count("folder/name.") == 2
    for form in ("png", "svg"):
        assert (tmp_path / "folder" / f"name.{form}").stat().st_size > 1000


def test_the_overview_draws_the_curves_of_the_committed_runs(tmp_path, capsys):
    study = json.loads((overview.ROOT / "results/digits_label_noise/runs.json").read_text())
    ends = []
    for arm, settings, _, _ in overview.LINES:
        found = overview.curves(study["runs"], arm, settings)
        last = [r["metrics"]["val/acc"] for r in study["runs"] if r["arm"] == arm]
        assert {*found[:, -1].round(3)} <= {*(100 * np.array(last)).round(3)}
        ends.append((found.shape, found[:, -1].mean()))
    assert [shape for shape, _ in ends] == [(3, 15), (3, 15), (3, 30)]
    # As in results/digits_label_noise/report.md.
    assert [f"{end:.1f}" for _, end in ends] == ["87.7", "69.8", "68.5"]
    overview.main([f"out={tmp_path}/name"])
    assert capsys.readouterr().out.count("/name.") == 2


def test_the_interval_of_a_kept_part_ends_where_the_t_test_does_and_covers_the_truth():
    draws, covered = np.random.default_rng(0), []
    for _ in range(2000):  # gains of SAM and of a method, spread as with wrong labels
        sgd, *gains = draws.normal([0, 6.5, 4.0], [0.5, 1.5, 2.5], (5, 3)).T
        sam, method = (gain - sgd for gain in gains)
        kept, low, high = cheaper_sam.part(method, sam)
        covered.append(low <= 4 / 6.5 <= high)
    assert kept == pytest.approx(method.mean() / sam.mean())
    for end in (low, high):
        assert stats.ttest_rel(method, end * sam).pvalue == pytest.approx(0.05)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


# Study, label noise, arms of SGD and SAM in runs.json, and of each method by its name in the table.
KEPT: tuple[tuple[str, float | None, str, str, dict[str, str]], ...] = (
    (
        *("cifar10_cheaper_sam", None, "sgd", "sam"),
        {
            "msam, rho 1": "msam 1",
            "looksam, rho 0.1": "looksam 0.2",
            "looksam, rho 0.1, alpha 0.7": "looksam 0.7",
            "sam, rho 0.1, every 5": "every_5th",
            "sam, rho 0.1, ascent_fraction 0.25": "quarter",
            "sam, rho 0.1, every 2": "every_2nd",
            "esam, rho 0.1": "esam",
        },
    ),
    (
        *("cifar10_cheaper_sam_seeds", None, "sgd", "sam"),
        {"msam, rho 1": "msam", "sam, rho 0.1, every 2": "every_2nd"},
    ),
    ("cifar10_label_noise", 0.4, "sgd", "sam 0.1", {"sgd, 40 epochs": "sgd_twice"}),
    ("cifar10_label_noise", 0.6, "sgd", "sam 0.1", {"sgd, 40 epochs": "sgd_twice"}),
    ("cifar10_finetune", 0, "sgd", "sam", {"sgd, 16 epochs, lr 0.01": "sgd_twice"}),
    (
        *("cifar10_finetune", 0.4, "sgd_wrong_labels", "sam_wrong_labels"),
        {"sgd, 16 epochs, lr 0.003": "sgd_twice_wrong_labels"},
    ),
    ("digits_label_noise", None, "sgd", "sam 0.2", {"sgd, 30 epochs": "sgd_twice"}),
)


def test_the_kept_parts_are_those_of_a_plain_calculation(tmp_path, capsys):
    """From ``runs.json``, which the figure does not read."""
    shown, left_out = cheaper_sam.committed()
    points = {(p.study, p.settings): p for p in shown if p.kept[0] not in (0, 1)}
    assert len(points) == sum(len(methods) for *_, methods in KEPT)
    for study, noise, sgd, sam, methods in KEPT:
        runs = json.loads((cheaper_sam.ROOT / f"results/{study}/runs.json").read_text())["runs"]
        accuracy: dict[str, dict[int, float]] = {}
        for run in runs:
            settings = {**run["settings"]}
            if settings.pop("data.label_noise", noise) == noise:
                arm = " ".join([run["arm"], *map(str, settings.values())])
                accuracy.setdefault(arm, {})[run["seed"]] = run["metrics"]["test/acc"]
        seeds = sorted(accuracy[sgd])
        title = study if noise is None else f"{study}, label_noise {noise:g}"
        for name, arm in methods.items():
            ours, of = (
                np.array([accuracy[a][s] - accuracy[sgd][s] for s in seeds]) for a in (arm, sam)
            )
            point = points[title, name]
            kept, *ends = point.kept
            assert kept == pytest.approx(ours.mean() / of.mean())
            for end in ends:
                assert stats.ttest_rel(ours, end * of).pvalue == pytest.approx(0.05)
            assert point.accuracy[0] == pytest.approx(np.mean([*accuracy[arm].values()]))
            assert point.seeds == len(seeds) == len(accuracy[arm])
    # No part of a gain that is not significant, and no word of studies of one seed.
    assert left_out == ["cifar10_label_noise, label_noise 0: SAM - SGD = 1.0, p = 0.10"]
    cheaper_sam.main([f"out={tmp_path}/name"])
    printed = capsys.readouterr().out
    assert printed.count("/name.") == 2
    page = (cheaper_sam.ROOT / "docs/results.md").read_text()
    assert cheaper_sam.table(shown).markdown() in page
    assert cheaper_sam.table(shown).markdown() in printed


def test_a_method_has_one_colour_in_every_figure():
    assert plots.METHODS.keys() == {file.stem for file in (CONF / "method").glob("*.yaml")}
    assert len({*plots.METHODS.values()}) == len(plots.METHODS)
    sgd, sam = plots.METHODS["sgd"], plots.METHODS["sam"]
    assert plots.colours(["SAM, rho 0.1", "sgd, 15 epochs", "SGD"]) == [sam, sgd, sgd]
    assert plots.colours(["base optimizer, seed 1", "sam_on"]) == [sgd, plots.METHODS["sam_on"]]
    # Names that are of no method have colours of their own, as long as there are any.
    count = len(plots.METHODS)
    others = plots.colours(["sam", *(f"run {i}" for i in range(count - 1)), "one more"])
    assert len({*others[:count]}) == count
    assert others[count] == others[1]


def test_names_that_differ_at_their_end_are_told_apart_where_they_are_cut():
    cut = [plots.plain(f"a class with a long name, {i}$", 12) for i in (1, 2)]
    assert cut == [r"a clas…e, 1\$", r"a clas…e, 2\$"]
    assert plots.plain("twelve signs", 12) == "twelve signs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["start=3"], "start=3: allowed is two numbers from -1000 to 1000"),
        (["rh=1"], "rh=1: no such key; did you mean rho?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, message):
    with pytest.raises(ConfigError) as raised:
        figures.main(arguments)
    assert str(raised.value) == message
