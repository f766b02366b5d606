"""SAMModule under autocast and a loss scaler, and with gradients that are not finite."""

import copy
import math

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from reference import (
    CLASSES,
    assert_close,
    batches,
    fit,
    loader,
    mlp,
    module_of,
    sgd,
    state,
    trainer,
)
from sam_lightning.config.errors import TrainingError


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
@pytest.mark.parametrize("decay_in_ascent", [False, True, "both"])
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
    assert module.train_metrics.skipped[0] >= 1
    steps_taken = 4 - int(module.train_metrics.skipped[0])
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
    assert module.train_metrics.skipped.tolist() == [
        2,
        0,
        1,
    ]  # in all, in a row at the end, longest row
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
