"""One process (group) at a time in a run's folder."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time

import pytest

from inject import begin, forked
from runs import SMALL, command, only_run, started, summary, wait_for_end
from sam_lightning.config.errors import ConfigError
from sam_lightning.runs.lock import OwnedError, joined, owned

FORK = multiprocessing.get_context("fork")


def hold(folder, there, how):
    """A process in the folder; it waits to be killed."""
    with owned(folder):
        child = FORK.Process(target=stay, args=(folder, there, how == "joined"))
        if how == "alone":
            stay(folder, there, False)
        child.start()
        child.join()


def stay(folder, there, joins):
    if joins:
        with joined(folder):
            there.put(os.getpid())
            time.sleep(60)
    there.put(os.getpid())
    time.sleep(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "outlives"), [("alone", False), ("loader", False), ("joined", True)]
)
def test_the_lock_ends_with_its_process_and_those_it_started(tmp_path, how, outlives):
    there = FORK.Queue()
    holder = FORK.Process(target=hold, args=(tmp_path, there, how))
    holder.start()
    last = there.get(timeout=20)
    with pytest.raises(OwnedError, match=f"output_dir={tmp_path}.* process {holder.pid}, since"):
        owned(tmp_path).__enter__()
    holder.kill()
    holder.join()
    if outlives:  # a rank that still works
        with pytest.raises(OwnedError, match=f"process {holder.pid}"):
            owned(tmp_path).__enter__()
        os.kill(last, signal.SIGKILL)
        wait_for_end([last])
    with owned(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert not any(tmp_path.iterdir())
    if how == "loader":
        os.kill(last, signal.SIGKILL)  # it was there all the time


def take(folder, results, start):
    start.wait()
    for _ in range(10):
        try:
            with owned(folder):
                (folder / "busy").touch(exist_ok=False)
                time.sleep(0.02)
                (folder / "busy").unlink()
            results.put("had it")
        except OwnedError:
            results.put("refused")
        except FileExistsError:
            results.put("shared it")


def test_no_two_ever_have_the_folder(tmp_path):
    results, start = FORK.Queue(), FORK.Event()
    processes = [FORK.Process(target=take, args=(tmp_path, results, start)) for _ in range(4)]
    for process in processes:
        process.start()
    start.set()
    found = [results.get(timeout=20) for _ in range(4 * 10)]
    for process in processes:
        process.join()
    assert {"had it"} <= {*found} <= {"had it", "refused"}


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with owned(tmp_path):
        pass
    assert "has no locks" in caplog.text


def test_a_link_in_a_strangers_folder_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(victim)
    with pytest.raises(ConfigError, match="cannot be written"):
        owned(tmp_path / "run").__enter__()
    assert victim.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_second_start_in_a_folder_is_refused(tmp_path, devices):
    first = started(tmp_path, "epoch 1/", *SMALL, "epochs=10000", f"trainer.devices={devices}")
    try:
        folder = only_run(tmp_path)
        other = tmp_path.with_name(f"{tmp_path.name}_other")
        other.mkdir()
        into = f"hydra.run.dir={folder}"
        for arguments in (["ckpt_path=last", into], [f"ckpt_path={folder}"], [*SMALL, into]):
            done = forked(other, *arguments)
            assert done.returncode == 2
            assert f"hydra.run.dir={folder}: another process is at work there (" in done.stderr
            assert f"process {first.pid}, since 20" in done.stderr
            assert done.stderr.count("\n") == 1
        assert not (folder / "metrics.json").exists()
    finally:
        first.terminate()
        first.communicate()
    assert summary(folder)["status"] == "interrupted"
    assert not (folder / ".lock").exists()


def wait_for(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("how", ["sweep", "run"])
def test_a_second_start_writes_nothing_into_the_folder(tmp_path, how):
    """Neither as the first begins nor while it trains, whatever the second would change."""
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "folder"
    first.mkdir()
    second.mkdir()
    into = f"hydra.{how}.dir={folder}"
    where = ["-m", "seed=0", into] if how == "sweep" else [into]
    process = begin(first, *SMALL, "epochs=10000", "ckpt_path=last", *where)
    try:
        wait_for(lambda: list(folder.rglob(".hydra/overrides.yaml")))
        for sign in ("*.lock", "metrics.csv"):  # as it imports torch, and in training
            wait_for(lambda sign=sign: list(folder.rglob(sign)))
            (overrides,) = folder.rglob("overrides.yaml")
            texts = [overrides, *folder.glob("multirun.yaml")]
            texts += folder.rglob("train.log") if sign == "metrics.csv" else []
            before = {path: path.read_text() for path in texts}
            for more in (["ckpt_path=last"], ["ckpt_path=last", "rho=0.5"], ["lr=0.5"]):
                done = forked(second, *SMALL, *where, *more)
                assert done.returncode == 2, done.stderr
                (line,) = done.stderr.splitlines()
                assert f"{into}: another process is at work there (" in line
                assert f"process {process.pid}, " in line
            assert not list(folder.rglob("*.json"))
            assert {path: path.read_text() for path in texts} == before
            assert list(folder.rglob("overrides.yaml")) == [overrides]
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.join(60)
    assert summary(overrides.parents[1])["status"] == "interrupted"
    assert not list(folder.rglob(".lock"))


@pytest.mark.slow
def test_a_sweep_is_refused_while_a_job_outlives_an_earlier_one(tmp_path):
    there = FORK.Queue()
    job = tmp_path / "sweep" / "0_seed=0"
    holder = FORK.Process(target=hold, args=(job, there, "alone"))
    holder.start()
    there.get(timeout=20)
    try:
        done = command(tmp_path, "-m", "seed=0,1", f"hydra.sweep.dir={tmp_path}/sweep")
    finally:
        holder.kill()
        holder.join()
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{job}: another process is at work there (host" in done.stderr
    assert [*tmp_path.rglob("*")] == [job.parent, job, job / ".lock"]
