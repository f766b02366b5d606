"""A real SLURM, on this machine: every recipe of the docs, and jobs that are stopped."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from random_resume import differences
from runs import summary, wait_for_end
from sam_lightning.config.conf import CONF
from slurm import Slurm, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.timeout(900),
]
DOCS = CONF.parent / "docs"
COMMANDS, RESULTS = ((DOCS / name).read_text() for name in ("commands.md", "results.md"))
SMALL = ["data=digits", "data.subset=100", "model.width=4", "batch_size=48", "epochs=2"]
SMALL += ["callbacks.dashboard=null"]
# 200 steps take more than 50 seconds on any machine, but where nothing is stopped.
SLOW = """
import os, time
from lightning.pytorch.callbacks import Callback

class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(float(os.environ.get("SLEEP", "0.25")))
"""
LONG = [*SMALL, "epochs=100", "+callbacks.slow._target_=slow.Slow"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    slurm = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        yield slurm
    finally:
        slurm.end()


@pytest.fixture
def here(slurm, tmp_path, monkeypatch):
    """A clone, in which jobs find the callback."""
    slurm.clone(tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    path = os.pathsep.join([str(tmp_path), slurm.environment["PYTHONPATH"]])
    monkeypatch.setitem(slurm.environment, "PYTHONPATH", path)
    return tmp_path


def train(slurm, cwd, *arguments):
    """A run without SLURM."""
    slurm("env", "SLEEP=0", "python", "train.py", *arguments, cwd=cwd)


def script(*command, header=""):
    """A file for sbatch."""
    words = " ".join(command)
    return f"#!/bin/bash\n#SBATCH --output=said.txt --open-mode=append {header}\n{words}\n"


def kill(*variables):
    """End what has these variables in its environment, as by a node that dies."""
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if {*variables} <= {*file.read_bytes().decode(errors="replace").split("\0")}:
                os.kill(int(file.parent.name), signal.SIGKILL)


def assert_unbroken(broken, whole, parts):
    found = summary(broken)
    assert found["status"] == "completed"
    assert len(found["parts"]) == parts
    assert [
        d for d in differences(broken, whole) if not d.startswith("metrics.json: .config")
    ] == []


# ------------------------------------------------------------------------------ the docs' recipes

SRUN = re.findall(r"`(srun [^`\n]+)`", COMMANDS)


@pytest.mark.parametrize("command", SRUN)
def test_srun_as_the_docs_have_it(slurm, here, command):
    (here / "job.sh").write_text(script(command, "trainer=ddp_cpu", *SMALL))
    tasks = int((re.findall(r"ntasks-per-node=(\d)", command) or ["1"])[0])
    job = slurm.submit(here, f"--ntasks-per-node={tasks}", "job.sh")
    assert slurm.wait_for(job) == "COMPLETED", (here / "said.txt").read_text()
    (run,) = (file.parent for file in here.glob("logs/**/metrics.json"))
    # Alone, ``trainer=ddp_cpu`` starts two.
    assert (summary(run)["status"], summary(run)["devices"]) == ("completed", max(tasks, 2))
    if "$SLURM_JOB_ID" in command:
        assert run.name == f"job-{job}"


def test_srun_without_a_script(slurm, here):
    """Also from a shell of salloc, by the number of tasks alone, on two nodes."""
    train(slurm, here, *SMALL, "trainer=ddp_cpu", f"hydra.run.dir={here / 'own'}")
    for number, start in enumerate(
        (
            "srun --ntasks-per-node=2",
            "srun --ntasks=2 --label",
            "srun --nodes=2 --ntasks-per-node=1",
            "salloc --ntasks-per-node=4 srun --ntasks=2",  # whose tasks have the name of a shell
        )
    ):
        folder = here / str(number)
        given = [*SMALL, "trainer=ddp_cpu", f"hydra.run.dir={folder}"]
        slurm(*start.split(), "python", "train.py", *given, cwd=here)
        found = differences(folder, here / "own")
        assert [d for d in found if ".trainer." not in d] == [], start
        assert summary(folder)["devices"] == 2


def test_a_wrong_number_of_tasks_or_value_is_said_once(slurm, here):
    before = {*here.iterdir()}
    for tasks, wrong, said in [
        ("--ntasks-per-node=3", "trainer.devices=2", "trainer.devices=2, trainer.num_nodes=1: SLU"),
        ("--ntasks=2", "trainer.num_nodes=2", "trainer.devices=2, trainer.num_nodes=2: SLURM has"),
        ("--ntasks=2", "batch_size=49", "batch_size=49: is over all devices together, and must"),
        ("--ntasks-per-node=3", "rho=-1", "rho=-1: allowed is a number >= 0"),
        # The first task of each machine says it.
        ("--nodes=2 --ntasks=3", "rho=0.1", "SLURM_STEP_TASKS_PER_NODE=2,1: must be as many on"),
    ]:
        start = ["srun", *tasks.split(), "python", "train.py"]
        done = slurm.run(*start, *SMALL, wrong, cwd=here)
        errors = [x for x in done.stderr.splitlines() if not x.startswith(("srun: ", "slurmst"))]
        assert errors == errors[:1] * (2 if "--nodes=2" in tasks else 1), done.stderr
        assert errors[0].startswith(f"error: {said}")
        assert (done.returncode, done.stdout) == (2, "")
    assert {*here.iterdir()} == before


def test_a_script_that_forgets_srun(slurm, here):
    """Its process has SLURM's variables as the first of two tasks has, and would wait for one."""
    said = "error: SLURM_NTASKS=2: the script of sbatch started this process itself"
    for options, state in [("--ntasks=2", "FAILED"), ("--ntasks=1", "COMPLETED")]:
        (here / "job.sh").write_text(script("python", "train.py", "trainer=ddp_cpu", *SMALL))
        before = {*here.rglob("*")}
        job = slurm.submit(here, options, "job.sh")
        assert slurm.wait_for(job) == state
        if state == "FAILED":
            assert (here / "said.txt").read_text().startswith(said)
            assert {*here.rglob("*")} - before == {here / "said.txt"}
    (run,) = (file.parent for file in here.glob("logs/**/metrics.json"))
    assert (summary(run)["status"], summary(run)["devices"]) == ("completed", 2)


def test_a_shell_with_a_terminal(slurm, here):
    """A run that is started from it is alone, unless ``srun`` starts it there."""
    for inner, devices in [("", 1), ("srun --overlap", 2)]:
        folder = here / f"run{devices}"
        given = " ".join([*SMALL, "trainer=cpu", f"hydra.run.dir={folder}"])
        if inner:
            given += f" trainer.devices={devices}"
        # Only the first of two tasks has the terminal, so the other shell ends at once.
        line = (
            f"srun --ntasks-per-node=2 --pty bash -c 'test -t 0 && {inner} python train.py {given}'"
        )
        slurm.run("script", "--quiet", "--command", line, os.devnull, cwd=here)
        assert (summary(folder)["status"], summary(folder)["devices"]) == ("completed", devices)


def test_a_task_that_cannot_start_says_why_by_the_first(slurm, here):
    """Another line for each task, as by its own processors: a GPU for the second, where is none."""
    own = "trainer.accelerator=$([ $SLURM_PROCID = 1 ] && echo gpu || echo cpu)"
    shell = " ".join(["python train.py", *SMALL, own])
    done = slurm.run("srun", "--ntasks=2", "bash", "-c", shell, cwd=here)
    errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    (error,) = errors
    assert re.match(r"error: rank 1 on \S+: trainer.accelerator=gpu: there is no CUDA GPU", error)
    assert done.returncode == 2


def test_what_only_the_first_task_sees_ends_all(slurm, here):
    (here / "run" / ".hydra").mkdir(parents=True)
    given = [*SMALL, "trainer=ddp_cpu", f"hydra.run.dir={here / 'run'}"]
    done = slurm.run("timeout", "120", "srun", "--ntasks=2", "python", "train.py", *given, cwd=here)
    assert done.returncode == 2, done.stderr
    assert "error: hydra.run.dir=" in done.stderr
    assert "has a run already" in done.stderr


def test_the_script_for_a_row_as_it_stands(slurm, here):
    row, _ = re.findall(r"^```bash\n(.*?)^```", RESULTS, re.M | re.S)
    (here / "row.sh").write_text(row)
    job = slurm.submit(here, "row.sh", "digits/sam", *SMALL, "trainer=cpu")
    slurm.wait_for(job)
    runs = [summary(here / "logs" / "digits" / "sam" / str(seed)) for seed in range(5)]
    assert [run["status"] for run in runs] == ["completed"] * 5
    assert [run["config"]["seed"] for run in runs] == [*range(5)]
    assert len({run["metrics"]["test/loss"] for run in runs}) == 5


def test_a_sweep_by_submitit(slurm, here):
    assert "`hydra/launcher=joblib` or `submitit_slurm`" in COMMANDS
    given = ["-m", "rho=0.05,0.1", *SMALL, "trainer=cpu", "hydra/launcher=submitit_slurm"]
    done = slurm.run("python", "train.py", *given, "hydra.launcher.partition=main", cwd=here)
    assert (done.returncode, done.stderr) == (0, "")
    told, table = done.stdout.split("2 jobs in ")
    assert len(told.splitlines()) == 3  # the folder, and a line for each job
    assert [line.split()[-2] for line in table.splitlines()[4:6]] == [
        f"{json.loads(file.read_text())['metrics']['test/acc']:.4f}"
        for file in sorted(here.glob("logs/train/multiruns/*/*/metrics.json"))
    ]


# ---------------------------------------------------------------------------- jobs that are stopped

TASKS = {
    "two tasks": ("--ntasks-per-node=2", "trainer=ddp_cpu"),
    "a task that starts two processes": ("--ntasks-per-node=1", "trainer=ddp_cpu"),
    "one": ("--ntasks-per-node=1", "trainer=cpu"),
    "scontrol requeue": ("--ntasks=2", "trainer=ddp_cpu"),
    "grace": ("--ntasks=2 --partition=lent", "trainer=ddp_cpu"),  # as another job goes first
}
TAKES_ALL = ("--nodes=2", "--exclusive", "--wrap=true")


@pytest.mark.parametrize("kind", TASKS)
def test_a_job_is_queued_again(slurm, here, kind):
    tasks, trainer = TASKS[kind]
    given = [*LONG, trainer, "epochs=20"]
    folder = here / "run"
    command = ["srun", "python", "train.py", *given, f"hydra.run.dir={folder}", "ckpt_path=last"]
    (here / "job.sh").write_text(script(*command, header=f"{tasks} --requeue"))
    job = slurm.submit(here, "job.sh")
    slurm.wait((folder / "checkpoints" / "previous.ckpt").is_file, 120)
    by_slurm = {"scontrol requeue": (*kind.split(), job), "grace": ("sbatch", *TAKES_ALL)}
    slurm(*by_slurm.get(kind, ("scancel", "--signal=USR1", job)), cwd=here)
    slurm.wait(lambda: slurm.state(job, "Restarts") == "1", 60)
    slurm.wait((folder / "metrics.json").is_file, 60)  # written as it ends
    stopped = "SIGTERM" if kind in by_slurm else "SIGUSR1"
    assert summary(folder)["exit_reason"] == f"Interrupted: stopped by {stopped}"
    train(slurm, here, *given, f"hydra.run.dir={here / 'whole'}")
    assert slurm.wait_for(job) == "COMPLETED", (here / "said.txt").read_text()
    assert_unbroken(folder, here / "whole", 2)


def test_a_job_that_may_not_be_queued_again_says_so(slurm, here):
    command = ["srun", "python", "train.py", *LONG, "trainer=cpu", "hydra.run.dir=run"]
    (here / "job.sh").write_text(script(*command, header="--no-requeue"))
    job = slurm.submit(here, "job.sh")
    slurm.wait((here / "run" / "checkpoints" / "last.ckpt").is_file, 120)
    slurm("scancel", "--signal=USR1", job)
    assert slurm.wait_for(job) == "FAILED"
    refused = f"Requested operation is presently disabled for job {job}"
    said = f"scontrol requeue {job}: {refused}; nothing starts the job again\n"
    assert (here / "said.txt").read_text().count(said) == 1
    assert summary(here / "run")["status"] == "interrupted"


def test_a_task_that_is_killed_ends_the_other(slurm, here):
    command = ["srun", "python", "train.py", *LONG, "trainer=ddp_cpu", "hydra.run.dir=run"]
    (here / "job.sh").write_text(script(*command, header="--nodes=2 --ntasks-per-node=1"))
    job = slurm.submit(here, "job.sh")
    slurm.wait((here / "run" / "checkpoints" / "last.ckpt").is_file, 120)
    kill(f"SLURM_JOB_ID={job}", "SLURM_STEP_ID=0", "SLURM_PROCID=1")
    assert slurm.wait_for(job, 60) == "FAILED"
    (error,) = re.findall(r"^error: (.*)", (here / "said.txt").read_text(), re.M)
    assert re.fullmatch(r"rank 1 on \S+ has ended, or is cut off", error)
    found = summary(here / "run")
    assert (found["status"], found["exit_reason"]) == ("failed", f"TrainingError: {error}")


def test_at_the_time_limit_the_jobs_of_an_array_go_on_later(slurm, here, monkeypatch):
    """The script for a row, with three minutes: SLURM sends the signal after 30 to 90 seconds."""
    monkeypatch.setitem(slurm.environment, "SLEEP", "0.5")
    row, _ = re.findall(r"^```bash\n(.*?)^```", RESULTS, re.M | re.S)
    (here / "row.sh").write_text(row)
    given = [*LONG, "trainer=cpu", "epochs=60"]
    job = slurm.submit(here, "--array=0-1", "--time=3", "row.sh", "digits/sam", *given)
    for seed in "01":
        train(slurm, here, *given, f"seed={seed}", f"hydra.run.dir={here / seed}")
    slurm.wait_for(job, 600)
    for seed in "01":
        run = here / "logs" / "digits" / "sam" / seed
        parts = len(summary(run)["parts"])
        assert parts > 1
        assert_unbroken(run, here / seed, parts)


# ------------------------------------------------------------------------------ studies

STUDY = """\
common: {experiment: quickstart, model.width: 4, data.subset: 100, epochs: 40}
seeds: [0]
arms:
  sgd: {method: sgd}
  sam: {method: sam}
"""


def study(slurm, cwd, *arguments, **environment):
    line = ["python", "-m", "sam_lightning", "study", "st.yaml", *arguments]
    return subprocess.Popen(
        line,
        cwd=cwd,
        env={**slurm.environment, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs ignore SIGINT, and so would what the tests start from one.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def test_a_study_is_an_array_whose_results_are_those_of_one_machine(slurm, here):
    """Though its jobs are told that their time is up, and the study is stopped and goes on."""
    (here / "st.yaml").write_text(STUDY)
    given = ["launcher=submitit", "+callbacks.slow._target_=slow.Slow"]
    first = study(slurm, here, *given, "slurm=--partition=main --cpus-per-task=9 --time=30")
    runs = [here / "logs" / "studies" / "st" / f"{arm},seed=0" for arm in ("sgd", "sam")]
    saved = [run / "checkpoints" / "previous.ckpt" for run in runs]
    slurm.wait(lambda: all(file.is_file() for file in saved), 240)
    (line,) = {*slurm("squeue", "--noheader", "--format=%A %C %l %j").splitlines()[:1]}
    array = slurm("squeue", "--noheader", "--format=%F").split()
    assert (len(array), len({*array})) == (2, 1)
    assert line.split()[1:] == ["9", "30:00", "st"]
    slurm("scancel", "--signal=URG", f"{array[0]}_0")  # what SLURM sends as time is up
    slurm.wait(lambda: slurm.state(f"{array[0]}_0", "Restarts") == "1", 60)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)
    assert (first.returncode, err) == (130, "")
    assert out.splitlines()[-1] == "stopped by SIGINT; the runs save and end"
    assert slurm("squeue", "--noheader") == ""
    assert summary(runs[1])["status"] == "interrupted"
    again = study(slurm, here, *given)
    out, err = again.communicate(timeout=600)
    assert (again.returncode, err) == (0, "")
    assert re.search(r"^\[2/2\] s(gd|am),seed=0: test/acc \d.\d{4}, \d+ s$", out, re.M)
    kept = json.loads((here / "results" / "st" / "runs.json").read_text())["runs"]
    for run in runs:
        run.rename(here / run.name)
    alone = study(slurm, here, *given[1:], "jobs=2", SLEEP="0")
    _, err = alone.communicate(timeout=600)
    assert (alone.returncode, err) == (0, "")
    for run in runs:
        assert_unbroken(here / run.name, run, len(summary(here / run.name)["parts"]))
        assert len(summary(here / run.name)["parts"]) > 1
    found = json.loads((here / "results" / "st" / "runs.json").read_text())["runs"]
    assert [run["metrics"] for run in found] == [run["metrics"] for run in kept]


def test_a_job_of_a_study_that_is_killed_is_named(slurm, here):
    """Each has a node for itself, and still one task."""
    (here / "st.yaml").write_text(STUDY)
    given = ["launcher=submitit", "slurm=--exclusive", "+callbacks.slow._target_=slow.Slow"]
    process = study(slurm, here, *given)
    runs = here / "logs" / "studies" / "st"
    slurm.wait((runs / "sam,seed=0" / "checkpoints" / "last.ckpt").is_file, 240)
    (job,) = {*slurm("squeue", "--noheader", "--format=%F").split()}
    kill(f"SLURM_ARRAY_JOB_ID={job}", "SLURM_ARRAY_TASK_ID=1")
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1
    assert f"sam,seed=0: failed: job {job}_1 was killed; see {runs.parent}/.submitit/st/" in out
    assert re.search(r"sgd,seed=0: test/acc 0.\d+", out)
    assert err.splitlines()[-1] == "error: 1 of 2 runs did not complete"


def test_jobs_of_a_study_that_make_room_for_another_go_on_later(slurm, here):
    (here / "st.yaml").write_text(STUDY)
    given = ["launcher=submitit", "+callbacks.slow._target_=slow.Slow", "slurm=--partition=lent"]
    process = study(slurm, here, *given)
    runs = [here / "logs" / "studies" / "st" / f"{arm},seed=0" for arm in ("sgd", "sam")]
    slurm.wait(lambda: all((r / "checkpoints" / "last.ckpt").is_file() for r in runs), 240)
    other = slurm.submit(here, *TAKES_ALL)
    assert slurm.wait_for(other, 100) == "COMPLETED"
    _, err = process.communicate(timeout=600)
    assert (process.returncode, err) == (0, "")
    assert [len(summary(run)["parts"]) for run in runs] == [2, 2]


def said(process, text):
    """What a study prints up to a line with this text."""
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return "".join(lines)


def test_jobs_of_a_study_that_was_killed_are_not_sent_twice_and_outlive_a_node(slurm, here):
    """They wait first, as their partition is down. The user's squeue would not show them."""
    (here / "st.yaml").write_text(STUDY)
    given = ["launcher=submitit", "+callbacks.slow._target_=slow.Slow"]
    sgd, sam = (here / "logs" / "studies" / "st" / f"{arm},seed=0" for arm in ("sgd", "sam"))
    slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    first = study(slurm, here, *given, SQUEUE_STATES="RUNNING")
    job = said(first, " waits in the queue: PartitionDown").split("sent as job ")[1].split()[0]
    changed = study(slurm, here, *given, "lr=0.2")
    _, err = changed.communicate(timeout=60)
    why = f"has a job of other overrides; undo the change, or scancel {job}_0"
    assert (changed.returncode, err) == (2, f"error: logs/studies/st/{sgd.name}: {why}\n")
    slurm("scontrol", "update", "PartitionName=main", "State=UP")
    slurm.wait((sgd / "checkpoints" / "previous.ckpt").is_file, 240)
    first.kill()
    first.communicate()
    again = study(slurm, here, *given)
    assert "sent as" not in said(again, f"2 in the queue already, as job {job}")
    node = slurm.state(f"{job}_0", "NodeList")
    slurm("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    slurm.wait(lambda: slurm.state(f"{job}_0", "Restarts") == "1", 60)
    slurm.wait(lambda: (sgd / "output.txt").read_text().count("$ python train.py") > 1, 240)
    again.send_signal(signal.SIGINT)
    out, err = again.communicate(timeout=120)
    assert (again.returncode, err) == (130, "")
    assert slurm("squeue", "--noheader") == ""
    last = study(slurm, here, *given, SLEEP="0")
    out, err = last.communicate(timeout=600)
    assert (last.returncode, err) == (0, "")
    assert "sent as job" in out
    assert [summary(run)["status"] for run in (sgd, sam)] == ["completed"] * 2


def test_a_study_is_stopped_at_once_while_slurm_does_not_answer(slurm, here):
    (here / "st.yaml").write_text(STUDY)
    given = ["launcher=submitit", "jobs=1", "+callbacks.slow._target_=slow.Slow"]
    first = study(slurm, here, *given)
    job = said(first, "sent as job").split()[-1]
    runs = here / "logs" / "studies" / "st"
    slurm.wait((runs / "sgd,seed=0" / "checkpoints" / "last.ckpt").is_file, 240)
    pid = int((slurm.folder / "slurmctld.pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for_end([pid])
    first.send_signal(signal.SIGINT)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert out.endswith(f"job {job} stays in the queue; the same command goes on with it\n")
    slurm("slurmctld")
    again = study(slurm, here, *given)
    said(again, f"2 in the queue already, as job {job}")
    again.send_signal(signal.SIGINT)  # one runs, and one waits for it
    again.communicate(timeout=120)
    assert again.returncode == 130
    assert slurm("squeue", "--noheader") == ""


def test_a_machine_that_does_not_see_the_folder_of_a_study_is_named(slurm, here):
    (here / "st.yaml").write_text(STUDY)
    slurm("scontrol", "update", "PartitionName=main", "State=DOWN")
    process = study(slurm, here, "launcher=submitit")
    said(process, "waits in the queue")
    (here / "logs" / "studies" / ".submitit").rename(here / "elsewhere")
    slurm("scontrol", "update", "PartitionName=main", "State=UP")
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 1
    why = r"failed: job \d+_\d has not begun: .*, or its machine cannot write to .*/\.submitit/st/"
    assert len(re.findall(why, out)) == 2


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--partition=nope", "sbatch: error: invalid partition specified: nope"),
        ("--partitoin=main", "sbatch: unrecognized option '--partitoin=main'"),
    ],
)
def test_options_that_sbatch_refuses(slurm, here, option, said):
    (here / "st.yaml").write_text(STUDY)
    before = {*here.iterdir()}
    process = study(slurm, here, "launcher=submitit", f"slurm={option}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"error: slurm={option}: {said}")
    assert err.count("\n") == 1
    assert {*here.iterdir()} == before


def test_a_folder_whose_name_slurm_would_change_is_refused(slurm, here):
    folder = here / "100%used"
    folder.mkdir()
    slurm.clone(folder)
    (folder / "st.yaml").write_text(STUDY)
    before = {*folder.iterdir()}
    sweep = ["train.py", "-m", "rho=0.1,0.2", "hydra/launcher=submitit_slurm"]
    for key, line in [
        ("launcher=submitit", ["-m", "sam_lightning", "study", "st.yaml", "launcher=submitit"]),
        ("hydra/launcher=submitit_slurm", sweep),
    ]:
        done = slurm.run("python", *line, cwd=folder)
        assert done.returncode == 2
        why = f"error: {key}: SLURM takes % for a pattern, and it is in {folder}/"
        assert done.stderr.startswith(why)
        assert done.stderr.count("\n") == 1
        assert {*folder.iterdir()} == before
