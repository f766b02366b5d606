"""The tests' own runner: a worker that dies ends it at once."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent

TESTS = """
import os, signal

def test_that_passes():
    pass

def test_that_dies():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_behind_it():
    pass
"""


@pytest.mark.long
def test_a_worker_that_dies_ends_the_run_and_names_its_test(tmp_path):
    shutil.copy(HERE.parent / "pyproject.toml", tmp_path)
    (tmp_path / "tests").mkdir()
    shutil.copy(HERE / "conftest.py", tmp_path / "tests")
    (tmp_path / "tests" / "test_one.py").write_text(TESTS)
    (tmp_path / "tests" / "test_two.py").write_text("import time\ndef test(): time.sleep(120)\n")
    started = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert time.monotonic() - started < 60
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert "a worker of the test runner died in tests/test_one.py::test_that_dies" in last
