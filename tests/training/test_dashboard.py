"""What a run logs of its updates, and what is drawn of it for TensorBoard."""

import logging
import math
import weakref
from functools import partial

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from ranks import RANKS, run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import reference
from host_syncs import HostSyncs
from inject import forked
from runs import WITH_DASHBOARD, column, equal, rows, summary, weights
from sam_lightning.config.errors import ConfigError
from sam_lightning.data import ImageSource, Split
from sam_lightning.data.augment import crop_flip
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.wsam import WeightedSharpness
from sam_lightning.optim.sam import SAM
from sam_lightning.training.callbacks import tensorboard as dashboard
from sam_lightning.training.callbacks.progress import MetricsCSV, Throughput
from sam_lightning.training.callbacks.tensorboard import (
    Dashboard,
    add_graph,
    draw_confusion,
    draw_images,
    grid,
)

# ------------------------------------------------------------- the geometry of an update, by loops


def geometry(groups, rho, adaptive=False, fraction=1.0, **options):
    """Norm of the perturbation and cosine at the last update, after plain updates before it."""
    model = reference.convnet()
    reference.plain_loop(model, groups[:-1], rho, adaptive, fraction=fraction, **options)
    sizes = [math.ceil(fraction * len(labels)) for _, labels in groups[-1]]
    part = [(x[:n], y[:n]) for (x, y), n in zip(groups[-1], sizes, strict=True)]
    first, _ = reference.mean_gradient(model, part)
    second, _ = reference.perturbed_gradient(model, groups[-1], first, rho, adaptive)
    squares = scaled = 0.0
    for name, w in model.named_parameters():
        t = w.detach().abs() + 0.01 if adaptive and name.endswith("weight") else 1.0
        squares += float((t**2 * first[name]).square().sum())
        scaled += float((t * first[name]).square().sum())
    return rho * math.sqrt(squares / scaled), cosine_of(first, second)


def cosine_of(one, other):
    product = sum(float((one[name] * other[name]).sum()) for name in one)
    lengths = [math.sqrt(sum(float(g.square().sum()) for g in d.values())) for d in (one, other)]
    return product / lengths[0] / lengths[1]


def logged(folder):
    """Norm and cosine by the number of the update, where there are any."""
    return {
        int(row["step"]): (float(row["train/perturbation_norm"]), float(row["train/cosine"]))
        for row in rows(folder)
        if row.get("train/cosine")
    }


def fit(folder, sizes, **options):
    data = reference.batches(sizes)
    trainer_options = {"logger": MetricsCSV(str(folder)), "log_every_n_steps": 3}
    reference.fit(reference.convnet(), data, trainer_options, **options)
    return data


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {}),
        ({"perturbation": AdaptiveAscent(eta=0.01), "rho": 1.0}, {"adaptive": True, "rho": 1.0}),
        ({"ascent_fraction": 0.4}, {"fraction": 0.4}),
        ({"gradient_clip_val": 0.2}, {"clip": 0.2}),
        ({"accumulate_grad_batches": 2}, {}),
    ],
)
def test_geometry_is_that_of_a_plain_loop_in_float64(tmp_path, options, plain):
    options, plain = {"rho": 0.2, **options}, {"rho": 0.2, **plain}
    accumulate = options.get("accumulate_grad_batches", 1)
    data = fit(tmp_path, [10] * 7 * accumulate, **options)
    groups = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    found = logged(tmp_path)
    assert list(found) == [3, 6, 7]  # the last one at the end of the epoch
    for number, values in found.items():
        assert values == pytest.approx(geometry(groups[:number], **plain), rel=1e-5)
        assert -1 < values[1] < 0.999


def test_geometry_is_that_of_the_gradients_before_a_method_combines_them(tmp_path):
    for name, method in (("sam", None), ("gsam", SurrogateGap()), ("wsam", WeightedSharpness())):
        fit(tmp_path / name, [10], rho=0.2, gradient_transform=method)
    expected = logged(tmp_path / "sam")
    assert expected == logged(tmp_path / "gsam") == logged(tmp_path / "wsam") != {}


def test_where_few_steps_perturb_the_last_one_before_a_log_is_measured(tmp_path):
    data = fit(tmp_path, [10] * 8, rho=0.2, every=2)
    found = logged(tmp_path)
    perturbed = {3: 3, 6: 5}  # updates 7 and 8 are logged at the epoch's end: 9 would be measured
    assert found.keys() == perturbed.keys()
    for number, at in perturbed.items():
        expected = geometry([[b] for b in data[:at]], 0.2, every=2)
        assert found[number] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"rho": 0.2, "ascent_per_micro_batch": True}])
def test_no_geometry_without_a_perturbation_of_the_whole_batch(tmp_path, options):
    fit(tmp_path, [10] * 6, **options)
    assert len(column(tmp_path, "train/grad_norm")) == 2
    assert not any("cosine" in name or "perturbation" in name for name in rows(tmp_path)[0])


def test_no_geometry_where_a_gradient_is_not_finite(tmp_path):
    data = reference.batches([10] * 9, torch.float32)
    data[5][0][0, 0, 0, 0] = float("nan")
    options = {"logger": MetricsCSV(str(tmp_path)), "log_every_n_steps": 3}
    reference.fit(reference.mlp(), data, options, rho=0.2)
    assert list(logged(tmp_path)) == [3, 9]
    assert [float(row["train/skipped_steps"]) for row in rows(tmp_path)] == [0, 1, 1]


def test_gradients_are_kept_at_measured_updates_only():
    model, alive, kept = reference.convnet(), [], []

    def after_backward(p):
        kept.append(weakref.ref(p.grad))

    def before_forward(_module, _images):
        if kept and model.bn1.weight.grad is None and model.training:
            alive.append(any(ref() is not None for ref in kept))
        kept.clear()

    model.conv1.weight.register_post_accumulate_grad_hook(after_backward)
    model.register_forward_pre_hook(before_forward)
    data = reference.batches([10] * 7)
    reference.fit(model, data, {"log_every_n_steps": 3}, rho=0.2)
    second_passes = alive[::2]  # between them are those of the next first pass
    assert second_passes == [number in (3, 6, 7) for number in range(1, 8)]


@pytest.mark.parametrize("rho", [0.0, 0.3])
def test_perturbation_norm_of_the_optimizer(rho):
    weight, bias = (nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (5, 3))
    groups = [{"params": [weight]}, {"params": [bias], "rho": 0.1}]
    optimizer = SAM(groups, torch.optim.SGD, rho=rho, lr=0.1)
    (weight.square().sum() + bias.sum()).backward()
    norm = math.sqrt(4 * float(weight.detach().square().sum()) + 3)
    expected = math.hypot(rho * 2 * float(weight.detach().norm()), 0.1 * math.sqrt(3)) / norm
    assert optimizer.perturbation_norm() == 0
    with optimizer.perturbed():
        assert float(optimizer.perturbation_norm()) == pytest.approx(expected, rel=1e-12)
    assert optimizer.perturbation_norm() == 0


def test_a_measurement_before_a_checkpoint_is_logged_behind_it(tmp_path):
    data = reference.batches([10] * 8, torch.float32)

    def run(name, epochs, ckpt_path=None, **options):
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        logger = MetricsCSV(str(tmp_path / name))
        runner = reference.trainer(
            max_epochs=epochs,
            logger=logger,
            log_every_n_steps=3,
            callbacks=[saver],
            enable_checkpointing=True,
        )
        if ckpt_path:
            logger.continue_from(5)
        module = reference.module_of(reference.mlp(), rho=0.2, every=2)
        runner.fit(module, reference.loader(data), ckpt_path=ckpt_path, weights_only=True)

    run("whole", 1)
    run("stopped", 1)
    assert list(logged(tmp_path / "whole")) == [3, 6]
    run("stopped", 1, tmp_path / "step=5.ckpt")
    assert logged(tmp_path / "stopped") == logged(tmp_path / "whole")


# ------------------------------------------------------------------------ what the images show

CLASSES = 4


def split(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count) % CLASSES)


def data(**options):
    source = ImageSource(split(90, 1), split(77, 2), ["a", "b", "c", "d"])
    options = {"batch_size": 80, "augment": {}, "eval_batch_size": 30, **options}
    return ImageDataModule(lambda: source, **options)


class Drawn(Dashboard):
    """Keeps what is drawn, and the host syncs of test batches."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.syncs, self.calls = [], {}
        for name in ("draw_confusion", "draw_images"):
            monkeypatch.setattr(dashboard, name, partial(self.draw, getattr(dashboard, name)))

    def draw(self, function, *arguments):
        self.calls[function.__name__] = arguments
        return function(*arguments)

    def on_test_batch_end(self, *args, **kwargs):
        with HostSyncs() as syncs:
            super().on_test_batch_end(*args, **kwargs)
        self.syncs += syncs.found


def runner(folder, *callbacks, **options):
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    options = {"logger": logger, "use_distributed_sampler": False, **options}
    return reference.trainer(callbacks=list(callbacks), **options)


def predictions(model, images):
    probabilities = model.eval()(images).softmax(1).detach()
    return probabilities, probabilities.argmax(1)


def test_the_test_figures_are_of_all_test_images(tmp_path, monkeypatch):
    drawn, served, model = Drawn(monkeypatch), data(), reference.mlp()
    module = reference.module_of(model)
    runner(tmp_path, drawn).test(module, datamodule=served, verbose=False)
    assert drawn.syncs == []
    assert drawn.calls.keys() == {"draw_confusion", "draw_images"}
    split, (mean,), (std,) = served.test, *((torch.tensor([v]),) for v in (served.mean, served.std))
    images = (split.images / 255 - mean[..., None, None]) / std[..., None, None]
    probabilities, predicted = predictions(model, images)
    counts, classes = drawn.calls["draw_confusion"]
    expected = [[0] * CLASSES for _ in range(CLASSES)]
    for label, other in zip(split.labels, predicted, strict=True):
        expected[label][other] += 1
    assert counts.tolist() == expected
    assert classes == ["a", "b", "c", "d"]
    pixels, titles = drawn.calls["draw_images"]
    wrong = [i for i in range(77) if predicted[i] != split.labels[i]]
    wrong.sort(key=lambda i: float(probabilities[i, split.labels[i]]))
    assert len(wrong) > 25
    assert torch.equal(pixels, split.images[wrong[:25]])
    for title, i in zip(titles, wrong[:25], strict=True):
        label, other, share = split.labels[i], predicted[i], 100 * probabilities[i].max()
        assert title == f"{classes[label]}\n→ {classes[other]}, {share:.0f} %"
    assert module.training  # as before


def test_nothing_is_shown_as_wrong_where_all_is_right(tmp_path, monkeypatch):
    class Right(nn.Linear):
        def forward(self, images):
            return nn.functional.one_hot(served.test.labels[: len(images)], CLASSES) * 9.0

    drawn, served = Drawn(monkeypatch), data(eval_batch_size=77)
    model = Right(1, 1)
    module = reference.module_of(model)
    runner(tmp_path, drawn).test(module, datamodule=served, verbose=False)
    assert drawn.calls.keys() == {"draw_confusion"}
    assert drawn.calls["draw_confusion"][0].diagonal().tolist() == [20, 19, 19, 19]


def test_the_first_batch_is_shown_as_it_was_trained_on(tmp_path, monkeypatch):
    shown, trained = [], []
    monkeypatch.setattr(dashboard, "grid", lambda pixels: shown.append(pixels) or grid(pixels))

    class Seen(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            trained.append(batch[0].clone())

    served = data(augment=crop_flip())
    runner(tmp_path, Dashboard(), Seen()).fit(
        reference.module_of(reference.mlp()), datamodule=served
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (served.mean, served.std))
    (pixels,) = shown
    assert torch.equal(pixels, ((trained[0] * std + mean) * 255).round().byte()[:64])
    assert not torch.equal(pixels, served.train.images[:64])


@pytest.mark.parametrize(("updates", "speeds"), [(4, [2, 4]), (3, [2])])
def test_an_epoch_cut_short_has_no_speed(tmp_path, updates, speeds):
    watched = runner(tmp_path, Dashboard(), Throughput(), max_epochs=-1, max_steps=updates)
    watched.fit(reference.module_of(reference.mlp()), datamodule=data())
    assert watched.global_step == updates
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("train/images_per_second")] == speeds


@pytest.mark.parametrize(("side", "length"), [(32, 8 * 34 + 2), (224, 4 * 226 + 2), (1100, 1100)])
def test_the_grid_is_of_a_size_to_look_at(side, length):
    pixels = torch.randint(256, (64, 1, side, side), dtype=torch.uint8)
    shown = grid(pixels)
    assert shown.shape == (3, length, length)
    first = 2 if length > side else 0  # behind the frame
    assert torch.equal(shown[0, first : first + side, first : first + side], pixels[0, 0])


@pytest.mark.parametrize("number", [2, 10, 100, 300])
def test_the_confusion_matrix_has_its_rows_in_percent(number):
    counts = torch.randint(1, 9, (number, number), generator=torch.Generator().manual_seed(0))
    counts[1] = 0  # a class without a test image
    figure = draw_confusion(counts, [rf"$\no{i}$, a long name" for i in range(number)])
    figure.draw_without_rendering()  # names are not taken for formulas
    axes = figure.axes[0]
    rows = torch.as_tensor(axes.images[0].get_array().data).sum(1)
    assert rows.tolist() == pytest.approx([0 if i == 1 else 100 for i in range(number)], rel=1e-5)
    assert len(axes.get_xticklabels()) == (number if number <= 100 else len(axes.get_xticks()))
    numbers = {t.get_position(): float(t.get_text()) for t in axes.texts}
    assert len(numbers) == (number * (number - 1) if number <= 10 else 0)
    for (j, i), shown in numbers.items():
        assert shown == pytest.approx(100 * counts[i, j].item() / counts[i].sum().item(), abs=0.051)
    right = 100 * counts.diagonal().sum() / counts.sum()
    assert axes.get_title() == f"test accuracy {right:.2f} %"
    assert max(figure.get_size_inches()) < 13


@pytest.mark.parametrize(("count", "channels"), [(1, 1), (7, 3), (25, 3)])
def test_wrong_images_lie_below_their_titles(count, channels):
    pixels = torch.randint(256, (count, channels, 6, 9), dtype=torch.uint8)
    axes = draw_images(pixels, [f"title {i}" for i in range(count)]).axes[0]
    assert [text.get_text() for text in axes.texts] == [f"title {i}" for i in range(count)]
    for i, (image, text) in enumerate(zip(axes.images, axes.texts, strict=True)):
        left, right, bottom, top = image.get_extent()
        assert text.get_position() == (left, pytest.approx(top - 0.05))
        assert (right - left, bottom - top) == pytest.approx((1, 6 / 9))
        shown = torch.as_tensor(image.get_array().data).view(6, 9, channels)
        assert torch.equal(shown, pixels[i].permute(1, 2, 0))


# ----------------------------------------------------------------------------- what it leaves alone


@pytest.mark.slow
def test_a_run_is_the_same_with_it(tmp_path):
    dropout = [
        "model=wide_resnet28_10",
        "model.depth=10",
        "model.widen_factor=1",
        "model.dropout=0.3",
    ]
    options = [
        *(o for o in WITH_DASHBOARD if not o.startswith("model")),
        *dropout,
        "data.val_size=100",
    ]
    for name, more in (("with", []), ("without", ["~callbacks.dashboard"])):
        done = forked(tmp_path, *options, *more, f"hydra.run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "TensorBoard" not in done.stdout
    assert equal(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    assert summary(tmp_path / "with")["metrics"] == summary(tmp_path / "without")["metrics"]


@pytest.mark.parametrize("compiled", [False, True])
def test_the_graph_changes_nothing_of_the_model(tmp_path, compiled):
    model = reference.convnet(torch.float32).train()
    model.bn1.eval()  # frozen
    if compiled:
        model.compile(backend="eager")
    call, before, random = model._compiled_call_impl, reference.state(model), torch.get_rng_state()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    add_graph(logger.experiment, model, (3, 8, 8))
    logger.save()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sum(node.op == "aten::_convolution" for node in events.Graph().node) == 20
    reference.assert_equal(reference.state(model), before)
    assert torch.equal(random, torch.get_rng_state())
    assert model._compiled_call_impl is call
    assert [m for m in model.modules() if not m.training] == [model.bn1]


def test_a_model_that_cannot_be_traced_is_said_in_a_line(tmp_path, caplog, capfd):
    class Dict(nn.Linear):
        def forward(self, images):
            return {"logits": images}

    logger = TensorBoardLogger(tmp_path)
    with caplog.at_level(logging.WARNING):
        add_graph(logger.experiment, Dict(1, 1), (3, 8, 8))
    (record,) = caplog.records
    assert record.getMessage().startswith("TensorBoard gets no graph of the model: RuntimeError: ")
    assert "\n" not in record.getMessage()
    assert capfd.readouterr().out == ""


def test_other_data_are_refused_where_there_is_a_tensorboard(tmp_path):
    batches = reference.loader(reference.batches([8], torch.float32))
    module = reference.module_of(reference.mlp())
    reference.trainer(callbacks=[Dashboard()]).fit(module, batches)  # has no logger to write to
    with pytest.raises(ConfigError, match="dashboard: needs the data of an ImageDataModule"):
        runner(tmp_path, Dashboard()).fit(module, batches)


# ------------------------------------------------------------------------------------ two processes


def program(folder):
    rank = dist.get_rank()
    distributed = {"devices": RANKS, "use_distributed_sampler": False}
    batches = [tuple(x.chunk(RANKS)[rank] for x in b) for b in reference.batches([16] * 2)]
    fitted = reference.trainer(
        logger=MetricsCSV(str(folder)),
        log_every_n_steps=1,
        strategy=DDPStrategy(broadcast_buffers=False),
        **distributed,
    )
    model = reference.mlp(torch.float64)
    fitted.fit(reference.module_of(model, rho=0.2), reference.loader(batches))
    with pytest.MonkeyPatch.context() as monkeypatch:
        drawn = Drawn(monkeypatch)
        tested = runner(folder, drawn, strategy=DDPStrategy(), **distributed)
        tested.test(reference.module_of(reference.mlp()), datamodule=data(), verbose=False)
    if rank == 0:
        counts, pixels = drawn.calls["draw_confusion"][0], drawn.calls["draw_images"][0]
        torch.save((counts, pixels), folder / "drawn.pt")
    else:
        assert drawn.calls == {}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(program, folder)
    return folder


@pytest.mark.long
@pytest.mark.slow
def test_geometry_is_the_mean_over_devices(ranks):
    model = reference.mlp(torch.float64)
    (batch, _) = reference.batches([16] * 2)
    first, second = [], []
    for part in zip(*(x.chunk(RANKS) for x in batch), strict=True):
        first.append(reference.mean_gradient(model, [part])[0])
        second.append(reference.perturbed_gradient(model, [part], first[-1], 0.2, False)[0])
    mean = {name: sum(g[name] for g in second) / RANKS for name in second[0]}
    cosines = [cosine_of(g, mean) for g in first]
    assert abs(cosines[0] - cosines[1]) > 1e-3
    assert logged(ranks)[1] == pytest.approx((0.2, sum(cosines) / RANKS), rel=1e-5)


@pytest.mark.slow
def test_the_confusion_matrix_is_of_all_devices_the_images_of_one(ranks):
    counts, pixels = torch.load(ranks / "drawn.pt", weights_only=True)
    served = data()
    served.setup()
    normalised, labels = served.on_after_batch_transfer((served.test.images, served.test.labels), 0)
    probabilities, predicted = predictions(reference.mlp(), normalised)
    assert counts.sum() == len(served.test) == 77
    expected = torch.zeros(CLASSES, CLASSES, dtype=torch.long)
    expected.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
    assert torch.equal(counts, expected)
    wrong = [i for i in range(0, 77, RANKS) if predicted[i] != labels[i]]  # of rank 0
    wrong.sort(key=lambda i: float(probabilities[i, labels[i]]))
    assert torch.equal(pixels, served.test.images[wrong[:25]])
