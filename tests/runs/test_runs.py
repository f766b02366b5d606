"""Whole runs: what they leave, that they repeat and resume bit for bit, and that sweeps hold."""

import math
import signal
from datetime import datetime, timedelta, timezone

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from inject import forked
from runs import (
    SMALL,
    WITH_DASHBOARD,
    column,
    command,
    configuration,
    equal,
    jobs,
    only_run,
    rows,
    run,
    started,
    summary,
    weights,
)
from sam_lightning.config.conf import CONF, top_level
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.config.schema import METRICS, check

# ------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("finished")
    done = command(cwd, *WITH_DASHBOARD, "data.val_size=100")
    assert done.returncode == 0, done.stderr
    return done, only_run(cwd)


def test_files(finished):
    _, folder = finished
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    events = {f for f in files if f.startswith("tensorboard/events.out.tfevents.")}
    assert events
    assert files - events == {
        ".hydra/config.yaml",
        ".hydra/hydra.yaml",
        ".hydra/overrides.yaml",
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "metrics.csv",
        "metrics.json",
        "tensorboard/hparams.yaml",
        "train.log",
    }


def test_output_is_a_line_per_epoch_and_the_results(finished):
    done, folder = finished
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    named = ["folder", "train", "val", "test", "model", "device", "steps", "epoch", "epoch"]
    assert [line.split()[0] for line in lines[:9]] == named
    assert lines[7].startswith("epoch 1/2  train/loss ")
    assert lines[8].startswith("epoch 2/2  train/loss ")
    assert "sam, rho 0.05" in lines[9]
    for shown in ("test accuracy", "validation accuracy", f"logs/train/runs/{folder.name}"):
        assert shown in done.stdout


def test_summary(finished):
    _, folder = finished
    found = summary(folder)
    assert found["status"] == found["exit_reason"] == "completed"
    assert set(found["metrics"]) == set(METRICS)
    assert found["metrics"]["test/error"] == pytest.approx(1 - found["metrics"]["test/acc"])
    assert found["seconds"] > found["train_seconds"] > 0
    finished = datetime.fromisoformat(found["finished"])  # with a zone
    assert timedelta(0) <= datetime.now(timezone.utc) - finished < timedelta(minutes=5)
    assert found["images_per_second"] == pytest.approx(200 / found["train_seconds"])
    assert found["peak_memory_bytes"] > 100e6
    assert (found["epochs"], found["updates"], found["devices"]) == (2, 4, 1)
    assert found["device"] == "cpu"
    assert {"python", "torch", "lightning", "hydra-core"} <= found["versions"].keys()
    commit = found["git_commit"]
    assert commit is None or (len(commit) == 40 and int(commit, 16))
    assert found["config"]["data"]["val_size"] == 100
    assert found["config"]["optimizer"]["lr"] == 0.1  # resolved
    assert found["config"]["output_dir"] == str(folder)


def test_curves(finished):
    _, folder = finished
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    train_names = {f"train/{n}" for n in ("loss", "acc", "sharpness", "grad_norm", "lr")}
    for name in train_names:
        assert sorted({e.step for e in events.Scalars(name)}) == [1, 2, 3, 4]  # updates
    for name in ("loss", "acc", "acc5", "error"):
        assert {e.step for e in events.Scalars(f"val/{name}")} == {2, 4}
        assert {e.step for e in events.Scalars(f"test/{name}")} == {4}
    logged = {e.step: e.value for e in events.Scalars("train/loss")}
    assert list(logged.values()) == pytest.approx(column(folder, "train/loss"))
    assert events.Scalars("test/acc")[0].value == pytest.approx(
        summary(folder)["metrics"]["test/acc"]
    )
    hparams = events.PluginTagToContent("hparams")
    start = hparams["_hparams_/session_start_info"]
    assert b"Rho" in start  # capitals come first
    assert b"label_noise" in start


def test_table_of_metrics(finished):
    _, folder = finished
    assert [int(row["step"]) for row in rows(folder)] == [1, 2, 2, 3, 4, 4, 4]
    for name in ("train/loss", "train/acc", "train/sharpness", "train/grad_norm", "train/lr"):
        assert len(column(folder, name)) == 4
    assert len(column(folder, "val/acc")) == 2
    assert len(column(folder, "test/acc")) == 1


def test_best_is_of_the_epoch_with_the_best_validation_accuracy(finished):
    _, folder = finished
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    accuracies = column(folder, "val/acc")
    assert best["epoch"] == accuracies.index(max(accuracies))


def test_best_needs_validation_data(tmp_path, recwarn):
    run(tmp_path)
    assert not [w for w in recwarn if "val/acc" in str(w.message)]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


# ---------------------------------------------------------------------------------------- choices


def test_a_run_repeats_bit_for_bit(tmp_path, finished):
    metrics = run(tmp_path / "same", "data.val_size=100")
    _, folder = finished
    assert equal(weights(tmp_path / "same"), weights(folder))
    assert rows(tmp_path / "same") == rows(folder)
    assert metrics == summary(folder)["metrics"]


@pytest.mark.parametrize(
    "change",
    [
        *("seed=1", "method=asam", "data.label_noise=0.5"),
        *(
            pytest.param(change, marks=pytest.mark.long)
            for change in ("rho=0.5", "method=sgd", "optimizer=adamw")
        ),
    ],
)
def test_a_choice_has_an_effect(tmp_path, finished, change):
    run(tmp_path, "data.val_size=100", change)
    _, folder = finished
    assert not equal(weights(tmp_path), weights(folder))


def test_sgd_is_sam_without_radius(tmp_path):
    run(tmp_path / "sgd", "method=sgd")
    run(tmp_path / "zero", "rho=0")
    assert equal(weights(tmp_path / "sgd"), weights(tmp_path / "zero"))
    for name in ("sgd", "zero"):
        assert not any(key.startswith("train/sharpness") for key in rows(tmp_path / name)[0])
    assert summary(tmp_path / "sgd")["config"]["method"]["rho"] == 0


def test_without_test(tmp_path):
    metrics = run(tmp_path, "test=false")
    assert not any(name.startswith("test/") for name in metrics)
    assert "train/loss" in metrics


def test_multistep_schedule(tmp_path):
    run(tmp_path, "scheduler=multistep", "scheduler.milestones=[0.5]", "scheduler.gamma=0.1")
    rates = column(tmp_path, "train/lr")
    assert rates[0] == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        ("trainer.limit_train_batches=3", 6),
        ("trainer.limit_train_batches=0.5", 4),
        ("trainer.overfit_batches=1", 2),
        ("trainer.max_steps=5", 5),
    ],
)
def test_the_schedule_ends_with_the_run(tmp_path, limit, steps):
    run(tmp_path, "batch_size=25", f"+{limit}", "test=false")
    rates = [r for r in column(tmp_path, "train/lr") if r]
    expected = [0.05 * (1 + math.cos(math.pi * step / steps)) for step in range(steps)]
    assert rates == pytest.approx(expected)


STOPPING = "+callbacks.early._target_=lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([STOPPING, "+callbacks.early.monitor=val/loss"], "early.monitor=val/loss: there is no va"),
        (
            [STOPPING, "+callbacks.early.monitor=val/lozz", "data.val_size=20"],
            "callbacks.early.monitor=val/lozz: this run has no such metric; did you mean val/loss?",
        ),
        (["callbacks.best.monitor=foo"], "callbacks.best.monitor=foo: this run has no such metric"),
        (
            ["callbacks.best.monitor=test/acc", "data.val_size=20"],
            "callbacks.best.monitor=test/acc",
        ),
        (["optimized_metric=val/acc"], "optimized_metric=val/acc: there is no validation data"),
        (
            ["optimized_metric=val/acc", "data.val_size=20", "trainer.check_val_every_n_epoch=3"],
            "optimized_metric=val/acc: the first validation is after 6 steps, and the run has 4",
        ),
        (
            ["optimized_metric=val/acc", "data.val_size=20", "+trainer.max_steps=1"],
            "the first validation is after 2 steps, and the run has 1",
        ),
        (
            ["optimized_metric=val/acc", "data.val_size=20", "+trainer.limit_val_batches=0"],
            "optimized_metric=val/acc: there is no validation with no validation batches",
        ),
        (["optimized_metric=test/acc", "+trainer.limit_test_batches=0"], "no test batches"),
        (["+trainer.max_steps=0"], "trainer.max_steps=0: trains nothing"),
        (["+trainer.limit_train_batches=0.0"], "trainer.limit_train_batches=0: trains nothing"),
        (["+optimizer.foreach=true"], "optimizer: .*foreach"),
        (["+trainer.val_check_interval=100", "data.val_size=20"], "trainer.val_check_interval: "),
    ],
)
def test_what_the_run_has_no_use_for(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, *overrides)
    assert not (tmp_path / "metrics.csv").exists()  # found before it trains


@pytest.mark.slow
def test_metrics_that_only_some_runs_have_can_be_watched(tmp_path):
    own = "{_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    best = ["callbacks.best.monitor=sharpness/trace", "callbacks.best.mode=min"]
    small = ["callbacks.sharpness.images=10", "callbacks.sharpness.max_steps=1", "epochs=1"]
    run(tmp_path / "sharpness", "callbacks=sharpness", *small, *best, "test=false")
    assert (tmp_path / "sharpness" / "checkpoints" / "best.ckpt").is_file()
    named = [f"+callbacks.lr={own}", "callbacks.best.monitor=lr-SAM", "epochs=1"]
    run(tmp_path / "rate", *named, "test=false")


def test_without_loggers_and_callbacks(tmp_path):
    run(tmp_path, "~logger", "~callbacks", small=WITH_DASHBOARD)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]


def test_a_single_callback_may_be_left_out(tmp_path):
    run(tmp_path, "callbacks.last=null", "test=false")
    assert not (tmp_path / "checkpoints").exists()


def test_clipping_and_accumulation_are_the_modules(tmp_path):
    run(tmp_path, "trainer.gradient_clip_val=0.1", "trainer.accumulate_grad_batches=2")
    assert summary(tmp_path)["updates"] == 2


# --------------------------------------------------------------------------------- other ends


@pytest.mark.long
def test_an_interrupted_run_says_so(tmp_path):
    process = started(tmp_path, "epoch 1/", *SMALL, "epochs=10000")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    found = summary(only_run(tmp_path))
    assert found["status"] == "interrupted"
    assert found["updates"] < 20000


def test_a_failed_run_leaves_its_summary(tmp_path):
    with pytest.raises(TrainingError, match="1 steps in a row had a gradient that is not finite"):
        run(tmp_path, "lr=1e30", "max_skipped_steps=1")
    found = summary(tmp_path)
    assert found["status"] == "failed"
    assert "not finite" in found["exit_reason"]


# ----------------------------------------------------------------------------------------- sweeps


@pytest.mark.slow
def test_a_sweep_and_the_resume_of_one_of_its_jobs(tmp_path):
    # A schedule would end with max_steps.
    arguments = [*SMALL, "scheduler=constant", "++data.root=/a/b/c", "rho=0.05,0.1", "seed=0,1"]
    done = forked(tmp_path, *arguments, "+trainer.max_steps=2", "sweep=rho_grid")
    assert done.returncode == 0, done.stderr
    folders = jobs(tmp_path)
    wanted = [("0.05", "0"), ("0.05", "1"), ("0.1", "0"), ("0.1", "1")]
    for folder, (rho, seed) in zip(folders, wanted, strict=True):
        assert folder.name.partition("_")[2].startswith(f"rho={rho},seed={seed},batch_size=50,")
        assert "data.root" not in folder.name
        config = summary(folder)["config"]
        assert (config["rho"], config["seed"]) == (float(rho), int(seed))
        assert summary(folder)["updates"] == 2

    checkpoint = folders[3] / "checkpoints" / "last.ckpt"
    done = forked(tmp_path, f"ckpt_path={checkpoint}", "++trainer.max_steps=-1")
    assert done.returncode == 0, done.stderr
    assert jobs(tmp_path) == folders
    run(tmp_path / "unbroken", "rho=0.1", "seed=1", "scheduler=constant")
    assert equal(weights(folders[3]), weights(tmp_path / "unbroken"))


@pytest.mark.slow
def test_a_job_that_fails_takes_no_other_down(tmp_path):
    swept = ["data.val_size=0,5000", "lr=1e30,0.1", "max_skipped_steps=1"]
    done = forked(tmp_path, *SMALL, "-m", *swept)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 steps in a row had a gradient")
    diverged, finished, refused, _ = jobs(tmp_path)
    assert summary(diverged)["status"] == "failed"
    assert "not finite" in (diverged / "train.log").read_text()
    assert "data.val_size=5000: must come to 1..1437" in (refused / "train.log").read_text()
    assert summary(finished)["status"] == "completed"


@pytest.mark.long
@pytest.mark.slow
def test_the_search_for_a_radius(tmp_path):
    arguments = [*SMALL, "data.val_size=100", "hydra.sweeper.n_trials=3"]
    done = forked(tmp_path, "-m", "sweep=rho_optuna", *arguments)
    assert done.returncode == 0, done.stderr
    (sweep,) = tmp_path.glob("logs/train/multiruns/*")
    assert (sweep / "optuna.db").stat().st_size > 0
    runs = [summary(file.parent) for file in sweep.glob("*/metrics.json")]
    assert len(runs) == 3
    assert all(0.005 <= found["config"]["rho"] <= 0.5 for found in runs)
    best = max(runs, key=lambda found: found["metrics"]["val/acc"])
    result = OmegaConf.load(sweep / "optimization_results.yaml")
    assert result.best_value == best["metrics"]["val/acc"]


# ---------------------------------------------------------------------------------- configurations


RECIPES = {
    "quickstart": {"rho": 0.05, "epochs": 5, "batch_size": 64, "model.width": 8, "lr": 0.1},
    "digits_label_noise": {"rho": 0.2, "epochs": 15, "data.label_noise": 0.4, "data.val_size": 200},
    # ESAM's run.sh; every row of docs/results.md is in test_recipes.py
    "resnet18": {
        "rho": 0.05,
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.05,
        "weight_decay": 1e-3,
        "optimizer.nesterov": False,
        "data.val_size": 0,
        "augment.cutout.side": 0,
        "model._target_": "sam_lightning.models.SAMResNet18",
        "model.width": 64,
    },
    # Foret et al. 2021, appendix C.1, and google-research/sam
    "wrn28_10": {
        "model.depth": 28,
        "model.widen_factor": 10,
        "rho": 0.05,
        "epochs": 200,
        "batch_size": 256,
        "optimizer.weight_decay": 5e-4,
        "optimizer.nesterov": True,
        "method.decay_in_ascent": True,
        "trainer.gradient_clip_val": 5.0,
        "data.val_size": 0,
    },
    "pyramidnet": {
        "model.depth": 272,
        "model.alpha": 200,
        "model.p_last": 0.5,
        "rho": 0.05,
        "epochs": 1800,
        "batch_size": 256,
        "lr": 0.02,
        "optimizer.weight_decay": 5e-4,
        "method.decay_in_ascent": True,
        "trainer.gradient_clip_val": 5.0,
        "data.val_size": 0,
    },
    # Foret et al. 2021, section 3.3
    "label_noise": {"data.label_noise": 0.4, "epochs": 200, "rho": 0.1, "data.val_size": 0},
}


PHOTOGRAPHS = ("finetune", "finetune_efficientnet", "imagenet_resnet50", "vit_s16")


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_recipe(name):
    root = ["data.root=."] if name in PHOTOGRAPHS else []
    cfg = configuration(f"experiment={name}", *root)
    cfg.output_dir = "run"
    check(cfg, top_level())
    assert cfg.task_name == name
    found = {key: OmegaConf.select(cfg, key) for key in RECIPES.get(name, ())}
    assert found == RECIPES.get(name, {})


CHOICES = sorted(
    f"{file.parent.name}={file.stem}"
    for file in CONF.glob("*/*.yaml")
    if file.parent.name not in ("experiment", "sweep", "study") and file.stem != "base"
)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_passes_the_check(choice, tmp_path):
    needs = {
        "data=image_folder": [f"data.root={tmp_path}"],
        "data=imagenet": [f"data.root={tmp_path}"],
        "data=shards": [f"data.root={tmp_path}"],
        "model=custom": ["model._target_=torchvision.models.resnet18"],
        "model=timm": ["model.name=vit_small_patch16_224"],
        "model=torchvision": ["model.name=convnext_tiny"],
        "loss=custom": ["loss._target_=torch.nn.MultiMarginLoss"],
    }
    cfg = configuration(choice, *needs.get(choice, []))
    cfg.output_dir = "run"
    check(cfg, top_level())


@pytest.mark.parametrize(
    ("optimizer", "lr", "weight_decay"),
    [("sgd", 0.1, 5e-4), ("adam", 1e-3, 0.0), ("adamw", 1e-3, 0.05)],
)
def test_optimizers_bring_their_learning_rate(optimizer, lr, weight_decay):
    cfg = configuration(f"optimizer={optimizer}")
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (lr, weight_decay)
    cfg = configuration(f"optimizer={optimizer}", "lr=0.3", "weight_decay=0.2")
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (0.3, 0.2)
