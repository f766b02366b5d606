"""Claims of docs/semantics.md that no other test shows."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from host_syncs import HostSyncs
from reference import CLASSES, SGD, batches, fit, loader, mlp, sgd, trainer
from runs import SMALL, command, summary
from sam_lightning import SAM, SAMModule
from sam_lightning.inference.load import TrainedClassifier, data_of
from sam_lightning.runs.checkpoint import read

# -------------------------------------------------------- SAM.step(closure), left to Lightning


class Automatic(L.LightningModule):
    """Automatic optimization; counts what is called."""

    def __init__(self, optimizer):
        super().__init__()
        self.model = mlp()
        self.optimizer = optimizer
        self.steps = self.hooks = self.clippings = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def on_before_optimizer_step(self, optimizer):
        self.hooks += 1

    def configure_gradient_clipping(self, *args, **kwargs):
        self.clippings += 1
        super().configure_gradient_clipping(*args, **kwargs)

    def configure_optimizers(self):
        return self.optimizer(self.model.parameters())


def sam(params):
    return SAM(params, torch.optim.SGD, rho=0.2, lr=0.1)


def plain(params):
    return torch.optim.SGD(params, lr=0.1)


def automatic(data, optimizer=sam, **options):
    module = Automatic(optimizer)
    runner = trainer(**options)
    runner.fit(module, loader(data))
    return module, runner


def fp16():
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


def test_automatic_optimization_runs_training_step_twice_an_update():
    module, runner = automatic(batches([8] * 3, torch.float32), gradient_clip_val=1.0)
    assert runner.global_step == 3
    assert (module.steps, module.hooks, module.clippings) == (6, 3, 3)


def test_automatic_optimization_refuses_to_accumulate():
    with pytest.raises(RuntimeError, match="use manual optimization"):
        automatic(batches([8] * 2, torch.float32), accumulate_grad_batches=2)


def test_automatic_optimization_in_float16_is_refused():
    with pytest.raises(RuntimeError, match="would be a plain step"):
        automatic(batches([8] * 3, torch.float32), plugins=[fp16()])


# ------------------------------------------------------------------------------- SAMModule


class Watched(SAMModule):
    """The number of times that each training step waits for the device."""

    def training_step(self, batch, batch_idx):
        with HostSyncs() as syncs:
            super().training_step(batch, batch_idx)
        self.waits = [*getattr(self, "waits", []), len(syncs.found)]


def test_a_loss_scaler_waits_once_an_update():
    for plugins, waits in ([], [0, 0, 0]), ([fp16()], [1, 1, 1]):
        module = Watched(mlp(), CLASSES, lambda p: sgd(p, fused=True), rho=0.1)
        trainer(plugins=plugins).fit(module, loader(batches([8] * 3, torch.float32)))
        assert module.waits == waits


class Rows(DummyLogger):
    """Keeps what is logged."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_metrics(self, metrics, step=None):
        self.rows.append(metrics)


def logged(data, name, **options):
    rows = Rows()
    _, runner = fit(mlp(), data, {"logger": rows, "log_every_n_steps": 1}, rho=0.1, **options)
    return [row[name] for row in rows.rows], runner


def test_a_skipped_update_counts_for_the_schedule():
    data = batches([8] * 4, torch.float32)
    data[1][0][0, 0, 0, 0] = float("nan")
    rates, runner = logged(data, "train/lr", lr_factor=lambda step: 1 / (step + 1))
    assert rates == [SGD["lr"] / (step + 1) for step in range(4)]
    assert runner.global_step == 4
    assert logged(data, "train/skipped_steps")[0] == [0, 1, 1, 1]


def test_the_logged_norm_is_that_before_clipping():
    data = batches([8], torch.float32)
    ((norm,), _), ((clipped,), _) = (
        logged(data, "train/grad_norm", gradient_clip_val=limit) for limit in (None, 1e-3)
    )
    assert norm == clipped > 1e-3


@pytest.mark.long
@pytest.mark.slow
def test_devices_evaluate_with_the_mean_of_their_running_statistics(tmp_path):
    done = command(tmp_path, *SMALL, "trainer=ddp_cpu", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    checkpoint = read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    one, two = checkpoint["per_rank_state"]["running_stats"]
    assert not torch.equal(one, two)
    saved = checkpoint["state_dict"].items()
    means = [v.flatten() for k, v in saved if k.endswith(("running_mean", "running_var"))]
    torch.testing.assert_close(torch.cat(means), (one + two) / 2)

    model, data = (
        TrainedClassifier(checkpoint),
        data_of(checkpoint["hyper_parameters"]),
    )  # one process, with the mean
    with torch.no_grad():
        logits = model(model.preprocess(data.test.images))
    loss = nn.functional.cross_entropy(logits, data.test.labels).item()
    assert summary(tmp_path / "run")["metrics"]["test/loss"] == pytest.approx(loss, rel=1e-5)
