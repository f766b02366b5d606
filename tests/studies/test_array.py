"""Studies as jobs of submitit, by its executor for one machine in the place of SLURM."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs import children, equal, rows, summary, weights
from sam_lightning.config.errors import ConfigError
from sam_lightning.studies.study import main

FILE = """\
common: {experiment: quickstart, model.width: 4, data.subset: 100, epochs: 8}
seeds: [0]
arms:
  sgd: {method: sgd}
  sam: {method: sam}
  big: {method: sam, data.val_size: 5000}
"""
SLOW = """
import os, time
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(float(os.environ["SLEEP"]))
"""
COMMAND = """
import sys
from sam_lightning.config.errors import one_line_errors
from sam_lightning.studies import array, study
array.CLUSTER = "local"
array.with_squeue = lambda *names: __import__("submitit")
with one_line_errors():
    study.main(sys.argv[1:])
"""


def study(sleep, *arguments):
    path = os.pathsep.join([".", os.environ["PYTHONPATH"]])
    line = [sys.executable, "-c", COMMAND, "st.yaml", "+callbacks.slow._target_=slow.Slow"]
    return subprocess.Popen(
        [*line, *arguments],
        env={**os.environ, "PYTHONPATH": path, "SLEEP": str(sleep)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "st.yaml").write_text(FILE)


def wait_for(file):
    end = time.monotonic() + 120
    while not file.is_file():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_jobs_that_are_stopped_go_on_and_have_the_results_of_processes(here):
    sgd, sam = (Path(f"logs/studies/st/{arm},seed=0") for arm in ("sgd", "sam"))
    process = study(1, "launcher=submitit")
    for run in (sgd, sam):
        wait_for(run / "checkpoints" / "last.ckpt")
    # What SLURM sends to a job whose time is nearly up, as submitit then queues it again.
    (job,) = (
        task
        for controller in children(process.pid)
        for task in children(controller)
        if any("method=sgd" in Path(f"/proc/{r}/cmdline").read_text() for r in children(task))
    )
    os.kill(job, signal.SIGURG)
    while len(re.findall(r"^\$ ", (sgd / "output.txt").read_text(), re.M)) < 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=100)
    assert process.returncode == 130
    again = study(0, "launcher=submitit")
    out, err = again.communicate(timeout=200)
    assert again.returncode == 1
    assert re.search(r"big,seed=0: failed: data.val_size=5000: must come to 1..1437 ", out)
    assert err.splitlines()[-1] == "error: 1 of 3 runs did not complete"
    parts = [len(summary(run)["parts"]) for run in (sgd, sam)]
    assert min(parts) > 1
    Path("logs").rename("broken")
    alone = study(0, "launcher=joblib", "jobs=2", "only=sgd,sam")
    alone.communicate(timeout=200)
    for run in (sgd, sam):
        broken = Path("broken", *run.parts[1:])
        assert equal(weights(broken), weights(run))
        assert rows(broken) == rows(run)
        assert summary(broken)["metrics"] == summary(run)["metrics"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["launcher=submitit"],
            "launcher=submitit: there is no srun here; start it where SLURM is",
        ),
        (
            ["launcher=dask"],
            "launcher=dask: allowed is joblib, submitit",
        ),
        (["slurm=--time=5"], "slurm=--time=5: is for launcher=submitit"),
        (["slurm=--time=5", "launcher=joblib"], "slurm=--time=5: is for launcher=submitit"),
        (
            ["launcher=submitit", "slurm=gpu"],
            "slurm=gpu: allowed is options of sbatch, as in '--gp",
        ),
        (
            ["launcher=submitit", "slurm=--ntasks=2"],
            "slurm=--ntasks=2: allowed is options of sbatch",
        ),
        (["launcher=submitit", "slurm=-n2"], "slurm=-n2: allowed is options of sbatch"),
        (
            ["launcher=submitit", "slurm=--time=5 --chdir=/"],
            "slurm=--time=5 --chdir=/: allowed is options of sbatch, .*, but those of .* chdir, ",
        ),
        (["launcher=submitit", "slurm=--pars"], "slurm=--pars: allowed is options of sbatch"),
        (
            ["launcher=submitit", "+model.token=0123456789"],
            r"\+model.token=0123456789: submitit would keep it in a file; take it from the environ",
        ),
    ],
)
def test_what_is_refused(here, monkeypatch, arguments, said):
    monkeypatch.setenv("PATH", "/nowhere")
    Path("st.yaml").write_text(FILE.partition("  big")[0])
    before = {*Path().iterdir()}
    with pytest.raises(ConfigError, match=said):
        main(["st.yaml", *arguments])
    assert {*Path().iterdir()} == before
