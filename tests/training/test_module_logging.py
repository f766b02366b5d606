"""What SAMModule counts, logs and evaluates, and that none of it waits for the device."""

import copy
import math

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from host_syncs import HostSyncs
from reference import (
    CLASSES,
    SGD,
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


def test_the_rest_of_an_epoch_is_logged_at_its_end():
    data = batches([8] * 5, torch.float32)
    recorder = Recorder()
    fit(mlp(), data, {"logger": recorder, "log_every_n_steps": 3, "max_epochs": 2}, rho=0.1)
    assert [step for step, _ in recorder.values("train/loss")] == [3, 5, 6, 9, 10]


def test_the_rest_of_a_run_is_logged_where_max_steps_ends_it():
    data = batches([8] * 5, torch.float32)
    recorder = Recorder()
    fit(mlp(), data, {"logger": recorder, "log_every_n_steps": 50, "max_steps": 3}, rho=0.1)
    assert [step for step, _ in recorder.values("train/loss")] == [3]


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
    assert [value for _, value in recorder.values("train/lr")] == lrs[1::2]


def test_sharpness_is_the_mean_over_perturbed_steps():
    data = batches([8] * 6)
    recorder = Recorder()
    fit(convnet(), data, {"logger": recorder, "log_every_n_steps": 6}, rho=0.1, every=3)
    expected = plain_loop(convnet(), [[b] for b in data], 0.1, every=3)
    ((_, sharpness),) = recorder.values("train/sharpness")
    assert len(expected) == 2
    assert sharpness == pytest.approx(sum(rise for _, rise in expected) / 2, rel=1e-5)


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


def test_the_gradient_norm_is_that_of_the_updates_that_were_made():
    good = batches([8] * 2, torch.float32)
    bad = (torch.full((8, 3, 8, 8), math.inf), good[0][1])
    norms = []
    for data in ([bad, *good], good):
        recorder = Recorder()
        fit(mlp(), data, {"logger": recorder, "log_every_n_steps": 5}, rho=0.1)
        ((_, norm),) = recorder.values("train/grad_norm")
        norms.append(norm)
    assert norms[0] == pytest.approx(norms[1])


def test_a_step_is_one_update():
    data = batches([8] * 7, torch.float32)
    model = mlp()
    options = {"max_epochs": -1, "max_steps": 5}
    _, runner = fit(model, data, options, rho=0.1, accumulate_grad_batches=2)
    assert runner.global_step == 5  # an epoch has 4 updates, the last of one batch
    assert runner.fit_loop.epoch_loop.batch_progress.current.ready == 2


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


def test_the_loss_of_a_diverged_model_is_not_that_of_its_good_batches():
    data = batches([9, 9], torch.float32)
    data[1][0][0] = float("nan")
    (values,) = trainer().validate(module_of(mlp()), loader(data), verbose=False)
    assert math.isnan(values["val/loss"])


def test_evaluations_and_fits_follow_one_another_in_any_order():
    data = batches([9, 5], torch.float32)
    module = module_of(mlp(), rho=0.1)
    trainer().test(module, loader(data), verbose=False)
    (before,) = trainer().validate(module, loader(data), verbose=False)
    recorder = Recorder()
    trainer(logger=recorder).fit(module, loader(data), loader(data))
    (after,) = trainer().validate(module, loader(data), verbose=False)
    assert recorder.values("val/loss") == [(2, pytest.approx(after["val/loss"]))]
    assert after["val/loss"] != before["val/loss"]


def test_evaluation_uses_and_keeps_the_running_statistics():
    model = convnet(torch.float32)
    fit(model, batches([16] * 3, torch.float32), rho=0.1)
    before = state(model)
    trainer().validate(module_of(model), loader(batches([16], torch.float32)), verbose=False)
    assert_equal(state(model), before)


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
