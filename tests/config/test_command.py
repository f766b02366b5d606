"""The command line: help, flags, tracebacks on demand, and what resuming makes of arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from commands import TRAIN, serve
from inject import forked
from runs import WITH_DASHBOARD
from sam_lightning.cli import settings_first
from sam_lightning.runs.resume import resumed


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.cli")


@pytest.mark.long
@pytest.mark.slow
def test_the_grid_of_radii(tmp_path):
    wrong = "data.val_size=5000"  # each job is refused at once
    done = forked(tmp_path, "-m", "sweep=rho_grid", "data=digits", wrong)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {wrong}: must come to 1..1437 ")
    radii = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")
    pairs = [(rho, seed) for rho in radii for seed in range(3)]
    expected = {
        f"{i}_rho={rho},seed={seed},data=digits,{wrong}" for i, (rho, seed) in enumerate(pairs)
    }
    assert {path.name for path in tmp_path.rglob("*_rho=*")} == expected


def test_a_missing_sweeper_is_named_with_its_remedy(tmp_path):
    (tmp_path / "cwd").mkdir()
    (tmp_path / "hydra_plugins").mkdir()
    (tmp_path / "hydra_plugins" / "__init__.py").touch()  # hides the plugins that are installed
    done = subprocess.run(
        [sys.executable, str(TRAIN), "-m", "sweep=rho_optuna"],
        cwd=tmp_path / "cwd",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: sweep=rho_optuna: ")
    assert "pip install -e '.[sweep]'" in done.stderr
    assert list((tmp_path / "cwd").iterdir()) == []


def test_help_names_every_group_choice_and_knob(light, tmp_path):
    out = light(tmp_path, "--help").out
    for file in (TRAIN.parent / "conf").glob("*/*.yaml"):
        if file.parent.name == "study":  # these are not of train.py
            continue
        (line,) = (x for x in out.splitlines() if x.strip().startswith(f"{file.parent.name}: "))
        assert (file.stem in line.replace(",", "").split()) == (file.stem != "base")
    primary = OmegaConf.load(TRAIN.parent / "conf" / "train.yaml")
    for key in {*primary} - {"defaults", "hydra"}:
        assert f"\n  {key}: " in out
    assert "radius of the perturbation" in out


@pytest.mark.parametrize("arguments", ["--help", "--cfg job", "--cfg job --resolve", "--info"])
def test_help_needs_no_torch_and_leaves_nothing(light, tmp_path, arguments):
    result = light(tmp_path, *arguments.split())
    assert (result.code, result.err, result.left) == (0, "", [])
    assert "max_skipped_steps" in result.out
    assert not result.torch


@pytest.mark.parametrize("given", ["traceback=true", "traceback=True", "++traceback=true"])
def test_a_traceback_is_shown_on_demand(light, tmp_path, given):
    result = light(tmp_path, given, "rho=-1")
    assert result.code == 1
    assert "Traceback" in result.err
    assert "ConfigError: rho=-1: allowed is a number >= 0" in result.err
    assert result.left == []


def test_the_command_itself(tmp_path):
    command = [sys.executable, str(TRAIN), "rho=-1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: rho=-1: allowed is a number >= 0\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def login_node(tmp_path, monkeypatch):
    """Where SLURM's commands are on the path, but jobs have another start."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").symlink_to("/bin/false")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.slow
def test_a_run_has_no_warning(login_node, tmp_path):
    options = [*WITH_DASHBOARD, "epochs=1"]
    command = [sys.executable, "-W", "error", str(TRAIN), *options, "hydra.run.dir=run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.long
@pytest.mark.slow
def test_an_error_comes_first_on_a_login_node_too(login_node, tmp_path):
    options = [*WITH_DASHBOARD, "data.val_size=5000"]  # found out with the data, behind the trainer
    command = [sys.executable, str(TRAIN), *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.val_size=5000")
    assert done.stderr.count("\n") == 1


def test_a_refused_run_leaves_other_folders_alone(light, tmp_path):
    (tmp_path / "empty").mkdir()
    result = light(tmp_path, "rho=-1", f"hydra.run.dir={tmp_path}/empty/run")
    assert result.code == 2
    assert list((tmp_path / "empty").iterdir()) == []


def earlier_run(folder: Path, overrides: list[str]) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    OmegaConf.save(OmegaConf.create(overrides), folder / ".hydra" / "overrides.yaml")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.write_text("checkpoint")
    return checkpoint


@pytest.mark.parametrize("name", ["it's", r"a\'b", r"a\b", "a\\"])
def test_hydra_reads_back_the_folder_of_a_resumed_run(tmp_path, name):
    earlier_run(tmp_path / name, [])
    arguments = resumed([f"ckpt_path={tmp_path / name}"])
    found = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(arguments)}
    assert found["hydra.run.dir"] == found["ckpt_path"] == str(tmp_path / name)


def test_resuming_repeats_the_overrides_in_the_same_folder(tmp_path):
    run = tmp_path / "it's 0_rho=0.1,seed=0"
    checkpoint = earlier_run(run, ["rho=0.1", "+trainer.max_steps=3", "epochs=5", "ckpt_path=old"])
    given = [f"ckpt_path={checkpoint}", "++trainer.max_steps=-1", "lr=1"]
    quoted = str(run).replace("'", r"\'")
    assert resumed(given) == [
        "rho=0.1",
        "epochs=5",
        f"ckpt_path='{quoted}/checkpoints/last.ckpt'",
        *given[1:],
        f"hydra.run.dir='{quoted}'",
        "hydra.output_subdir=null",
        "hydra.mode=RUN",
    ]


def test_resuming_into_a_folder_that_is_given(tmp_path):
    checkpoint = earlier_run(tmp_path / "run", ["rho=0.1"])
    given = [f"ckpt_path={checkpoint}", "hydra.run.dir=elsewhere"]
    expected = ["rho=0.1", f"ckpt_path='{checkpoint}'", given[1], "hydra.mode=RUN"]
    assert resumed(given) == expected


@pytest.mark.parametrize(
    "arguments",
    [["rho=0.1"], ["ckpt_path=null"], ["~ckpt_path"], ["-m", "ckpt_path=a.ckpt,b.ckpt"]],
)
def test_other_arguments_stay_as_they_are(arguments):
    assert resumed(arguments) == arguments


def test_a_refused_resume_keeps_the_earlier_run(light, tmp_path):
    checkpoint = earlier_run(tmp_path / "run", ["rho=0.1"])
    checkpoint.unlink()
    checkpoint.parent.rmdir()
    result = light(tmp_path, f"ckpt_path={checkpoint}")
    assert result.code == 2
    assert "last.ckpt: no such file" in result.err
    assert (tmp_path / "run" / ".hydra" / "overrides.yaml").is_file()


def test_flags_may_stand_anywhere():
    assert settings_first(["rho=1,2", "-m", "seed=0"]) == ["rho=1,2", "seed=0", "-m"]
    assert settings_first(["rho=1", "seed=0"]) == ["rho=1", "seed=0"]
    assert settings_first(["a=1", "--cfg", "job", "b=2"]) == ["a=1", "b=2", "--cfg", "job"]
    flags = ["--config-dir=x", "--config-name", "y", "--info"]
    assert settings_first(["a=1", *flags, "b=1"]) == ["a=1", "b=1", *flags]
