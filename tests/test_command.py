"""The command line: wrong input ends in one clear line, before torch where it can."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from sam_lightning.command import multirun_first, resumed
from sam_lightning.errors import ConfigError
from sam_lightning.launch import local_processes

TRAIN = Path(__file__).parent.parent / "train.py"
SMALL = ["data=digits", "model.width=8", "trainer=cpu", "data.subset=100", "epochs=1"]

# Runs train.py in a fork for each line of stdin, so that what it imports is imported once for all.
SERVER = """
import json, os, runpy, sys, traceback
train, *imports = sys.argv[1:]
for name in imports:
    __import__(name)
for line in sys.stdin:
    folder, arguments = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    os.chdir(folder)
    for fd, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(f"../{name}", os.O_CREAT | os.O_WRONLY), fd)
    sys.argv = [train, *arguments]
    code = 0
    try:
        runpy.run_path(train, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    with open("../torch", "w") as file:
        file.write(str("torch" in sys.modules))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking torch apart would last longer than the command
"""


class Result:
    def __init__(self, code: int, folder: Path) -> None:
        self.code = code
        self.out, self.err, torch_loaded = (
            (folder / name).read_text() for name in ("stdout", "stderr", "torch")
        )
        self.torch = torch_loaded == "True"
        self.left = sorted(p.name for p in (folder / "cwd").rglob("*"))


def serve(*imports: str):
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(TRAIN), *imports],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def command(folder: Path, *arguments: str) -> Result:
        (folder / "cwd").mkdir()
        server.stdin.write(json.dumps([str(folder / "cwd"), arguments]) + "\n")
        server.stdin.flush()
        return Result(int(server.stdout.readline()), folder)

    with server:
        yield command
        server.stdin.close()


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.command")


@pytest.fixture(scope="module")
def heavy():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # no GPU on any machine
        yield from serve("sam_lightning.training", "torchvision.datasets", "sklearn.datasets")


def assert_refused(result: Result, *fragments: str) -> None:
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.err.endswith("\n")
    for fragment in fragments:
        assert fragment in result.err
    assert result.out == ""
    assert result.left == []


LIGHT = [
    # names
    ("rhoo=0.1", "rhoo=0.1: no such key; did you mean rho?"),
    ("++lrr=9", "lrr=9: no such key; did you mean lr?"),
    ("+foo=1", "foo=1: no such key; allowed are data, model, ", " rho, epochs, "),
    ("model.widht=16", "model.widht=16: no such key; did you mean model.width?"),
    ("data.foo=1", "data.foo=1: no such key; allowed in data are val_size, subset, "),
    ("width=16", "width=16: no such key; did you mean model.width?"),
    ("optim.momentum=0.9", "optim.momentum=0.9: no such key; did you mean optimizer.momentum?"),
    (
        "optimizer=adamw optimizer.momentum=0.9",
        "optimizer.momentum=0.9: no such key; allowed in optimizer are _target_, lr, betas, ",
    ),
    ("hydra.foo=1", "hydra.foo=1: no such key"),
    ("method=samm", "method=samm: allowed are asam, sam, sgd; did you mean sam?"),
    ("data=cifar", "data=cifar: allowed are cifar10, cifar100, ", "did you mean cifar10?"),
    ("model=null", "model=null: allowed are resnet18, "),
    ("experiment=quick", "experiment=quick: allowed are ", "did you mean quickstart?"),
    ("~rho", "rho: must be given, as in rho=..."),
    ("data=image_folder", "data.root: must be given, as in data.root=..."),
    # values
    ("rho=-0.1", "rho=-0.1: allowed is a number >= 0"),
    ("rho=abc", "rho=abc: allowed is a number >= 0"),
    ("rho=nan", "rho=nan: allowed is a number >= 0"),
    ("rho=inf", "rho=inf: allowed is a number >= 0"),
    ("rho=null", "rho=null: allowed is a number >= 0"),
    ("rho=true", "rho=True: allowed is a number >= 0"),
    ("method.rho=-1", "method.rho=-1: allowed is a number >= 0"),
    ("seed=-1", "seed=-1: allowed is a whole number from 0 to 4294967295"),
    ("seed=4294967296", "seed=4294967296: allowed is a whole number from 0 to"),
    ("epochs=0", "epochs=0: allowed is a whole number >= 1"),
    ("epochs=1.5", "epochs=1.5: allowed is a whole number >= 1"),
    ("lr=0", "lr=0: allowed is a number > 0"),
    ("test=maybe", "test=maybe: allowed is true, false"),
    ("model.width=wide", "model.width=wide: allowed is a whole number >= 1"),
    ("scheduler.warmup_epochs=-1", "scheduler.warmup_epochs=-1: allowed is a number >= 0"),
    ("scheduler=multistep scheduler.milestones=3", "scheduler.milestones=3: allowed is a list"),
    ("data.policy=magic", "data.policy=magic: allowed is null, autoaugment, "),
    ("data.label_noise=1.5", "data.label_noise=1.5: allowed is a fraction from 0 to 1"),
    ("trainer.accelerator=cdua", "trainer.accelerator=cdua: allowed is auto, cpu, cuda, "),
    ("trainer.devices=0", "trainer.devices=0: allowed is a whole number >= 1, a list of"),
    ("trainer.devices=[0,0]", "trainer.devices=[0, 0]: allowed is "),
    ("trainer.precision=17", "trainer.precision=17: allowed is 32-true, 16-mixed, "),
    ("trainer.gradient_clip_val=0", "trainer.gradient_clip_val=0: allowed is a number > 0, or"),
    ("optimized_metric=val/accuracy", "optimized_metric=val/accuracy: allowed is null, val/acc, "),
    ("optimized_metric=test/acc test=false", "optimized_metric=test/acc: needs test=true"),
    # what a configuration may name
    ("model._target_=os.system", "model._target_=os.system: allowed are names in sam_lightning.,"),
    ("callbacks.last._target_=os.system", "callbacks.last._target_=os.system: allowed are"),
    # files
    ("ckpt_path=nowhere.ckpt", "ckpt_path=nowhere.ckpt: no such file"),
    ("data=image_folder data.root=nowhere", "data.root=nowhere: no such folder"),
    # the form of an argument
    ("rho=[", "rho=[: not of the form key=value"),
    ("rho", "rho: not of the form key=value"),
    ("rho=0.1,0.2", "rho=0.1,0.2", "To sweep over it, add --multirun"),
    ("-m method=sam,samm", "method=samm: allowed are asam, sam, sgd"),
    ("-m rhoo=0.1,0.2", "rhoo=0.1,0.2: no such key; did you mean rho?"),
]


@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row[0])
def test_wrong_input_is_refused_before_torch_is_loaded(light, tmp_path, row):
    arguments, *fragments = row
    result = light(tmp_path, *SMALL, *arguments.split())
    assert_refused(result, *fragments)
    assert not result.torch


HEAVY = [
    # names that only the class knows
    ("+model.foo=1", "model.foo=1: no such key; allowed are width, stem, "),
    ("+model.num_classes=3", "model.num_classes=3: no such key"),
    ("+trainer.foo=1", "trainer.foo=1: no such key; allowed are accelerator, "),
    ("+trainer.limit_train_batch=1", "trainer.limit_train_batch=1: no such key; did you mean "),
    ("+trainer.max_epochs=1", "trainer.max_epochs=1: no such key"),
    ("+optimizer.foo=1", "optimizer.foo=1: no such key; allowed are ", "momentum"),
    ("+data.foo=1", "data.foo=1: no such key; allowed are ", "val_size"),
    ("+data.seed=1", "data.seed=1: no such key"),
    ("+scheduler.foo=1", "scheduler.foo=1: no such key; allowed are warmup_epochs, final"),
    ("+scheduler.total_steps=1", "scheduler.total_steps=1: no such key"),
    ("+method.foo=1", "method.foo=1: no such key; allowed are rho, "),
    ("+method.seed=1", "method.seed=1: no such key"),
    ("+callbacks.last.monitr=x", "callbacks.last.monitr=x: no such key; did you mean monitor?"),
    ("model._target_=sam_lightning.models.Net", "model._target_=sam_lightning.models.Net: "),
    ("optimizer.momentum=-1", "optimizer: Invalid momentum value: -1"),
    ("model.stem=foo", "model.stem=foo: allowed are cifar, imagenet"),
    # this machine
    ("trainer=cuda", "trainer.accelerator=cuda: there is no CUDA GPU here; use cpu or auto"),
    ("trainer.devices=[0]", "trainer.devices=[0]: indices are for GPUs; give a number"),
    ("trainer.devices=3", "batch_size=128: ", "must be a multiple of their number, 3"),
    ("trainer.num_nodes=2", "trainer.num_nodes=2: start every node's processes with torchrun"),
    # the data
    ("data.val_size=1438", "data.val_size=1438: must come to 1..1437 of the 1438 training"),
    ("optimized_metric=val/acc", "optimized_metric=val/acc: there is no validation data; set "),
    ("trainer.devices=2 optimized_metric=val/acc", "optimized_metric=val/acc: there is no val"),
    ("data=cifar10 data.root={tmp} data.download=false", "data.root=", "cannot load CIFAR10"),
    ("data=cifar10 data.root={tmp}/damaged data.download=false", "cannot load CIFAR10"),
    ("data=image_folder data.root={tmp}/damaged", "data.root=", "no folder", "train/<class>/*"),
    # the checkpoint
    ("ckpt_path={tmp}/text.ckpt", "text.ckpt: not a readable checkpoint of a run"),
    ("ckpt_path={tmp}/weights.ckpt", "weights.ckpt: not a readable checkpoint of a run"),
    ("ckpt_path={tmp}/width16.ckpt", "is of another model, with model."),
]


@pytest.mark.parametrize("row", HEAVY, ids=lambda row: row[0])
def test_wrong_input_is_refused_before_training(heavy, tmp_path, row):
    damaged = tmp_path / "damaged" / "cifar-10-batches-py"
    damaged.mkdir(parents=True)
    (damaged / "data_batch_1").write_text("no pickle")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "weights.ckpt")
    width16 = {"_target_": "sam_lightning.models.SAMResNet18", "width": 16}
    wider = {"state_dict": {}, "hyper_parameters": {"model": width16}}
    torch.save(wider, tmp_path / "width16.ckpt")
    arguments, *fragments = row
    assert_refused(heavy(tmp_path, *SMALL, *arguments.format(tmp=tmp_path).split()), *fragments)


def test_a_run_that_fails_ends_in_one_line_and_keeps_its_folder(heavy, tmp_path):
    result = heavy(tmp_path, *SMALL, "batch_size=50", "lr=1e30", "max_skipped_steps=1")
    assert result.code == 1
    assert result.err.startswith("error: 1 steps in a row had a gradient that is not finite")
    assert result.err.count("\n") == 1
    assert "metrics.json" in result.left


def test_a_metric_that_was_not_logged_keeps_the_finished_run(heavy, tmp_path):
    unvalidated = ["data.val_size=50", "trainer.check_val_every_n_epoch=2"]  # in one epoch
    result = heavy(tmp_path, *SMALL, *unvalidated, "optimized_metric=val/acc")
    assert result.code == 2
    message = result.err.splitlines()[-1]  # Lightning warns of best.ckpt before
    assert message.startswith("error: optimized_metric=val/acc: this run logged ")
    assert "test/acc" in message
    assert {"metrics.json", "last.ckpt"} <= set(result.left)


def test_the_grid_of_radii(light, tmp_path):
    result = light(tmp_path, "-m", "sweep=rho_grid", "epochs=0")  # each job is refused at once
    assert result.code == 2
    assert result.err.splitlines()[-1] == "error: epochs=0: allowed is a whole number >= 1"
    radii = ("0.01", "0.02", "0.05", "0.1", "0.2", "0.5")
    pairs = [(rho, seed) for rho in radii for seed in range(3)]
    expected = {f"{i}_epochs=0,rho={rho},seed={seed}" for i, (rho, seed) in enumerate(pairs)}
    assert {name for name in result.left if "rho=" in name} == expected


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
    ],
)
def test_processes_per_machine(monkeypatch, trainer, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_processes(OmegaConf.create(trainer)) == processes


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
    assert done.stderr.startswith("error: sweep=rho_optuna: ")
    assert "pip install -e '.[sweep]'" in done.stderr
    assert list((tmp_path / "cwd").iterdir()) == []


def test_help_names_every_group_choice_and_knob(light, tmp_path):
    out = light(tmp_path, "--help").out
    for file in (TRAIN.parent / "conf").glob("*/*.yaml"):
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


@pytest.mark.parametrize("debug", ["debug=true", "debug=True", "++debug=true"])
def test_debug_shows_the_traceback(light, tmp_path, debug):
    result = light(tmp_path, debug, "rho=-1")
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


def test_multirun_may_stand_anywhere():
    assert multirun_first(["rho=1,2", "-m", "seed=0"]) == ["-m", "rho=1,2", "seed=0"]
    assert multirun_first(["rho=1", "seed=0"]) == ["rho=1", "seed=0"]
