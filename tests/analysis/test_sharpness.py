"""Sharpness of checkpoints, as a command, and in the course of a run."""

import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn
from torch.nn.functional import cross_entropy

from runs import WITH_DASHBOARD, run
from sam_lightning.analysis import sharpness
from sam_lightning.analysis.checkpoints import checkpoint_files
from sam_lightning.analysis.curvature import spectrum, top_eigenpairs, trace
from sam_lightning.analysis.loss_surface import LossSurface, fixed_batches
from sam_lightning.config.arguments import parse
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import ImageSource, Split
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.inference.load import data_of, load
from sam_lightning.runs.checkpoint import read
from sam_lightning.training.callbacks.sharpness import SharpnessMonitor
from sam_lightning.training.callbacks.tensorboard import MONITORED
from sam_lightning.training.module import SAMModule

SMALLER = ["data.subset=40", "batch_size=20", "data.label_noise=0.2", "model.width=2"]
QUICK = ["images=999", "batch_size=25", "m=1000", "ascent_steps=2", "top_k=2", "trace_samples=2"]
QUICK += ["max_steps=6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two runs, as a sweep names them."""
    base = tmp_path_factory.mktemp("runs")
    folders = [base / "0_rho=0,seed=0", base / "1_rho=0.1,seed=0"]
    for folder, rho in zip(folders, (0, 0.1), strict=True):
        run(folder, f"rho={rho}", "test=false", "epochs=1", *SMALLER)
    return folders


def main(*arguments):
    sharpness.main([*QUICK, *arguments])


def results(folder):
    return json.loads((folder / "sharpness.json").read_text())["checkpoints"]


def everything(folder):
    """The loss of a checkpoint over all its training images, by one plain pass."""
    model = load(folder / "checkpoints" / "last.ckpt")
    split = data_of(model.config).train
    return model, lambda: cross_entropy(model(model.preprocess(split.images)), split.labels)


@pytest.mark.slow
def test_the_command_measures_what_its_names_say(trained, capsys):
    main(f"ckpt_path={trained[0]},{trained[1]}/checkpoints/last.ckpt", "rho=0.1")
    printed = capsys.readouterr().out
    for folder, label in zip(trained, ("base optimizer", "SAM, rho 0.1"), strict=True):
        (found,) = results(folder)
        assert found["label"] == label
        assert label in printed
        model, loss = everything(folder)
        weights = list(model.parameters())
        here = loss()
        grads = torch.autograd.grad(here, weights)
        norm = torch.sqrt(sum(g.square().sum() for g in grads))
        with torch.no_grad():
            for w, g in zip(weights, grads, strict=True):
                w += 0.1 * g / norm
        rise = (loss() - here).item()
        assert found["loss"] == pytest.approx(here.item(), rel=1e-4)
        assert found["worst"] == pytest.approx(rise, rel=1e-3)
        assert found["m_sharpness"] == pytest.approx(rise, rel=1e-3)  # as m is all images
        assert found["worst_by_steps"] >= found["worst"] - 1e-6
        assert found["images"] == 40
        assert found["weights"] == sum(w.numel() for w in weights)
        first, second = found["eigenvalues"]
        assert found["lambda_max"] == first > second
        assert f"{found['lambda_max']:.4g}" in printed


@pytest.mark.slow
def test_curvature_is_that_of_the_seed(trained, tmp_path):
    main(
        *(f"ckpt_path={trained[1]}", "seed=3", "images=30", f"out={tmp_path}", "split=test"),
        *("density=true", "density_steps=3"),
    )
    (found,) = results(tmp_path)
    model = load(trained[1] / "checkpoints" / "last.ckpt")
    data = data_of(model.config)
    surface = LossSurface(model, fixed_batches(data, "test", 30, 25, 3, "cpu"))
    generator = torch.Generator().manual_seed(3)
    top = top_eigenpairs(surface, generator, 2, tolerance=1e-3, max_steps=6)
    assert found["eigenvalues"] == top.values.tolist()
    assert (found["trace"], found["trace_error"]) == trace(surface, generator, 2, top)
    density = spectrum(surface, generator, 1, 3, top)
    assert found["density"] == {
        "nodes": density.nodes.tolist(),
        "weights": density.weights.tolist(),
    }


def test_density_and_two_checkpoints_of_one_folder(trained, tmp_path, capsys):
    arguments = [f"ckpt_path={trained[0]},{trained[1]}", "images=20", "density=true"]
    arguments += ["labels=$a_{$,b", "density_steps=3", "density_samples=1", "max_steps=2"]
    main(*arguments, f"out={tmp_path}")
    first, second = results(tmp_path)
    assert (first["label"], second["label"]) == ("$a_{$", "b")
    assert first["ckpt_path"] != second["ckpt_path"]
    assert [sum(w) for w in first["density"]["weights"]] == pytest.approx([1])
    assert len(first["density"]["nodes"][0]) == 3 + 2  # with the largest eigenvalues
    assert (tmp_path / "density.png").stat().st_size > 1000
    drawn = (tmp_path / "density.svg").read_bytes()
    sharpness.draw_density([first, second], tmp_path / "again")
    assert (tmp_path / "again.svg").read_bytes() == drawn
    assert "density.svg" in capsys.readouterr().out


def test_a_sweeps_folders_and_lists_are_found(trained):
    files = [folder / "checkpoints" / "last.ckpt" for folder in trained]
    both = f"{trained[0]},{files[1]}"
    assert checkpoint_files(both) == files
    listed = parse(sharpness.KEYS, [f"ckpt_path=['{trained[0]}','{files[1]}']"])
    assert checkpoint_files(listed.ckpt_path) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "ckpt_path: must be given"),
        (["ckpt_path=nowhere"], "ckpt_path=nowhere: no such file or folder"),
        (["ckpt_path=RUN,nowhere"], "ckpt_path=nowhere: no such file or folder"),
        (["ckpt_path=RUN", "imags=3"], "imags=3: no such key; did you mean images?"),
        (["ckpt_path=RUN", "rho=0"], "rho=0: allowed is a number > 0"),
        (["ckpt_path=RUN", f"seed={2**32}"], "seed=4294967296: allowed is a whole number from 0"),
        (["ckpt_path=RUN", "trace_samples=1"], "trace_samples=1: allowed is a whole number >= 2"),
        (["ckpt_path=RUN", "top_k=9", "max_steps=8"], "max_steps=8: must be >= top_k=9"),
        (["ckpt_path=RUN", "split=valid"], "split=valid: allowed is train, val, test"),
        (["ckpt_path=RUN", "split=val"], "split=val: this run has no validation images"),
        (["ckpt_path=RUN", "labels=a,b"], "labels=a,b: must be 1, one for each"),
        (["ckpt_path=RUN", "out=RUN/metrics.json"], "is not a folder"),
        (["ckpt_path=RUN", "out=RUN/metrics.json/x"], "metrics.json/x: cannot be made (Not a dir"),
        (["ckpt_path=RUN/metrics.json"], "not a readable checkpoint of a run"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(trained, arguments, message):
    before = sorted(trained[0].rglob("*"))
    with pytest.raises(ConfigError) as raised:
        sharpness.main([a.replace("RUN", str(trained[0])) for a in arguments])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(trained[0].rglob("*")) == before


def test_weights_that_are_not_finite_are_refused(trained, tmp_path):
    checkpoint = read(trained[0] / "checkpoints" / "last.ckpt")
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "nan.ckpt")
    with pytest.raises(ConfigError, match=r"nan\.ckpt: the loss of its weights is nan"):
        main(f"ckpt_path={tmp_path}/nan.ckpt")
    assert not (tmp_path / "sharpness.json").exists()


def test_measures_are_shown_also_where_they_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / "sharpness.json").mkdir()
    with pytest.raises(ConfigError, match=r"out=.*sharpness\.json: cannot be written"):
        main(f"ckpt_path={trained[0]}", "images=20", f"out={tmp_path}")
    assert "base optimizer" in capsys.readouterr().out


# ------------------------------------------------------------------------------- in a run


class Network(nn.Module):
    """BatchNorm and dropout, which a careless measurement would touch."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(108, 4),
        )

    def forward(self, images):
        return self.layers(images)


def data():
    images = torch.randint(256, (50, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Split(images.to(torch.uint8), torch.arange(50) % 4)
    return ImageDataModule(lambda: ImageSource(split, split, list("abcd")), batch_size=16)


class Logger(L.pytorch.loggers.logger.DummyLogger):
    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))


def fit(*callbacks, epochs=3, compile_with=None, **options):
    torch.manual_seed(0)
    model = Network()
    if compile_with:
        model.compile(backend=compile_with)
    module = SAMModule(model, 4, partial(torch.optim.SGD, lr=0.05, momentum=0.9), rho=0.05)
    logger = Logger()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, datamodule=data())
    return trainer, module, logger


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*treespec")


def test_the_monitor_changes_nothing_of_the_training():
    _, module, logger = fit()
    rng = torch.get_rng_state()
    _, watched, watched_logger = fit(SharpnessMonitor(images=20))
    assert equal(module.state_dict(), watched.state_dict())
    assert equal(module.sam.state_dict()["state"], watched.sam.state_dict()["state"])
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in module.modules()] == [m.training for m in watched.modules()]
    kept = [row for row in watched_logger.rows if "sharpness/worst" not in row[1]]
    assert kept == logger.rows


def test_the_monitor_tells_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr("sam_lightning.config.progress.FIRST", 0)
    caplog.set_level("INFO", "sam_lightning")
    fit(SharpnessMonitor(images=20, max_steps=3, trace_samples=4))
    assert any("sharpness, at most: 1 of 9" in message for message in caplog.messages)


def test_the_monitor_logs_every_n_epochs_and_at_the_end():
    monitor = SharpnessMonitor(every_n_epochs=2, images=20, batch_size=8, rho=0.2, seed=5)
    trainer, module, logger = fit(monitor, epochs=3)
    rows = [(step, row) for step, row in logger.rows if "sharpness/worst" in row]
    assert [(step, row["epoch"]) for step, row in rows] == [(8, 1), (12, 2)]
    # The last row is of the final weights; any other order of the batches gives the same.
    datamodule = trainer.datamodule
    surface = LossSurface(module.model, fixed_batches(datamodule, "train", 20, 20, 5, "cpu"))
    exact = top_eigenpairs(surface, torch.Generator().manual_seed(9), 1).values.item()
    last = rows[-1][1]
    assert last["sharpness/lambda_max"] == pytest.approx(exact, rel=1e-2)
    here, gradient = surface.gradient()
    with surface.moved(0.2 * gradient / gradient.norm()):
        assert last["sharpness/worst"] == pytest.approx(surface.value() - here, rel=1e-3)
    for name in ("worst", "lambda_max", "trace"):  # for metrics.json and for other callbacks
        logged = trainer.callback_metrics[f"sharpness/{name}"].item()
        assert logged == pytest.approx(last[f"sharpness/{name}"], rel=1e-6)


@pytest.mark.slow
def test_the_monitor_takes_a_compiled_model():
    options = {"epochs": 1, "limit_train_batches": 1}
    _, _, plain = fit(SharpnessMonitor(images=20), **options)
    _, _, compiled = fit(SharpnessMonitor(images=20), compile_with="aot_eager", **options)
    for name in ("worst", "lambda_max", "trace"):
        key = f"sharpness/{name}"
        assert compiled.rows[-1][1][key] == pytest.approx(plain.rows[-1][1][key], rel=1e-3)


def test_the_monitor_refuses_what_it_cannot_measure(tmp_path):
    for wrong in ({"images": 0}, {"every_n_epochs": 0}, {"rho": 0}, {"seed": -1}):
        ((key, value),) = wrong.items()
        with pytest.raises(ConfigError, match=f"callbacks.sharpness.{key}={value}"):
            SharpnessMonitor(**wrong)
    with pytest.raises(ConfigError, match=r"^callbacks.sharpness.rho=-1: allowed is a number > 0$"):
        run(tmp_path, "callbacks=sharpness", "callbacks.sharpness.rho=-1")
    trainer = L.Trainer(logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="needs the data of an ImageDataModule"):
        SharpnessMonitor().on_fit_start(trainer, None)


def test_a_run_with_the_callbacks_of_the_configuration(tmp_path):
    keys = ["callbacks=sharpness", "callbacks.sharpness.images=20", "test=false", "epochs=1"]
    keys += ["callbacks.sharpness.max_steps=5", "model.width=2"]
    metrics = run(tmp_path, *keys, small=WITH_DASHBOARD)
    with open(tmp_path / "metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row.get("sharpness/worst")]
    assert [row["step"] for row in logged] == ["2"]
    assert metrics["sharpness/worst"] == pytest.approx(float(logged[0]["sharpness/worst"]))
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (layout,) = events.Tensors("custom_scalars__config__")
    pages = Layout.FromString(layout.tensor_proto.string_val[0]).category
    (page,) = (page for page in pages if page.title == MONITORED)
    shown = [chart.multiline.tag[0] for chart in page.chart]
    assert [len(events.Scalars(tag.strip("^$"))) for tag in shown] == [1, 1, 1]


def program(folder):
    """Two processes, once with the monitor and once without."""
    for name, callbacks in (("plain", []), ("watched", [SharpnessMonitor(images=20)])):
        strategy = DDPStrategy(broadcast_buffers=False)
        trainer, module, logger = fit(*callbacks, epochs=2, devices=2, strategy=strategy)
        result = {
            "state": dict(module.state_dict()),
            "metrics": {k: v.item() for k, v in trainer.callback_metrics.items()},
            "rows": [row for _, row in logger.rows if "sharpness/worst" in row],
        }
        torch.save(result, Path(folder, f"{name}_{trainer.global_rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.slow
def test_the_monitor_on_two_processes(tmp_path):
    arguments = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *arguments, __file__, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {file.stem: torch.load(file) for file in tmp_path.glob("*.pt")}
    for rank in (0, 1):
        watched = found[f"watched_{rank}"]
        assert equal(watched["state"], found[f"plain_{rank}"]["state"])
        assert watched["metrics"]["sharpness/worst"] > 0
        assert watched["metrics"] == found["watched_0"]["metrics"]
    # Measured with the mean of the ranks' running statistics, which both have at the end.
    model = Network()
    states = [found[f"plain_{rank}"]["state"] for rank in (0, 1)]
    assert equal(*states)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in states[0].items() if "model." in k}
    )
    datamodule = data()
    datamodule.setup()
    surface = LossSurface(model, fixed_batches(datamodule, "train", 20, 20, 0, "cpu"))
    here, gradient = surface.gradient()
    with surface.moved(0.05 * gradient / gradient.norm()):
        rise = surface.value() - here
    assert found["watched_0"]["rows"][-1]["sharpness/worst"] == pytest.approx(rise, rel=1e-3)


if __name__ == "__main__":
    program(sys.argv[1])
