"""``metrics.json``: what a run did, over what, by which command, and what it may not say."""

import os
import sys

import pytest
import torch

from inject import forked
from runs import SMALL, command, run, summary
from sam_lightning.config.errors import ConfigError, TrainingError
from sam_lightning.inference.load import data_of, load
from sam_lightning.runs.secrets import without_secrets


def test_what_was_measured_is_said_with_how_much_of_it(tmp_path, capsys, monkeypatch):
    token = "0123456789abcdef"
    monkeypatch.setattr(sys, "argv", ["train.py", "rho=0.1", f"+logger.wandb.api_key={token}"])
    monkeypatch.setenv("OTHER_TOKEN", "in-the-environment")
    monkeypatch.setenv("PWD", "train.py rho")  # is no password
    limits = ["+trainer.limit_test_batches=2", "+trainer.limit_val_batches=0.5"]
    given = [*limits, "data.eval_batch_size=20", "data.val_size=80", "trainer.log_every_n_steps=3"]
    run(tmp_path, *given, "data.label_noise=0.3", "task_name=in-the-environment")
    found = summary(tmp_path)
    assert found["computed_over"] == {
        "train": {"images": 100, "of": 100, "last_steps": 1},  # of 4, after a log at 3
        "val": {"images": 40, "of": 80},
        "test": {"images": 40, "of": 359},
    }
    assert (40 * found["metrics"]["test/acc"]) % 1 == pytest.approx(0, abs=1e-5)
    printed = " ".join(capsys.readouterr().out.split())
    assert "test accuracy, 40 of 359 images" in printed
    assert "validation accuracy, 40 of 80 images" in printed
    images = found["images"]
    assert {split: sum(of.values()) for split, of in images.items()} == {
        **{"train": 100, "val": 80, "test": 359},
    }
    assert list(images["test"]) == [str(digit) for digit in range(10)]
    assert max(images["val"].values()) - min(images["val"].values()) <= 1  # stratified
    assert found["parameters"] == 44_550
    (part,) = found["parts"]
    assert (part["from_step"], part["to_step"], part["devices"]) == (0, 4, 1)
    hidden = "python train.py rho=0.1 '+logger.wandb.api_key=***'"
    assert part["command"] == found["command"] == hidden
    assert found["host"] == part["host"] != ""
    text = (tmp_path / "metrics.json").read_text()
    assert token not in text
    assert "in-the-environment" not in text


def test_a_whole_split_is_not_called_a_part(tmp_path, capsys):
    run(tmp_path, "epochs=1")
    assert summary(tmp_path)["computed_over"]["test"] == {"images": 359, "of": 359}
    assert "val" not in summary(tmp_path)["computed_over"]
    assert " images " not in capsys.readouterr().out.replace("images/s", "")


def test_a_run_that_trained_nothing_is_not_completed(tmp_path):
    with pytest.raises(TrainingError, match="before the first step"):
        run(tmp_path, "+trainer.max_time='00:00:00:00'")
    assert summary(tmp_path)["status"] == "failed"


def test_a_record_has_every_part_of_the_run(tmp_path, monkeypatch):
    for epochs in (1, 2, 2):  # the last has nothing left to train, and tests again
        monkeypatch.setattr(sys, "argv", ["train.py", f"epochs={epochs}"])
        run(tmp_path, f"epochs={epochs}", "data.val_size=20", "ckpt_path=last")
    parts = summary(tmp_path)["parts"]
    steps = [(part["from_step"], part["to_step"]) for part in parts]
    assert steps == [(0, 2), (2, 4), (4, 4)]
    commands = [part["command"].rpartition(" ")[2] for part in parts]
    assert commands == ["epochs=1", "epochs=2", "epochs=2"]
    assert [part["started"] for part in parts] == sorted(part["started"] for part in parts)
    assert summary(tmp_path)["computed_over"]["val"] == {"images": 20, "of": 20}


def test_threads_are_those_asked_for_and_only_within_the_run(tmp_path, capfd):
    before = torch.get_num_threads()
    run(tmp_path, "epochs=1", f"threads={before + 1}", "test=false")
    run(tmp_path, "epochs=2", "ckpt_path=last", "test=false")
    parts = summary(tmp_path)["parts"]
    assert [part["threads"] for part in parts] == [before + 1, before]
    assert parts[1]["changed"]["threads"] == {"from": before + 1, "to": None}
    assert torch.get_num_threads() == before


@pytest.mark.long
def test_processes_of_a_run_use_the_threads_asked_for(tmp_path):
    given = [*SMALL, "epochs=1", "trainer=ddp_cpu", "trainer.devices=2", "threads=3"]
    assert command(tmp_path, *given, f"hydra.run.dir={tmp_path / 'run'}").returncode == 0
    assert summary(tmp_path / "run")["parts"][0]["threads"] == 3


@pytest.mark.slow
def test_the_parts_of_a_run_that_was_killed_join(tmp_path):
    given = [*SMALL, "epochs=4", "checkpoint_every_n_steps=3", "ckpt_path=last"]
    for fault in ("SIGKILL", "pass:9"), ("SIGTERM", "pass:3"), None:
        forked(tmp_path, *given, f"hydra.run.dir={tmp_path / 'run'}", fault=fault)
    found = summary(tmp_path / "run")
    steps = [(part["from_step"], part["to_step"]) for part in found["parts"]]
    assert steps == [(0, 4), (4, 6), (6, 8)]  # what was lost after a checkpoint is in none
    assert (found["status"], found["updates"]) == ("completed", 8)


CRASH = """
import os
from lightning import Callback
class Crash(Callback):
    def on_test_start(self, trainer, module):
        if trainer.global_rank == 1:
            os.kill(os.getpid(), 9)
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_crash_while_the_test_is_repeated_leaves_the_record_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text(CRASH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    given = [*SMALL, "epochs=1", "trainer.devices=2", f"hydra.run.dir={tmp_path / 'run'}"]
    assert command(tmp_path, *given).returncode == 0
    complete = summary(tmp_path / "run")
    again = [*given, "ckpt_path=last", "hydra.output_subdir=null"]
    crashed = command(tmp_path, *again, "callbacks.summary._target_=crash.Crash")
    assert crashed.returncode == 1
    assert crashed.stderr.splitlines()[-1].startswith("error: rank 1 of 2 failed: ")
    left = summary(tmp_path / "run")
    assert left.pop("refused").startswith("rank 1 of 2 failed: ")
    assert left == complete
    assert command(tmp_path, *again).returncode == 0
    assert summary(tmp_path / "run")["status"] == "completed"
    assert "refused" not in summary(tmp_path / "run")


STORED_FAR_AWAY = """
from sam_lightning.data import ImageSource, digits
def pictures(root: str) -> ImageSource:
    return digits()
"""


def test_no_record_of_a_run_has_a_password_and_it_continues_without(tmp_path, monkeypatch):
    (tmp_path / "far_away.py").write_text(STORED_FAR_AWAY)
    monkeypatch.syspath_prepend(tmp_path)
    folder, root = tmp_path / "run", "s3://me:pass-word@host/a"
    given = ["data.source._target_=far_away.pictures", f"+data.root='{root}'"]
    given += ["+data.source.root=${data.root}"]
    run(folder, *given, "epochs=1")
    run(folder, *given, "epochs=2", "ckpt_path=last")
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert [file for file in files if b"pass-word" in file.read_bytes()] == []
    config = load(folder / "checkpoints" / "last.ckpt", trust=["far_away.pictures"]).config
    with pytest.raises(ConfigError, match=r"^data.root=s3://\*\*\*@host/a: is an address"):
        data_of(config)
    assert data_of(config, root=root).classes == config["classes"]


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("logger.wandb.api_key=abc", "logger.wandb.api_key=***"),
        ("model.token=a:b: no such key", "model.token=***: no such key"),
        ("{api_key: 'a b', project: x}", "{api_key: ***, project: x}"),
        ("s3://me:pass@host/a?token=abc&b=c", "s3://***@host/a?token=***&b=c"),
        ("aws_secret_access_key=a PASSWORD=b", "aws_secret_access_key=*** PASSWORD=***"),
        ("model.monkey=1 monitor=val/acc data.root=/a@b", None),
        ("model.key='it\\'s mine' x=1", "model.key=*** x=1"),
        ("+model.tokens=[abc,def] clientSecret=a", "+model.tokens=*** clientSecret=***"),
        ("s3://me:p@ss@host/a", "s3://***@host/a"),
        ({"a": [{"token": "x", "tokens": 3}], "use_token": True}, None),
        ({"token": ["x", "y"], "key": 4}, None),
    ],
    ids=str,
)
def test_secrets_are_taken_out(text, without):
    if isinstance(text, dict):
        without = {"a": [{"token": "***", "tokens": 3}], "use_token": True}
        without = without if "a" in text else {"token": ["***", "***"], "key": 4}
    assert without_secrets(text) == (text if without is None else without)


@pytest.mark.slow
def test_a_record_stays_where_a_continuation_fails_before_it_saves(tmp_path):
    assert forked(tmp_path, *SMALL, "hydra.run.dir=run").returncode == 0
    before = summary(tmp_path / "run")
    target = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    more = [f"+callbacks.more._target_={target}", "+callbacks.more.scheduling={1: 2}", "epochs=3"]
    done = forked(tmp_path, "ckpt_path=run", *more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    after = summary(tmp_path / "run")
    assert "GradientAccumulationScheduler" in after.pop("refused")
    assert after == before
