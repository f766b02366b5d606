"""What no method needs a line of its own for: loss scales, resuming, a device not waited for."""

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from family import FAMILY, options_of
from host_syncs import HostSyncs
from reference import (
    CLASSES,
    assert_close,
    assert_equal,
    batches,
    convnet,
    fit,
    loader,
    mlp,
    module_of,
    sgd,
    state,
    trainer,
)
from sam_lightning import SAMModule
from sam_lightning.config.errors import ConfigError
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.training.callbacks.progress import MetricsCSV


class WithoutAutocast(nn.Module):
    """A network with a normalisation layer that stays in float32, so that scaling alone is seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        )

    def forward(self, images):
        with torch.autocast("cpu", enabled=False):
            return self.layers(images.float())


@pytest.mark.parametrize(
    ("method", "synced"), [*((m, False) for m in FAMILY), ("gsam", True), ("looksam", True)]
)
def test_a_loss_scale_changes_nothing(method, synced):
    data = batches([16] * 12, torch.float32)
    options = options_of(
        method, accumulate_grad_batches=2, gradient_clip_val=0.5, sync_perturbation=synced
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    scaled, plain = WithoutAutocast(), WithoutAutocast()
    fit(scaled, data, {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}, **options)
    fit(plain, data, **options)
    assert scaler.get_scale() > 2.0**16
    assert_close(state(scaled), state(plain), atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", FAMILY)
def test_an_overflow_skips_an_update_and_is_not_remembered(method):
    data = batches([16] * 8, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**122)
    model = WithoutAutocast()
    before = state(model)
    module, _ = fit(
        model,
        [(images * 1e4, labels) for images, labels in data],
        {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]},
        **options_of(method, rho=1e-3),  # all of it in every weight would overflow for good
    )
    assert 1 <= module.train_metrics.skipped[0] < 8
    assert all(w.isfinite().all() for w in state(model).values())
    assert not torch.equal(before["layers.1.weight"], model.layers[1].weight)


@pytest.mark.parametrize("method", FAMILY)
def test_a_resumed_run_ends_where_an_unbroken_one_does(method, tmp_path):
    data = batches([16] * 7, torch.float32)

    def run(epochs, ckpt_path=None):
        module = module_of(convnet(torch.float32), **options_of(method))
        runner = trainer(max_epochs=epochs)
        runner.fit(module, loader(data), ckpt_path=ckpt_path, weights_only=True)
        return module, runner

    whole, _ = run(2)
    _, stopped = run(1)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed, _ = run(2, tmp_path / "stopped.ckpt")
    assert_equal(state(whole.model), state(resumed.model))


class Watched(SAMModule):
    """Records host syncs of training steps."""

    def training_step(self, batch, batch_idx):
        with HostSyncs() as syncs:
            super().training_step(batch, batch_idx)
        self.syncs = [*getattr(self, "syncs", []), *syncs.found]


@pytest.mark.parametrize("method", FAMILY)
def test_a_training_step_never_waits_for_the_device(method):
    module = Watched(
        convnet(torch.float32), CLASSES, lambda p: sgd(p, fused=True), **options_of(method)
    )
    trainer().fit(module, loader(batches([8] * 6, torch.float32)))
    assert module.syncs == []


@pytest.mark.parametrize("method", FAMILY)
def test_rho_0_is_the_base_optimizer_bit_for_bit_at_one_pass(method):
    data = batches([12] * 6, torch.float32)
    ours, theirs = convnet(torch.float32), convnet(torch.float32)
    calls = []
    ours.register_forward_hook(lambda *_: calls.append(1))
    fit(ours, data, **options_of(method, rho=0.0, rho_min=None))
    fit(theirs, data, rho=0.0)
    assert_equal(state(ours), state(theirs))
    assert len(calls) == len(data)


@pytest.mark.slow
@pytest.mark.parametrize("same_randomness", [True, False])
def test_running_statistics_are_those_of_the_first_pass(same_randomness):
    data = batches([12] * 3, torch.float32)
    counts = {}
    for method in FAMILY:
        if method == "msam":  # has one pass
            continue
        model = convnet(torch.float32)
        options = options_of(method, same_randomness=same_randomness, ascent_steps=2)
        fit(model, data, **options)
        counts[method] = int(model.bn1.num_batches_tracked)
    assert set(counts.values()) == {3}


@pytest.mark.parametrize(
    ("method", "images"),
    [
        ("sgd", [10] * 5),
        ("msam", [10] * 5),
        ("sam", [10, 10] * 5),
        ("looksam", [10, 10, 10, 10, 10, 10]),
        ("esam", [10, 10, 5] * 5),  # the pass between has no backward
    ],
)
def test_what_a_step_costs(method, images):
    model = convnet(torch.float32)
    calls = []
    model.register_forward_hook(lambda _module, args, _out: calls.append(len(args[0])))
    fit(model, batches([10] * 5, torch.float32), **options_of(method))
    assert calls == images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ascent_fraction": 0.5, "descent_fraction": 0.5}, r"descent_fraction=0\.5: needs"),
        (
            {"ascent_per_micro_batch": True, "gradient_transform": SurrogateGap()},
            "not with method.descent",
        ),
        *(
            ({"perturbation": MomentumAscent(), **option}, f"so .*{next(iter(option))}.* must be")
            for option in (
                {"ascent_steps": 3},
                {"ascent_fraction": 0.5},
                {"descent_fraction": 0.5},
                {"ascent_per_micro_batch": True},
                {"decay_in_ascent": True},
                {"sync_perturbation": True},
            )
        ),
        ({"rho": 0.05, "rho_min": 0.5}, r"rho_min=0\.5: must be at most rho=0\.05"),
        ({"perturbed_layers": "norm"}, "perturbed_layers=norm: allowed are all, normalization"),
    ],
)
def test_options_that_cannot_be_combined(options, message):
    with pytest.raises(ConfigError, match=message):
        module_of(convnet(), **options)


def test_a_radius_of_0_ends_what_a_method_remembers(tmp_path):
    data = batches([16] * 6, torch.float32)
    _, runner = fit(convnet(torch.float32), data, **options_of("looksam"))
    runner.save_checkpoint(tmp_path / "looksam.ckpt")
    ends = []
    for method in ("looksam", "sgd"):
        module = module_of(convnet(torch.float32), **options_of(method, rho=0.0))
        runner = trainer(max_epochs=2)
        path = tmp_path / "looksam.ckpt"
        runner.fit(module, loader(data), ckpt_path=path, weights_only=True)
        ends.append(state(module.model))
    assert_equal(*ends)
    assert not module.sam.method_state  # of another method


def test_only_what_has_been_measured_is_logged(tmp_path):
    for method, logged in (("sam", True), ("msam", False), ("sgd", False)):
        folder = tmp_path / method
        logger = MetricsCSV(folder)
        options = {"logger": logger, "log_every_n_steps": 1}
        fit(convnet(torch.float32), batches([16] * 2, torch.float32), options, **options_of(method))
        assert ("train/sharpness" in (folder / "metrics.csv").read_text()) == logged


class Draws:
    """Climbs along the gradient, and keeps what it draws."""

    def __init__(self):
        self.drawn = []

    def __call__(self, weights, grads, names, memory):
        self.drawn.append(torch.rand(()).item())
        return grads, torch.ones(())


@pytest.mark.parametrize("synced", [True, False])
def test_devices_draw_alike_where_their_gradient_is_the_same(monkeypatch, synced):
    drawn = []
    for rank in (0, 1):
        monkeypatch.setattr(SAMModule, "global_rank", rank)
        draws = Draws()
        options = {"perturbation": draws, "ascent_steps": 3, "sync_perturbation": synced}
        fit(mlp(dropout=0.5), batches([16] * 2, torch.float32), **options)
        drawn.append(draws.drawn)
    assert len({*drawn[0]}) == 6
    assert (drawn[0] == drawn[1]) == synced
    assert synced or not {*drawn[0]} & {*drawn[1]}
