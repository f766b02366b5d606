"""A run that is stopped, whatever stops it, continues as if it never had been."""

import math
import os
import random
import re
import shutil
import signal
import time

import pytest

from inject import begin, forked
from random_resume import differences
from runs import children, equal, rows, summary, wait_for_end, weights
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.schema import METRICS
from sam_lightning.runs.checkpoint import newest, read

# Four epochs of eight updates, everything random on: order, crops, label noise, validation.
RUN = ["data=digits", "data.subset=250", "data.val_size=100", "data.label_noise=0.2", "epochs=4"]
RUN += ["model.width=4", "trainer=cpu", "batch_size=32", "trainer.log_every_n_steps=3"]
RUN += ["data.eval_batch_size=1000", "scheduler.warmup_epochs=1", "checkpoint_every_n_steps=3"]
RUN += ["callbacks.dashboard=null"]  # its pictures take as long as the training
WIDE = ["model=wide_resnet28_10", "model.depth=10", "model.widen_factor=1", "model.dropout=0.3"]
WIDE += [o for o in RUN if not o.startswith("model")]
DDP = [o for o in RUN if not o.startswith(("trainer=", "epochs="))]
DDP += ["trainer=ddp_cpu", "epochs=6"]


def into(folder):
    return ["hydra.run.dir=" + str(folder), "ckpt_path=last"]


def continued(folder, *arguments):
    done = forked(folder.parent, *arguments, *into(folder))
    assert done.returncode == 0, done.stderr
    return done


def images(folder):
    return summary(folder)["images_per_second"] * summary(folder)["train_seconds"]


def assert_same_run(folder, unbroken):
    for name in ("last", "best"):
        assert equal(weights(folder, name), weights(unbroken, name))
    assert rows(folder) == rows(unbroken)
    assert summary(folder)["metrics"] == summary(unbroken)["metrics"]
    assert summary(folder)["updates"] == summary(unbroken)["updates"]
    assert images(folder) == pytest.approx(images(unbroken))  # of all parts
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing stops."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    done = forked(folder.parent, *RUN, *into(folder))  # `last` starts anew where nothing is
    assert done.returncode == 0, done.stderr
    assert summary(folder)["updates"] == 32
    return folder


@pytest.mark.slow
def test_checkpoints_do_not_change_a_run(unbroken, tmp_path):
    run_without = [o for o in RUN if not o.startswith("checkpoint")]
    assert forked(tmp_path, *run_without, f"hydra.run.dir={tmp_path / 'run'}").returncode == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_amid_an_epoch(unbroken, tmp_path, number):
    folder = tmp_path / "run"
    # In the second pass of update 8 or 21: of epochs 1 and 3, between two checkpoints.
    at = f"pass:{(16, 42)[number - 1]}"
    killed = forked(tmp_path, *RUN, *into(folder), fault=("SIGKILL", at))
    assert killed.returncode == -signal.SIGKILL
    if number == 2:  # again, in a run that is continued itself
        killed = forked(tmp_path, *RUN, *into(folder), fault=("SIGKILL", "pass:3"))
        assert killed.returncode == -signal.SIGKILL
    assert newest(folder / "checkpoints") is not None
    continued(folder)
    assert_same_run(folder, unbroken)


@pytest.mark.slow
def test_killed_as_it_saves(unbroken, tmp_path):
    folder = tmp_path / "run"
    assert forked(tmp_path, *RUN, *into(folder), fault=("SIGKILL", "save:6")).returncode < 0
    continued(folder)
    assert_same_run(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("at", [pytest.param("test:1", marks=pytest.mark.long), "tested:1"])
def test_killed_when_trained(unbroken, tmp_path, at):
    folder = tmp_path / "run"
    assert forked(tmp_path, *RUN, *into(folder), fault=("SIGKILL", at)).returncode < 0
    assert not (folder / "metrics.json").exists()
    continued(folder)
    assert_same_run(folder, unbroken)


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(unbroken, tmp_path):
    folder = tmp_path / "run"
    assert forked(tmp_path, *RUN, *into(folder), fault=("SIGKILL", "pass:5")).returncode < 0
    continued(folder, *RUN)
    assert_same_run(folder, unbroken)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("SIGTERM", "pass:20"),
        # An epoch's last update.
        pytest.param("SIGINT", "pass:32", marks=pytest.mark.long),
        pytest.param("SIGINT", "pass:19", marks=pytest.mark.long),
        pytest.param("SIGTERM", "between:10", marks=pytest.mark.long),
    ],
)
def test_told_to_stop(unbroken, tmp_path, name, at):
    folder = tmp_path / "run"
    stopped = forked(tmp_path, *RUN, *into(folder), fault=(name, at))
    assert stopped.returncode == 128 + getattr(signal, name)
    assert f"stopped by {name} after step {16 if at == 'pass:32' else 10}" in stopped.stdout
    found = summary(folder)
    assert found["status"] == "interrupted"
    assert name in found["exit_reason"]
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == found["updates"]
    continued(folder)
    assert_same_run(folder, unbroken)
    for name in ("seconds", "train_seconds"):
        assert summary(folder)[name] > found[name]


@pytest.mark.slow
@pytest.mark.parametrize("at", ["pass:20", pytest.param("test:1", marks=pytest.mark.long)])
def test_told_to_stop_by_slurm_it_is_queued_again(unbroken, tmp_path, at):
    folder = tmp_path / "run"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/asked"\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash"}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    stopped = forked(tmp_path, *RUN, *into(folder), fault=("SIGUSR1", at), **slurm)
    assert stopped.returncode == 128 + signal.SIGUSR1
    assert summary(folder)["status"] == "interrupted"
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    continued(folder, *RUN)  # SLURM repeats the whole command line
    assert_same_run(folder, unbroken)


@pytest.mark.long
def test_a_dropout_network_with_a_policy_in_workers(tmp_path):
    extra = ["augment=trivialaugment", "augment.mixup.alpha=0.2", "data.num_workers=2"]
    extra += ["optimizer=adamw", "loss.class_weights=balanced", "epochs=2"]
    options = [*(o for o in WIDE if not o.startswith("epochs")), *extra]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert forked(tmp_path, *options, *into(folder), fault=("SIGKILL", "pass:25")).returncode < 0
    continued(folder)
    assert forked(tmp_path, *options, f"hydra.run.dir={whole}").returncode == 0
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_accumulation_continues_between_updates(tmp_path):
    options = [*RUN, "trainer.accumulate_grad_batches=3", "checkpoint_every_n_steps=1"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    # Update 5 has passes 23 to 28, of the middle three of an epoch's eight batches.
    stopped = forked(tmp_path, *options, *into(folder), fault=("SIGTERM", "pass:25"))
    assert stopped.returncode == 128 + signal.SIGTERM
    assert read(folder / "checkpoints" / "last.ckpt")["global_step"] == 5
    continued(folder)
    assert forked(tmp_path, *options, f"hydra.run.dir={whole}").returncode == 0
    assert_same_run(folder, whole)


STOPPING = "{_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: val/loss"
STOPPING += ", stopping_threshold: 100}"
EMA = "{_target_: lightning.pytorch.callbacks.EMAWeightAveraging, decay: 0.9}"


WATCHED = [
    (f"+callbacks.stopping={STOPPING}", "test:1"),  # it has stopped
    ("+trainer.overfit_batches=5 checkpoint_every_n_steps=2", "pass:16"),
]
OTHERS = [
    (f"+callbacks.ema={EMA}", "pass:21"),
    ("+trainer.max_steps=21", "pass:17"),  # right behind the save at the end of an epoch
    ("trainer.check_val_every_n_epoch=3", "pass:60"),  # in an epoch without validation
    ("+trainer.val_check_interval=3 checkpoint_every_n_steps=3", "pass:14"),
    ("+trainer.val_check_interval=4 trainer.accumulate_grad_batches=3", "pass:14"),
    ("+trainer.limit_train_batches=5 +trainer.limit_val_batches=1", "pass:19"),
    ("trainer.precision=64-true", "pass:21"),
    (f"+callbacks.ema={EMA}", "test:1"),
]


@pytest.mark.parametrize(
    ("options", "at"),
    [
        *(pytest.param(*case, marks=pytest.mark.slow) for case in WATCHED),
        *(pytest.param(*case, marks=pytest.mark.long) for case in OTHERS),
    ],
)
def test_what_watches_a_run_continues(tmp_path, options, at):
    options = re.findall(r"\S+=\{.*?\}|\S+", options)
    folder, whole = tmp_path / "run", tmp_path / "whole"
    assert forked(tmp_path, *RUN, *options, f"hydra.run.dir={whole}").returncode == 0
    killed = forked(tmp_path, *RUN, *options, *into(folder), fault=("SIGKILL", at))
    assert killed.returncode == -signal.SIGKILL
    continued(folder)
    assert differences(folder, whole) == []
    if "EarlyStopping" in str(options):
        assert summary(whole)["epochs"] == 1
    continued(folder)  # its test again
    assert differences(folder, whole) == []


@pytest.mark.long
def test_a_run_whose_time_was_over_continues_with_more(tmp_path):
    folder, options = tmp_path / "run", [*RUN, "epochs=4000", "+trainer.max_time=00:00:00:02"]
    continued(folder, *options)
    done = summary(folder)["updates"]
    continued(folder)  # no time is left
    assert summary(folder)["updates"] == done
    continued(folder, "++trainer.max_time=00:00:00:04")
    assert summary(folder)["updates"] > done
    assert summary(folder)["parts"][-1]["from_step"] == done


# ------------------------------------------------------------------------------ damaged checkpoints


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed when it had two checkpoints."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    forked(folder.parent, *RUN, *into(folder), fault=("SIGKILL", "pass:42"))
    assert {"previous.ckpt", "last.ckpt"} <= {p.name for p in (folder / "checkpoints").iterdir()}
    return folder


@pytest.fixture
def with_previous(killed, tmp_path):
    """That run, elsewhere."""
    return shutil.copytree(killed, tmp_path / "run")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [pytest.param(truncate, marks=pytest.mark.slow), flip_a_bit], ids=lambda d: d.__name__
)
def test_a_damaged_checkpoint_is_left_for_the_one_before(unbroken, with_previous, damage):
    last = with_previous / "checkpoints" / "last.ckpt"
    damage(last)
    done = forked(with_previous.parent, f"ckpt_path={last}")
    assert done.returncode == 2
    assert str(last) in done.stderr
    assert "Traceback" not in done.stderr
    done = continued(with_previous)
    assert "last.ckpt" in done.stdout
    assert "previous.ckpt" in done.stdout
    assert_same_run(with_previous, unbroken)


def test_all_damaged(with_previous):
    for path in (with_previous / "checkpoints").glob("*.ckpt"):
        truncate(path)
    with pytest.raises(ConfigError, match=r"damaged are best.ckpt, last.ckpt, previous.ckpt"):
        newest(with_previous / "checkpoints")


@pytest.mark.slow
def test_a_full_disk_keeps_the_checkpoint_before(unbroken, tmp_path):
    folder = tmp_path / "run"
    full = forked(tmp_path, *RUN, *into(folder), fault=("full_disk", "save:4"))
    assert full.returncode == 1
    assert "cannot save" in full.stderr
    assert "File too large" in full.stderr
    assert "Traceback" not in full.stderr
    assert {p.suffix for p in (folder / "checkpoints").iterdir()} == {".ckpt"}
    continued(folder)
    assert_same_run(folder, unbroken)


@pytest.mark.slow
def test_out_of_memory_in_the_second_pass(unbroken, tmp_path):
    folder = tmp_path / "run"
    failed = forked(tmp_path, *RUN, *into(folder), fault=("oom", "pass:20"))
    assert failed.returncode == 1
    assert "out of memory: lower batch_size=32" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert summary(folder)["status"] == "failed"
    continued(folder)
    assert_same_run(folder, unbroken)


# ---------------------------------------------------------------------------- which is the last run


@pytest.mark.long
def test_last_is_the_run_started_last(tmp_path):
    for name in ("2030-01-01_00-00-00-000000", "2031-01-01_00-00-00-000000"):
        folder = tmp_path / "logs/train/runs" / name
        assert forked(tmp_path, *RUN, "epochs=1", f"hydra.run.dir={folder}").returncode == 0
    os.utime(tmp_path / "logs/train/runs/2030-01-01_00-00-00-000000/checkpoints/last.ckpt")
    done = forked(tmp_path, "ckpt_path=last", "epochs=2")
    assert done.returncode == 0, done.stderr
    assert summary(folder)["updates"] == 16
    last = (folder / "checkpoints/last.ckpt").relative_to(tmp_path)  # by name
    done = forked(tmp_path, f"ckpt_path={last}", "epochs=3")
    assert done.returncode == 0, done.stderr
    assert summary(folder)["updates"] == 24
    assert "epoch 2/3" not in done.stdout
    assert len([*tmp_path.glob("logs/*/*/*")]) == 2


def test_no_last_run(tmp_path):
    done = forked(tmp_path, "ckpt_path=last", "experiment=quickstart")
    assert done.returncode == 2
    assert "no run with a checkpoint in logs/quickstart/runs" in done.stderr
    assert not (tmp_path / "logs").exists()


@pytest.mark.slow
def test_jobs_of_a_sweep_continue_in_their_folders(unbroken, tmp_path):
    jobs = ["-m", "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}", "ckpt_path=last"]
    stopped = forked(tmp_path, *RUN, *jobs, fault=("SIGTERM", "pass:20"))
    assert stopped.returncode == 128 + signal.SIGTERM
    done = forked(tmp_path, *RUN, *jobs)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("continuing from") == 1
    (first,) = tmp_path.glob("sweep/0_*")
    (second,) = tmp_path.glob("sweep/1_*")
    assert_same_run(first, unbroken)
    assert summary(second)["updates"] == 32


def test_settings_given_on_resuming_count(unbroken, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    given = ["epochs=6", "rho=0", "lr=0.01", "optimizer.momentum=0.5", "scheduler.warmup_epochs=0"]
    assert forked(tmp_path, f"ckpt_path={folder}", *given).returncode == 0
    (group,) = read(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    assert (group["rho"], group["initial_lr"], group["momentum"]) == (0, 0.01, 0.5)
    lrs = {int(row["step"]): float(row["train/lr"]) for row in rows(folder) if row["train/lr"]}
    later = {step: lr for step, lr in lrs.items() if step > 32}
    # The rate of an update is that of the number of updates before it, of 48 in all.
    expected = {step: 0.005 * (1 + math.cos(math.pi * (step - 1) / 48)) for step in later}
    assert later == pytest.approx(expected)
    assert 33 in later


# ----------------------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def unbroken_pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair") / "run"
    done = forked(folder.parent, *DDP, *into(folder))
    assert done.returncode == 0, done.stderr
    found = summary(folder)
    assert (found["status"], found["devices"], found["updates"]) == ("completed", 2, 48)
    assert set(found["metrics"]) == set(METRICS)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "signals",
    [
        pytest.param(["SIGKILL"], marks=pytest.mark.slow),
        pytest.param(["SIGTERM", "SIGKILL"], marks=pytest.mark.long),
        pytest.param(["SIGINT"], marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_two_processes(unbroken_pair, tmp_path, signals):
    folder, saved = tmp_path / "run", 0
    for name in signals:
        process = begin(tmp_path, *DDP, *into(folder))
        while process.is_alive() and updates(folder) <= saved:
            time.sleep(0.1)
        others = children(process.pid)
        os.kill(process.pid, getattr(signal, name))
        process.join(60)
        if name == "SIGKILL":
            assert process.exitcode == -signal.SIGKILL
            wait_for_end(others)
        else:
            assert process.exitcode == 128 + getattr(signal, name)
            assert summary(folder)["status"] == "interrupted"
        assert saved < updates(folder) < 48
        saved = updates(folder)
    continued(folder)
    assert_same_run(folder, unbroken_pair)


def updates(folder):
    """Those of the newest checkpoint, between two of which it may have another name."""
    try:
        path = newest(folder / "checkpoints")
        return 0 if path is None else read(path)["global_step"]
    except ConfigError:
        return 0


@pytest.mark.long
def test_ten_random_kills(unbroken, tmp_path):
    folder, generator, kills = tmp_path / "run", random.Random(0), 0
    while kills < 10:
        done = forked(tmp_path, *RUN, *into(folder), kill_after=generator.uniform(0.3, 2.5))
        if done.returncode == 0:  # it was complete: kill another one
            assert_same_run(folder, unbroken)
            folder = tmp_path / f"run{kills}"
        else:
            assert done.returncode == -signal.SIGKILL
            kills += 1
    continued(folder, *RUN)
    assert_same_run(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, pytest.param(4, marks=pytest.mark.long)])
def test_results_do_not_depend_on_the_number_of_processes(unbroken_pair, tmp_path, processes):
    folder = tmp_path / "run"
    shutil.copytree(unbroken_pair, folder)
    # The run is complete: with the checkpoint and nothing to train, only the test is left. The two
    # processes had 180 and 179 of its images.
    trainer = ["trainer=ddp_cpu", "trainer.devices=4"] if processes == 4 else ["trainer=cpu"]
    done = forked(tmp_path, f"ckpt_path={folder}", *trainer, "data.eval_batch_size=37")
    assert done.returncode == 0, done.stderr
    assert "\nepoch " not in done.stdout
    found, expected = (
        {k: v for k, v in summary(f)["metrics"].items() if k.startswith("test/")}
        for f in (folder, unbroken_pair)
    )
    assert summary(folder)["devices"] == 2  # that trained it
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["test/acc"] == expected["test/acc"]
