"""``rerun`` and ``diff``: the same settings in a new folder, and what differs between two runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runs import SMALL, command, configuration, equal, only_run, weights
from sam_lightning.config.conf import top_level
from sam_lightning.config.errors import ConfigError
from sam_lightning.config.trust import trust_arguments
from sam_lightning.runs.resume import replayable
from sam_lightning.studies import diff, rerun
from sam_lightning.studies.runner import TRAIN


def earlier(folder: Path, overrides: list[str], **changes) -> Path:
    """The folder of a run as Hydra leaves it."""
    (folder / ".hydra").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    cfg = OmegaConf.to_container(configuration(*overrides)) | changes
    OmegaConf.save(OmegaConf.create(cfg), folder / ".hydra" / "config.yaml")
    return folder


@pytest.fixture
def started(monkeypatch):
    """The command lines that would have replaced this process."""
    lines = []
    monkeypatch.setattr("os.execv", lambda program, line: lines.append(line))
    return lines


@pytest.mark.slow
def test_a_run_is_repeated_bit_for_bit_in_a_new_folder(tmp_path):
    done = command(tmp_path, *SMALL, "epochs=1", "rho=0.2", "hydra.run.dir=first run")
    assert done.returncode == 0, done.stderr
    (tmp_path / "cwd").mkdir()
    again = [sys.executable, "-m", "sam_lightning", "rerun", str(tmp_path / "first run")]
    done = subprocess.run(again, cwd=tmp_path / "cwd", capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert equal(weights(tmp_path / "first run"), weights(only_run(tmp_path / "cwd")))


def test_what_is_given_replaces_what_is_stored(tmp_path, started, capsys):
    run = earlier(tmp_path / "run", ["method=asam", "rho=0.2", "+trainer.max_steps=5"])
    rerun.main([str(run), "rho=1", "-m", "seed=1,2"])
    kept = ["method=asam", "+trainer.max_steps=5"]
    assert started == [[sys.executable, str(TRAIN), *kept, "rho=1", "-m", "seed=1,2"]]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("added", ["x={_target_: a.B, c: 1}", "x._target_=a.B"])
@pytest.mark.parametrize("given", ["callbacks.x=null", "~callbacks.x", "++callbacks.x=null"])
def test_what_was_added_can_be_left_out(tmp_path, added, given):
    run = earlier(tmp_path / "run", [f"+callbacks.{added}"])
    trust_arguments(["a._target_=a.B"])
    replayed = replayable(run / ".hydra" / "overrides.yaml", top_level(), [given])
    assert configuration(*replayed, given).callbacks.get("x") is None


def test_what_has_changed_in_conf_is_named(tmp_path, started, capsys):
    run = earlier(tmp_path / "run", ["method=asam"], lr=0.25, epochs=3)
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    del config.threads  # a key that is new
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    rerun.main([str(run)])
    said = "conf has changed since: epochs was 3, is 200; lr was 0.25, is 0.1\n"
    assert capsys.readouterr().err == said
    assert len(started) == 1


@pytest.mark.parametrize(
    "override",
    [
        "hydra.launcher._target_=os.system",
        "model._target_=subprocess.run",
        "output_dir=/tmp/x",
        "optimizer={_target_:os.system}",
        "data.root='${oc.env:HOME}'",
    ],
)
def test_strangers_settings_are_not_repeated(tmp_path, started, override):
    (tmp_path / ".hydra").mkdir()
    OmegaConf.save(OmegaConf.create([override]), tmp_path / ".hydra" / "overrides.yaml")
    with pytest.raises(ConfigError):
        rerun.main([str(tmp_path)])
    assert started == []


@pytest.mark.parametrize("arguments", [[], ["nowhere"], ["."]])
def test_rerun_needs_the_folder_of_a_run(tmp_path, monkeypatch, started, arguments):
    monkeypatch.chdir(tmp_path)
    named = (arguments or ["RUN"])[0]
    with pytest.raises(ConfigError, match=f"^{named}: must be the folder of a run"):
        rerun.main(arguments)
    assert started == []


def test_a_sweep_needs_several_values(tmp_path, started):
    run = earlier(tmp_path / "run", [])
    with pytest.raises(ConfigError, match=r"^-m: needs a setting with several values"):
        rerun.main([str(run), "-m"])
    assert started == []


def test_flags_are_checked_before_they_are_read(tmp_path, started):
    run = earlier(tmp_path / "run", [])
    with pytest.raises(ConfigError, match=r"^-rho=1: no such flag; did you mean -r\?$"):
        rerun.main([str(run), "-rho=1"])
    assert started == []


def record(folder: Path, *overrides: str, **content) -> str:
    cfg = configuration("data=digits", *overrides)
    cfg.output_dir = str(folder)
    config = OmegaConf.to_container(cfg, resolve=True)
    folder.mkdir()
    summary = {"status": "completed", "device": "cpu", "config": config, **content}
    (folder / "metrics.json").write_text(json.dumps(summary))
    return str(folder)


def table(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    return {row[0]: row[1:] for row in rows if row}


def test_the_difference_of_two_runs(tmp_path, capsys):
    metrics = [{"test/acc": 0.9, "val/acc": 0.5}, {"test/acc": 0.95}]
    one = record(tmp_path / "one", "lr=0.2", metrics=metrics[0], seconds=1.5)
    other = record(
        tmp_path / "other", "+trainer.max_steps=5", metrics=metrics[1], seconds=2, device="[b]gpu"
    )
    diff.main([one, other])
    printed = capsys.readouterr().out
    assert f"A: {one}" in printed
    assert table(printed) == {
        "lr": ["0.2", "0.1"],
        "trainer.max_steps": ["-", "5"],
        "test/acc": ["0.9000", "0.9500", "+0.0500"],
        "val/acc": ["0.5000", "-", "-"],
        "device": ["cpu", "[b]gpu"],
        "seconds": ["1.5", "2"],
    }
    assert max(map(len, printed.splitlines())) <= 160
    diff.main([one, one])
    printed = capsys.readouterr().out
    assert "settings that differ: nothing" in printed
    assert "what else differs: nothing" in printed


def test_diff_needs_two_runs(tmp_path):
    one = record(tmp_path / "one", metrics={"test/acc": 0.9})
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("[")
    for arguments, says in [
        ([], "diff: needs two folders of runs, not 0"),
        ([one], "diff: needs two folders of runs, not 1"),
        ([one, one, one], "diff: needs two folders of runs, not 3"),
        ([one, "nowhere"], "nowhere: is not the folder of a run that has ended"),
        ([one, str(tmp_path / "empty")], "empty: is not the folder of a run that has ended"),
        ([one, str(tmp_path / "broken")], "metrics.json is not a run's"),
    ]:
        with pytest.raises(ConfigError, match=says):
            diff.main(arguments)
