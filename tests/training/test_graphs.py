"""Recorded passes are the same passes: on a GPU as CUDA graphs, on a CPU as tapes of operations."""

import logging
import random

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from family import CHANGED, FAMILY, options_of
from reference import assert_equal, batches, convnet, loader, mlp, module_of, sgd, state, trainer
from runs import SMALL, command, run
from sam_lightning.config.errors import ConfigError
from sam_lightning.data.augment import MixedLabels
from sam_lightning.training import graphs, module
from sam_lightning.training.graphs import WATCHED, GraphedPasses, graphed_passes
from sam_lightning.training.module import SAMModule
from tape import TapeRecorder

DATA = [24] * 9 + [10]


ON_GPU = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
ON_CPU = pytest.mark.parametrize("device", ["cpu"], indirect=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch):
    """Runs on a CPU replay tapes where runs on a GPU replay graphs."""
    made = []

    def keep(asked, lightning_module, model):
        if request.param == "cpu" and asked:
            passes = GraphedPasses(model, TapeRecorder(model), required=asked is True)
        else:
            passes = graphed_passes(asked, lightning_module, model)
        made.append(passes)
        return passes

    monkeypatch.setattr(module, "graphed_passes", keep)
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return request.param, made


@pytest.fixture
def both(device):
    """Trains two equal models, one with recorded passes; returns modules and recorded passes."""
    kind, made = device

    def fit(model, data, trainer_options=None, **options):
        modules = []
        for cuda_graph in (False, "auto"):
            torch.manual_seed(0)
            random.seed(0)
            ours = module_of(model(), fused, cuda_graph=cuda_graph, **options)
            accelerator = {"accelerator": kind, "devices": 1}
            trainer(**accelerator, **(trainer_options or {})).fit(ours, loader(data))
            assert ours.passes.graphs is None  # its memory is free again
            modules.append(ours.cpu())
        return *modules, made[-1]

    return fit


def convnet32():
    return convnet(torch.float32)


def fused(params):
    return sgd(params, fused=True)


def assert_same(one, two):
    assert_equal(state(one.model), state(two.model))
    assert torch.equal(one.train_metrics.window, two.train_metrics.window)
    assert one.train_metrics.skipped.equal(two.train_metrics.skipped)
    states = one.sam.state_dict()["state"], two.sam.state_dict()["state"]
    for i, values in states[0].items():
        assert_equal(values, states[1][i])


def recorded(passes):
    """The number of recordings of passes that could all be recorded."""
    assert passes.why_not is None
    return len(passes._recordings)


@pytest.mark.parametrize("method", FAMILY)
def test_every_method_ends_with_the_same_weights(both, method):
    options = options_of(method, **CHANGED.get(method, {}))
    one, two, passes = both(convnet, batches(DATA), **options)
    assert_same(one, two)
    # One kind where there is one pass, or where too few steps perturb.
    assert recorded(passes) == (1 if method in ("sgd", "msam", "looksam") else 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"ascent_steps": 3},
        {"ascent_steps": 3, **options_of("gsam")},
        {"ascent_fraction": 0.25},
        {"descent_fraction": 0.5},
        {"every": 2},
        {"rho": 0.0},
        {"rho_min": 0.05, "lr_factor": lambda step: 1 / (1 + step)},
        {"decay_in_ascent": True, "gradient_clip_val": 0.5},
        {"memory_format": "channels_last"},
        {"perturbed_layers": "normalization"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 3, "ascent_per_micro_batch": True},
        {"accumulate_grad_batches": 2, **options_of("friendly_sam")},
        {"param_settings": {"conv1.weight": {"rho": 0.0}, "fc.weight": {"lr_factor": 3.0}}},
    ],
)
def test_every_option_ends_with_the_same_weights(both, options):
    one, two, passes = both(convnet, batches([24] * 17 + [10]), **{"rho": 0.2, **options})
    assert_same(one, two)
    assert recorded(passes) >= 1


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "32-true"])
def test_every_precision(both, precision):
    options = {"rho": 0.2, "gradient_clip_val": 1.0}
    data = batches(DATA, torch.float32)
    one, two, passes = both(
        lambda: convnet(torch.float32), data, {"precision": precision}, **options
    )
    assert_same(one, two)
    assert recorded(passes) == 2


@ON_GPU
def test_the_gradient_scaler_is_in_the_recording(both):
    data = batches(DATA, torch.float32)
    one, two, passes = both(
        lambda: convnet(torch.float32), data, {"precision": "16-mixed"}, rho=0.2
    )
    assert_same(one, two)
    assert recorded(passes) == 2


@pytest.mark.parametrize("same_randomness", [True, False])
def test_each_replay_draws_masks_of_its_own(both, same_randomness):
    one, two, passes = both(
        lambda: mlp(torch.float32, dropout=0.5),
        batches(DATA, torch.float32),
        rho=0.2,
        same_randomness=same_randomness,
    )
    assert_same(one, two)
    assert recorded(passes) == 1  # both passes run the same kernels


def test_labels_of_mixtures(both):
    generator = torch.Generator().manual_seed(2)
    data = [
        (x, MixedLabels(y, y.flip(0), torch.rand(len(y), generator=generator)))
        for x, y in batches(DATA)
    ]
    one, two, passes = both(convnet, data, rho=0.2)
    assert_same(one, two)
    assert recorded(passes) == 2


def test_a_step_that_is_not_finite_is_skipped(both):
    data = batches(DATA)
    data[6][0][0] = torch.inf
    one, two, passes = both(mlp64, data, rho=0.2)
    assert_same(one, two)
    assert one.train_metrics.skipped[0] == 1
    assert recorded(passes) == 1


def mlp64():
    return mlp(torch.float64)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self):
        super().__init__()
        self.layers = mlp64()
        self.calls = 0

    def forward(self, images):
        self.calls += 1
        return self.layers(images)


def test_replays_call_no_python_and_a_smaller_batch_is_not_mixed_up(both):
    # Passes of 24 images: 3 run and 1 recorded. Of the 10, of which there are 2: both run.
    one, two, _ = both(Counted, batches([24] * 9 + [10]), rho=0.2)
    assert (one.model.calls, two.model.calls) == (20, WATCHED + 1 + 2)


def ended(folder, kind, *overrides):
    options = ["batch_size=20", "scheduler=constant", f"trainer.accelerator={kind}", *overrides]
    run(folder, *options)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint["state_dict"]


class Launches(TorchDispatchMode):
    """Counts the operations that the host starts."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


class Counting(L.Callback):
    """Counts those of every step from the end of one batch to the end of the next."""

    def __init__(self):
        self.counts, self.mode = [], None

    def on_train_batch_start(self, *_):
        self.mode = Launches()
        self.mode.__enter__()

    def on_train_batch_end(self, *_):
        self.mode.__exit__(None, None, None)
        self.counts.append(self.mode.count)


def test_the_host_starts_few_operations_of_a_replayed_step(both):
    counting = Counting()
    both(convnet32, batches([24] * 10, torch.float32), {"callbacks": [counting]}, rho=0.2)
    eager, replayed = counting.counts[8], counting.counts[18]
    assert eager > 350
    assert replayed < 50


@pytest.mark.slow
def test_runs_with_layers_that_thaw(device, tmp_path):
    kind, made = device
    options = ["epochs=2", "finetune=full", "finetune.freeze=[conv1,layer1]"]
    options += ["finetune.unfreeze={1:[layer1]}", "trainer.gradient_clip_val=1"]
    one = ended(tmp_path / "one", kind, *options)
    two = ended(tmp_path / "two", kind, *options, "cuda_graph=auto")
    assert_equal(one, two)
    assert recorded(made[-1]) == 2  # those of the first epoch are gone


@pytest.mark.slow
def test_a_run_continues_within_an_epoch(device, tmp_path, monkeypatch):
    kind, made = device
    whole = ended(tmp_path / "whole", kind, "epochs=3")
    graphed = ["epochs=3", "cuda_graph=auto"]
    with monkeypatch.context() as patch:
        patch.setattr(SAMModule, "training_step", failing_at(9, SAMModule.training_step))
        with pytest.raises(RuntimeError, match="the cable"):
            ended(tmp_path / "part", kind, *graphed, "checkpoint_every_n_steps=1")
    part = ended(tmp_path / "part", kind, *graphed, f"ckpt_path={tmp_path}/part")
    assert recorded(made[-1]) == 2
    assert_equal(whole, part)


def failing_at(call, method):
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise RuntimeError("the cable")
        return method(*args)

    return fail


class Waiting(Counted):
    def forward(self, images):
        return super().forward(images) * (1 if images.sum().item() else 2)


class Drawing(Counted):
    def forward(self, images):
        return super().forward(images) * (1 + random.random())


class Hooked(Counted):
    def __init__(self):
        super().__init__()
        self.layers.register_forward_hook(lambda module, args, out: out * 2)


class GradHooked(Counted):
    def __init__(self):
        super().__init__()
        self.layers[1].weight.register_hook(lambda grad: grad * 2)


REASONS = {
    Waiting: "waits for the device",
    Drawing: "draws random numbers on the host",
    Hooked: "has hooks",
    GradHooked: "has hooks",
}


@pytest.mark.parametrize("model", REASONS)
def test_what_cannot_be_repeated_runs_as_always_and_says_why_once(both, model, caplog):
    with caplog.at_level(logging.WARNING):
        one, two, passes = both(model, batches(DATA), rho=0.2)
    assert_same(one, two)
    assert REASONS[model] in passes.why_not
    said = [r.getMessage() for r in caplog.records if "cuda_graph" in r.getMessage()]
    assert said == [f"cuda_graph=auto: kernels are started one by one, as {passes.why_not}"]


@pytest.mark.parametrize("model", REASONS)
def test_what_cannot_be_repeated_is_refused_where_it_was_asked_for(model, device):
    ours = module_of(model(), fused, cuda_graph=True, rho=0.2)
    with pytest.raises(ConfigError, match=f"cuda_graph=true: .*{REASONS[model]}.*auto, false"):
        trainer(accelerator=device[0], devices=1).fit(ours, loader(batches(DATA)))


def test_a_recording_that_fails_leaves_the_pass_to_be_run(both, monkeypatch, device):
    def fail(self, run):
        run()  # leaves gradients
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    recorder = TapeRecorder if device[0] == "cpu" else graphs.CUDARecorder
    monkeypatch.setattr(recorder, "record", fail)
    one, two, passes = both(mlp64, batches(DATA), rho=0.2, accumulate_grad_batches=2)
    assert_same(one, two)
    assert passes.why_not == "operation not permitted when stream is capturing"


def test_batches_of_ever_other_sizes_are_given_up(both):
    one, two, passes = both(mlp64, batches(range(2, 2 + graphs.KINDS + 5)), rho=0.2)
    assert_same(one, two)
    assert "kinds" in passes.why_not


class Scaled(L.Callback):
    def on_after_backward(self, trainer, pl_module):
        pl_module.model[1].weight.grad.mul_(2)


@ON_GPU
def test_callbacks_of_a_pass_are_not_left_out(both):
    one, two, passes = both(mlp64, batches(DATA), {"callbacks": [Scaled()]}, rho=0.2)
    assert_same(one, two)
    assert passes.why_not == "Scaled has on_after_backward"


@pytest.mark.long
@pytest.mark.slow
@ON_CPU
def test_two_processes_are_refused_in_one_line(tmp_path):
    options = ["cuda_graph=true", "trainer=ddp_cpu", "trainer.devices=2", "hydra.run.dir=here"]
    done = command(tmp_path, *SMALL, *options)
    line = "cuda_graph=true: needs one CUDA device, and this run has 2 x cpu; "
    line += "allowed here are auto, false"
    assert done.returncode == 2
    assert [said for said in done.stderr.splitlines() if "cuda_graph" in said] == [f"error: {line}"]
    assert not (tmp_path / "here").exists()
