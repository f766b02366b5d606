"""What may change between the parts of a run, what is refused, and what the record says of it."""

import math
import re
import shutil
import signal
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from inject import forked
from runs import equal, rows, run, summary, weights
from sam_lightning.config.conf import CONF, flat, package_of
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs import parts
from sam_lightning.runs.parts import MEANING, TABLE, when

DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
SLOW = pytest.mark.slow
# Four steps an epoch.
RUN = ["data=digits", "data.subset=100", "data.val_size=50", "model.width=4", "trainer=cpu"]
RUN += ["epochs=3", "batch_size=25", "data.eval_batch_size=1000", "checkpoint_every_n_steps=1"]
RUN += ["callbacks.dashboard=null"]


# --------------------------------------------------------------------------------------- the table


def test_the_documentation_has_the_table():
    text = DOCS.read_text().split("## What may change")[1].split("\n## ")[0]
    found = {
        meaning: set(re.findall(r"`([^`]+)`", keys))
        for meaning, keys in re.findall(r"^\| (.*?) \| (.*) \|$", text, re.M)
    }
    for name, meaning in MEANING.items():
        assert found[meaning] == {*TABLE[name].split()}


def test_every_key_of_conf_is_decided():
    decided = {name for names in TABLE.values() for name in names.split()}
    undecided = set()
    for file in [CONF / "train.yaml", *CONF.glob("*/*.yaml")]:
        group = file.parent.name
        if group in ("study", "sweep", "experiment"):  # overrides of the other keys
            continue
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        names = [k for k in flat(content) if k.partition(".")[0] not in ("defaults", "hydra")]
        for key in [f"{package_of(file, CONF)}{name}" for name in names]:
            parts = key.split(".")
            if not decided & {".".join(parts[:i]) for i in range(1, len(parts) + 1)}:
                undecided.add(key)
    assert undecided == set()


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("epochs", "steps"),
        ("optimizer.lr", "steps"),
        ("optimizer._target_", "never"),
        ("trainer.max_steps", "epochs"),
        ("trainer.anything", "steps"),
        ("augment.mixup.alpha", "epochs"),
        ("data.source.extra", "never"),
        ("callbacks.stopping.patience", "steps"),
        ("callbacks.progress._target_", "always"),
        ("unheard.of", "never"),
    ],
)
def test_the_longest_name_counts(key, allowed):
    assert when(key) == allowed


# ------------------------------------------------------------------------------------ within a run


@pytest.fixture(scope="module")
def within(tmp_path_factory):
    """A run killed in its second epoch, after six steps."""
    folder = tmp_path_factory.mktemp("within") / "run"
    killed = forked(folder.parent, *RUN, f"hydra.run.dir={folder}", fault=("SIGKILL", "pass:13"))
    assert killed.returncode == -signal.SIGKILL
    return folder


@pytest.fixture
def copy(within, tmp_path):
    return shutil.copytree(within, tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "had"),
    [
        ("batch_size=50", "25"),
        ("data.val_size=30", "50"),
        ("model.width=8", "4"),
        pytest.param("seed=5", "0", marks=SLOW),
        pytest.param("data.subset=40", "100", marks=SLOW),
        pytest.param("data.label_noise=0.5", "0.0", marks=SLOW),
        pytest.param("+trainer.limit_train_batches=2", "null", marks=SLOW),
        pytest.param("+trainer.max_steps=30", "null", marks=SLOW),
        pytest.param("optimizer._target_=torch.optim.Adam", "torch.optim.SGD", marks=SLOW),
        pytest.param("epochs=1", "3", marks=SLOW),
    ],
)
def test_what_may_not_change_within_an_epoch_is_refused(copy, given, had):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.suffix in (".ckpt", ".csv")}
    done = forked(copy.parent, f"ckpt_path={copy}", given)
    assert done.returncode == 2
    given = given.lstrip("+")
    assert done.stderr.startswith(f"error: {given}: may not change ")
    had = f"{given.partition('=')[0]}={had}"
    assert f"ckpt_path={copy}/checkpoints/last.ckpt had {had}: leave it so, or" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in before} == before
    assert not (copy / "metrics.json").exists()


def test_the_record_says_from_which_step_a_setting_changed(copy):
    given = ["lr=0.05", "rho=0.2", "epochs=2", "data.eval_batch_size=7"]
    done = forked(copy.parent, f"ckpt_path={copy}", *given)
    assert done.returncode == 0, done.stderr
    first, second = summary(copy)["parts"]
    assert (first["from_step"], second["from_step"]) == (0, 6)
    changed = second["changed"]
    assert changed["lr"] == {"from": 0.1, "to": 0.05}
    assert changed["rho"] == changed["method.rho"] == {"from": 0.05, "to": 0.2}
    assert changed["epochs"] == {"from": 3, "to": 2}
    assert not {key for key in changed if key.startswith("data.")}
    assert summary(copy)["updates"] == 8


@pytest.mark.long
def test_callbacks_may_change(tmp_path):
    stopping = "+callbacks.stopping={_target_: lightning.pytorch.callbacks.EarlyStopping"
    stopping += ", monitor: val/loss, min_delta: 1000, patience: "  # the first is the best
    ema = "+callbacks.ema={_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}"
    monitor = "+callbacks.lr={_target_: lightning.pytorch.callbacks.LearningRateMonitor}"
    folder, whole = (f"hydra.run.dir={tmp_path / name}" for name in ("run", "whole"))
    options = [*RUN, "epochs=8", f"{stopping}50}}"]
    assert forked(tmp_path, *options, ema, folder, fault=("SIGKILL", "pass:13")).returncode < 0
    given = ["callbacks.stopping.patience=2", "++callbacks.ema=null", monitor]
    done = forked(tmp_path, f"ckpt_path={tmp_path / 'run'}", *given)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("EMAWeightAveraging") == 1, done.stdout
    assert "Traceback" not in done.stderr
    changed = summary(tmp_path / "run")["parts"][1]["changed"]
    assert changed["callbacks.stopping.patience"] == {"from": 50, "to": 2}
    assert changed["callbacks.ema.decay"] == {"from": 0.9, "to": None}
    assert changed["callbacks.lr._target_"]["from"] is None
    # It stops after the third epoch, and has the weights of a run without averaging.
    assert summary(tmp_path / "run")["epochs"] == 3
    assert forked(tmp_path, *options[:-1], f"{stopping}2}}", whole).returncode == 0
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_other_classes_of_the_same_number(tmp_path):
    photos = tmp_path / "photos"
    for i in range(12):
        file = photos / ("test" if i % 3 == 0 else "train") / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (20 * i, 99 - i, 7 * i)).save(file)
    options = ["data=image_folder", f"data.root={photos}", f"data.cache_dir={tmp_path}/cache"]
    options += ["data.subset=1.0", "batch_size=4", "callbacks.dashboard=null"]
    run(tmp_path / "run", *options, "epochs=1")
    for split in ("train", "test"):
        (photos / split / "b").rename(photos / split / "c")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(ConfigError, match=r"classes=\['a', 'c'\]: may not .*=\['a', 'b'\]"):
        run(tmp_path / "run", *options, "epochs=2", f"ckpt_path={last}")


# --------------------------------------------------------------------------------- a finished run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert forked(folder.parent, *RUN, f"hydra.run.dir={folder}").returncode == 0
    return folder


@pytest.fixture
def finished_copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("lr=0.001 rho=0.5", "lr=0.001"),
        ("epochs=2", "epochs=2"),
        pytest.param("+trainer.limit_test_batches=1", "trainer.limit_test_batches=1", marks=SLOW),
        pytest.param("batch_size=50", "batch_size=50", marks=SLOW),
    ],
)
def test_a_finished_run_is_never_relabelled(finished_copy, given, said):
    before = (finished_copy / "metrics.json").read_bytes()
    done = forked(finished_copy.parent, f"ckpt_path={finished_copy}", *given.split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}: may not change if nothing is left to train")
    assert done.stderr.count("\n") == 1
    assert (finished_copy / "metrics.json").read_bytes() == before


def test_null_and_keys_that_are_new_mean_what_was_meant_before():
    old = {"data.interpolation": "bilinear", "data.source.interpolation": "bilinear", "lr": 0.1}
    new = {"data.interpolation": None, "data.crop_mode": None, "model.pretrained": False, "lr": 0.1}
    assert parts._spelled_out(old) == parts._spelled_out(new)


def test_the_test_of_a_finished_run_may_be_repeated(finished_copy):
    before, curves = summary(finished_copy), rows(finished_copy)
    done = forked(finished_copy.parent, f"ckpt_path={finished_copy}", "data.eval_batch_size=7")
    assert done.returncode == 0, done.stderr
    assert "\nepoch " not in done.stdout
    after = summary(finished_copy)
    assert after.pop("metrics") == pytest.approx(before.pop("metrics"), rel=1e-6)
    assert [part["from_step"] for part in after.pop("parts")] == [0, 12]
    changed = {key for key in after if after[key] != before[key]}
    assert changed <= {"finished"}
    assert len(rows(finished_copy)) == len(curves)


def test_a_finished_run_may_be_trained_longer(finished_copy):
    longer = ["epochs=6", "batch_size=50", "trainer.log_every_n_steps=1"]  # two steps an epoch
    done = forked(finished_copy.parent, f"ckpt_path={finished_copy}", *longer)
    assert done.returncode == 0, done.stderr
    found = summary(finished_copy)
    assert (found["epochs"], found["config"]["epochs"], found["updates"]) == (6, 6, 12 + 6)
    changed = found["parts"][1]["changed"]
    assert changed["epochs"] == {"from": 3, "to": 6}
    assert changed["batch_size"] == {"from": 25, "to": 50}
    # The schedule is where the epochs are: half of it is done.
    lrs = [float(row["train/lr"]) for row in rows(finished_copy) if row["train/lr"]][-6:]
    expected = [0.05 * (1 + math.cos(math.pi * step / 12)) for step in range(6, 12)]
    assert lrs == pytest.approx(expected)


def test_a_run_that_was_moved_keeps_its_best_checkpoint(tmp_path):
    # No later epoch is better: the learning rate is 0 after the first.
    options = ["epochs=1", "data.val_size=50", "callbacks.best.monitor=val/loss"]
    options += ["callbacks.best.mode=min"]
    run(tmp_path / "here", *options)
    best = weights(tmp_path / "here", "best")
    shutil.move(tmp_path / "here", tmp_path / "there")
    last = tmp_path / "there" / "checkpoints" / "last.ckpt"
    worse = ["epochs=2", "lr=1000", f"ckpt_path={last}"]
    run(tmp_path / "there", *options[1:], *worse)
    after = weights(tmp_path / "there", "best")
    assert all((best[name] == after[name]).all() for name in best)


def test_averaging_at_the_end_of_training_cannot_be_continued(copy):
    target = "lightning.pytorch.callbacks.StochasticWeightAveraging"
    swa = f"+callbacks.swa={{_target_: {target}, swa_lrs: 0.01}}"
    done = forked(copy.parent, f"ckpt_path={copy}", swa)
    assert done.returncode == 2
    assert "StochasticWeightAveraging: cannot continue a run" in done.stderr
