"""Two hosts that train one run: network namespaces, joined by cables that can be pulled."""

import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from hosts import Command, two_hosts, why_not
from image_files import write_images
from runs import SMALL, TRAIN, equal, rows, summary, weights
from sam_lightning.models import SAMResNet18

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(900)]
TIMEOUT = 30  # trainer.timeout, in seconds
RUN = ["hydra.run.dir=run", *SMALL, "data.val_size=100", "trainer=ddp_cpu"]
RUN += [f"trainer.timeout={TIMEOUT}"]
LONG = "epochs=100000"
EPOCHS = "epochs=20"
WITHIN = 300  # seconds; what starts has to import torch, on whatever else runs here


@pytest.fixture(scope="module", autouse=True)
def _possible():
    if reason := why_not():
        pytest.skip(f"this machine cannot play two hosts: {reason}")


@pytest.fixture
def hosts(tmp_path):
    with two_hosts(tmp_path / "shared") as hosts:
        yield hosts


@pytest.fixture
def apart(tmp_path):
    """Hosts that share no folder."""
    with two_hosts(tmp_path / "apart", shared=False) as hosts:
        yield hosts


def torchrun(hosts, *both, each=((), ()), env=({}, {}), train=(TRAIN, TRAIN)):
    """Start a run on both hosts, with arguments for ``both`` and for ``each``."""
    meet = ["--nnodes=2", f"--master_addr={hosts[0].address}", "--master_port=29500"]
    line = [sys.executable, "-m", "torch.distributed.run", *meet]
    return [
        host.start(*line, f"--node_rank={i}", str(train[i]), *RUN, *both, *each[i], env=env[i])
        for i, host in enumerate(hosts)
    ]


def each_its_own(hosts, *both, each=((), ()), env=({}, {}), before=((), ())):
    """Start a run on both hosts without a launcher."""
    meet = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"}
    line = [sys.executable, str(TRAIN), *RUN, "trainer.num_nodes=2", "trainer.devices=1"]
    return [
        host.start(*before[i], *line, *both, *each[i], env={**meet, "NODE_RANK": str(i), **env[i]})
        for i, host in enumerate(hosts)
    ]


def ends(commands, within=WITHIN):
    """Exit codes, and the error that each host says in a line of its own."""
    found = [command.end(within) for command in commands]
    codes = [code for code, _ in found]
    assert None not in codes, found
    said = [[line for line in text.splitlines() if line.startswith("error: ")] for _, text in found]
    return codes, [lines[0].removeprefix("error: ") if lines else "" for lines in said]


def refused(commands, *parts):
    """Neither host trains, and both say why."""
    codes, said = ends(commands)
    assert 0 not in codes, said
    for line in said:
        assert all(part in line for part in parts), said
    for command in commands:
        assert not (command.host.folder / "run" / "metrics.json").exists()
        assert "epoch 1/" not in command.said()


def trains(command: Command) -> None:
    """Wait until a run is in its third epoch."""
    end = time.monotonic() + WITHIN
    while "epoch 2/" not in command.said():
        assert time.monotonic() < end, command.said()
        assert command.process.poll() is None, command.said()
        time.sleep(0.2)


def same(one: Path, other: Path) -> None:
    assert equal(weights(one), weights(other))
    assert equal(weights(one, "best"), weights(other, "best"))
    assert rows(one) == rows(other)
    assert summary(one)["metrics"] == summary(other)["metrics"]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The folder of an unbroken run of two processes on one host."""
    folder = tmp_path_factory.mktemp("one") / "hosts"
    with two_hosts(folder) as (host, _):
        command = host.start(sys.executable, str(TRAIN), *RUN, "trainer.devices=2", EPOCHS)
        assert command.end(WITHIN)[0] == 0, command.said()
    return folder / "work" / "run"


@pytest.mark.parametrize("fixture", ["hosts", "apart"])
@pytest.mark.parametrize("start", [torchrun, each_its_own])
def test_two_hosts_train_as_one_does(request, start, fixture, one_host):
    hosts = request.getfixturevalue(fixture)
    assert ends(start(hosts, EPOCHS)) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)
    found = summary(hosts[0].folder / "run")
    assert (found["devices"], found["host"]) == (2, "alpha, beta")
    if fixture == "apart":  # rank 0 alone writes
        assert not (hosts[1].folder / "run").exists()


@pytest.mark.parametrize(
    "starts", ["MASTER_ADDR=HOST MASTER_PORT=29500 NODE_RANK=0", "torchrun --nn"]
)
def test_the_lines_of_the_docs(hosts, one_host, starts):
    (line,) = re.findall(f"`({starts}[^`]*)`", (TRAIN.parent / "docs" / "commands.md").read_text())
    line = line.replace("HOST", "alpha").replace("=4", "=1").replace("train.py", str(TRAIN))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    commands = [
        host.start("sh", "-c", f"{numbered} {' '.join(RUN)} {EPOCHS}", env={"PATH": path})
        for host, numbered in zip(
            hosts, [line, re.sub("(NODE_RANK|--node_rank)=0", r"\1=1", line)], strict=True
        )
    ]
    assert ends(commands) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


def test_a_host_that_comes_late_is_waited_for(hosts, one_host):
    meet = [torchrun(hosts[:1], EPOCHS)[0]]
    time.sleep(20)
    assert meet[0].process.poll() is None
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--node_rank=1"]
    line += [f"--master_addr={hosts[0].address}", "--master_port=29500", str(TRAIN), *RUN]
    assert ends([*meet, hosts[1].start(*line, EPOCHS)]) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("start", [torchrun, each_its_own])
def test_a_host_that_is_killed_ends_the_other_which_continues(hosts, one_host, start, lost):
    commands = start(hosts, EPOCHS)
    trains(commands[0])
    hosts[lost].kill()
    left = commands[1 - lost]
    (code,), (said,) = ends([left], within=TIMEOUT + 60)
    how = f"rank {lost} on {hosts[lost].name} has ended, or is cut off"
    assert code == 1
    assert said.removeprefix(f"rank {1 - lost} of 2 failed: TrainingError: ") == how
    if lost == 1:
        found = summary(hosts[0].folder / "run")
        assert found["status"] == "failed"
        assert found["exit_reason"].endswith(f"TrainingError: {how}")
    assert ends(start(hosts, EPOCHS, "ckpt_path=last")) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


@pytest.mark.parametrize(
    ("told", "number"), [(0, signal.SIGTERM), (1, signal.SIGTERM), (1, signal.SIGINT)]
)
def test_a_host_that_is_told_to_stop_stops_both_which_continue(hosts, one_host, told, number):
    commands = each_its_own(hosts, EPOCHS)
    trains(commands[0])
    commands[told].process.send_signal(number)
    assert ends(commands, within=60) == ([128 + number] * 2, ["", ""])
    stopped = f"stopped by {number.name} on {hosts[told].name}"
    assert all(command.said().count(f"{stopped} after step ") == 1 for command in commands)
    assert "Traceback" not in "".join(command.said() for command in commands)
    assert summary(hosts[0].folder / "run")["exit_reason"] == f"Interrupted: {stopped}"
    assert ends(each_its_own(hosts, EPOCHS, "ckpt_path=last")) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


def test_a_cable_that_is_pulled_for_seconds_does_not_matter(hosts, one_host):
    commands = torchrun(hosts, EPOCHS)
    trains(commands[0])
    hosts[1].plug("down")
    time.sleep(5)
    hosts[1].plug("up")
    assert ends(commands) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


@pytest.mark.parametrize("start", [torchrun, each_its_own])
def test_a_cable_that_is_pulled_for_good_ends_both(hosts, start):
    commands = start(hosts, LONG)
    trains(commands[0])
    hosts[1].plug("down")
    codes, said = ends(commands, within=TIMEOUT + 90)
    how = f"has not answered within trainer.timeout={TIMEOUT} s"
    assert codes == [1, 1]
    assert said[0].endswith(f"rank 1 on beta {how}")
    assert said[1].endswith(f"rank 0 on alpha {how}")
    assert summary(hosts[0].folder / "run")["status"] == "failed"


MEETS = """
import os, time
from omegaconf import OmegaConf
from sam_lightning.training.connected import agree, connected
with connected(OmegaConf.create({"accelerator": "cpu", "timeout": 20})):
    print("epoch 2/", flush=True)
    if os.environ["RANK"] == "0":
        time.sleep(40)
    agree(lambda: {"lr": 0.1})
    agree(lambda: {"rho": 0.1})
"""


def test_a_cable_that_is_pulled_while_one_waits_for_the_other_ends_both(hosts):
    """As rank 0 reads data for a while. Of itself TCP gives up after a quarter of an hour."""
    (hosts[0].folder / "meets.py").write_text(MEETS)
    commands = processes(hosts, script="meets.py")
    trains(commands[1])
    hosts[1].plug("down")
    text = [command.end(120)[1] for command in commands]
    assert "rank 1 on beta of 2 did not come to alpha within trainer.timeout=20 s" in text[0]
    assert "rank 0 on alpha has not answered within trainer.timeout=20 s" in text[1]


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs the command faketime")
@pytest.mark.parametrize(
    ("shift", "how"), [("-60s", "option"), ("+60s", "option"), ("-60s", "variable"), ("-60s", "sh")]
)
def test_no_host_trains_alone_as_clocks_differ(hosts, shift, how):
    """Also with torchrun's PET_NNODES for ``--nnodes``, and where torchrun starts a script."""
    nodes = ["--nnodes=2"] if how != "variable" else []
    line = [sys.executable, "-m", "torch.distributed.run", *nodes, "--rdzv_backend=c10d"]
    line += ["--rdzv_id=7", f"--rdzv_endpoint={hosts[0].address}:29400"]
    train = [str(TRAIN), *RUN]
    if how == "sh":
        train = ["--no_python", "sh", "-c", f"{sys.executable} {' '.join(train)}; exit $?"]
    env = {} if nodes else {"PET_NNODES": "2"}
    first = hosts[0].start(*line, *train, env=env)
    second = hosts[1].start("faketime", "-f", shift, *line, *train, env=env)
    codes, said = ends([first, second], within=120)
    assert codes == [1, 1]
    # The one whose clock is behind is dropped before it starts a process.
    ahead = 0 if shift == "-60s" else 1
    assert said[ahead].startswith("--nnodes=2: torchrun goes on with 1; with --rdzv_backend=c10d")
    assert "epoch 1/" not in first.said() + second.said()


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs the command faketime")
def test_without_torchrun_no_clock_matters(hosts, one_host):
    started = each_its_own(hosts, EPOCHS, before=((), ("faketime", "-f", "-1d")))
    assert ends(started) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        (["lr=0.2"], ["lr: is 0.1 on rank 0 on alpha, but 0.2 on rank 1 on beta"]),
        (["test=false"], ["test: is True on rank 0 on alpha, but False on rank 1 on beta"]),
        (["lrr=0.2"], ["lrr=0.2: no such key; did you mean lr?"]),
        (["data.num_workers=x"], ["data.num_workers=x: allowed is"]),
        (["ckpt_path=last"], ["ckpt_path: is None on rank 0 on alpha, but last on rank 1 on beta"]),
    ],
    ids=["lr", "test", "key", "value", "ckpt_path"],
)
def test_other_settings_on_the_second_host_are_refused(hosts, own, parts):
    refused(torchrun(hosts, each=((), own)), *parts)


def test_a_setting_that_only_the_first_host_has_wrong_ends_both(hosts):
    refused(torchrun(hosts, each=(["rho=-1"], ())), "rho=-1: allowed is a number >= 0")


def test_how_a_host_loads_its_data_is_its_own_affair(hosts):
    each = (["data.num_workers=0"], ["data.num_workers=1"])
    assert ends(torchrun(hosts, each=each)) == ([0, 0], ["", ""])


PHOTOS = ["data=image_folder", "data.root=photos", "data.image_size=32", "data.subset=1.0"]
PHOTOS += ["data.val_size=0", "batch_size=4"]


@pytest.mark.parametrize("view", ["resize", "random_resized_crop"])
@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", lambda ant, zebra: ant.rename(zebra.with_name("other.png"))),
        ("train", lambda ant, zebra: shutil.copy(zebra, ant)),
        ("test", lambda ant, zebra: shutil.copy(zebra, ant)),
    ],
    ids=["class", "image", "test"],
)
def test_other_data_on_the_second_host_are_refused(apart, view, split, change):
    """Images that are decoded once, and such that are decoded each time."""
    for host in apart:
        write_images(host.folder / "photos", side=32, splits=("train", "val", "test"))
    folder = apart[1].folder / "photos" / split
    change(folder / "ant" / "0.png", folder / "zebra" / "0.png")
    found = torchrun(apart, *PHOTOS, f"data.view={view}")
    refused(found, f"images of {split}: is ", "on rank 1 on beta")


@pytest.mark.parametrize("view", ["resize", "random_resized_crop"])
def test_copies_of_the_data_may_be_elsewhere(apart, view):
    for host in apart:
        write_images(host.folder / host.name, side=32, splits=("train", "val", "test"))
    each = [[f"data.root={host.name}"] for host in apart]
    assert ends(torchrun(apart, *PHOTOS, f"data.view={view}", each=each)) == ([0, 0], ["", ""])


def test_other_weights_to_start_from_are_refused(apart):
    for seed, host in enumerate(apart):
        torch.manual_seed(seed)
        model = SAMResNet18(num_classes=10, in_channels=1, width=4)
        torch.save(model.state_dict(), host.folder / "start.pth")
    found = torchrun(apart, "model.weights=start.pth")
    refused(found, "model.weights: is a file of SHA-256 ", "on rank 1 on beta")


def test_another_version_of_the_code_is_refused(hosts, tmp_path):
    other = tmp_path / "other"
    for name in ("sam_lightning", "conf"):
        shutil.copytree(TRAIN.parent / name, other / name)
    shutil.copy(TRAIN, other)
    with (other / "sam_lightning" / "optim" / "__init__.py").open("a") as file:
        file.write("# another version\n")
    found = torchrun(hosts, train=(TRAIN, other / TRAIN.name))
    refused(found, "code of sam_lightning: is ", "beta")


def test_another_version_of_the_users_code_is_refused(hosts, tmp_path):
    env = []
    for i in (0, 1):
        file = tmp_path / str(i) / "own" / "__init__.py"
        file.parent.mkdir(parents=True)
        file.write_text(f"import lightning\nclass Own(lightning.Callback):\n    version = {i}\n")
        paths = [str(file.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        env.append({"PYTHONPATH": os.pathsep.join(paths)})
    found = torchrun(hosts, "+callbacks.own._target_=own.Own", env=env)
    refused(found, "code of own: is ", "beta")


# ------------------------------------------------------------------------------ names and variables


def test_a_name_that_leads_to_the_host_itself_is_said_with_the_variable_that_helps(tmp_path):
    with two_hosts(tmp_path / "debian", loop=True) as hosts:
        refused(torchrun(hosts), "GLOO_SOCKET_IFNAME: rank ", "at 127.0.1.1, where gloo would")
        env = {"GLOO_SOCKET_IFNAME": "eth0"}
        assert ends(torchrun(hosts, env=(env, env))) == ([0, 0], ["", ""])


def test_an_interface_that_one_host_does_not_have_is_named(hosts):
    env = ({}, {"GLOO_SOCKET_IFNAME": "eth9"})
    refused(torchrun(hosts, env=env), "GLOO_SOCKET_IFNAME=eth9: there is no eth9 on beta")


@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs the command iptables")
def test_a_firewall_that_lets_one_port_pass_is_said_before_training(hosts):
    opened = ["--protocol", "tcp", "--dport", "29500", "--jump", "ACCEPT"]
    closed = ["--protocol", "tcp", "--syn", "--jump", "DROP"]
    rule = ["iptables", "--append", "INPUT", "--in-interface", "eth0"]
    for host in hosts:
        for end in (opened, closed):
            assert host.start(*rule, *end).end(10) == (0, "")
    refused(each_its_own(hosts), "does not reach", "let firewalls pass all its ports")


@pytest.mark.skipif(shutil.which("iptables") is None, reason="needs the command iptables")
def test_a_network_that_loses_large_packets_ends_both(hosts):
    """As where hosts differ in the MTU. The last host has no answer, nor an error, from TCP."""
    large = ["--match", "length", "--length", "1000:65535", "--jump", "DROP"]
    rule = ["iptables", "--append", "OUTPUT", "--out-interface", "eth0", "--protocol", "tcp"]
    for host in hosts:
        assert host.start(*rule, *large).end(10) == (0, "")
    codes, said = ends(each_its_own(hosts), within=TIMEOUT + 90)
    assert codes == [1, 1]
    within = f"within trainer.timeout={TIMEOUT} s"
    assert said[0].endswith(f"rank 1 on beta of 2 did not come to alpha {within}")
    assert said[1].endswith(f"rank 0 on alpha has not answered {within}")


@pytest.mark.parametrize("name", ["alpha", "localhost"])
def test_hosts_of_one_name_that_do_not_reach_each_other_are_refused(hosts, name):
    for host in hosts:
        host.name = name
    refused(each_its_own(hosts), f"on {name} at 127.0.0.1, where gloo would listen")


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"NODE_RANK": ""}, ["", "NODE_RANK is not set on beta; give each host one"]),
        ({"NODE_RANK": "2"}, ["beta: ", "NODE_RANK=2: must be from 0 to 1 (trainer.num_nodes"]),
        ({"NODE_RANK": "0"}, ["", ": another process is at work there (host "]),
        (
            {"MASTER_ADDR": ""},
            ["rank 0 of 2 failed: TrainingError: rank 1 of 2 did not", "MASTER_"],
        ),
        (
            {"MASTER_PORT": "29511"},
            ["rank 1 of 2 did not come to alpha", "MASTER_PORT=29511: beta"],
        ),
    ],
    ids=["none", "2", "twice", "address", "port"],
)
def test_what_two_hosts_need_is_named(hosts, env, said):
    codes, found = ends(each_its_own(hosts, env=({}, env)))
    assert 0 not in codes
    assert all(part in text for part, text in zip(said, found, strict=True)), found
    assert all(found)


@pytest.mark.parametrize(
    "each",
    [
        (["trainer.devices=2"], []),
        ([], ["trainer.devices=2"]),
        ([], ["trainer.num_nodes=3"]),
    ],
    ids=["first", "second", "nodes"],
)
def test_other_numbers_of_processes_are_refused(hosts, each):
    found = each_its_own(hosts, "batch_size=48", each=each)
    refused(found, "trainer.devices, trainer.num_nodes: make ", "they must be the same on all")


FAKES_A_GPU = """
import torch.cuda
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch.cuda.set_device = lambda device: None
"""


@pytest.mark.parametrize("with_gpu", [0, 1])
def test_a_host_without_the_others_gpu_is_named(hosts, tmp_path, with_gpu):
    (tmp_path / "sitecustomize.py").write_text(FAKES_A_GPU)
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = [{}, {}]
    env[with_gpu] = {"PYTHONPATH": os.pathsep.join(paths)}
    kinds = ["cpu", "cpu"]
    kinds[with_gpu] = "cuda"
    found = each_its_own(hosts, "trainer.accelerator=auto", env=env)
    said = (
        f"trainer.accelerator: is {kinds[0]} on rank 0 on alpha, but {kinds[1]} on rank 1 on beta"
    )
    refused(found, f"{said}; it must be the same on all")


def test_a_launcher_that_sets_half_on_one_host_ends_both(hosts):
    env = {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500", "WORLD_SIZE": "2"}
    line = [sys.executable, str(TRAIN), *RUN]
    first = hosts[0].start(*line, env=env | {"RANK": "0", "LOCAL_RANK": "0"})
    second = hosts[1].start(*line, env=env | {"RANK": "1"})
    refused([first, second], "WORLD_SIZE=2: there is no LOCAL_RANK; ")


def test_a_sweep_over_hosts_is_refused(hosts):
    codes, said = ends(each_its_own(hosts, "-m", "rho=0.1,0.2"))
    assert codes == [2, 2]
    assert said == [f"NODE_RANK={i}: a sweep is started on one host; unset it" for i in (0, 1)]


def test_another_program_at_the_port_is_named(hosts):
    server = hosts[0].start(sys.executable, "-m", "http.server", "29500")
    time.sleep(2)
    codes, said = ends(each_its_own(hosts))
    assert codes == [1, 1]
    place = "MASTER_ADDR=10.77.0.1, MASTER_PORT=29500"
    assert all(
        f"{place}: {host.name} cannot meet" in x for host, x in zip(hosts, said, strict=True)
    )
    assert server.process.poll() is None


def test_a_second_run_at_the_port_of_another_leaves_that_alone(hosts):
    first = each_its_own(hosts, LONG)
    trains(first[0])
    codes, said = ends(each_its_own(hosts, "hydra.run.dir=other"))
    assert (codes, "EADDRINUSE" in said[0]) == ([1, 2], True), said
    assert "MASTER_PORT=29500: another run has met there; give this one another" in said[1]
    time.sleep(5)
    assert [command.process.poll() for command in first] == [None, None]
    first[1].process.terminate()
    assert ends(first, within=60) == ([143, 143], ["", ""])


def processes(hosts, *arguments, without=(), script=None, **changed):
    """Start the run's two processes with torchrun's variables, but for some."""
    line = [script] if script else [str(TRAIN), *RUN]
    started = []
    for i, host in enumerate(hosts):
        env = {"WORLD_SIZE": "2", "RANK": str(i), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500", **changed}
        env = {name: value for name, value in env.items() if name not in without}
        started.append(host.start(sys.executable, *line, *arguments, env=env))
    return started


def test_processes_with_torchruns_variables_alone_are_one_run(hosts, one_host):
    """Neither GROUP_RANK nor TORCHELASTIC_RUN_ID is there."""
    assert ends(processes(hosts, EPOCHS)) == ([0, 0], ["", ""])
    same(hosts[0].folder / "run", one_host)


@pytest.mark.parametrize(
    ("without", "changed", "said"),
    [
        (["MASTER_PORT"], {}, "MASTER_PORT: is not set on"),
        (["WORLD_SIZE"], {}, ": there is no WORLD_SIZE; "),
        (["RANK"], {}, "WORLD_SIZE=2: there is no RANK; "),
    ],
    ids=["port", "size", "rank"],
)
def test_half_of_the_variables_are_refused(hosts, without, changed, said):
    refused(processes(hosts, without=without, **changed), said)


def test_a_host_that_does_not_come_is_named(hosts):
    """Without torchrun, which itself waits ten minutes for a host."""
    (first,) = processes(hosts[:1])
    refused([first], f"rank 1 of 2 did not come to alpha within trainer.timeout={TIMEOUT} s")
    assert "waiting for rank 1, at most trainer.timeout=30 s" in first.said()


@pytest.mark.parametrize("missing", [0, 1])
def test_a_host_that_torchrun_waits_for_in_vain(hosts, missing):
    """Its own words: no process of ours has begun."""
    line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv_conf=timeout=20"]
    line += [f"--master_addr={hosts[0].address}", "--master_port=29500"]
    there = 1 - missing
    code, said = hosts[there].start(*line, f"--node_rank={there}", str(TRAIN), *RUN).end(120)
    assert code == 1
    joined, address = "1/2 clients joined", f"connect to ({hosts[0].address}, 29500)"
    assert (joined if missing == 1 else address) in said


def test_a_place_to_meet_that_nobody_keeps_is_named(hosts):
    started = processes(hosts, MASTER_ADDR="10.77.0.9")
    refused(started, "MASTER_ADDR=10.77.0.9, MASTER_PORT=29500: ", "cannot meet the others there")


# ------------------------------------------------------------------------------- without one folder


def test_without_a_shared_folder_a_run_continues_from_copies(apart, one_host):
    first, second = (host.folder / "run" for host in apart)
    commands = torchrun(apart, EPOCHS)
    trains(commands[0])
    apart[0].kill()
    ends(commands)
    line = [EPOCHS, "ckpt_path=last"]
    codes, said = ends(torchrun(apart, *line))
    assert 0 not in codes
    for text in said:
        assert "SHA-256" in text
        assert text.endswith("but no file on rank 1 on beta; it must be the same on all")
    shutil.copytree(first, second)
    (second / "checkpoints" / "last.ckpt").write_bytes(b"of another run")
    codes, said = ends(torchrun(apart, *line))
    assert 0 not in codes
    assert all("a file of SHA-256" in text and "rank 1 on beta" in text for text in said)
    shutil.copy(first / "checkpoints" / "last.ckpt", second / "checkpoints" / "last.ckpt")
    assert ends(torchrun(apart, *line)) == ([0, 0], ["", ""])
    assert equal(weights(first), weights(one_host))
    assert rows(first) == rows(one_host)
