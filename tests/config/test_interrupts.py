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


@pytest.mark.parametrize("arguments", [RUN, MODULE])
def test_ctrl_c_amid_the_first_imports(tmp_path, arguments):
    for after in (0.06, 0.12, 0.2):
        found = interrupted(tmp_path, after, *arguments)
        assert found == ("error: stopped by SIGINT\n", 130)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_ctrl_c_at_random_times(tmp_path):
    draw = random.Random(0)
    for after in sorted(draw.uniform(0.05, 3) for _ in range(20)):
        said, code = interrupted(tmp_path, after, *RUN)
        assert code == 130, (after, said)
        assert said in ("error: stopped by SIGINT\n", ""), (after, said)  # nothing: training saved


@pytest.mark.slow
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
