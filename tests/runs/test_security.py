"""What comes from elsewhere, checkpoints, run folders and archives, is data and never runs code."""

import ast
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf
from torchvision import datasets

from commands import TRAIN, assert_refused, serve
from image_files import one_line_error, write_cifar
from inject import forked
from runs import run
from sam_lightning.config import trust
from sam_lightning.config.arguments import help_of, parse
from sam_lightning.config.conf import top_level
from sam_lightning.config.instantiate import build, not_taken
from sam_lightning.config.trust import check_targets
from sam_lightning.data import cifar10
from sam_lightning.inference import evaluate
from sam_lightning.inference.load import load
from sam_lightning.runs.checkpoint import read
from sam_lightning.runs.resume import replayable
from sam_lightning.training.checkpoint_io import AtomicCheckpointIO
from trained_runs import changed


class Touch:
    """Pickled, it is a command that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ------------------------------------------------------------------------------ what is named


def made(key, **node):
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, key, node, force_add=True)
    check_targets(cfg)
    return build(cfg, key)


RESNET = "sam_lightning.models.SAMResNet18"
FOREIGN = [
    # not of a trusted package, so not even imported
    ("model", "os.mkdir"),
    ("model", "builtins.exec"),
    ("model", "antigravity.fly"),
    ("model", "torch.hub.load"),
    ("model", "sam_lightning_evil.Net"),
    ("optimizer", "torch.optimum.SGD"),
    ("scheduler", "torch.optim.lr_scheduler.StepLR"),
    ("callbacks.x", "lightning.pytorch.cli.LightningCLI"),
    ("callbacks.x", "lightning.pytorch.loggers.CSVLogger"),
    # reached through a trusted module
    ("model", "sam_lightning.runs.record.os.mkdir"),
    ("model", "sam_lightning.runs.record.subprocess.run"),
    ("model", "sam_lightning.cli.hydra.utils.instantiate"),
    ("model", "sam_lightning.config.instantiate.import_module"),
    ("model", "sam_lightning.config.instantiate.nn.Linear"),
    ("callbacks.x", "lightning.pytorch.callbacks.timer.os.mkdir"),
    ("optimizer", "torch.optim.optimizer.functools.partial"),
    ("data.source", "sam_lightning.data.torchvision_sets.Path"),
    # of a trusted package, but not of the kind
    ("model", "sam_lightning.runs.files.write_json"),
    ("model", "sam_lightning.data.digits"),
    ("data.source", "sam_lightning.data.source.stratified_split"),
    ("data.source", RESNET),
    ("scheduler", "sam_lightning.optim.schedules.bisect_right"),
    ("logger.x", "sam_lightning.training.callbacks.progress.EpochLines"),
    ("callbacks.x", "sam_lightning.training.callbacks.progress.MetricsCSV"),
    ("method.perturbation", "sam_lightning.optim.perturbation.global_norm"),
    ("optimizer", "torch.optim.lr_scheduler.StepLR"),
    # no name, a private one, or where there is none
    ("model", None),
    ("model", ["os.mkdir"]),
    ("model", "sam_lightning"),
    ("model", "sam_lightning..models"),
    ("model", "sam_lightning.__init__.import_module"),
    ("model", "sam_lightning.models.__loader__"),
    ("model.part", RESNET),
    ("data", "sam_lightning.data.digits"),
    ("callbacks", "sam_lightning.training.callbacks.progress.progress"),
    ("trainer", RESNET),
    ("callbacks.x.part", "sam_lightning.training.callbacks.progress.progress"),
]


@pytest.mark.parametrize(("key", "target"), FOREIGN)
def test_nothing_else_can_be_named(tmp_path, key, target):
    path = tmp_path / "made"
    before = {*sys.modules}
    message = one_line_error(made, key, _target_=target, path=str(path))
    shown = "null" if target is None else target
    assert message.startswith(f"{key}._target_={shown}: ")
    assert not path.exists()
    assert not {"antigravity", "lightning.pytorch.cli"} & ({*sys.modules} - before)


ALLOWED = [
    ("model", RESNET, {"num_classes": 2, "in_channels": 1, "width": 1}),
    ("scheduler", "sam_lightning.optim.schedules.cosine", {"total_steps": 2, "steps_per_epoch": 1}),
    ("method.perturbation", "sam_lightning.optim.methods.asam.AdaptiveAscent", {"eta": 0.1}),
    ("callbacks.x", "sam_lightning.training.callbacks.progress.progress", {}),
    ("callbacks.x", "lightning.pytorch.callbacks.EarlyStopping", {"monitor": "val/acc"}),
    ("logger.x", "lightning.pytorch.loggers.CSVLogger", {"save_dir": "."}),
]


@pytest.mark.parametrize(("key", "target", "options"), ALLOWED)
def test_what_keys_are_meant_for_can_be_named(key, target, options):
    assert callable(made(key, _target_=target, **options)) or key != "model"


def test_lists_reach_a_constructor_as_lists():
    cfg = OmegaConf.create({"optimizer": {"_target_": "torch.optim.Adam", "betas": [0.5, 0.6]}})
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = build(cfg, "optimizer", params=[weight])
    assert type(optimizer.defaults["betas"]) in (list, tuple)  # and so a checkpoint can be read


OWN = """
from pathlib import Path
from typing import Any
from torch import nn
from sam_lightning.data import ImageSource, digits
Path({imported!r}).touch()
def mine() -> ImageSource:
    return digits()
def unsaid():
    return digits()
class Net(nn.Linear):
    def __init__(self, num_classes, scale=1.0):
        super().__init__(1024, num_classes)
        self.scale = scale
    def forward(self, x):
        return super().forward(x.flatten(1)) * self.scale
"""


@pytest.fixture
def my_project(tmp_path, monkeypatch):
    """A module of the person's own; this file is there once it has been imported."""
    imported = tmp_path / "imported"
    (tmp_path / "my_project.py").write_text(OWN.format(imported=str(imported)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(trust, "_typed", set())
    yield imported
    sys.modules.pop("my_project", None)


def test_code_that_a_checkpoint_names_is_refused_unless_it_is_typed(my_project):
    message = one_line_error(made, "data.source", _target_="my_project.mine")
    assert message == (
        "data.source._target_=my_project.mine: is not trusted; if this code is yours, add "
        "trust=my_project.mine"
    )
    assert not my_project.exists()
    trust.trust("other.thing,my_project.mine")
    assert len(made("data.source", _target_="my_project.mine").test) == 359
    one_line_error(made, "data.source", _target_="my_project.unsaid")  # names are whole


@pytest.mark.parametrize(
    "names", ["", "x", "a.b,", "a..b", "a.b;c", ["a.b", 3], "os.*", "/a.b", 3, True]
)
def test_what_is_no_name_cannot_be_trusted(names):
    assert one_line_error(trust.trust, names).startswith("trust=")


ON_CHECKPOINT = {"ckpt_path": ("???", Any)}


def test_commands_that_read_checkpoints_take_trust(monkeypatch):
    monkeypatch.setattr(trust, "_typed", set())
    options = parse(ON_CHECKPOINT, ["ckpt_path=a", "trust=a.b,c.d", "trust=[e.f]"])
    assert (dict(options), trust._typed) == ({"ckpt_path": "a"}, {"e.f"})
    for names in ("x", "{a:1}", "3", "a.b c.d"):
        message = one_line_error(parse, ON_CHECKPOINT, ["ckpt_path=a", f"trust={names}"])
        assert message.startswith("trust=")
    assert "trust=x.y: no such key" in one_line_error(parse, {"out": (1, Any)}, ["trust=x.y"])
    assert "trust=my_project.Net" in help_of("", ON_CHECKPOINT)


def test_code_that_conf_names_is_trusted_below_the_same_key(my_project, tmp_path, monkeypatch):
    for file, content in {
        "data/mine.yaml": "source: {_target_: my_project.mine}",
        "experiment/net.yaml": "# @package _global_\nmodel: {_target_: my_project.Net}",
        "study/s.yaml": "arms: {a: {callbacks.x._target_: my_project.X}}",
        "sweep/s.yaml": "# @package _global_\nhydra: {sweeper: {x: {_target_: my_project.sqlite}}}",
        "logger/broken.yaml": "a: [",
    }.items():
        (tmp_path / "conf" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / file).write_text(content)
    monkeypatch.setattr(trust, "CONF", tmp_path / "conf")
    for key, name in [("data.source", "mine"), ("model", "Net"), ("callbacks.y", "X")]:
        check_targets(OmegaConf.from_dotlist([f"{key}._target_=my_project.{name}"]))
        for other in {"data.source", "model", "logger.x"} - {key}:
            one_line_error(made, other, _target_=f"my_project.{name}")
    one_line_error(made, "callbacks.x", _target_="my_project.sqlite")
    assert not my_project.exists()


def typed(key, **node):
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, key, node, force_add=True)
    return build(cfg, key, **({"num_classes": 7, "in_channels": 1} if key == "model" else {}))


def test_what_is_typed_is_called_and_its_result_is_checked(my_project):
    assert len(typed("data.source", _target_="my_project.unsaid").test) == 359
    message = one_line_error(typed, "model", _target_="my_project.unsaid")
    assert message.startswith("model._target_=my_project.unsaid: returned a ImageSource; must be")
    message = one_line_error(typed, "callbacks.x", _target_="my_project.Net")
    assert "must be a class of kind lightning.pytorch.Callback, or a function that " in message
    message = one_line_error(typed, "data.source", _target_="my_project.mien")
    assert message.endswith("there is no mien in my_project; did you mean mine?")


def test_a_model_gets_what_it_takes_of_the_data(my_project):
    assert typed("model", _target_="my_project.Net", scale=2).out_features == 7
    cfg = OmegaConf.create({"model": {"_target_": "my_project.Net"}})
    told = {"num_classes": 7, "in_channels": 1}
    assert not_taken(cfg, told) == "model: my_project.Net has no parameter for in_channels=1"
    cfg.model._target_ = "torchvision.models.resnet18"
    assert not_taken(cfg, told).endswith("resnet18 has no parameter for in_channels=1")
    assert not_taken(cfg, {"num_classes": 7}) == ""
    assert typed("model", _target_="torchvision.models.resnet18").fc.out_features == 7
    message = one_line_error(typed, "model", _target_="my_project.Net", width=3)
    assert message.startswith("model.width=3: no such key; allowed are scale")
    one_line_error(typed, "model", _target_="my_project.Net", in_channels=3)


# ------------------------------------------------------------------------- run folders of others

REPLAYED = [
    "rho=0.1",
    "~logger",
    "+trainer.max_steps=3",
    "model=resnet34",
    "logger=[csv]",
    "experiment=null",
    "data.mean=[0.1,0.2,0.3]",
    "optimizer.lr=${lr}",
    "data.root='/a b/c=d'",
    "callbacks.best=null",
]
REFUSED = [
    "--experimental-rerun={pickle}",
    "--config-dir={folder}",
    "-m",
    "hydra.searchpath=[file://{folder}]",
    "hydra/launcher=joblib",
    "hydra/job_logging=mine",
    "+hydra.callbacks.x._target_=os.mkdir",
    "+hydra.callbacks.x={{_target_:os.mkdir,path:{made}}}",
    "hydra.sweeper._target_=os.mkdir",
    "+hydra.job.env_set.PYTHONPATH=elsewhere",
    "+model@hydra.callbacks.x=resnet18",
    "model@hydra=resnet18",
    "data=../../{folder}/evil",
    "data={folder}/evil",
    "data=[digits,../evil]",
    "data=${{oc.env:HOME}}",
    "task_name=${{oc.env:HOME}}",
    "task_name='${{oc.env:HOME}}'",
    r"task_name=$\{{oc.env\:HOME\}}",
    "task_name=x${{oc.decode:${{oc.env:HOME}}}}",
    "+data.x={{a:[{{b:'${{oc.env:HOME}}'}}]}}",
    "task_name=${{hydra:runtime.cwd}}",
    "output_dir={made}",
    "rho=0.1,0.2",
    "defaults=[]",
    "rho=[",
]


UNTRUSTED = [
    "model._target_=my_project.Net",
    "++callbacks.x={{_target_:os.mkdir,path:{made}}}",
    "+callbacks.x.list=[{{_target_:os.mkdir}}]",
    "+model.part._target_=sam_lightning.models.SAMResNet18",
    "model._target_=${{task_name}}",
    "+callbacks.x._target_=sam_lightning.cli.__builtins__",
]


def stored(folder: Path, overrides: object) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    return folder / ".hydra" / "overrides.yaml"


def test_settings_of_a_run_are_replayed(tmp_path):
    file = stored(tmp_path, [*REPLAYED, "ckpt_path=old", "seed=1"])
    assert replayable(file, top_level(), ["seed"]) == [*REPLAYED, "++data.download=false"]
    assert replayable(stored(tmp_path / "none", []), top_level()) == []


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_no_setting_of_a_run_is_not_replayed(tmp_path, override):
    override = override.format(folder=tmp_path, made=tmp_path / "made", pickle=tmp_path / "p")
    message = one_line_error(replayable, stored(tmp_path, ["rho=1", override]), top_level())
    assert message.startswith(f"{tmp_path}/.hydra/overrides.yaml: ")
    assert override in message


@pytest.mark.parametrize("override", UNTRUSTED)
def test_what_names_code_of_strangers_is_not_replayed(tmp_path, override):
    file = stored(tmp_path, ["rho=1", override.format(made=tmp_path / "made")])
    message = one_line_error(replayable, file, top_level())
    key = override.lstrip("+").partition("=")[0].removesuffix("._target_")
    assert message.startswith(f"{file}: {key}")
    assert "_target_=" in message
    assert "is not trusted; if" in message or "allowed is the full name of a class" in message


@pytest.mark.parametrize("overrides", [None, 5, "rho=1", {"rho": 1}, [["rho=1"]], [1]])
def test_what_is_no_list_of_overrides(tmp_path, overrides):
    one_line_error(replayable, stored(tmp_path, overrides), top_level())


def test_a_key_that_is_given_anew_may_be_anything(tmp_path):
    file = stored(tmp_path, ["rho=1", "task_name=${oc.env:HOME}", "model._target_=os.mkdir"])
    assert replayable(file, top_level(), ["task_name", "model._target_"]) == ["rho=1"]


NET = "model._target_=my_project.Net"


@pytest.mark.slow
def test_a_run_with_ones_own_model_goes_on_and_is_evaluated(my_project, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    small = ["data=digits", "data.subset=50", "trainer=cpu", f"hydra.run.dir={folder}"]
    path = {"PYTHONPATH": str(tmp_path)}
    done = forked(tmp_path, "model=custom", NET, *small, "epochs=1", **path)
    assert done.returncode == 0, done.stderr
    assert "model: my_project.Net has no parameter for in_channels=1" in done.stdout
    my_project.unlink()
    for arguments in ([f"ckpt_path={folder}"], ["ckpt_path=last", f"hydra.run.dir={folder}"]):
        done = forked(tmp_path, *arguments, "epochs=2", **path)
        file = folder / ".hydra" / "overrides.yaml"
        assert done.stderr == (
            f"error: {file}: {NET}: is not trusted; if this code is yours, type {NET} too\n"
        )
        assert done.returncode == 2
    one_line_error(load, folder / "checkpoints" / "last.ckpt")
    assert not my_project.exists()
    done = forked(tmp_path, f"ckpt_path={folder}", NET, "epochs=2", **path)
    assert done.returncode == 0, done.stderr
    assert load(folder / "checkpoints" / "last.ckpt", trust=["my_project.Net"]).classes
    monkeypatch.setattr(trust, "_typed", set())
    refused = one_line_error(evaluate.main, [f"ckpt_path={folder}"])
    assert refused.endswith("is not trusted; if this code is yours, add trust=my_project.Net")
    evaluate.main([f"ckpt_path={folder}", "trust=my_project.Net"])
    monkeypatch.setattr(trust, "_typed", set())
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "net.yaml").write_text("_target_: my_project.Net")
    monkeypatch.setattr(trust, "CONF", tmp_path / "conf")
    evaluate.main([f"ckpt_path={folder}"])
    done = forked(
        tmp_path, f"ckpt_path={folder}", f"--config-dir={tmp_path}/conf", "epochs=3", **path
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def light():
    yield from serve("sam_lightning.cli")


@pytest.mark.parametrize(
    "override",
    [
        "--experimental-rerun={pickle}",
        "+hydra.callbacks.x={{_target_:os.mkdir,path:{made}}}",
        "model._target_=os.mkdir",
        "+callbacks.x={{_target_:os.mkdir,path:{made}}}",
    ],
)
def test_resuming_in_a_foreign_folder_runs_no_code(light, tmp_path, override):
    run, path = tmp_path / "run", tmp_path / "made"
    (tmp_path / "rerun.pickle").write_bytes(pickle.dumps(Touch(path)))
    stored(run, [override.format(made=path, pickle=tmp_path / "rerun.pickle")])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    result = light(tmp_path, f"ckpt_path={run}/checkpoints/last.ckpt")
    assert_refused(result)
    assert not path.exists()
    assert not result.torch
    assert {p.name for p in run.iterdir()} - {"train.log"} == {".hydra", "checkpoints"}


# ----------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_cannot_run_code_as_it_is_read(tmp_path):
    model = {"model": Touch(tmp_path / "m")}
    evil = {"state_dict": {}, "global_step": 0, "hyper_parameters": model}
    torch.save(evil, tmp_path / "zip.ckpt")
    torch.save(evil, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.ckpt").write_bytes(pickle.dumps(evil))
    for file in tmp_path.glob("*.ckpt"):
        assert "not a readable checkpoint" in one_line_error(read, file)
    assert not (tmp_path / "m").exists()
    torch.load(tmp_path / "zip.ckpt", weights_only=False)  # which is what it would have done
    assert (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_checkpoint_cannot_have_other_files_removed(tmp_path):
    run(tmp_path / "run", "data.val_size=100", "epochs=1")
    victim, other = tmp_path / "victim", tmp_path / "other.ckpt"
    victim.mkdir()
    other.touch()
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in (victim.name, other.name):
        path = f"{checkpoints}/../../{name}"  # of the same beginning as the run's own

        def to_be_replaced(checkpoint, path=path):
            (key,) = (k for k in checkpoint["callbacks"] if k.startswith("ModelCheckpoint"))
            best = {"best_k_models": {path: torch.tensor(-1.0)}, "kth_best_model_path": path}
            checkpoint["callbacks"][key].update(best, kth_value=torch.tensor(-1.0))

        evil = changed(checkpoints / "last.ckpt", tmp_path / "evil.ckpt", to_be_replaced)
        run(tmp_path / "run", "data.val_size=100", "epochs=2", f"ckpt_path={evil}")
        assert (checkpoints / "best.ckpt").exists()
    assert victim.exists()
    assert other.exists()


def test_a_checkpoint_that_a_better_one_replaces_is_removed(tmp_path):
    files = AtomicCheckpointIO()
    files.save_checkpoint({}, tmp_path / "run" / "1.ckpt")
    files.save_checkpoint({}, tmp_path / "run" / "2.ckpt")
    (tmp_path / "run" / "notes.txt").touch()
    for name in ("1.ckpt", "notes.txt", "gone.ckpt"):
        files.remove_checkpoint(tmp_path / "run" / name)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"2.ckpt", "notes.txt"}


def test_every_load_is_of_weights_only():
    loads = []
    for file in (TRAIN.parent / "sam_lightning").rglob("*.py"):
        text = file.read_text()
        assert "pickle" not in {name.split(".")[0] for name in imports(text)}, file
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name == "torch.load" or ("ckpt_path" in given and name.startswith("trainer.")):
                loads.append(name)
                assert given.get("weights_only") == "True", f"{file}: {ast.unparse(call)}"
            assert not name.endswith(("load_from_checkpoint", "hub.load", "exec", "eval_str")), file
    assert {"torch.load", "trainer.fit"} <= {*loads}


def imports(text: str) -> set[str]:
    nodes = [*ast.walk(ast.parse(text))]
    direct = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return direct | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


# -------------------------------------------------------------------------------------- data sets


@pytest.mark.parametrize("download", [False, True])
@pytest.mark.parametrize("which", ["train", "test", "meta"])
def test_a_batch_that_was_altered_is_never_unpickled(tmp_path, monkeypatch, download, which):
    folder, _ = write_cifar(tmp_path, monkeypatch, datasets.CIFAR10, "labels")
    name = {"train": "data_batch_3", "test": "test_batch", "meta": "batches.meta"}[which]
    (folder / name).write_bytes(pickle.dumps(Touch(tmp_path / "made")))
    message = one_line_error(cifar10, str(tmp_path), download=download)
    assert f"{folder / name} has MD5 " in message
    assert not (tmp_path / "made").exists()


def test_an_archive_that_was_altered_is_never_unpacked(tmp_path, monkeypatch):
    folder, _ = write_cifar(tmp_path / "other", monkeypatch, datasets.CIFAR10, "labels")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / datasets.CIFAR10.filename, "w:gz") as archive:
        for file in folder.iterdir():  # what it has to hold, and more
            archive.add(file, f"cifar-10-batches-py/{file.name}")
        archive.addfile(tarfile.TarInfo("../evil"), io.BytesIO(b""))
        link = tarfile.TarInfo("cifar-10-batches-py/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
    message = one_line_error(cifar10, str(root))
    assert f"{root / datasets.CIFAR10.filename} has MD5 " in message
    assert f"must have {datasets.CIFAR10.tgz_md5}" in message
    assert {p.name for p in root.iterdir()} == {datasets.CIFAR10.filename}
    assert not (tmp_path / "evil").exists()


# ---------------------------------------------------------------------------------------- network

WATCHED = """
import os, runpy, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"):
        where = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = where if isinstance(where, str) else where[0]
        if host not in ("127.0.0.1", "::1", "localhost"):
            os.write(2, f"{event} {arguments}".encode())
            os._exit(77)
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
@pytest.mark.slow
def test_a_run_on_digits_uses_no_network(tmp_path):
    small = ["data=digits", "data.subset=50", "model.width=2", "trainer=cpu", "epochs=1"]
    assert watched(tmp_path, TRAIN, *small) == (0, "")
    script = tmp_path / "talks.py"
    script.write_text("import socket\nsocket.create_connection(('192.0.2.1', 80), 0.1)")
    assert watched(tmp_path, script)[0] == 77


def watched(cwd: Path, script: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-c", WATCHED, str(script), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stderr
