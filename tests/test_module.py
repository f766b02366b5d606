"""SAMModule under a real Trainer, against plain loops written from the formulas."""

import copy
import math

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reference import (
    CLASSES,
    SGD,
    assert_close,
    assert_equal,
    batches,
    convnet,
    fit,
    loader,
    mean_gradient,
    mlp,
    module_of,
    perturbed_gradient,
    plain_loop,
    sgd,
    state,
    trainer,
)
from sam_lightning import SAMModule
from sam_lightning.errors import TrainingError
from sam_lightning.perturbations import AdaptiveAscent


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_twenty_updates_equal_a_plain_loop_in_float64(method, clip, accumulate):
    sizes = [12, 12, 7] * 20 if accumulate == 3 else [12, 9] * 10
    data = batches(sizes)
    groups = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    ours, theirs = convnet(), convnet()
    _, runner = fit(
        ours,
        data,
        rho=0.2,
        perturbation=AdaptiveAscent(eta=0.01) if method == "asam" else None,
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
    )
    plain_loop(theirs, groups, 0.2, adaptive=method == "asam", clip=clip)
    assert runner.global_step == len(groups) == 20
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)
    assert theirs.bn1.num_batches_tracked == len(data)


def test_clipping_is_that_of_torch():
    (batch,) = batches([12])
    ours, theirs = convnet(), convnet()
    fit(ours, [batch], rho=0.2, gradient_clip_val=0.3)
    first, _ = mean_gradient(theirs, [batch])
    second, _ = perturbed_gradient(theirs, [batch], first, 0.2, adaptive=False)
    for name, p in theirs.named_parameters():
        p.grad = second[name]
    assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.3) > 0.3
    sgd(theirs.parameters()).step()
    assert_close(state(ours), state(theirs), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_each_micro_batch_can_climb_by_itself(method):
    data = batches([12, 12, 7] * 5 + [4, 5])
    groups = [data[i : i + 3] for i in range(0, len(data), 3)]
    ours, theirs = convnet(), convnet()
    _, runner = fit(
        ours,
        data,
        rho=0.2,
        perturbation=AdaptiveAscent(eta=0.01) if method == "asam" else None,
        accumulate_grad_batches=3,
        ascent_per_micro_batch=True,
    )
    plain_loop(theirs, groups, 0.2, adaptive=method == "asam", per_micro_batch=True)
    assert runner.global_step == len(groups) == 6
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)


def test_schedule_and_label_smoothing():
    data = batches([8] * 6)
    factors = [1.0, 0.5, 0.25, 0.2, 0.1, 0.05]
    ours, theirs = convnet(), convnet()
    lr_factor = lambda step: (*factors, 0)[step]  # noqa: E731
    fit(ours, data, rho=0.1, lr_factor=lr_factor, label_smoothing=0.2)
    plain_loop(
        theirs, [[b] for b in data], 0.1, lrs=[SGD["lr"] * f for f in factors], smoothing=0.2
    )
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)


def count_forwards(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_rho_0_is_plain_sgd_bit_for_bit_at_one_pass():
    data = batches([16] * 20, torch.float32)
    ours, theirs = convnet(torch.float32), convnet(torch.float32)
    calls = count_forwards(ours)
    fit(ours, data, rho=0.0)
    optimizer = sgd(theirs.parameters())
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
    assert_equal(state(ours), state(theirs))
    assert len(calls) == 20


def test_sam_costs_two_passes():
    model = convnet(torch.float32)
    calls = count_forwards(model)
    fit(model, batches([16] * 5, torch.float32), rho=0.1)
    assert len(calls) == 10


# --------------------------------------------------------------------------- mixed precision


class InFloat32(nn.Module):
    """Opts out of autocast, so that a run shows what scaling alone does.

    Its backward pass is in float32 only if that one, too, runs outside of autocast.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, CLASSES, generator=generator) * 0.1)

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return images.flatten(1).float() @ self.weight


def fp16(init_scale=2.0**16, **options):
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, **options)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler), scaler


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("decay_in_ascent", [False, True])
def test_with_a_loss_scaler_perturbation_and_clipping_use_unscaled_gradients(
    clip, accumulate, decay_in_ascent
):
    data = batches([16] * 10, torch.float32)
    options = {
        "rho": 0.5,
        "decay_in_ascent": decay_in_ascent,
        "gradient_clip_val": clip,
        "accumulate_grad_batches": accumulate,
    }
    plugin, scaler = fp16(growth_interval=3)
    scaled, plain = InFloat32(), InFloat32()
    fit(scaled, data, {"plugins": [plugin]}, **options)
    fit(plain, data, **options)
    assert scaler.get_scale() > 2.0**16
    assert_close(state(scaled), state(plain), atol=1e-6, rtol=0)


def test_an_overflow_under_the_scaler_skips_the_step_and_backs_off():
    data = batches([16] * 4, torch.float32)
    data = [(images * 1e4, labels) for images, labels in data]
    plugin, scaler = fp16(init_scale=2.0**122)  # the scaled gradient is infinite, the true one not
    model = InFloat32()
    before = state(model)
    module, runner = fit(model, data, {"plugins": [plugin]}, rho=0.5)
    assert runner.global_step == 4
    assert scaler.get_scale() < 2.0**122
    assert all(w.isfinite().all() for w in state(model).values())
    assert module.skipped[0] >= 1
    steps_taken = 4 - int(module.skipped[0])
    assert (not torch.equal(before["weight"], model.weight)) == (steps_taken > 0)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_autocast_covers_the_forward_and_not_the_backward_pass(precision):
    data = batches([16] * 6, torch.float32)
    ours, theirs = mlp(), mlp()
    dtype = torch.bfloat16
    options = {"precision": precision}
    if precision == "16-mixed":
        options, dtype = {"plugins": [fp16()[0]]}, torch.float16
    fit(ours, data, options, rho=0.2)
    optimizer = sgd(theirs.parameters())
    for images, labels in data:

        def gradients(images=images, labels=labels):
            with torch.autocast("cpu", dtype):
                loss = nn.functional.cross_entropy(theirs(images), labels)
            # a power of two scales exactly, and keeps small float16 gradients from vanishing
            scaled = torch.autograd.grad(loss * 2**16, list(theirs.parameters()))
            return [g / 2**16 for g in scaled]

        g = gradients()
        norm = math.sqrt(sum(float(x.square().sum()) for x in g))
        kept = copy.deepcopy(theirs.state_dict())
        with torch.no_grad():
            for p, x in zip(theirs.parameters(), g, strict=True):
                p += 0.2 * x / norm
        g = gradients()
        theirs.load_state_dict(kept)
        for p, x in zip(theirs.parameters(), g, strict=True):
            p.grad = x
        optimizer.step()
    assert_close(state(ours), state(theirs), atol=2e-6 if dtype is torch.bfloat16 else 1e-5, rtol=0)


# ---------------------------------------------------------------------- non-finite gradients


def poisoned(count, bad):
    data = batches([8] * count, torch.float32)
    for i in bad:
        data[i][0][0, 0, 0, 0] = float("nan")
    return data


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_gradient_skips_the_step_and_is_counted(fused):
    data = poisoned(6, bad=[0, 3])
    ours, theirs = mlp(), mlp()
    module, runner = fit(ours, data, optimizer=lambda p: sgd(p, fused=fused), rho=0.2)
    fit(theirs, [b for i, b in enumerate(data) if i not in (0, 3)], rho=0.2)
    assert_close(state(ours), state(theirs), atol=1e-7, rtol=0)
    assert module.skipped.tolist() == [2, 0, 1]  # in all, in a row at the end, longest row
    assert runner.global_step == 6


def test_too_many_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(tmp_path):
    good = poisoned(4, bad=[])
    bad = poisoned(4, bad=range(4))

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader(good if self.trainer.current_epoch == 0 else bad)

    module = module_of(mlp(), rho=0.2, max_skipped_steps=3)
    saver = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    runner = trainer(
        max_epochs=3,
        callbacks=[saver],
        enable_checkpointing=True,
        reload_dataloaders_every_n_epochs=1,
    )
    with pytest.raises(TrainingError, match=r"max_skipped_steps=3"):
        runner.fit(module, datamodule=Data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    assert all(v.isfinite().all() for v in saved["state_dict"].values())
    assert runner.current_epoch == 1


# -------------------------------------------------------------------------------- randomness


@pytest.mark.parametrize("same", [True, False])
def test_dropout_masks_of_the_second_pass(same):
    model = mlp(dropout=0.5)
    masks = []
    model[3].register_forward_hook(lambda _m, i, out: masks.append((i[0] != 0) & (out == 0)))
    # a rho this small leaves the sign of every activation as it is
    fit(model, batches([32] * 4, torch.float32), rho=1e-6, same_randomness=same)
    pairs = list(zip(masks[::2], masks[1::2], strict=True))
    assert [torch.equal(a, b) for a, b in pairs] == [same] * 4
    assert not torch.equal(masks[0], masks[2])


def test_masks_differ_between_seeds_and_a_run_repeats():
    results = []
    for seed in (0, 0, 1):
        model = mlp(dropout=0.5)
        fit(model, batches([32] * 3, torch.float32), rho=0.1, seed=seed)
        results.append(state(model))
    assert_equal(results[0], results[1])
    assert not torch.equal(results[0]["1.weight"], results[2]["1.weight"])


# ----------------------------------------------------------------------- counting and logging


class Recorder(L.pytorch.loggers.logger.Logger):
    """Keeps what is logged, as (step, metrics)."""

    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def values(self, name):
        return [(step, row[name]) for step, row in self.rows if name in row]


def test_logged_values_are_means_over_the_updates_since_the_last_log():
    data = batches([8] * 12)
    groups = [data[i : i + 2] for i in range(0, 12, 2)]
    recorder = Recorder()
    ours, theirs = convnet(), convnet()
    options = {"logger": recorder, "log_every_n_steps": 2}
    fit(ours, data, options, rho=0.1, accumulate_grad_batches=2, lr_factor=lambda s: 1 / (s + 1))
    lrs = [SGD["lr"] / (i + 1) for i in range(6)]
    expected = plain_loop(theirs, groups, 0.1, lrs=lrs)
    for name, column in (("train/loss", 0), ("train/sharpness", 1)):
        logged = recorder.values(name)
        assert [step for step, _ in logged] == [2, 4, 6]
        means = [(expected[i][column] + expected[i + 1][column]) / 2 for i in (0, 2, 4)]
        assert [value for _, value in logged] == pytest.approx(means, rel=1e-5)
    assert all(value > 0 for _, value in recorder.values("train/sharpness"))
    assert [value for _, value in recorder.values("train/skipped_steps")] == [0, 0, 0]


def test_logged_accuracy_gradient_norm_and_learning_rate():
    (batch,) = batches([20])
    recorder = Recorder()
    model = convnet()
    clean = copy.deepcopy(model)
    fit(model, [batch], {"logger": recorder, "log_every_n_steps": 1}, rho=0.1)
    ((_, acc),) = recorder.values("train/acc")
    assert acc == pytest.approx((clean(batch[0]).argmax(1) == batch[1]).double().mean().item())
    clean = convnet()
    first, _ = mean_gradient(clean, [batch])
    second, _ = perturbed_gradient(clean, [batch], first, 0.1, adaptive=False)
    norm = math.sqrt(sum(float(g.square().sum()) for g in second.values()))
    assert recorder.values("train/grad_norm") == [(1, pytest.approx(norm, rel=1e-5))]
    ((step, lr),) = recorder.values("train/lr")
    assert (step, lr) == (1, SGD["lr"])


def test_a_step_is_one_update():
    data = batches([8] * 7, torch.float32)
    model = mlp()
    options = {"max_epochs": -1, "max_steps": 5}
    _, runner = fit(model, data, options, rho=0.1, accumulate_grad_batches=2)
    assert runner.global_step == 5  # an epoch has 4 updates, the last of one batch
    assert runner.fit_loop.epoch_loop.batch_progress.current.ready == 2


class HostSyncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class Watched(SAMModule):
    """Records host syncs of training steps."""

    def training_step(self, batch, batch_idx):
        with HostSyncs() as syncs:
            super().training_step(batch, batch_idx)
        self.syncs = [*getattr(self, "syncs", []), *syncs.found]


@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("per_micro_batch", [False, True])
def test_a_training_step_never_waits_for_the_device(rho, per_micro_batch):
    module = Watched(
        convnet(torch.float32),
        CLASSES,
        lambda p: sgd(p, fused=True),
        rho=rho,
        accumulate_grad_batches=2,
        ascent_per_micro_batch=per_micro_batch,
        gradient_clip_val=1.0,
    )
    trainer().fit(module, loader(batches([8] * 4, torch.float32)))
    assert module.syncs == []
    with HostSyncs() as syncs:
        torch.ones(()).item()
    assert syncs.found


# -------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("classes", [4, 12])
def test_evaluation_is_exact_over_uneven_batches(classes):
    data = batches([9, 9, 5], torch.float32, classes)
    model = mlp(classes=classes)
    module = SAMModule(model, classes, sgd)
    (values,) = trainer().validate(module, loader(data), verbose=False)
    model.eval()
    logits = torch.cat([model(images) for images, _ in data])
    labels = torch.cat([labels for _, labels in data])
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert values["val/loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert values["val/acc"] == pytest.approx((ranks == 0).float().mean().item())
    assert values["val/error"] == pytest.approx(1 - values["val/acc"])
    if classes >= 10:
        assert values["val/acc5"] == pytest.approx((ranks < 5).float().mean().item())
    else:
        assert "val/acc5" not in values
    (values,) = trainer().test(module, loader(data[:1]), verbose=False)
    assert values["test/acc"] == pytest.approx((ranks[:9] == 0).float().mean().item())


def test_evaluation_uses_and_keeps_the_running_statistics():
    model = convnet(torch.float32)
    fit(model, batches([16] * 3, torch.float32), rho=0.1)
    before = state(model)
    trainer().validate(module_of(model), loader(batches([16], torch.float32)), verbose=False)
    assert_equal(state(model), before)


# ------------------------------------------------------------------- compile, layout, hparams


def test_a_compiled_model_trains_the_same_with_two_graphs():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    data = batches([16] * 6, torch.float32)
    ours, theirs = convnet(torch.float32), convnet(torch.float32)
    ours.compile(backend=counter)
    fit(ours, data, rho=0.1)
    fit(theirs, data, rho=0.1)
    assert_close(state(ours), state(theirs), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 2  # running statistics updated, and frozen


def test_channels_last_trains_the_same():
    data = batches([16] * 6)
    ours, theirs = convnet(), convnet()
    module, _ = fit(ours, data, rho=0.1, memory_format="channels_last")
    fit(theirs, data, rho=0.1)
    assert module.model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)
    with pytest.raises(ValueError, match="memory_format=nhwc"):
        module_of(mlp(), memory_format="nhwc")


def test_frozen_layers_stay_and_a_fully_frozen_model_is_refused():
    model = convnet(torch.float32)
    model.conv1.weight.requires_grad_(False)
    before = model.conv1.weight.clone()
    fit(model, batches([8] * 2, torch.float32), rho=0.1)
    assert torch.equal(model.conv1.weight, before)


def test_checkpoints_hold_plain_values_and_load_with_weights_only(tmp_path):
    module = module_of(mlp(), rho=0.1, hparams={"model": {"width": 16}, "classes": ["a", "b"]})
    runner = trainer()
    runner.fit(module, loader(batches([8] * 3, torch.float32)))
    runner.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {"model": {"width": 16}, "classes": ["a", "b"]}
    assert saved["global_step"] == 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_ends_where_an_unbroken_one_does(tmp_path, accumulate):
    data = batches([16] * 5, torch.float32)
    options = {
        "rho": 0.1,
        "accumulate_grad_batches": accumulate,
        "lr_factor": lambda step: 0.9**step,
    }

    def run(epochs, recorder, ckpt_path=None):
        module = module_of(mlp(dropout=0.3), **options)
        runner = trainer(max_epochs=epochs, logger=recorder, log_every_n_steps=2)
        runner.fit(module, loader(data), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    unbroken, first, second = Recorder(), Recorder(), Recorder()
    whole, _ = run(3, unbroken)
    _, stopped = run(2, first)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = run(3, second, tmp_path / "stopped.ckpt")
    assert_equal(state(whole.model), state(resumed.model))
    assert first.rows + second.rows == unbroken.rows
