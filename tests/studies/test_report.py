"""The report: statistics against closed forms, everything else on folders of runs."""

import csv
import itertools
import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy import special, stats

from sam_lightning.config.conf import CONF, DEFAULTS
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.text import clean
from sam_lightning.studies.report import figures, tables
from sam_lightning.studies.report.command import main
from sam_lightning.studies.report.comparison import Study, analyse
from sam_lightning.studies.report.files import choices_by_validation, without_baseline
from sam_lightning.studies.report.runs import curve, passes_per_step, read_runs
from sam_lightning.studies.report.statistics import estimate, holm, paired


@cache
def composed(*overrides):
    with initialize_config_dir(str(CONF), **DEFAULTS):
        cfg = compose("train", ["experiment=quickstart", *overrides])
    cfg.output_dir = ""
    return json.dumps(OmegaConf.to_container(cfg, resolve=True))


def leave(folder, *overrides, acc=0.5, val=None, seed=0, written=None, **summary):
    """What a run with these overrides leaves in ``folder``, with a given test accuracy."""
    config = json.loads(composed(*overrides))
    config |= {"seed": seed, "output_dir": str(folder)}
    metrics = {"train/acc": 0.9, "train/loss": 0.3, "test/acc": acc, "test/loss": 1 - acc}
    metrics |= {"test/error": 1 - acc}
    metrics |= {} if val is None else {"val/acc": val, "val/error": 1 - val}
    found = {
        "status": "completed",
        "exit_reason": "completed",
        "metrics": metrics,
        "seconds": 12.0,
        "train_seconds": 10.0,
        "images_per_second": 500.0,
        "peak_memory_bytes": 1,
        "epochs": config["epochs"],
        "updates": 10,
        "devices": 1,
        "device": "cpu",
        "versions": {"python": "3"},
        "git_commit": None,
        "config": config,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found | summary))
    if written is not None:
        os.utime(folder / "metrics.json", (written, written))
    return folder


def leave_seeds(folder, *overrides, accs, vals=None, **summary):
    for seed, acc in enumerate(accs):
        val = None if vals is None else vals[seed]
        leave(folder / str(seed), *overrides, acc=acc, val=val, seed=seed, **summary)


def sizes(study):
    return study.runs.groupby(level=0).size().tolist()


def study_of(*folders, metric="test/acc", baseline="sgd"):
    runs, left_out, warnings = read_runs(folders)
    assert not left_out
    assert not warnings
    return analyse(runs, metric, baseline)


# ---- statistics


def test_interval_of_a_mean():
    found = estimate([1.0, 2.0, 3.0])
    # The 97.5 % quantile of Student's t with 2 degrees of freedom has a closed form.
    u = 2 * 0.975 - 1
    quantile = u * math.sqrt(2 / (1 - u**2))
    assert (found["n"], found["mean"], found["sd"]) == (3, 2, 1)
    assert found["half"] == pytest.approx(quantile / math.sqrt(3), rel=1e-12)

    values = np.random.default_rng(0).normal(0.9, 0.02, 7)
    found = estimate(values)
    low, high = stats.t.interval(0.95, 6, values.mean(), stats.sem(values))
    expected = pytest.approx((low, high))
    assert (found["mean"] - found["half"], found["mean"] + found["half"]) == expected


def test_intervals_hold_what_they_promise():
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 3))
    covered = np.mean([abs(f["mean"] - 3) <= f["half"] for f in map(estimate, draws)])
    assert 0.935 < covered < 0.965  # four standard errors


def test_one_value_has_no_interval_and_none_no_mean():
    found = estimate([0.7])
    assert (found["n"], found["mean"]) == (1, 0.7)
    assert np.isnan([found["sd"], found["half"]]).all()
    assert estimate([])["n"] == 0


@pytest.mark.parametrize("pairs", [2, 3, 5, 6, 10])
def test_paired_against_closed_forms(pairs):
    first, second = np.random.default_rng(pairs).normal(0.8, 0.05, (2, pairs))
    found = paired(first, second)
    expected = estimate(first - second)
    assert found == found | expected
    # The regularized incomplete beta function is the two tails of Student's t.
    t2 = pairs * (expected["mean"] / expected["sd"]) ** 2
    p = special.betainc((pairs - 1) / 2, 0.5, (pairs - 1) / (pairs - 1 + t2))
    assert found["p"] == pytest.approx(p)
    assert math.isnan(found["wilcoxon"]) == (pairs < 6)
    if pairs >= 6:
        assert found["wilcoxon"] == pytest.approx(wilcoxon_by_enumeration(first - second))


@pytest.mark.parametrize("pairs", [6, 9, 13])
def test_the_signed_rank_test_is_exact_also_with_ties_and_zeros(pairs):
    differences = np.random.default_rng(3).integers(-3, 6, pairs).astype(float)
    differences[:4] = (0, 1, -1, 5)
    found = paired(differences, np.zeros(pairs))["wilcoxon"]
    assert found == pytest.approx(wilcoxon_by_enumeration(differences[differences != 0]))


def wilcoxon_by_enumeration(differences):
    """Of all assignments of signs, the share with a sum of ranks at least as extreme."""
    sizes = np.abs(differences)[:, None]
    ranks = np.mean((sizes > sizes.T) * 2.0 + (sizes == sizes.T), axis=1) * len(sizes) / 2 + 0.5
    seen = abs(np.sum(ranks * np.sign(differences)))
    signs = np.array(list(itertools.product((-1, 1), repeat=len(ranks))))
    return np.mean(np.abs(signs @ ranks) >= seen)


def test_equal_differences_have_no_t_test():
    found = paired([0.3, 0.5, 0.9], [0.2, 0.4, 0.8])  # 0.1 up to rounding
    assert found["mean"] == pytest.approx(0.1)
    assert math.isnan(found["p"])
    same = paired([0.5] * 6, [0.5] * 6)
    assert np.isnan([same["p"], same["wilcoxon"]]).all()


def test_one_pair_has_no_test():
    found = paired([0.6], [0.5])
    assert found["n"] == 1
    assert np.isnan([found["p"], found["half"]]).all()
    assert paired([], [])["n"] == 0


def test_holm_by_hand_and_as_a_closed_test():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert len(holm([])) == 0
    assert holm([0.2]) == [0.2]
    p = list(np.random.default_rng(2).uniform(0, 0.3, 6))
    # Closed testing with Bonferroni: reject one where every set that holds it is rejected.
    subsets = [s for k in range(1, 7) for s in itertools.combinations(range(6), k)]
    closed = [
        max(min(1, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in range(6)
    ]
    assert holm(p) == pytest.approx(closed)
    untested = holm([0.04, math.nan, 0.01])  # one that is no test is not counted
    assert untested == pytest.approx([0.04, math.nan, 0.02], nan_ok=True)


# ---- reading runs


def test_only_completed_runs_count_and_the_others_are_named(tmp_path):
    leave(tmp_path / "good")
    leave(tmp_path / "bad", status="failed", exit_reason="ValueError: no")
    leave(tmp_path / "stopped", status="interrupted", exit_reason="KeyboardInterrupt: ")
    torn = leave(tmp_path / "torn") / "metrics.json"
    torn.write_text(torn.read_text()[:100])
    (leave(tmp_path / "list") / "metrics.json").write_text("[]")
    (leave(tmp_path / "bytes") / "metrics.json").write_bytes(b"\xff\xfe")
    leave(tmp_path / "empty", metrics={})
    (tmp_path / "killed" / ".hydra").mkdir(parents=True)
    (tmp_path / "killed" / ".hydra" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "no_run").mkdir()

    runs, left_out, _ = read_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["good"]
    assert {run.folder.name: run.state for run in left_out} == {
        "bad": "failed",
        "stopped": "interrupted",
        "torn": "damaged",
        "list": "damaged",
        "bytes": "damaged",
        "empty": "damaged",
        "killed": "unfinished",
    }
    assert {run.folder.name: run.reason for run in left_out}["bad"] == "ValueError: no"


def test_a_run_counts_once_however_often_it_is_named(tmp_path, monkeypatch):
    leave(tmp_path / "sweep" / "0_rho=0.1")
    (tmp_path / "latest").symlink_to(tmp_path / "sweep")
    (tmp_path / "sweep" / "around").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "sweep"
    folders = [sweep, tmp_path, Path("sweep"), sweep / "0_rho=0.1", Path("latest")]
    runs, left_out, _ = read_runs(folders)
    assert (len(runs), left_out) == (1, [])


@pytest.mark.slow
def test_hostile_files(tmp_path, capsys):
    """What no run writes neither stops the report nor reaches the terminal or its tables."""
    escape = "\x1b[2J \ud800 | <b>\n# x"
    for name, change in {
        "text": {"config": {"seed": 0, "model": {"note": escape}, "folder": 2}, "device": escape},
        "other": {"config": {"seed": 0, "model": {"note": 1}, "folder": 1}},
        "list": {"config": {"seed": [1], "epochs": [1], "method": {"name": [1], "rho": {}}}},
        "huge": {"metrics": {"test/acc": 10**400, "test/loss": 10**300, escape: 1, "run": 1}},
        "failed": {"status": "failed", "exit_reason": escape},
    }.items():
        leave(tmp_path / name, **change)
    (leave(tmp_path / "digits") / "metrics.json").write_text("9" * 5000)
    (leave(tmp_path / "deep") / "metrics.json").write_text("[" * 100_000)
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "metrics.json")
    main([str(tmp_path), "formats=png", "metric=test/loss"])
    texts = [path.read_text() for path in (tmp_path / "report").glob("report.*")]
    said = capsys.readouterr()
    shown = "".join([*texts, said.out, said.err])
    assert shown.replace("\n", "").isprintable()
    assert "left out: 2 damaged, 1 failed, 1 unfinished" in said.out
    assert "test/acc=inf" in said.err
    text = (tmp_path / "report" / "report.md").read_text()
    assert "\\|" in text
    assert not re.search(r"^# x|(?<!\\)<b>", text, re.MULTILINE)


def test_files_of_other_versions(tmp_path):
    for name, content in {
        "bare": {"status": "completed", "metrics": {"test/acc": 0.5}},
        "odd": {"status": "completed", "metrics": {"test/acc": 0.5}, "config": {"method": "sam"}},
        "none": {"metrics": {"test/acc": 0.5}},
        "text": {"status": "completed", "metrics": "good"},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    leave(tmp_path / "today", acc=0.7)
    runs, left_out, _ = read_runs([tmp_path])
    assert sorted(run.folder.name for run in runs) == ["bare", "odd", "today"]
    assert {run.folder.name: run.state for run in left_out} == {
        "none": "unknown",
        "text": "damaged",
    }
    main([str(tmp_path), "formats=png"])
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        seeds = {Path(row["folder"]).name: row["seed"] for row in csv.DictReader(file)}
    assert seeds == {"bare": "", "odd": "", "today": "0"}


def test_a_key_that_old_runs_lack_does_not_tell_groups_apart(tmp_path):
    leave_seeds(tmp_path / "new", "rho=0.1", accs=[0.5, 0.6])
    old = leave(tmp_path / "old", "rho=0.1", acc=0.7, seed=2) / "metrics.json"
    summary = json.loads(old.read_text())
    del summary["config"]["method"]["every"], summary["config"]["data"]["sampler"]
    del summary["config"]["trainer"]["deterministic"], summary["config"]["optimizer"]["momentum"]
    old.write_text(json.dumps(summary))
    study = study_of(tmp_path)
    assert len(study.settings) == 1
    assert study.runs["seed"].tolist() == [0, 1, 2]


def test_metrics_that_are_not_finite_are_left_out_with_a_warning(tmp_path):
    metrics = {"test/acc": 0.1, "test/loss": math.nan, "val/loss": math.inf}
    leave(tmp_path / "run", metrics=metrics)
    (run,), _, warnings = read_runs([tmp_path])
    assert {*run.results} & {*metrics} == {"test/acc"}
    assert [re.search(r"(\S+)=(\w+) is not finite", w).groups() for w in warnings] == [
        ("test/loss", "nan"),
        ("val/loss", "inf"),
    ]


@pytest.mark.parametrize(
    ("method", "passes"),
    [
        ({"name": "sgd", "rho": 0.0}, 1),
        ({"name": "sgd", "rho": 0.05}, 1),
        ({"name": "sam", "rho": 0}, 1),
        ({"name": "sam", "rho": 0.1}, 2),
        ({"name": "sam", "rho": 0.1, "ascent_fraction": 0.25, "every": 1}, 1.25),
        ({"name": "sam", "rho": 0.1, "ascent_fraction": 1.0, "every": 5}, 1.2),
        ({"name": "asam", "rho": 1, "ascent_fraction": 0.5, "every": 2}, 1.25),
        ({"name": "new", "rho": 0.1, "passes": 3}, 3),
        ({}, None),
        ({"name": "sam", "rho": 0.1, "ascent_steps": 3}, 4),
        ({"name": "sam", "rho": 0.1, "ascent_steps": 3, "every": 2}, 2.5),
        ({"name": "esam", "rho": 0.1, "descent_fraction": 0.5}, pytest.approx(11 / 6)),
        ({"name": "msam", "rho": 0.1, "passes": 1}, 1),
    ],
)
def test_passes_per_step(method, passes):
    assert passes_per_step(method) == passes


def test_costs_of_a_run(tmp_path):
    leave(tmp_path / "a", "rho=0.1", "epochs=7")
    (run,), _, _ = read_runs([tmp_path])
    assert (run.results["total_passes"], run.results["train_seconds"]) == (14, 10)


def test_a_run_without_graphs_is_like_one_of_before_there_were_any(tmp_path):
    old = json.loads((leave(tmp_path / "old") / "metrics.json").read_text())
    assert old["config"].pop("cuda_graph") is False
    (tmp_path / "old" / "metrics.json").write_text(json.dumps(old))
    leave(tmp_path / "new", seed=1)
    assert sizes(study_of(tmp_path)) == [2]


def test_curves_by_epoch(tmp_path):
    (run,), _, _ = read_runs([leave(tmp_path / "run")])
    (run.folder / "metrics.csv").write_text(
        "epoch,step,test/acc,train/acc,val/acc\n"
        "0,5,,0.2,\n0,10,,0.4,\n0,5,,,0.1\n0,10,,,0.3\n1,15,,0.5,\n1,20,,,0.6\n,20,0.9,,\n"
    )
    assert dict(curve(run.folder, "val/acc")) == {1: 0.3, 2: 0.6}
    assert dict(curve(run.folder, "train/acc")) == pytest.approx({1: 0.3, 2: 0.5})
    assert curve(run.folder, "val/acc5").empty
    # Epochs of 5 updates, a row every 4: rows are means over 4, 1, 3, 2, 2 and 3 updates.
    losses = np.random.default_rng(0).random(15)
    (run.folder / "metrics.csv").write_text("epoch,step,train/loss,val/acc\n")
    with (run.folder / "metrics.csv").open("a") as file:
        for first, last in itertools.pairwise((0, 4, 5, 8, 10, 12, 15)):
            file.write(f"{(last - 1) // 5},{last},{losses[first:last].mean()},\n")
            file.write(f"{(last - 1) // 5},{last},,0.5\n" if last % 5 == 0 else "")
    means = {epoch: losses[5 * epoch - 5 : 5 * epoch].mean() for epoch in (1, 2, 3)}
    assert dict(curve(run.folder, "train/loss")) == pytest.approx(means)
    (run.folder / "metrics.csv").write_text("epoch,step,val/acc\n0,5,torn")
    assert curve(run.folder, "val/acc").empty
    (run.folder / "metrics.csv").write_text("epoch,step,val/acc\nnan,5,0.5\n")
    assert curve(run.folder, "val/acc").empty
    (run.folder / "metrics.csv").unlink()
    assert curve(run.folder, "val/acc").empty
    os.mkfifo(run.folder / "metrics.csv")
    assert curve(run.folder, "val/acc").empty


# ---- grouping


def test_groups_differ_in_settings_not_in_seeds_or_paths(tmp_path):
    for noise in (0.0, 0.4):
        for width in (4, 8):
            name = f"{noise}_{width}"
            changes = [f"data.label_noise={noise}", f"model.width={width}", f"task_name={name}"]
            leave_seeds(tmp_path / name, *changes, accs=[0.5, 0.6])
    study = study_of(tmp_path)
    columns = ["data.label_noise", "model.width", "method", "rho", "epochs"]
    assert list(study.settings) == columns
    values = [[n, w, "sam", 0.05, 5] for n in (0.0, 0.4) for w in (4, 8)]
    assert study.settings.to_numpy().tolist() == values
    assert sizes(study) == [2] * 4
    assert study.common["batch_size"] == 64
    assert {"seed", "task_name", "output_dir"}.isdisjoint({*study.settings, *study.common})


def test_names_stand_for_what_they_spell_out(tmp_path):
    leave(tmp_path / "a", "method=sam")
    leave(tmp_path / "b", "method=asam")
    leave(tmp_path / "c", "method=sgd")
    leave(tmp_path / "d", "method=sgd", "model=wide_resnet28_10", "~model.width")
    assert list(study_of(tmp_path).settings) == ["model", "method", "rho", "epochs"]


def test_learning_rate_and_method_options_have_columns(tmp_path):
    leave(tmp_path / "a", "rho=0.1")
    leave(tmp_path / "b", "rho=0.1", "lr=0.2")
    leave(tmp_path / "c", "rho=0.1", "method.every=5")
    study = study_of(tmp_path)
    assert list(study.settings) == ["method", "rho", "epochs", "method.every", "optimizer.lr"]
    assert study.describe(2) == "sam, rho 0.1, every 5, lr 0.1"
    assert [*tables.results(study).head[:5]] == ["method", "rho", "epochs", "every", "lr"]


def test_image_folders_are_told_apart_by_their_names(tmp_path):
    source = "sam_lightning.data.sources.image_folder"
    for name in ("cats", "dogs"):
        changes = [f"data.source._target_={source}", f"+data.source.root=/photos/{name}"]
        leave(tmp_path / name, *changes)
    found = study_of(tmp_path).settings["data"]
    assert found.tolist() == ["image_folder cats", "image_folder dogs"]


def test_callbacks_that_change_training_tell_groups_apart(tmp_path):
    stop = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, patience: 3}"
    leave(tmp_path / "a", stop)
    leave(tmp_path / "b", stop.replace("3", "9"))
    leave(tmp_path / "c", "~callbacks.best")
    leave(tmp_path / "d", seed=1)
    study = study_of(tmp_path)
    assert "callbacks.stop.patience" in study.settings
    assert sorted(sizes(study)) == [1, 1, 2]
    assert {*study.settings["callbacks.stop"]} == {"EarlyStopping", "–"}
    with_and_without = study_of(tmp_path / "a", tmp_path / "c", tmp_path / "d")
    assert list(with_and_without.settings) == ["method", "rho", "epochs", "callbacks.stop"]
    assert sizes(with_and_without) == [1, 2]


@pytest.mark.parametrize(
    "changes",
    [
        ([], ["+trainer.limit_train_batches=0.5"]),
        ([], ["+trainer.fast_dev_run=true"]),
        (["optimizer=adamw"], ["optimizer=adamw", "+optimizer.amsgrad=true"]),
        (["data=svhn"], ["data=svhn", "data.source.extra=true"]),
        (["+data.source.file=a.npz"], ["+data.source.file=b.npz"]),
    ],
    ids=str,
)
def test_what_only_some_runs_were_given_tells_groups_apart(tmp_path, changes):
    for name, own in zip("ab", changes, strict=True):
        leave(tmp_path / name, *own)
    assert sizes(study_of(tmp_path)) == [1, 1]


def test_without_radius_every_method_is_sgd_and_the_later_run_counts(tmp_path):
    leave(tmp_path / "early", "method=sgd", acc=0.1, written=1000)
    leave(tmp_path / "late", "rho=0", acc=0.2, written=2000)
    leave(tmp_path / "other", "rho=0", acc=0.4, seed=1, written=500)
    study = study_of(tmp_path)
    assert study.settings[["method", "rho"]].to_numpy().tolist() == [["sgd", 0]]
    assert study.estimates["test/acc"]["mean"].tolist() == pytest.approx([0.3])
    (warning,) = study.warnings
    assert re.search(r"seed 0 was run twice: .*late counts, the earlier .*early does not", warning)


def test_error_is_what_is_missing_in_the_accuracy(tmp_path):
    leave(tmp_path / "a", metrics={"test/acc": 0.75, "val/acc": 0.5})
    found = study_of(tmp_path).estimates
    assert found["test/error"]["mean"].tolist() == [0.25]
    assert found["val/error"]["mean"].tolist() == [0.5]
    assert found["val/acc5"]["n"].tolist() == [0]


# ---- choosing rho


def test_rho_is_chosen_on_validation_data_where_test_would_choose_another(tmp_path):
    leave_seeds(tmp_path / "0.05", "rho=0.05", accs=[0.7, 0.7], vals=[0.5, 0.6])
    leave_seeds(tmp_path / "0.1", "rho=0.1", accs=[0.6, 0.6], vals=[0.7, 0.8])
    leave_seeds(tmp_path / "0.2", "rho=0.2", accs=[0.9, 0.9], vals=[0.6, 0.7])
    study = study_of(tmp_path)
    assert study.choices == {(0, 1, 2): 1}
    (line,) = choices_by_validation(study)
    assert "rho 0.1 is best on validation data (validation accuracy 75.00 ± " in line
    assert "tried" not in line
    assert study.leading == [1]


def test_learning_rates_are_chosen_too_and_a_method_meets_the_tuned_baseline(tmp_path):
    for lr, val in (("0.01", 0.5), ("0.03", 0.7), ("0.1", 0.6)):
        leave_seeds(
            tmp_path / f"sgd{lr}", "method=sgd", f"lr={lr}", accs=[0.5, 0.6], vals=[val] * 2
        )
    for rho, val in (("0.1", 0.7), ("0.2", 0.8)):
        changes = ["method=sam", "lr=0.01", f"rho={rho}"]
        leave_seeds(tmp_path / f"sam{rho}", *changes, accs=[0.7, 0.9], vals=[val] * 2)
    study = study_of(tmp_path)
    of_sgd, of_sam = choices_by_validation(study)
    assert of_sgd.startswith("sgd: lr 0.03 is best")
    assert of_sgd.endswith("of 0.01, 0.03, 0.1")
    assert "rho 0.2 is best" in of_sam
    assert of_sam.endswith("it is the largest tried")
    (test,) = study.comparisons.to_dict("records")
    assert study.settings.at[test["baseline"], "optimizer.lr"] == 0.03
    assert test["mean"] == pytest.approx((0.2 + 0.3) / 2)


def test_learning_rates_that_nothing_chooses_are_not_compared_with_others(tmp_path):
    for lr in ("0.01", "0.03"):
        leave_seeds(tmp_path / f"sgd{lr}", "method=sgd", f"lr={lr}", accs=[0.5, 0.6])
    leave_seeds(tmp_path / "sam", "method=sam", "lr=0.01", "rho=0.1", accs=[0.7, 0.9])
    study = study_of(tmp_path)
    (test,) = study.comparisons.to_dict("records")
    assert study.settings.at[test["baseline"], "optimizer.lr"] == 0.01


def test_without_validation_data_none_is_chosen(tmp_path):
    leave_seeds(tmp_path / "0.1", "rho=0.1", accs=[0.6, 0.6], vals=[0.7, 0.8])
    leave_seeds(tmp_path / "0.2", "rho=0.2", accs=[0.9, 0.9])
    study = study_of(tmp_path)
    assert study.choices == {(0, 1): None}
    assert "no validation data" in choices_by_validation(study)[0]
    assert study.leading == [0, 1]


def test_ties_go_to_the_smaller_rho_and_the_end_of_the_grid_is_named(tmp_path):
    for rho in (0.05, 0.1, 0.2):
        vals = [0.8] if rho < 0.2 else [0.7]
        leave_seeds(tmp_path / str(rho), f"rho={rho}", accs=[0.5], vals=vals)
    study = study_of(tmp_path)
    assert study.choices == {(0, 1, 2): 0}
    assert choices_by_validation(study)[0].endswith("it is the smallest tried")


def test_each_method_and_length_has_its_own_choice(tmp_path):
    for method, epochs, best in (("sam", 5, 0.1), ("sam", 10, 0.2), ("asam", 5, 0.1)):
        for rho in (0.1, 0.2):
            changes = [f"method={method}", f"rho={rho}", f"epochs={epochs}"]
            name = f"{method}_{epochs}_{rho}"
            leave(tmp_path / name, *changes, val=0.9 if rho == best else 0.8)
    study = study_of(tmp_path)
    best = study.settings.loc[[*study.choices.values()], ["method", "epochs", "rho"]]
    assert best.to_numpy().tolist() == [["asam", 5, 0.1], ["sam", 5, 0.1], ["sam", 10, 0.2]]


def test_different_seeds_of_rhos_are_named(tmp_path):
    leave_seeds(tmp_path / "a", "rho=0.1", accs=[0.6, 0.6], vals=[0.7, 0.8])
    leave(tmp_path / "b", "rho=0.2", val=0.9)
    (warning,) = study_of(tmp_path).warnings
    assert warning == "sam: not the same seeds at every rho (0.1: 0, 1; 0.2: 0)"
    leave(tmp_path / "c", "rho=0.2", val=0.9, seed=3)  # as many
    (warning,) = study_of(tmp_path).warnings
    assert warning == "sam: not the same seeds at every rho (0.1: 0, 1; 0.2: 0, 3)"


# ---- comparing


def test_comparison_pairs_equal_seeds(tmp_path):
    sgd = {0: 0.50, 1: 0.61, 2: 0.55, 5: 0.70}
    sam = {1: 0.66, 2: 0.58, 3: 0.99, 5: 0.79}
    for seed, acc in sgd.items():
        leave(tmp_path / f"sgd{seed}", "method=sgd", acc=acc, seed=seed)
    for seed, acc in sam.items():
        leave(tmp_path / f"sam{seed}", "rho=0.1", acc=acc, seed=seed)
    (comparison,) = study_of(tmp_path).comparisons.to_dict("records")
    differences = [0.66 - 0.61, 0.58 - 0.55, 0.79 - 0.70]
    mean = sum(differences) / 3
    sd = math.sqrt(sum((d - mean) ** 2 for d in differences) / 2)
    t = mean / (sd / math.sqrt(3))
    assert (comparison["equal"], comparison["n"]) == ("epochs", 3)
    assert comparison["mean"] == pytest.approx(mean)
    # Student's t with 2 degrees of freedom again in closed form.
    assert comparison["p"] == pytest.approx(1 - t / math.sqrt(2 + t**2))
    assert comparison["half"] == pytest.approx(sd / math.sqrt(3) * 4.302652729911275)
    assert comparison["holm"] == comparison["p"]


def test_baselines_have_as_many_epochs_or_passes_and_else_the_same_settings(tmp_path):
    for epochs in (5, 10, 20):
        leave_seeds(tmp_path / f"sgd{epochs}", "rho=0", f"epochs={epochs}", accs=[0.5, 0.6, 0.4])
    leave_seeds(tmp_path / "sgd_lr", "rho=0", "epochs=10", "lr=0.2", accs=[0.5, 0.6, 0.4])
    leave_seeds(tmp_path / "sam", "rho=0.1", "epochs=5", accs=[0.7, 0.9, 0.5])
    leave_seeds(tmp_path / "half", "rho=0.1", "epochs=8", "method.ascent_fraction=0.25", accs=[0.6])
    study = study_of(tmp_path)
    found = [
        (study.describe(c.group), study.describe(c.baseline), c.equal)
        for c in study.comparisons.itertuples()
    ]
    quarter = "sam, rho 0.1, 8 epochs, ascent_fraction 0.25"
    sam = "sam, rho 0.1, 5 epochs"
    assert found == [
        (sam, "sgd, 5 epochs, lr 0.1", "epochs"),
        (sam, "sgd, 10 epochs, lr 0.1", "passes"),
        (quarter, "sgd, 10 epochs, lr 0.1", "passes"),
    ]
    adjusted = [*holm(study.comparisons["p"][:2]), math.nan]  # one pair, no test
    assert study.comparisons["holm"].tolist() == pytest.approx(adjusted, nan_ok=True)
    assert without_baseline(study) == []


def test_groups_without_a_baseline_are_named(tmp_path):
    leave_seeds(tmp_path / "sgd", "rho=0", "epochs=7", accs=[0.5, 0.6])
    leave_seeds(tmp_path / "sam", "rho=0.1", "epochs=5", accs=[0.5, 0.6])
    study = study_of(tmp_path)
    assert study.comparisons.empty
    assert without_baseline(study)[0].startswith(
        "sam, rho 0.1, 5 epochs: no sgd with the same settings"
    )
    (line,) = without_baseline(study_of(tmp_path / "sam"))
    assert "nothing is compared" in line


def test_another_baseline_is_compared_at_its_chosen_rho(tmp_path):
    for rho, val in ((0.05, 0.8), (0.1, 0.7)):
        leave_seeds(tmp_path / f"sam{rho}", f"rho={rho}", accs=[0.5, 0.6], vals=[val, val])
    leave_seeds(tmp_path / "asam", "method=asam", "rho=1", accs=[0.6, 0.65], vals=[0.9, 0.9])
    study = study_of(tmp_path, baseline="sam")
    (comparison,) = study.comparisons.to_dict("records")
    assert study.settings["rho"][comparison["baseline"]] == 0.05
    assert comparison["equal"] == "epochs and passes"
    assert comparison["mean"] == pytest.approx(0.075)


# ---- what is written


@pytest.fixture
def sweep(tmp_path):
    """Two methods and one failed run; a path with what Markdown and LaTeX would read."""
    folder = tmp_path / "logs_a" / "multi=run"
    leave_seeds(folder / "sgd", "rho=0", accs=[0.50, 0.60, 0.55], vals=[0.5, 0.5, 0.6])
    for rho, val in ((0.05, 0.6), (0.1, 0.7), (0.2, 0.65)):
        accs = [0.70 + rho, 0.66 + rho, 0.61 + rho]
        changes = [f"rho={rho}", "method.every=5"]
        leave_seeds(folder / f"{rho}", *changes, accs=accs, vals=[val - 0.01, val, val + 0.02])
    leave(folder / "broken_run", status="failed", exit_reason="TrainingError: a | b")
    for path in folder.rglob("metrics.json"):
        rows = "".join(f"{e},{e + 1},{0.1 * e + 0.1},{0.2 * e}\n" for e in range(3))
        (path.parent / "metrics.csv").write_text(f"epoch,step,val/acc,train/acc\n{rows}")
    return folder


def test_files_of_a_report(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    main([str(sweep), f"out={out}"])
    names = ["compute", "epochs", "rho"]
    images = {f"{name}.{form}" for name in names for form in ("png", "svg")}
    written = {path.name for path in out.iterdir()}
    assert written == {"report.md", "report.csv", "summary.csv", "report.tex", *images}
    printed = capsys.readouterr().out
    assert "12 runs in 4 groups; left out: 1 failed; see" in printed
    assert "rho 0.1 is best on validation data" in printed

    text = (out / "report.md").read_text()
    assert {*re.findall(r"!\[[^]]+\]\((.*?)\)", text)} == {f"{name}.png" for name in names}
    assert f"failed: {sweep / 'broken_run'}: TrainingError: a \\| b" in text
    for text_table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in text_table.splitlines()}) == 1
    # 0.80, 0.76, 0.71: mean 75.67, sd 4.51, half of the interval 4.3027 / sqrt(3) of it.
    assert re.search(r"\| sam \| 0\.1 \|.* \| 75\.67 ± 11\.20 \|", text)
    # The best of each metric is bold, whichever rho is chosen.
    bold = re.findall(r"\*\*(.*?)\*\*", text)
    assert bold == ["70.33 ± 3.79", "85.67 ± 11.20"]
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ET.parse(out / f"{name}.svg").getroot().tag.endswith("svg")


def test_tables_for_other_programs(sweep, tmp_path):
    main([str(sweep), f"out={tmp_path / 'out'}", "formats=null"])
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    for row in rows:
        summary = json.loads(Path(row["folder"], "metrics.json").read_text())
        assert float(row["test/acc"]) == summary["metrics"]["test/acc"]
        assert int(row["seed"]) == summary["config"]["seed"]
        assert float(row["rho"]) == summary["config"]["method"]["rho"]
        passes = 1 if float(row["rho"]) == 0 else 1.2
        assert float(row["total_passes"]) == pytest.approx(5 * passes)
    with open(tmp_path / "out" / "summary.csv", newline="") as file:
        groups = list(csv.DictReader(file))
    assert [g["chosen"] for g in groups] == ["0", "0", "1", "0"]
    accs = [float(r["test/acc"]) for r in rows if r["rho"] == "0.2"]
    assert float(groups[3]["test/acc mean"]) == pytest.approx(np.mean(accs))
    assert float(groups[3]["test/acc sd"]) == pytest.approx(np.std(accs, ddof=1))
    low, high = stats.t.interval(0.95, 2, np.mean(accs), stats.sem(accs))
    found = float(groups[3]["test/acc low"]), float(groups[3]["test/acc high"])
    assert found == pytest.approx((low, high))


def test_csv_keeps_all_digits(tmp_path):
    leave(tmp_path / "run", "rho=0.012345678901234567", acc=1 / 3)
    main([str(tmp_path), "formats=null"])
    with open(tmp_path / "report" / "report.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["rho"]), float(row["test/acc"])) == (0.012345678901234567, 1 / 3)


def test_latex_is_well_formed(sweep, tmp_path):
    leave(sweep / "odd", "data.label_noise=0.3", r"+model.note='50%_a&b#c$d{e}\f~g^h'")
    leave(sweep / "even", "data.label_noise=0.3", "+model.note=plain")
    main([str(sweep), f"out={tmp_path / 'out'}", "formats=null"])
    text = (tmp_path / "out" / "report.tex").read_text()
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert re.findall(r"\\begin\{(\w+)\}", body) == ["table", "tabular"] * 2
    assert re.findall(r"\\end\{(\w+)\}", body) == ["tabular", "table"] * 2
    bare = re.sub(r"\\.", "", body.replace("\\\\", ""))  # without line ends and escaped characters
    assert bare.count("{") == bare.count("}")
    for character in "_#~^%":
        assert character not in bare
    assert bare.count("$") % 2 == 0
    columns = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", body)
    for spec, part in zip(columns, body.split("\\end{tabular}"), strict=False):
        rows = [line for line in part.splitlines() if line.endswith("\\\\")]
        assert len(rows) > 1
        for row in rows:
            assert len(re.findall(r"(?<!\\)&", row)) + 1 == len(spec)
    escaped = r"50\%\_a\&b\#c\$d\{e\}\textbackslash{}f\textasciitilde{}g\textasciicircum{}h"
    assert clean(r"50%_a&b#c$d{e}\f~g^h", "latex") == escaped
    assert escaped in text
    assert clean("-1.5 ± 2, a-b", "latex") == r"$-$1.5 $\pm$ 2, a-b"


def test_figures_show_the_numbers(sweep, tmp_path):
    runs, _, _ = read_runs([sweep])
    study = analyse(runs, "test/acc", "sgd")
    figure = Figure()
    figures.metric_against_rho(study, study.settings.index, figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    (bars,) = axes.containers
    line, caps, _ = bars
    assert list(line.get_xdata()) == pytest.approx([0.05, 0.1, 0.2], rel=0.02)
    means = [100 * (1.97 / 3 + rho) for rho in (0.05, 0.1, 0.2)]
    assert list(line.get_ydata()) == pytest.approx(means)
    half = 100 * estimate([0.70, 0.66, 0.61])["half"]
    assert list(caps[1].get_ydata()) == pytest.approx([mean + half for mean in means])
    flat = next(one for one in axes.lines if one.get_label() == "sgd")
    assert list(flat.get_ydata()) == pytest.approx([55, 55])

    figure = Figure()
    figures.metric_against_epochs(study, study.settings.index, figure)
    names = [one.get_label() for one in figure.axes[0].lines]
    assert names == ["sgd", "sam, rho 0.1"]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 2, 3]
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([10, 20, 30])

    figure = Figure()
    figures.metric_against_cost(study, study.settings.index, figure)
    passes, seconds = figure.axes
    assert [c[0].get_xdata()[0] for c in passes.containers] == pytest.approx([5, 6], rel=0.02)
    assert [c[0].get_xdata()[0] for c in seconds.containers] == [10, 10]


def test_no_axis_of_accuracy_leaves_0_to_100_percent(tmp_path):
    for rho in ("rho=0.1", "rho=0.2"):
        leave_seeds(tmp_path / rho, rho, accs=[0.0, 0.9])  # an interval of 45 ± 572 %
    study = study_of(tmp_path)
    figures.metric_against_rho(study, study.settings.index, figure := Figure())
    assert figure.axes[0].get_ylim() == (-2, 102)


@pytest.mark.parametrize("length", [5, 40, 100])
def test_a_legend_covers_nothing(sweep, monkeypatch, length):
    study = analyse(read_runs([sweep])[0], "test/acc", "sgd")
    name = "$a_{$ as in no formula "[:length]
    methods = study.settings["method"]
    monkeypatch.setattr(Study, "describe", lambda self, g, without: name + methods[g] * length)
    figure = Figure(layout="constrained")
    figures.metric_against_rho(study, study.settings.index, figure)
    figure.draw_without_rendering()
    legend, axes = (part[0].get_tightbbox() for part in (figure.legends, figure.axes))
    assert not legend.overlaps(axes)
    assert axes.height > 200  # of 400 pixels
    assert axes.width > 200


@pytest.mark.slow
def test_a_figure_for_each_data_set(sweep, tmp_path):
    main([str(sweep), f"out={tmp_path / 'out'}", "formats=pdf"])
    (tmp_path / "out" / "own.pdf").touch()
    for rho in (0, 0.1):
        leave(sweep / f"noisy{rho}", f"rho={rho}", "data.label_noise=0.4")
    main([str(sweep), f"out={tmp_path / 'out'}", "formats=png"])
    names = {path.stem for path in (tmp_path / "out").glob("*.p*")}
    # The noisy runs have no metrics.csv. What the first report drew is gone.
    assert names == {"rho_1", "rho_2", "epochs_1", "compute_1", "compute_2", "own"}
    assert (
        "label_noise 0.4: test accuracy against rho" in (tmp_path / "out" / "report.md").read_text()
    )


def test_tables_and_figures_speak_of_error_where_the_metric_does(sweep, tmp_path):
    main([str(sweep), f"out={tmp_path / 'out'}", "metric=test/error", "formats=png"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "accuracy" not in text
    assert "| validation error, % | test error, % |" in text
    assert "rho 0.1 is best on validation data (validation error 29.67 ± 3.79 %)" in text
    assert re.findall(r"\*\*(.*?)\*\*", text) == ["29.67 ± 3.79", "14.33 ± 11.20"]  # the lowest
    study = analyse(read_runs([sweep])[0], "test/error", "sgd")
    for kind, plot in figures.KINDS.items():
        plot(study, study.settings.index, figure := Figure())
        assert figure.axes[0].get_ylabel().endswith(" error, %"), kind
    figures.metric_against_epochs(study, study.settings.index, figure := Figure())
    assert list(figure.axes[0].lines[0].get_ydata()) == pytest.approx([90, 80, 70])


def test_what_is_bold_is_best_for_its_data(tmp_path):
    for noise, accs in ((0, (0.8, 0.9, 0.90001)), (0.4, (0.5, 0.4, 0.45))):
        for rho, acc in zip((0, 0.1, 0.2), accs, strict=True):
            leave(tmp_path / f"{noise}{rho}", f"rho={rho}", f"data.label_noise={noise}", acc=acc)
    found = tables.results(study_of(tmp_path))
    bold = {(found.rows[row][:3], found.head[column]) for row, column in found.strong}
    best = [("0", "sam", "0.1"), ("0", "sam", "0.2"), ("0.4", "sgd", "0")]  # equal as printed
    assert bold == {(settings, "test accuracy, %") for settings in best}


def test_columns_of_choice(sweep, tmp_path, capsys):
    out = f"out={tmp_path / 'out'}"
    main([str(sweep), out, "formats=null", "columns=n,test/error,lr,rho,passes"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "\n| n | test error, % | optimizer.lr | rho | passes/step |\n| ---: | ---: |" in text
    assert "\n| 3 | 24.33 ± 11.20 | 0.1 | 0.1 | 1.2 |\n" in text
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="columns: no column rhoo; did you mean rho"):
        main([str(sweep), out, "columns=rhoo"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_labels_leave_out_what_does_not_vary(tmp_path):
    leave(tmp_path / "a", "rho=0.1", "lr=0.2")
    leave(tmp_path / "b", "rho=0.1", "data=svhn")
    leave(tmp_path / "c", "method=sgd", "data=svhn")
    leave(tmp_path / "d", "method=sgd", "data=svhn", "lr=0.3")
    study = study_of(tmp_path)
    assert {"data.flip", "optimizer.lr"} <= {*study.settings}
    names = {study.describe(group) for group in study.settings.index}
    of_data = {"svhn, sgd, lr 0.1", "svhn, sgd, lr 0.3", "svhn, sam, rho 0.1"}
    assert {frozenset(name.split(", ")) for name in names} == {
        frozenset(name.split(", ")) for name in {*of_data, "digits, sam, rho 0.1"}
    }


def test_labels_leave_out_what_the_methods_file_says(tmp_path):
    for method in ("sam", "gsam", "looksam", "sgd"):
        leave(tmp_path / method, f"method={method}")
    leave(tmp_path / "min", "method=gsam", "method.rho_min=0.01")
    study = study_of(tmp_path)
    names = [study.describe(group) for group in study.settings.index]
    rho = "rho 0.05"
    expected = ["sgd", f"gsam, {rho}", f"gsam, {rho}, rho_min 0.01", f"looksam, {rho}"]
    assert sorted(names) == sorted([*expected, f"sam, {rho}"])


def test_the_same_number_of_runs_everywhere(tmp_path, capsys):
    for i, written in enumerate((1000, 2000, 3000)):
        leave(tmp_path / str(i), seed=0, written=written)
    leave(tmp_path / "bad", status="failed")
    main([str(tmp_path), "formats=null"])
    said = "1 runs in 1 groups; 2 repeated, not counted; left out: 1 failed"
    assert f"{said}; see " in capsys.readouterr().out
    assert f"\n{said}.\n" in (tmp_path / "report" / "report.md").read_text()


def test_metrics_over_a_part_of_a_set_are_named(tmp_path):
    over = {"test": {"images": 512, "of": 10000}, "val": {"images": 9, "of": 9}, "odd": [1]}
    leave_seeds(tmp_path, accs=[0.5, 0.6], computed_over=over)
    leave(tmp_path / "odd", computed_over={"test": {"images": "x"}})
    _, _, warnings = read_runs([tmp_path])
    assert warnings == ["2 runs: test metrics are over 512 of 10,000 images"]


def test_another_metric(sweep, tmp_path):
    main([str(sweep), f"out={tmp_path / 'out'}", "metric=test/loss", "formats=null"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| test loss |" in text
    assert "## Test loss against sgd" in text
    assert "-0.2067 ± " in text  # 0.55 - 0.7567


# ---- the command


def report(*arguments, **options):
    command = [sys.executable, "-m", "sam_lightning", "report", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.slow
def test_folders_with_an_equals_sign_and_the_default_place(sweep, tmp_path):
    done = report("multi=run", "formats=null", cwd=sweep.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert (sweep / "report" / "report.md").is_file()
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    again = report("multi=run", "formats=null", cwd=sweep.parent, env=os.environ | ascii_only)
    assert (again.returncode, again.stderr) == (0, "")
    assert "75.67 ± 11.20" in (sweep / "report" / "report.md").read_text(encoding="utf-8")
    assert sorted(p.name for p in (sweep / "report").iterdir()) == [
        *("report.csv", "report.md", "report.tex", "summary.csv")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "FOLDER: must be given"),
        (["{sweep}", "basline=sam"], "basline=sam: no such key; did you mean baseline?"),
        (["{sweep}", "baseline=sa"], "baseline=sa: these runs have sam, sgd"),
        (["{sweep}", "metric=test/accuracy"], "metric=test/accuracy: allowed is val/acc, "),
        (["{sweep}", "metric=val/loss"], "metric=val/loss: these runs have test/acc, "),
        (
            ["{sweep}", "formats=png,gif"],
            "formats=png,gif: allowed is png,svg, png, svg, pdf, null",
        ),
        (["{sweep}/0_rho=0.3"], "multi=run/0_rho=0.3: no such folder"),
        (["nowhere"], "nowhere: no such folder"),
        (["{sweep}/0.1/0/metrics.json"], "metrics.json: not a folder"),
        (["{sweep}/broken_run"], "no completed run there; left out: 1 failed"),
        (["{sweep}", "out={sweep}/0.1/0/metrics.json"], "metrics.json: File exists"),
    ],
)
def test_errors_are_one_line_and_write_nothing(sweep, arguments, message, capsys):
    before = {path: path.stat().st_mtime_ns for path in sweep.rglob("*")}
    with pytest.raises(ConfigError) as caught:
        main([argument.format(sweep=sweep) for argument in arguments])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in sweep.rglob("*")} == before


def test_an_error_ends_the_process_with_code_2(tmp_path):
    done = report(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {tmp_path}: no completed run there\n"


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(sweep, tmp_path, monkeypatch):
    out = tmp_path / "out"
    main([str(sweep), f"out={out}", "formats=null"])
    before = {path.name: path.read_text() for path in out.iterdir()}
    leave(sweep / "more", "rho=0.1", "method.every=5", seed=9)
    write_text = Path.write_text

    def full(path, text, **options):
        write_text(path, text[:20], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"out=.*No space left on device"):
        main([str(sweep), f"out={out}", "formats=null"])
    assert {path.name: path.read_text() for path in out.iterdir()} == before


@pytest.mark.slow
def test_help_and_reports_need_no_torch(sweep, tmp_path):
    code = (
        "import sys; from sam_lightning.studies.report.command import main\n"
        "heavy = {'torch', 'lightning', 'matplotlib', 'pandas', 'scipy'}\n"
        "assert not heavy & {*sys.modules}, heavy & {*sys.modules}\n"
        f"main([{str(sweep)!r}, 'out={tmp_path / 'out'}'])\n"
        "assert not {'torch', 'lightning'} & {*sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = report("--help")
    assert shown.returncode == 0
    assert "metric=test/acc" in shown.stdout


@pytest.mark.slow
def test_a_real_sweep(tmp_path):
    small = ["epochs=2", "model.width=1", "data.subset=64", "data.val_size=32"]
    command = [sys.executable, str(CONF.parent / "train.py"), "-m", "experiment=quickstart", *small]
    command += ["rho=0,0.1", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    main([str(tmp_path / "sweep")])
    with open(tmp_path / "sweep" / "report" / "summary.csv", newline="") as file:
        groups = list(csv.DictReader(file))
    assert [(g["method"], float(g["rho"]), g["epochs"], g["n"]) for g in groups] == [
        ("sgd", 0, "2", "2"),
        ("sam", 0.1, "2", "2"),
    ]
    assert [float(g["total_passes"]) for g in groups] == [2, 4]
    assert list(groups[0])[:3] == ["method", "rho", "epochs"]
    for group in groups:
        accs = [
            json.loads(path.read_text())["metrics"]["test/acc"]
            for path in (tmp_path / "sweep").glob(f"*rho={float(group['rho']):g},*/metrics.json")
        ]
        assert float(group["test/acc mean"]) == pytest.approx(np.mean(accs))
    assert (tmp_path / "sweep" / "report" / "epochs.png").is_file()
