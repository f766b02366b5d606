"""Ctrl-C at any time after Python itself is up: one line at most, and exit code 130."""

import os
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from runs import SMALL, TRAIN, children

MODULE = ["-m", "sam_lightning"]
RUN = [str(TRAIN), *SMALL, "epochs=500"]


def interrupted(cwd, after, *arguments):
    """What a command printed to stderr, and its exit code, after Ctrl-C."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1], process.returncode


@pytest.mark.parametrize(
    ("name", "arguments"),
    [*((name, RUN) for name in ("hydra", "omegaconf", "torch", "numpy")), ("omegaconf", MODULE)],
)
def test_ctrl_c_amid_an_import(tmp_path, name, arguments):
    code = f"""
import os, runpy, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "{name}":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv = {arguments}
if sys.argv[0] == "-m":
    runpy.run_module(sys.argv[1], run_name="__main__")
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stderr, done.returncode) == ("error: stopped by SIGINT\n", 130)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_at_random_times(tmp_path):
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import sam_lightning.config.process"], check=True)
    up, draw = 1.5 * (time.monotonic() - began), random.Random(0)
    for after in sorted(draw.uniform(up, up + 3) for _ in range(20)):
        said, code = interrupted(tmp_path, after, *RUN)
        assert code == 130, (after, said)
        assert said in ("error: stopped by SIGINT\n", ""), (after, said)  # nothing: training saved


@pytest.mark.long
def test_ctrl_c_amid_the_imports_of_the_processes_of_a_run(tmp_path):
    process = subprocess.Popen(
        [sys.executable, *RUN, "trainer=ddp_cpu"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C reaches all of them
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while len(children(process.pid)) < 3:  # two, and one that multiprocessing needs
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 130
