"""Who starts a run's processes, and what happens if one of them does not live: real processes."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from runs import (
    SMALL,
    TRAIN,
    children,
    command,
    only_run,
    started,
    summary,
    wait_for_end,
)
from sam_lightning.cli import as_launched
from sam_lightning.config.cluster import Launched, launched
from sam_lightning.config.errors import ConfigError
from sam_lightning.training.connected import connected
from sam_lightning.training.launch import local_processes

TORCHRUN = {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
RANKS = [
    {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank} for rank in "01"
]
SLURM = {"SLURM_NTASKS": "6", "SLURM_PROCID": "4", "SLURM_STEP_ID": "0"}
SLURM |= {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"}


@pytest.fixture
def environment(monkeypatch):
    """Set variables; those that a launcher around the tests has set are not there."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name.endswith(("RANK", "WORLD_SIZE")):
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (TORCHRUN, Launched("torchrun", rank=5, processes=8, per_node=4)),
        (SLURM, Launched("SLURM", rank=4, processes=6, per_node=3)),
        (SLURM | TORCHRUN, Launched("torchrun", rank=5, processes=8, per_node=4)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "6", "SLURM_JOB_NAME": "interactive"}, None),  # a shell of salloc
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
    ],
)
def test_who_has_started_this_process(environment, variables, found):
    environment(variables)
    assert launched() == found


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x2),1"}, "=3(x2),1: must be as many on every node"),
        ({"SLURM_STEP_ID": None}, "SLURM_NTASKS=6: the script of sbatch started this process its"),
    ],
)
def test_tasks_of_slurm_that_are_no_run(environment, changed, said):
    environment({k: v for k, v in (SLURM | changed).items() if v})
    with pytest.raises(ConfigError, match=re.escape(said)):
        launched()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2: there is no LOCAL_RANK; start the proc"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "WORLD_SIZE=2: there is no RANK; start the proc"),
        ({"RANK": "1", "LOCAL_RANK": "0"}, "RANK=1: there is no WORLD_SIZE; .* or unset RANK"),
        ({"GROUP_RANK": "1"}, "GROUP_RANK=1: there is no WORLD_SIZE"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0"},
            "OMPI_COMM_WORLD_SIZE=2: each process",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: each process would train alone; "),
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8: must be from 0 to 7 \(WORLD_SIZE - 1\)"),
    ],
)
def test_half_of_a_launchers_variables_are_refused(environment, variables, message):
    """Each process would take itself for the first, or train alone."""
    environment(variables)
    with pytest.raises(ConfigError, match=message):
        launched()


def test_numbers_of_devices_and_nodes_come_from_the_launcher_unless_given(environment):
    assert as_launched(["rho=0.1"]) == ["rho=0.1"]
    environment(TORCHRUN)
    assert as_launched(["rho=0.1"]) == ["rho=0.1", "trainer.devices=4", "trainer.num_nodes=2"]
    assert as_launched(["trainer.devices=8"]) == ["trainer.devices=8", "trainer.num_nodes=2"]


def trainer(**options):
    return OmegaConf.create({"accelerator": "cpu", "devices": 4, "num_nodes": 2, **options})


def test_other_numbers_than_the_launchers_are_refused(environment):
    environment(TORCHRUN)
    assert local_processes(trainer()) == 4
    for wrong in ({"devices": 1}, {"num_nodes": 1}, {"devices": 8}):
        with pytest.raises(ConfigError, match="torchrun has started 8 processes; leave both out"):
            local_processes(trainer(**wrong))


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "model_parallel", "ddp_spawn", "fdsp"])
def test_strategies_without_whole_weights_are_refused(environment, name):
    with pytest.raises(ConfigError, match=f"trainer.strategy={name}: allowed is auto, ddp: "):
        local_processes(trainer(strategy=name))


def test_strategies_with_whole_weights(environment):
    one = {"num_nodes": 1}
    assert local_processes(trainer(**one, strategy="ddp")) == 4
    assert local_processes(trainer(**one, strategy="auto")) == 4


@pytest.mark.parametrize(
    ("variables", "nodes", "message"),
    [
        ({}, 2, "trainer.num_nodes=2: NODE_RANK is not set on .*; give each host one from 0 to 1"),
        ({"NODE_RANK": ""}, 2, "NODE_RANK is not set on "),
        ({"NODE_RANK": "2"}, 2, r"NODE_RANK=2: must be from 0 to 1 \(trainer.num_nodes - 1\)"),
        ({"NODE_RANK": "1"}, 1, r"NODE_RANK=1: must be from 0 to 0 \(trainer.num_nodes - 1\)"),
        ({"NODE_RANK": "x"}, 2, "NODE_RANK=x: must be a whole number"),
        (
            {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
            2,
            "trainer.num_nodes=2: torchrun has started one process",
        ),
    ],
)
def test_a_host_without_its_number_is_refused(environment, variables, nodes, message):
    environment(variables)
    with pytest.raises(ConfigError, match=message):
        local_processes(trainer(num_nodes=nodes))


def test_a_host_may_have_a_number(environment):
    environment({"NODE_RANK": "1"})
    assert (local_processes(trainer()), launched()) == (4, None)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"accelerator": "cuda", "devices": 3}, "trainer.devices=3: there are 2 GPUs here"),
        ({"accelerator": "auto", "devices": 3}, "trainer.devices=3: there are 2 GPUs here"),
        ({"accelerator": "gpu", "devices": [1, 2]}, r"devices=\[1, 2\]: the GPUs here are 0 to 1"),
    ],
)
def test_more_gpus_than_there_are(monkeypatch, trainer, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=message):
        local_processes(OmegaConf.create(trainer))


@pytest.mark.parametrize(
    ("trainer", "processes"),
    [
        ({"accelerator": "cuda", "devices": "auto"}, 2),
        ({"accelerator": "auto", "devices": [1]}, 1),
        ({"accelerator": "cpu", "devices": "auto"}, 1),
        ({"accelerator": "cpu", "devices": 4}, 4),
        ({"accelerator": "cuda", "devices": 2, "sync_batchnorm": True}, 2),
    ],
)
def test_processes_per_machine(monkeypatch, trainer, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_processes(OmegaConf.create(trainer)) == processes


# ----------------------------------------------------------------------------------- real launchers


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def torchrun(*arguments):
    return [sys.executable, "-m", "torch.distributed.run", *arguments, str(TRAIN), *SMALL]


def together(cwd, *processes):
    """Run several commands, each with variables of its own, at the same time."""
    running = [
        subprocess.Popen(
            line,
            cwd=cwd,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line, variables in processes
    ]
    try:
        return [(p.communicate(timeout=250)[0], p.returncode) for p in running]
    finally:
        for p in running:
            p.kill()


@pytest.mark.long
@pytest.mark.slow
def test_two_nodes_of_torchrun_are_one_run(tmp_path):
    meeting = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        [*torchrun(*meeting, f"--node_rank={rank}", "--nproc_per_node=1"), "data.val_size=100"]
        for rank in range(2)
    ]
    for output, code in together(tmp_path, *((node, {}) for node in nodes)):
        assert code == 0, output
    found = summary(only_run(tmp_path))
    assert (found["status"], found["devices"], found["updates"]) == ("completed", 2, 4)
    counts = found["config"]["trainer"]
    assert (counts["devices"], counts["num_nodes"]) == (1, 2)  # torchrun has said so


@pytest.mark.long
@pytest.mark.parametrize(
    "started",
    [
        pytest.param("by torchrun", marks=pytest.mark.long),
        pytest.param("by the launcher", marks=pytest.mark.slow),
    ],
)
def test_processes_leave_no_threads_that_hold_tensors(tmp_path, started):
    """Such a thread aborts its process now and then, long after the results are written."""
    (tmp_path / "sitecustomize.py").write_text(  # each process of Python imports it
        "import atexit, os, pathlib\n"
        "def threads():\n"
        "    names = pathlib.Path('/proc/self/task').glob('*/comm')\n"
        "    file = pathlib.Path(__file__).with_name(f'{os.getpid()}.threads')\n"
        "    file.write_text(' '.join(name.read_text() for name in names))\n"
        "atexit.register(threads)\n"
    )
    line = [sys.executable, str(TRAIN), *SMALL]
    processes = [([*line, "trainer.devices=2"], {})]
    if started == "by torchrun":
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        # Without this id Lightning does not know torchrun.
        meeting["TORCHELASTIC_RUN_ID"] = "none"
        processes = [(line, meeting | rank) for rank in RANKS]
    path = {"PYTHONPATH": str(tmp_path)}
    outputs = together(tmp_path, *((line, variables | path) for line, variables in processes))
    assert [code for _, code in outputs] == [0] * len(processes), outputs
    threads = [file.read_text() for file in tmp_path.glob("*.threads")]
    assert len(threads) >= 2
    assert not any("gloo" in names for names in threads)


@pytest.mark.long
@pytest.mark.slow
def test_what_rank_0_logs_is_in_the_log_of_the_run(tmp_path):
    code = "from torch import nn\n"
    code += "def net() -> nn.Module:\n"
    code += "    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 10))\n"
    (tmp_path / "own_net.py").write_text(code)
    (cwd := tmp_path / "cwd").mkdir()
    given = [
        *SMALL[:2],
        "trainer=ddp_cpu",
        "epochs=1",
        "model=custom",
        "model._target_=own_net.net",
    ]
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = command(cwd, *given, env=os.environ | {"PYTHONPATH": path})
    assert (done.returncode, done.stderr) == (0, "")
    said = "own_net.net has no parameter for num_classes=10, in_channels=1\n"
    assert (only_run(cwd) / "train.log").read_text().count(said) == done.stdout.count(said) == 1


@pytest.mark.long
def test_two_nodes_of_slurm_are_one_run(tmp_path):
    port = free_port()
    job = {"SLURM_JOB_ID": "71234", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    job |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "127.0.0.1"}
    job |= {"MASTER_PORT": str(port)}
    tasks = [
        job | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        for rank in range(2)
    ]
    line = [sys.executable, str(TRAIN), *SMALL]
    for output, code in together(tmp_path, *((line, task) for task in tasks)):
        assert code == 0, output
    found = summary(only_run(tmp_path))
    assert (found["status"], found["devices"]) == ("completed", 2)
    assert found["config"]["trainer"]["num_nodes"] == 2


def as_ranks(cwd, *arguments):
    """What two processes that torchrun would start so print, and their exit codes."""
    line = [sys.executable, str(TRAIN), *SMALL, *arguments]
    return together(cwd, *((line, rank) for rank in RANKS))


@pytest.mark.parametrize("sweep", [["-m", "rho=0.1,0.2"], ["sweep=rho_grid"]])
def test_a_sweep_under_torchrun_is_refused(tmp_path, sweep):
    (first, code), other = as_ranks(tmp_path, *sweep)
    assert code == 2
    assert first.startswith("error: a sweep is started by one process, and torchrun has started 2")
    assert first.count("\n") == 1
    assert other == ("", 2)
    assert list(tmp_path.iterdir()) == []


def test_a_command_for_one_process_under_torchrun_is_refused(tmp_path):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ((said, code),) = together(tmp_path, ([*line, "-m", "sam_lightning", "list-models"], {}))
    assert code == 1  # torchrun's own
    assert "error: list-models: is done by one process, and torchrun has started 2, which" in said
    assert "resnet18" not in said


def test_a_wrong_value_under_torchrun_is_refused_by_all(tmp_path):
    said = ("error: rho=-1: allowed is a number >= 0\n", 2)
    assert as_ranks(tmp_path, "rho=-1") == [said, said]
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ ranks that are lost

LOSING = '''
import json, multiprocessing, os, signal, time
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

class Lose(Callback):
    """Ends a rank as ``losing`` says for the radius; notes where each rank trains."""
    def __init__(self, losing: dict[float, list], notes: str):
        self.losing, self.notes = losing, notes

    def note(self, trainer, module, **more):
        rho = module.sam.defaults["rho"]
        note = {"rank": trainer.global_rank, "rho": rho, "time": time.time(), **more}
        with open(self.notes, "a") as file:
            file.write(json.dumps(note) + "\\n")

    def on_train_start(self, trainer, module):
        how = multiprocessing.get_start_method()
        self.note(trainer, module, env=dict(os.environ), group=dist.is_initialized(), loaders=how)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rank, how = self.losing.get(module.sam.defaults["rho"], [None, None])
        if trainer.global_step == 3 and rank == trainer.global_rank:
            self.note(trainer, module, lost=True)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "hangs":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)  # else it has half a minute to end
                time.sleep(300)
            raise RuntimeError("this rank fails")
'''


@pytest.fixture
def losing(tmp_path):
    """A sweep, some of whose processes are lost amid training: its result, folders and notes."""
    (tmp_path / "losing.py").write_text(LOSING)
    cwd, notes, temporary = tmp_path / "cwd", tmp_path / "notes", tmp_path / "tmp"
    cwd.mkdir()
    temporary.mkdir()

    def sweep(losing, *arguments):
        callback = [f"+callbacks.lose.notes={notes}", "+callbacks.lose._target_=losing.Lose"]
        callback += [f"+callbacks.lose.losing={losing}"]
        variables = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(temporary)}
        done = command(cwd, "-m", *SMALL, *callback, *arguments, env={**os.environ, **variables})
        assert list(temporary.glob("sam_lightning_*")) == []  # where the ranks of a job meet
        (folder,) = cwd.glob("logs/train/multiruns/*")
        jobs = json.loads((folder / "sweep.json").read_text())["jobs"]
        return done, folder, jobs, [json.loads(line) for line in notes.read_text().splitlines()]

    return sweep


SAID = {
    "killed": f"rank 0 of 2 failed: Signal {signal.SIGKILL:d} (SIGKILL) received",
    "raises": "rank 1 of 2 failed: RuntimeError: this ",
    "hangs": "rank 0 of 2 failed: TrainingError: rank 1 has not answered within trainer.timeout=10",
}


@pytest.mark.long
@pytest.mark.slow
def test_a_rank_that_is_lost_ends_its_job_at_once_and_no_other(losing):
    lost = {0.1: (0, "killed"), 0.2: (1, "raises"), 0.25: (1, "hangs")}
    given = ",".join(f"{rho}:[{rank},{how}]" for rho, (rank, how) in lost.items())
    radii = [*lost, 0.3]
    sweep = ["rho=" + ",".join(map(str, radii)), "trainer.devices=2", "trainer.timeout=10"]
    done, folder, jobs, notes = losing(f"{{{given}}}", *sweep)
    assert done.returncode == 1
    started = sorted((n["rho"], n["rank"]) for n in notes if "env" in n)
    assert started == [(rho, rank) for rho in radii for rank in range(2)]
    times = {(n["rho"], n["rank"]): n["time"] for n in notes if n.get("lost")}
    for job, (rho, (rank, how)) in zip(jobs, lost.items(), strict=False):
        found = summary(folder / job["folder"])
        assert (job["status"], found["status"]) == ("failed", "failed")
        assert SAID[how] in found["exit_reason"]
        assert SAID[how] in (folder / job["folder"] / "train.log").read_text()
        ended = (folder / job["folder"] / "metrics.json").stat().st_mtime
        assert ended - times[rho, rank] < 60
    assert "error: rank 0 of 2 failed: Signal 9 (SIGKILL)" in done.stderr
    assert "(job 0; 3 of 4 jobs failed)" in done.stderr
    found = summary(folder / jobs[3]["folder"])
    assert (found["status"], found["devices"], found["config"]["rho"]) == ("completed", 2, 0.3)


@pytest.mark.long
def test_processes_of_a_job_leave_nothing_to_the_next(losing):
    done, _, jobs, notes = losing("{}", "lr=0.1,0.05", "trainer.devices=1,2")
    assert done.returncode == 0, done.stderr
    assert [job["status"] for job in jobs] == ["completed"] * 4
    before, _, _, after, *_ = notes
    assert [note["group"] for note in notes] == [False, True, True] * 2
    assert {note["loaders"] for note in notes} == {multiprocessing.get_start_method()}
    assert before["env"] == after["env"]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("begun", [True, False])
def test_processes_end_with_the_one_that_started_them(tmp_path, begun):
    arguments = [*SMALL, "trainer.devices=2", "epochs=100000"]
    process = subprocess.Popen(
        [sys.executable, "-u", str(TRAIN), *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    if begun:
        assert any(line.startswith("epoch 1/") for line in process.stdout)
    while len(others := children(process.pid)) < 3:  # two, and one that tracks resources
        time.sleep(0.05)
    process.kill()
    process.wait()
    wait_for_end(others)
    process.communicate()


@pytest.mark.long
@pytest.mark.slow
def test_the_folder_in_which_ranks_meet_is_private_and_ends_with_the_run(tmp_path, monkeypatch):
    cwd, temporary = tmp_path / "cwd", tmp_path / "tmp"
    cwd.mkdir()
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    process = started(cwd, "epoch 1/", *SMALL, "trainer.devices=2", "epochs=100000")
    (folder,) = temporary.glob("sam_lightning_*")
    assert folder.stat().st_mode & 0o777 == 0o700
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert not folder.exists()


@pytest.mark.parametrize(
    ("devices", "device"),
    [(4, 1), ("auto", 1), ([2, 5], 5)],
)
def test_each_process_of_nccl_has_a_gpu_of_its_own(monkeypatch, tmp_path, devices, device):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    store = dist.FileStore(str(tmp_path / "store"), 2)
    with connected(OmegaConf.create({"accelerator": "auto", "devices": devices}), store):
        pass
    assert calls == [device, "nccl"]


def test_ranks_wait_for_each_other_as_long_as_the_timeout_says(monkeypatch, tmp_path):
    groups = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **given: groups.append(given))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    store = dist.FileStore(str(tmp_path / "store"), 2)
    trainer = OmegaConf.create({"accelerator": "cpu", "devices": 2, "timeout": 1234})
    with connected(trainer, store):
        pass
    (given,) = groups
    assert given["timeout"] == store.timeout == timedelta(seconds=1234)


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number(environment, variable):
    environment({**TORCHRUN, variable: "x"})
    with pytest.raises(ConfigError, match=f"{variable}=x: must be a whole number"):
        launched()
