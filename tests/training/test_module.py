"""SAMModule under a real Trainer, against plain loops written from the formulas."""

import math

import lightning as L
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from reference import (
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
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.training.losses import CrossEntropy


def count_images(model):
    calls = []
    model.register_forward_hook(lambda _module, args, _out: calls.append(len(args[0])))
    return calls


@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.3, 3)])
@pytest.mark.parametrize("method", ["sam", "asam"])
def test_twenty_updates_equal_a_plain_loop_in_float64(method, clip, accumulate):
    # BatchNorm over a few samples would amplify rounding to the size of the bound below
    sizes = [32, 32, 20] * 20 if accumulate == 3 else [32, 24] * 10
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
def test_each_micro_batch_can_perturb_by_itself(method):
    data = batches([24, 24, 15] * 5 + [12, 13])
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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "options", [{"fraction": 0.3}, {"every": 3}, {"fraction": 0.5, "every": 2}]
)
def test_cheaper_ascents(options, accumulate):
    data = batches([40, 25] * 6)
    groups = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    ours, theirs = convnet(), convnet()
    calls = count_images(ours)
    fraction, every = options.get("fraction", 1.0), options.get("every", 1)
    fit(
        ours,
        data,
        rho=0.2,
        ascent_fraction=fraction,
        every=every,
        accumulate_grad_batches=accumulate,
    )
    plain_loop(theirs, groups, 0.2, **options)
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)
    ascents = sum(
        math.ceil(fraction * len(labels)) for group in groups[::every] for _, labels in group
    )
    assert sum(calls) == sum(len(labels) for _, labels in data) + ascents


def test_schedule_and_label_smoothing():
    data = batches([8] * 6)
    factors = [1.0, 0.5, 0.25, 0.2, 0.1, 0.05]
    ours, theirs = convnet(), convnet()
    lr_factor = lambda step: (*factors, 0)[step]  # noqa: E731
    fit(ours, data, rho=0.1, lr_factor=lr_factor, loss=CrossEntropy(0.2))
    plain_loop(
        theirs, [[b] for b in data], 0.1, lrs=[SGD["lr"] * f for f in factors], smoothing=0.2
    )
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)


def test_rho_0_is_plain_sgd_bit_for_bit_at_one_pass():
    data = batches([16] * 20, torch.float32)
    ours, theirs = convnet(torch.float32), convnet(torch.float32)
    calls = count_images(ours)
    fit(ours, data, rho=0.0)
    optimizer = sgd(theirs.parameters())
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels).backward()
        optimizer.step()
    assert_equal(state(ours), state(theirs))
    assert calls == [16] * 20


def test_sam_costs_two_passes():
    model = convnet(torch.float32)
    calls = count_images(model)
    fit(model, batches([16] * 5, torch.float32), rho=0.1)
    assert calls == [16] * 10


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


@pytest.mark.long
@pytest.mark.slow
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


class CountGraphs(L.Callback):
    """The number of graphs compiled by the end of each epoch."""

    def __init__(self, counter):
        self.counter, self.counts = counter, []

    def on_train_epoch_end(self, trainer, pl_module):
        self.counts.append(self.counter.frame_count)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "memory_format", ["contiguous", pytest.param("channels_last", marks=pytest.mark.slow)]
)
def test_nothing_is_compiled_after_the_first_epoch(memory_format):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    model = convnet(torch.float32)
    model.compile(backend=counter, fullgraph=True)  # a graph break is an error
    graphs = CountGraphs(counter)
    module = module_of(model, rho=0.1, memory_format=memory_format)
    train, val = batches([16, 16, 9], torch.float32), batches([16, 5], torch.float32)
    trainer(max_epochs=4, callbacks=[graphs]).fit(module, loader(train), loader(val))
    assert len(graphs.counts) == 4
    assert len(set(graphs.counts)) == 1


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last_trains_the_same(fused):
    data = batches([16] * 6)

    def optimizer(params):
        return sgd(params, fused=fused)

    ours, theirs = convnet(), convnet()
    module, _ = fit(ours, data, optimizer=optimizer, rho=0.1, memory_format="channels_last")
    fit(theirs, data, optimizer=optimizer, rho=0.1)
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
