"""What is installed: versions, and distributions that build and import."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import sam_lightning

ROOT = Path(__file__).parents[1]
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # setuptools sets sys.argv
print(build_meta.build_wheel(out), build_meta.build_sdist(out))
"""
# As if of what the project needs only torch were installed.
STEP = """
import sys

REFUSED = {"fcntl", "resource"}  # as on Windows
REFUSED |= {"hydra", "joblib", "lightning", "lightning_fabric", "matplotlib", "omegaconf", "pandas"}
REFUSED |= {"PIL", "pytorch_lightning", "rich", "scipy", "sklearn", "tensorboard", "timm"}
REFUSED |= {"torchmetrics", "torchvision", "yaml"}

sys.modules.update(dict.fromkeys(REFUSED))  # imports fail, and find_spec finds nothing
import torch
import sam_lightning
from sam_lightning import SAM
from sam_lightning.optim import AdaptiveAscent
assert sam_lightning.__file__.startswith(sys.argv[1]), sam_lightning.__file__

model = torch.nn.Linear(3, 2)
before = model.weight.detach().clone()
optimizer = SAM(model.named_parameters(), torch.optim.SGD, perturbation=AdaptiveAscent(), lr=0.1)
x = torch.ones(4, 3)
model(x).square().sum().backward()
with optimizer.perturbed(model):
    model(x).square().sum().backward()
optimizer.step()
assert not torch.equal(before, model.weight)
try:
    import lightning
except ImportError:
    print("done")
"""

# What Python says there of the system.
ON_WINDOWS = """
import runpy, sys
sys.platform = "win32"
import sam_lightning
try:
    sam_lightning.load
except ImportError as error:
    print(error)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_one_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sam_lightning.__version__
    assert 'attr = "sam_lightning.__version__"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("script", ["train.py", "sam_lightning/__main__.py"])
def test_windows_gets_one_line(script):
    command = [sys.executable, "-c", ON_WINDOWS, str(ROOT / script), "rho=0.1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = "on Windows only the optimizer and the models work; use Linux, macOS or WSL\n"
    assert (done.returncode, done.stderr) == (2, f"error: {said}")
    assert done.stdout == f"load: {said}"


@pytest.mark.long
@pytest.mark.slow
def test_make_tells_how_far_an_installation_is(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\nsleep 9; exit $FAKED\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    for code in (1, 0):
        done = subprocess.run(
            ["make", "--no-print-directory", f"VENV={tmp_path}", f"{tmp_path}/.base"],
            cwd=ROOT,
            env={**os.environ, "FAKED": str(code)},
            capture_output=True,
            text=True,
        )
        first, *times, last = done.stdout.splitlines()
        assert first.startswith("Installing torch")
        assert all(re.fullmatch(r"  \d+ s: \d+ MB", line) for line in times)
        assert len(times) >= 1
        assert bool(done.returncode) == bool(code)
        assert last.startswith("It failed: " if code else "  ")
        assert (tmp_path / ".base").exists() == (not code)
    assert not (tmp_path / "tmp").exists()


@pytest.mark.slow
def test_wheel_and_sdist_build_and_the_optimizer_needs_torch_alone(tmp_path):
    source, out, installed = (tmp_path / name for name in ("source", "out", "installed"))
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    out.mkdir()
    command = [sys.executable, "-c", BUILD, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, sdist = done.stdout.splitlines()[-1].split()
    assert f"-{sam_lightning.__version__}" in wheel
    with tarfile.open(out / sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "sam_lightning/optim/sam.py"} <= names
    with zipfile.ZipFile(out / wheel) as archive:
        archive.extractall(installed)
        packed = {name for name in archive.namelist() if name.startswith("sam_lightning/")}
    package = ROOT / "sam_lightning"
    code = {f.relative_to(ROOT).as_posix() for f in package.rglob("*.py")}
    assert packed == code | {"sam_lightning/py.typed"}
    command = [sys.executable, "-c", STEP, str(installed)]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
