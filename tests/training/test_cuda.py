"""On one CUDA GPU: the same numbers as on the CPU, no waiting, one copy of the weights."""

import subprocess
import sys
from functools import partial

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

import reference
from family import CHANGED, FAMILY, PlainLoop, options_of
from reference import (
    assert_close,
    assert_equal,
    batches,
    convnet,
    loader,
    mlp,
    module_of,
    sgd,
    state,
    trainer,
)
from runs import TRAIN, run
from sam_lightning import SAM
from sam_lightning.data import digits
from sam_lightning.data.augment import CutMix, Cutout, crop_flip
from sam_lightning.data.datamodule import ImageDataModule
from sam_lightning.optim import foreach as vectors
from sam_lightning.optim.methods.asam import AdaptiveAscent

pytestmark = pytest.mark.gpu

fused_sgd = partial(sgd, fused=True)


def fit(model, data, trainer_options=None, **options):
    """A run on the GPU; its model comes back to the CPU."""
    gpu = {"accelerator": "cuda", "devices": 1, **(trainer_options or {})}
    reference.fit(model, data, gpu, optimizer=fused_sgd, **options)
    model.cpu()


@pytest.fixture
def exact(monkeypatch):
    """Convolutions of float32 in float32, as on the CPU, and not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("method", FAMILY)
def test_twelve_updates_equal_a_plain_loop_in_float64(method):
    data = batches([24] * 12)
    ours, theirs = convnet(), convnet()
    options = options_of(method, **CHANGED.get(method, {}))
    fit(ours, data, **options)
    loop = PlainLoop(theirs, method, options["rho"])
    for batch in data:
        loop.update([batch])
    weights = [name for name, _ in theirs.named_parameters()]
    assert_close(
        {name: state(ours)[name] for name in weights},
        {name: state(theirs)[name] for name in weights},
        atol=1e-9,
        rtol=0,
    )


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
@pytest.mark.parametrize("method", ["sam", "asam", "gsam", "linf"])
def test_the_fused_kernels_compute_what_the_cpu_does(method, memory_format, monkeypatch):
    data = batches([24] * 3, torch.float32)
    here, there = convnet(torch.float32), convnet(torch.float32)
    options = {**options_of(method), "memory_format": memory_format}
    moved = []
    ascend = vectors._ascend
    monkeypatch.setattr(vectors, "_ascend", lambda ws, *a: (moved.append(len(ws)), ascend(ws, *a)))
    fit(there, data, **options)
    assert moved == [len(list(there.parameters()))] * 3
    trainer().fit(module_of(here, fused_sgd, **options), loader(data))
    assert_close(state(there), state(here), atol=2e-4, rtol=1e-3)


def test_the_weights_move_by_rho_and_come_back_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model = convnet(dtype).cuda()
        sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, fused=True)
        before = state(model)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        sam.perturb()
        moved = torch.cat([(p.double() - before[n].double()).flatten() for n, p in named(model)])
        tolerance = {torch.bfloat16: 0.1, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
        assert moved.norm().item() == pytest.approx(0.3, rel=tolerance)
        sam.restore()
        assert_equal(state(model), before)
        model.fc.bias.grad[0] = torch.nan  # moves nothing
        sam.perturb()
        assert_equal(state(model), before)
        sam.restore()


def named(model):
    return ((name, p.detach()) for name, p in model.named_parameters())


class Watched(L.Callback):
    """Makes it an error to wait for the GPU, from one batch's start to the end of a later one."""

    def __init__(self, first, last):
        self.first, self.last, self.watched = first, last, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.first:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.watched += torch.cuda.get_sync_debug_mode() == 2
        if batch_idx == self.last:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _syncs_are_allowed_again():
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", FAMILY)
def test_nothing_waits_for_the_gpu_between_two_logs(method, precision):
    watched = Watched(1, 8)
    fit(
        convnet(torch.float32),
        batches([16] * 10, torch.float32),
        {"precision": precision, "callbacks": [watched]},
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        **options_of(method),
    )
    assert watched.watched == 8


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"device": "cuda"},
        {"augment": {**crop_flip(), "cutout": Cutout(8), "cutmix": CutMix(1.0)}},
        {"num_workers": 2},
    ],
)
def test_the_input_waits_for_nothing_either(options):
    data = ImageDataModule(digits, batch_size=64, **options)
    data.setup("fit")
    module = module_of(convnet_of_digits(), fused_sgd, rho=0.1)
    watched = Watched(2, 12)
    trainer(accelerator="cuda", devices=1, callbacks=[watched], limit_val_batches=0).fit(
        module, datamodule=data
    )
    assert watched.watched == 11


def convnet_of_digits():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def test_waiting_would_be_seen():
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones((), device="cuda").item()


# ASAM's direction is made of 2^22 weights at a time, in two steps.
@pytest.mark.parametrize(("perturbation", "copies"), [(None, 1), (AdaptiveAscent(), 1.25)])
def test_perturbing_takes_one_copy_of_the_weights(perturbation, copies):
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(32))).cuda()
    nbytes = sum(p.numel() * 4 for p in model.parameters())
    named_parameters = model.named_parameters()
    sam = SAM(named_parameters, torch.optim.SGD, perturbation=perturbation, lr=0.1, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sam.perturb()
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(copies * nbytes, rel=0.02)
    assert torch.cuda.memory_allocated() - before == pytest.approx(nbytes, rel=0.02)
    sam.step()
    assert torch.cuda.memory_allocated() - before == pytest.approx(0, abs=0.02 * nbytes)


class InFloat32(nn.Module):
    """Opts out of autocast, so that a run shows what scaling alone does."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, images):
        with torch.autocast("cuda", enabled=False):
            return self.layers(images.float())


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("method", ["sam", "asam", "gsam"])
def test_the_gradient_scaler_changes_nothing(method):
    data = batches([16] * 8, torch.float32)
    options = options_of(method, gradient_clip_val=0.5)
    scaled, plain = InFloat32(), InFloat32()
    scaler = torch.amp.GradScaler("cuda", growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cuda", scaler=scaler)
    fit(scaled, data, {"plugins": [plugin]}, **options)
    fit(plain, data, **options)
    assert scaler.get_scale() > 2.0**16
    assert_close(state(scaled), state(plain), atol=2e-6, rtol=0)


@pytest.mark.usefixtures("exact")
def test_a_compiled_model_trains_the_same_and_is_compiled_twice():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    data = batches([32] * 2, torch.float32)
    ours, theirs = convnet(torch.float32), convnet(torch.float32)
    ours.compile(backend=counter, fullgraph=True)
    options = {"rho": 0.1, "memory_format": "channels_last"}
    fit(ours, data, {"max_epochs": 2}, **options)
    fit(theirs, data, {"max_epochs": 2}, **options)
    assert_close(state(ours), state(theirs), atol=1e-3, rtol=1e-3)
    assert counter.frame_count == 2  # running statistics updated, and frozen


@pytest.mark.parametrize("options", [[], ["data.device=cuda", "method=gsam"]])
def test_a_resumed_run_ends_where_an_unbroken_one_does(options, tmp_path):
    gpu = ["trainer=cuda", "trainer.deterministic=true", "scheduler=constant", *options]
    run(tmp_path / "whole", *gpu, "epochs=2")
    run(tmp_path / "resumed", *gpu, "epochs=1")
    stopped = tmp_path / "resumed" / "checkpoints" / "last.ckpt"
    run(tmp_path / "resumed", *gpu, "epochs=2", f"ckpt_path={stopped}")
    one, two = (
        torch.load(tmp_path / f / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for f in ("whole", "resumed")
    )
    assert_equal(one, two)


@pytest.mark.timeout(600)
def test_the_commands_of_readme(tmp_path):
    small = ["data=digits", "data.subset=200", "data.val_size=100", "model.width=4", "epochs=1"]
    train = [str(TRAIN), *small, "trainer.precision=bf16-mixed", "hydra.run.dir=run"]
    checkpoint = ["ckpt_path=run", "device=cuda"]
    for arguments in (
        [*train, "callbacks=sharpness"],
        ["-m", "sam_lightning", "evaluate", *checkpoint],
        [
            "-m",
            "sam_lightning",
            "sharpness",
            *checkpoint,
            "images=100",
            "density=true",
            "out=.",
        ],
        ["-m", "sam_lightning", "landscape", *checkpoint, "points=3", "images=100", "out=."],
        ["-m", "sam_lightning", "export", "ckpt_path=run", "format=pt2"],
        ["-m", "torch.distributed.run", "--nproc_per_node=1", *train[:-1], "hydra.run.dir=again"],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (arguments, done.stdout[-2000:], done.stderr[-4000:])
    assert (tmp_path / "again" / "metrics.json").exists()
