"""What watches a run, under a real Trainer on a CPU, and by the clock of the test."""

import csv
import re
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import nn

from sam_lightning.data import ImageSource, Split
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.training.callbacks import progress as callbacks
from sam_lightning.training.callbacks.progress import EpochLines, MetricsCSV, Throughput, progress
from sam_lightning.training.callbacks.summary import RunSummary
from sam_lightning.training.module import SAMModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*exists and is not empty",
    "ignore:.*does not have many workers",
    "ignore:Total length of `list` across ranks is zero",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Using ModelCheckpoint with manual optimization",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    "ignore:.*treespec, LeafSpec",
)

TRAIN, VAL, BATCH = 50, 10, 16
BATCHES = 4  # of 16, 16, 16 and 2 images
CLASSES = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For small tensors threads cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def split(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES)


def data(val=True, **options):
    source = ImageSource(
        train=split(TRAIN, 1),
        test=split(12, 2),
        classes=["a", "b", "c", "d"],
        val=split(VAL, 3) if val else None,
    )
    return ImageDataModule(lambda: source, batch_size=BATCH, **options)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def fit(*watchers, model=None, datamodule=None, ckpt_path=None, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": any(isinstance(w, ModelCheckpoint) for w in watchers),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "use_distributed_sampler": False,
    }
    trainer = L.Trainer(accelerator="cpu", callbacks=list(watchers), **{**quiet, **options})
    module = SAMModule(
        model or mlp(), CLASSES, partial(torch.optim.SGD, lr=0.05, momentum=0.9), rho=0.05
    )
    trainer.fit(module, datamodule=datamodule or data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.fixture
def clock(monkeypatch):
    """What the callbacks take for the time; it goes on where a test says so."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


class Ticking(nn.Module):
    """A training pass takes half a second, so a step of SAM one; an evaluation pass 100."""

    def __init__(self, clock, fail_at=None):
        super().__init__()
        self.model, self.clock, self.fail_at = mlp(), clock, fail_at
        self.images = 0

    def forward(self, images):
        self.clock.now += 0.5 if self.training else 100
        self.images += len(images) / 2 if self.training else 0
        if self.fail_at is not None and self.clock.now >= self.fail_at:
            raise RuntimeError("out of memory")
        return self.model(images)


# ---- progress


def test_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(progress(), RichProgressBar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert isinstance(progress(), EpochLines)


class Snapshots(Callback):
    def __init__(self):
        self.metrics = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.metrics.append({k: float(v) for k, v in trainer.callback_metrics.items()})


LINE = re.compile(
    r"epoch (\d+/\d+)  train/loss (\d+\.\d{4})  train/acc (\d\.\d{4})"
    r"  val/loss (\d+\.\d{4})  val/acc (\d\.\d{4})  (\d+\.\d) s"
)


def test_a_line_per_epoch(capsys, clock):
    snapshots = Snapshots()
    fit(EpochLines(), snapshots, model=Ticking(clock), max_epochs=3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for epoch, (line, metrics) in enumerate(zip(lines, snapshots.metrics, strict=True), 1):
        count, *values, seconds = LINE.fullmatch(line).groups()
        assert count == f"{epoch}/3"
        names = ("train/loss", "train/acc", "val/loss", "val/acc")
        assert values == [f"{metrics[name]:.4f}" for name in names]
        assert seconds == "104.0"  # 4 steps and one evaluation batch
    assert len({line.split("train/loss")[1] for line in lines}) == 3


def test_without_validation_the_line_has_none(capsys):
    fit(EpochLines(), datamodule=data(val=False), max_epochs=1)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 1/1  train/loss [\d.]+  train/acc [\d.]+  [\d.]+ s", line)


# ---- throughput


def test_throughput_counts_training_and_leaves_evaluation_out(clock):
    throughput, saving = Throughput(), Callback()

    def save(trainer, pl_module):
        clock.now += 1000

    saving.on_validation_end = save
    fit(throughput, saving, model=Ticking(clock), max_epochs=3)
    assert throughput.images == 3 * TRAIN
    assert throughput.seconds == 3 * BATCHES
    assert clock.now == 1000 + 3 * BATCHES + 3 * 100 + 3 * 1000


def test_throughput_leaves_out_evaluation_amid_an_epoch(clock):
    throughput = Throughput()
    fit(throughput, model=Ticking(clock), max_epochs=2, val_check_interval=1)
    assert clock.now == 1000 + 2 * BATCHES + 2 * BATCHES * 100
    assert throughput.seconds == 2 * BATCHES


@pytest.mark.parametrize(("steps", "images"), [(3, 48), (6, TRAIN + 32), (8, 2 * TRAIN)])
def test_throughput_of_an_epoch_cut_short(clock, steps, images):
    throughput = Throughput()
    fit(throughput, model=Ticking(clock), max_epochs=-1, max_steps=steps)
    assert (throughput.images, throughput.seconds) == (images, steps)


def test_throughput_of_limited_and_dropped_batches(clock):
    throughput = Throughput()
    fit(throughput, model=Ticking(clock), max_epochs=2, limit_train_batches=2)
    assert (throughput.images, throughput.seconds) == (64, 4)
    throughput = Throughput()
    dropping = data(drop_last=True)
    fit(throughput, model=Ticking(clock), datamodule=dropping, max_epochs=2)
    assert (throughput.images, throughput.seconds) == (96, 6)


def test_throughput_of_a_run_that_fails(clock):
    throughput = Throughput()
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(throughput, model=Ticking(clock, fail_at=1002.5), max_epochs=2)
    assert (throughput.images, throughput.seconds) == (32, 2.5)


def test_throughput_of_two_fits_adds_up_and_testing_adds_nothing(clock):
    throughput = Throughput()
    for fits in (1, 2):
        datamodule = data()
        trainer = fit(throughput, model=Ticking(clock), datamodule=datamodule, max_epochs=1)
        for evaluate in (trainer.test, trainer.validate):
            evaluate(trainer.lightning_module, datamodule=datamodule, verbose=False)
        assert (throughput.images, throughput.seconds) == (fits * TRAIN, fits * BATCHES)


def test_a_run_resumed_amid_an_epoch_is_watched(tmp_path, clock, capsys):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(saving, model=Ticking(clock), max_epochs=1)
    throughput, model = Throughput(), Ticking(clock)
    started = clock.now
    options = {"max_epochs": 2, "ckpt_path": tmp_path / "step=2.ckpt"}
    fit(throughput, EpochLines(), model=model, **options)
    assert throughput.images == model.images > TRAIN
    assert throughput.seconds == clock.now - started - 200 > BATCHES
    lines = capsys.readouterr().out.splitlines()
    assert [LINE.fullmatch(line).group(1, 6) for line in lines] == [
        ("1/2", f"{100 + throughput.seconds - BATCHES:.1f}"),
        ("2/2", f"{100 + BATCHES:.1f}"),
    ]


def test_the_parts_of_a_resumed_run_add_up(tmp_path, clock):
    throughput = Throughput()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(throughput, saving, model=Ticking(clock), max_epochs=1)
    assert (throughput.seconds, throughput.elapsed) == (BATCHES, 100 + BATCHES)
    clock.now += 1000  # before it is resumed, amid its first epoch
    throughput = Throughput()
    options = {"max_epochs": 2, "ckpt_path": tmp_path / "step=3.ckpt"}
    fit(throughput, model=Ticking(clock), **options)
    assert (throughput.images, throughput.seconds) == (2 * TRAIN, 2 * BATCHES)
    assert throughput.elapsed == 2 * (100 + BATCHES)
    assert throughput.parts == [{"from_step": 0, "to_step": 3}, {"from_step": 3, "to_step": 8}]
    for old in (None, 3, "x", [1, {"from_step": 0}]):  # a stranger's, or none
        throughput.load_state_dict({**throughput.state_dict(), "parts": old})
        assert len(throughput.parts) == (2 if isinstance(old, list) else 1)


# ---- metrics.csv


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def filled(row):
    return {name: value for name, value in row.items() if value}


def test_a_row_per_logged_step_is_on_disk_at_once(tmp_path):
    folder = tmp_path / "logs" / "run"
    logger = MetricsCSV(str(folder))
    logger.log_metrics({"train/loss": torch.tensor(0.5), "epoch": 0}, step=2)
    assert rows(folder) == [{"epoch": "0", "step": "2", "train/loss": "0.5"}]
    logger.log_metrics({"val/acc": 0.25}, step=4)  # without finalize, as if killed after it
    assert [filled(row) for row in rows(folder)] == [
        {"epoch": "0", "step": "2", "train/loss": "0.5"},
        {"step": "4", "val/acc": "0.25"},
    ]
    assert [path.name for path in folder.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("name", ["run", "run/", "./run"])
def test_the_table_lies_in_the_folder_that_is_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    MetricsCSV(name).log_metrics({"a": 1}, step=0)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.csv")] == [
        "run/metrics.csv"
    ]


def earlier_run(folder):
    logger = MetricsCSV(str(folder))
    logger.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, step=50)
    logger.log_metrics({"val/acc": 0.0, "epoch": 0}, step=50)
    logger.log_metrics({"train/loss": 1e-9, "epoch": 1}, step=100)
    logger.log_metrics({"train/loss": float("nan"), "epoch": 1}, step=150)
    logger.log_metrics({"lost/work": 1.0, "epoch": 1}, step=151)


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 0), (49, 0), (50, 2), (100, 3), (149, 3), (150, 4), (9999, 5)]
)
def test_on_resume_rows_up_to_the_step_stay_as_they_are(tmp_path, step, kept):
    earlier_run(tmp_path)
    before = [filled(row) for row in rows(tmp_path)]
    logger = MetricsCSV(str(tmp_path))
    logger.continue_from(step)
    if kept:  # at once, should the resumed run be killed
        assert [filled(row) for row in rows(tmp_path)] == before[:kept]
    logger.log_metrics({"train/loss": 0.125, "epoch": 1}, step=step + 1)
    new = {"train/loss": "0.125", "epoch": "1", "step": str(step + 1)}
    assert [filled(row) for row in rows(tmp_path)] == [*before[:kept], new]


def test_columns_may_come_and_go_with_a_resume(tmp_path):
    earlier_run(tmp_path)
    logger = MetricsCSV(str(tmp_path))
    logger.continue_from(100)
    logger.log_metrics({"train/loss": 0.25}, step=150)
    logger.log_metrics({"train/sharpness": 0.5, "a/new one": 1.0}, step=200)
    logger.finalize("success")
    names = ["a/new one", "epoch", "step", "train/loss", "train/sharpness", "val/acc"]
    assert [list(row) for row in rows(tmp_path)] == [names] * 5
    assert [filled(row) for row in rows(tmp_path)][2:] == [
        {"epoch": "1", "step": "100", "train/loss": "1e-09"},
        {"step": "150", "train/loss": "0.25"},
        {"step": "200", "train/sharpness": "0.5", "a/new one": "1.0"},
    ]


def test_resume_after_resume(tmp_path):
    for start in (0, 2, 4):
        logger = MetricsCSV(str(tmp_path))
        logger.continue_from(start)
        for step in range(start + 1, start + 4):  # the third is lost work
            logger.log_metrics({"start": start}, step=step)
    assert [(row["step"], row["start"]) for row in rows(tmp_path)] == [
        *[("1", "0"), ("2", "0"), ("3", "2"), ("4", "2")],
        *[("5", "4"), ("6", "4"), ("7", "4")],
    ]


@pytest.mark.parametrize("torn", ["2,20", "2", "2,", "2,200.1"])
def test_a_line_torn_by_a_kill_is_dropped(tmp_path, torn):
    (tmp_path / "metrics.csv").write_bytes(b"epoch,step,loss\r\n1,10,0.5\r\n" + torn.encode())
    logger = MetricsCSV(str(tmp_path))
    logger.continue_from(1000)
    assert rows(tmp_path) == [{"epoch": "1", "step": "10", "loss": "0.5"}]


@pytest.mark.parametrize("content", [b"", b"epoch,step,loss\r\n", b"epoch,st", None])
def test_resume_of_a_run_without_rows(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.csv").write_bytes(content)
    logger = MetricsCSV(str(tmp_path))
    logger.continue_from(10)
    logger.log_metrics({"loss": 0.5}, step=11)
    assert rows(tmp_path) == [{"loss": "0.5", "step": "11"}]


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path):
    earlier_run(tmp_path)
    MetricsCSV(str(tmp_path)).log_metrics({"train/loss": 0.5}, step=1)
    assert rows(tmp_path) == [{"step": "1", "train/loss": "0.5"}]


@pytest.mark.parametrize(("epoch", "step"), [(0, 4), (1, 8)])
def test_a_resumed_run_leaves_the_table_of_an_unbroken_one(tmp_path, epoch, step):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(logger=MetricsCSV(str(whole)), max_epochs=3)
    logged = rows(whole)
    assert [row["step"] for row in logged if row["train/loss"]] == [str(n) for n in range(1, 13)]
    assert [row["step"] for row in logged if row["val/acc"]] == ["4", "8", "12"]

    saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(saving, logger=MetricsCSV(str(broken)), max_epochs=2)
    logger = MetricsCSV(str(broken))
    logger.continue_from(step)
    fit(logger=logger, max_epochs=3, ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
    assert rows(broken) == logged


# ---- the time left


@pytest.mark.parametrize(
    ("epochs", "said"),
    # A step takes a second. From 4 steps an epoch the first warms up and three are measured.
    [(30, ["about 2 min of training left"]), (1, [])],
)
def test_the_time_left_is_measured_once(clock, capsys, epochs, said):
    fit(RunSummary(), Throughput(), model=Ticking(clock), datamodule=data(False), max_epochs=epochs)
    assert re.findall("about .*", capsys.readouterr().out) == said


def test_where_the_device_is_not_waited_for_only_steps_that_log_are_timed(clock, capsys):
    class Elsewhere(RunSummary):
        """As on a GPU, whose steps have not ended when they return."""

        def on_train_batch_end(self, trainer, pl_module, *others):
            class Module:
                device = torch.device("cuda")

                def __getattr__(self, name):
                    return getattr(pl_module, name)

            seen.append(self._start)
            super().on_train_batch_end(trainer, Module(), *others)

    seen = []
    fit(
        Elsewhere(),
        Throughput(),
        model=Ticking(clock),
        datamodule=data(False, drop_last=True),
        max_epochs=10,
        log_every_n_steps=2,
    )
    assert [s and s[0] for s in seen[:4]] == [None, None, 2, 2]  # of 3 steps the last one logs too
    assert "about 27 s of training left" in capsys.readouterr().out


def test_why_a_run_has_stopped_is_said(capsys):
    stops = EarlyStopping("val/loss", min_delta=100, patience=2)
    trainer = fit(RunSummary(), stops, max_epochs=9)
    assert trainer.current_epoch == 3
    assert re.search("stopped after epoch 3: .*val/loss did not improve", capsys.readouterr().out)
