"""The rate that ``cost`` computes hours from: typed, measured by a finished run, or a guess."""

import json
import os
import re
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from runs import TRAIN
from sam_lightning.config.errors import ConfigError
from sam_lightning.studies import cost

SMALL = ["data=cifar10", "model.width=8", "trainer=cpu", "batch_size=32"]


def leave(folder, *overrides, written, **summary):
    """What a finished run with these overrides leaves in ``folder``."""
    config = OmegaConf.to_container(cost.configuration([*SMALL, *overrides]), resolve=True)
    del config["cuda_graph"]  # as an earlier version had none
    found = {"status": "completed", "metrics": {"train/loss": 0.1}, "config": config}
    found |= {"images_per_second": 500.0, "updates": 300, "devices": 1, "device": "AMD EPYC"}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found | summary))
    os.utime(folder / "metrics.json", (written, written))


def shown(capsys, *arguments):
    """The lines that ``cost`` prints, by their beginnings."""
    cost.main([*SMALL, *arguments])
    return dict(re.split(r"  +", line) for line in capsys.readouterr().out.splitlines())


def rate_of(lines):
    (rate,) = (re.fullmatch(r"at (\S+) FLOPs/s", name) for name in lines if name.startswith("at "))
    return float(rate[1])


@pytest.mark.slow
def test_hours_are_at_the_rate_of_the_newest_run_like_this_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a_pass = 3 * cost.estimate(cost.configuration(SMALL)).forward
    leave(tmp_path / "logs" / "old", written=10)
    new = {"images_per_second": 1800.0, "devices": 2}
    leave(tmp_path / "logs" / "new", "method=sgd", "data=svhn", "lr=0.3", written=20, **new)
    others = "batch_size=64 compile=true model.width=16 trainer.precision=bf16-mixed"
    for number, other in enumerate([*others.split(), "data=digits"]):
        leave(tmp_path / "logs" / f"other{number}", other, written=30 + number)
    leave(tmp_path / "logs" / "short", written=40, updates=99)
    leave(tmp_path / "logs" / "stopped", written=50, status="interrupted")
    leave(tmp_path / "logs" / "no_time", written=60, images_per_second=None)

    lines = shown(capsys, "epochs=1000")
    assert lines["this rate"] == "measured on 2 x AMD EPYC, 1,800 images/s: logs/new"
    assert rate_of(lines) == pytest.approx(a_pass * 1 * 1800 / 2, rel=1e-4)
    hours = a_pass * 2 * 45_000 * 1000 / (a_pass * 900) / 3600
    assert f"{hours:.2f} hours" in lines.values()

    lines = shown(capsys, "runs=logs/old")
    assert lines["this rate"] == "measured on 1 x AMD EPYC, 500 images/s: logs/old"
    assert rate_of(lines) == pytest.approx(a_pass * 2 * 500, rel=1e-4)

    lines = shown(capsys, "model.width=4")
    assert lines["this rate"].startswith("a guess: no finished run of this model, batch size")
    assert rate_of(lines) == 2e13

    lines = shown(capsys, "flops_per_second=1e12")
    assert "this rate" not in lines
    assert rate_of(lines) == 1e12


def test_a_folder_of_runs_that_is_typed_must_be_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^runs=lgos: no such folder$"):
        cost.main([*SMALL, "runs=lgos"])
    assert "a guess" in shown(capsys)["this rate"]  # there need not be a folder logs


@pytest.mark.long
@pytest.mark.slow
def test_a_run_measures_the_rate_of_the_next(tmp_path, monkeypatch, capsys):
    run = [*SMALL, "data=digits", "model.width=2", "batch_size=10", "data.subset=200", "test=false"]
    subprocess.run([sys.executable, TRAIN, *run, "epochs=5"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    (record,) = tmp_path.glob("logs/train/runs/*/metrics.json")
    summary = json.loads(record.read_text())
    lines = shown(capsys, *run[4:], "method=looksam", "epochs=70")
    assert lines["this rate"].endswith(str(record.parent.relative_to(tmp_path)))
    forward = cost.estimate(cost.configuration(run)).forward
    assert rate_of(lines) == pytest.approx(6 * forward * summary["images_per_second"], rel=1e-4)
