"""A run that is refused late, or stopped early, leaves every folder as it was."""

import signal
import subprocess
import sys
import time

import pytest

from commands import assert_refused, serve
from inject import begin, forked
from runs import SMALL, TRAIN, command
from sam_lightning.runs.folder import Started

EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"


@pytest.fixture(scope="module")
def light():
    yield from serve(
        "sam_lightning.training.run", "sklearn.datasets", "torch.utils.tensorboard", "torch._dynamo"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["++logger.tensorboard.nothing=1"], "logger.tensorboard.nothing=1: SummaryWriter."),
        (["++logger.tensorboard.max_queue=a"], "logger.tensorboard: '>' not supported"),
        (
            [f"+callbacks.ema._target_={EMA}", "+callbacks.ema.nothing=1"],
            "callbacks.ema.nothing=1: AveragedModel.",
        ),
        (
            ["+callbacks.best.save_last=true"],
            "callbacks.best.save_last=True: would write over the run's own ",
        ),
        (
            [f"+callbacks.x._target_={SAVER}", "+callbacks.x.filename=previous", "logger=csv"],
            "callbacks.x.filename=previous: would write over the run's own ",
        ),
        (["rho=-1", "hydra.output_subdir=null"], "rho=-1"),
        (["hydra.run.dir=/dev/null"], "hydra.run.dir=/dev/null: cannot be made (File exists)"),
    ],
)
def test_what_only_the_training_would_meet_is_refused_before_it(light, tmp_path, given, said):
    assert_refused(light(tmp_path, *SMALL, *given), f"error: {said}")


@pytest.mark.slow
def test_what_was_in_the_folder_stays(light, tmp_path):
    for name in ("tensorboard", "0_mine", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    result = light(tmp_path, *SMALL, "++logger.tensorboard.nothing=1", "hydra.run.dir=..")
    assert result.err.startswith("error: logger.tensorboard.nothing=1: ")
    found = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    kept = {"tensorboard", "tensorboard/file", "0_mine", "0_mine/file", "notes", "notes/file"}
    assert found - {"cwd", "stdout", "stderr", "torch"} == kept


def test_a_sweep_whose_first_job_has_not_begun_to_train_is_left_out(light, tmp_path):
    lone, other = tmp_path / "a" / "lone", tmp_path / "b" / "other"
    for sweep, elsewhere in ((lone, False), (other, True)):
        started = Started(sweep, "train.log", True, elsewhere)
        (sweep / "0_seed=0" / ".hydra").mkdir(parents=True)
        (sweep / "multirun.yaml").touch()
        started.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert (other / "0_seed=0" / ".hydra").is_dir()  # that job may be at work
    started = Started(lone, "train.log", True)
    (lone / "0_seed=0" / "checkpoints").mkdir(parents=True)
    (lone / "0_seed=0" / ".hydra").mkdir()
    (lone / "0_seed=0" / "checkpoints" / "last.ckpt").touch()
    (lone / "1_mine").mkdir()
    (lone / "1_mine" / "file").touch()
    started.discard()
    assert (lone / "0_seed=0" / "checkpoints" / "last.ckpt").is_file()


def test_a_refused_run_leaves_what_others_write_beside_it(tmp_path):
    started = Started(tmp_path, "own.log")
    (tmp_path / "2026-11-30" / ".hydra").mkdir(parents=True)  # another run, in the same folder
    (tmp_path / "own.log").touch()
    (tmp_path / ".hydra").symlink_to(tmp_path / "2026-11-30")
    started.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["2026-11-30"]
    assert (tmp_path / "2026-11-30" / ".hydra").is_dir()


@pytest.mark.slow
def test_ctrl_c_before_the_first_job_of_a_sweep_trains(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(TRAIN), *SMALL, "-m", "seed=0,1"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(tmp_path.rglob("0_*/.hydra/overrides.yaml")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)  # as it imports torch
    assert process.communicate(timeout=60)[1] == "error: stopped by SIGINT\n"
    assert process.returncode == 130
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
def test_a_start_by_hand_where_a_sweep_will_come_is_refused(tmp_path):
    sweep, (first, second) = tmp_path / "sweep", (tmp_path / "first", tmp_path / "second")
    first.mkdir()
    second.mkdir()
    into = ["-m", "seed=0,1", f"hydra.sweep.dir={sweep}"]
    process = begin(first, *SMALL, "epochs=10000", *into)
    try:
        while not list(sweep.rglob("metrics.csv")):
            assert process.is_alive()
            time.sleep(0.05)
        done = forked(second, *SMALL, "rho=0.5", f"hydra.run.dir={sweep}/1_seed=1")
    finally:
        process.terminate()
        process.join(60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: hydra.run.dir={sweep}: another process is at work there")
    assert not (sweep / "1_seed=1").exists()
    done = command(second, *SMALL, "epochs=1", f"hydra.run.dir={sweep}/1_seed=1")
    assert done.returncode == 0, done.stderr  # no sweep is at work
