"""Models against torchvision, published sizes and plain functions; statistics in a second pass."""

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torchvision
from torch import nn
from torch.nn import functional as F

from sam_lightning.models import (
    SAMResNet18,
    SAMResNet34,
    SAMResNet50,
    WideResNet,
    frozen_running_stats,
)
from sam_lightning.models.resnet import BasicBlock, Bottleneck

RESNETS = {"18": SAMResNet18, "34": SAMResNet34, "50": SAMResNet50}
SMALL = {
    "18": lambda **options: SAMResNet18(width=4, **options),
    "50": lambda **options: SAMResNet50(width=4, **options),
    "18-imagenet": lambda **options: SAMResNet18(width=4, stem="imagenet", **options),
    "wrn": lambda **options: WideResNet(depth=10, widen_factor=2, **options),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For small tensors threads cost more than they bring, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(make, **options):
    torch.manual_seed(0)
    return make(**options)


def count(make, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in make(**options).parameters())


def scramble(model):
    """Give normalisations values that a fresh model does not tell apart."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5, generator=generator)
            for values in (module.bias, module.running_mean):
                nn.init.normal_(values, 0, 0.3, generator=generator)
    return model


# ---- ResNets


@pytest.mark.parametrize("depth", RESNETS)
def test_imagenet_resnet_is_torchvisions(depth):
    torch.manual_seed(0)
    reference = scramble(getattr(torchvision.models, f"resnet{depth}")())
    model = RESNETS[depth](stem="imagenet", width=64, num_classes=1000)
    assert list(model.state_dict()) == list(reference.state_dict())
    model.load_state_dict(reference.state_dict())
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        for train in (False, True):
            expected = reference.train(train)(x)
            torch.testing.assert_close(model.train(train)(x), expected, rtol=1e-5, atol=1e-5)
    for name, buffer in reference.named_buffers():  # as training mode left them
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)


def resnet_parameters(layers, bottleneck, num_classes, in_channels, width, kernel):
    """Counted by hand: convolutions without bias, two numbers per normalised channel."""
    total = in_channels * width * kernel**2 + 2 * width
    channels = width
    for stage, blocks in enumerate(layers):
        planes = width * 2**stage
        out = 4 * planes if bottleneck else planes
        for block in range(blocks):
            if bottleneck:
                total += channels * planes + 9 * planes * planes + planes * out
                total += 2 * (planes + planes + out)
            else:
                total += 9 * channels * planes + 9 * planes * planes + 4 * planes
            if block == 0 and (stage > 0 or channels != out):
                total += channels * out + 2 * out
            channels = out
    return total + channels * num_classes + num_classes


# As published for CIFAR; those of the imagenet stem are torchvision's.
@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (SAMResNet18, {}, 11_173_962),
        (SAMResNet34, {}, 21_282_122),
        (SAMResNet50, {}, 23_520_842),
        (SAMResNet18, {"num_classes": 100}, 11_220_132),
        (SAMResNet18, {"num_classes": 1000, "stem": "imagenet"}, 11_689_512),
        (SAMResNet50, {"num_classes": 1000, "stem": "imagenet"}, 25_557_032),
        (WideResNet, {}, 36_479_194),
        (WideResNet, {"num_classes": 100}, 36_536_884),
    ],
)
def test_published_parameter_counts(make, options, expected):
    assert count(make, **options) == expected


@pytest.mark.parametrize(
    ("depth", "layers"), [("18", (2, 2, 2, 2)), ("34", (3, 4, 6, 3)), ("50", (3, 4, 6, 3))]
)
@pytest.mark.parametrize(("stem", "kernel"), [("cifar", 3), ("imagenet", 7)])
@pytest.mark.parametrize(
    ("width", "in_channels", "num_classes"), [(1, 3, 2), (8, 1, 10), (96, 4, 7)]
)
def test_width_and_channels_scale_the_parameters(
    depth, layers, stem, kernel, width, in_channels, num_classes
):
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "width": width}
    expected = resnet_parameters(layers, depth == "50", **sizes, kernel=kernel)
    assert count(RESNETS[depth], stem=stem, **sizes) == expected


def feature_maps(model, names, x):
    """The shapes, without the batch, that the named modules put out."""
    shapes = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: shapes.update({name: tuple(out.shape[1:])})
        )
    with torch.no_grad():
        logits = model(x)
    return [shapes[name] for name in names], tuple(logits.shape)


@pytest.mark.parametrize(("depth", "expansion"), [("18", 1), ("34", 1), ("50", 4)])
@pytest.mark.parametrize(
    ("stem", "size", "sides"),
    [
        ("cifar", 32, (32, 32, 16, 8, 4)),
        ("cifar", 28, (28, 28, 14, 7, 4)),
        ("imagenet", 64, (32, 16, 8, 4, 2)),
        ("imagenet", 96, (48, 24, 12, 6, 3)),
    ],
)
def test_resnet_feature_maps(depth, expansion, stem, size, sides):
    width = 4
    model = RESNETS[depth](num_classes=7, in_channels=1, width=width, stem=stem)
    stages = ["layer1", "layer2", "layer3", "layer4"]
    shapes, logits = feature_maps(model, ["conv1", *stages], images(3, 1, size, size))
    channels = [width, *(width * factor * expansion for factor in (1, 2, 4, 8))]
    assert shapes == [(c, side, side) for c, side in zip(channels, sides, strict=True)]
    assert logits == (3, 7)


def residual_blocks(model):
    return [m for m in model.modules() if isinstance(m, BasicBlock | Bottleneck)]


@pytest.mark.parametrize("make", [SMALL["18"], SMALL["50"]])
@pytest.mark.parametrize("zero_init", [False, True])
def test_zero_init_residual_starts_each_block_at_its_shortcut(make, zero_init):
    model = build(make, zero_init_residual=zero_init)
    seen = []
    for block in residual_blocks(model):
        block.register_forward_hook(lambda m, args, out: seen.append((m, args[0].clone(), out)))
    model(images(4, 3, 16, 16))
    assert len(seen) == len(residual_blocks(model)) >= 8
    for block, x, out in seen:
        shortcut = x if block.downsample is None else block.downsample(x)
        assert torch.equal(out, shortcut.relu()) == zero_init
        # Only the last normalisation is 0: gradients must reach it.
        last = "bn2" if isinstance(block, BasicBlock) else "bn3"
        zeros = [name for name, p in block.named_parameters() if "weight" in name and not p.any()]
        assert zeros == ([f"{last}.weight"] if zero_init else [])


# ---- wide residual networks


def wide_parameters(depth, widen_factor, num_classes, in_channels):
    total = 9 * in_channels * 16
    channels = 16
    for stage in range(3):
        planes = 16 * 2**stage * widen_factor
        for _ in range((depth - 4) // 6):
            total += 2 * channels + 9 * channels * planes + 2 * planes + 9 * planes * planes
            total += channels * planes if channels != planes else 0
            channels = planes
    return total + 2 * channels + channels * num_classes + num_classes


@pytest.mark.parametrize(("depth", "widen_factor"), [(10, 1), (16, 8), (22, 8), (40, 4), (28, 10)])
@pytest.mark.parametrize(("num_classes", "in_channels"), [(10, 3), (100, 1)])
def test_wide_resnet_parameter_counts(depth, widen_factor, num_classes, in_channels):
    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    sizes |= {"depth": depth, "widen_factor": widen_factor}
    assert count(WideResNet, **sizes) == wide_parameters(**sizes)


@pytest.mark.parametrize("depth", [10, 16, 28])
def test_wide_resnet_depth_counts_convolutions(depth):
    with torch.device("meta"):
        model = WideResNet(depth=depth, widen_factor=2)
    kernels = [m.kernel_size for m in model.modules() if isinstance(m, nn.Conv2d)]
    # The paper's depth of 6 n + 4 counts the first convolution, 6 n in blocks, 3 shortcuts.
    assert kernels.count((3, 3)) == depth - 3
    assert kernels.count((1, 1)) == 3


def wide_resnet_forward(weights, x, depth, dropout, train):
    """The paper's figure 1 (d) and table 1, written down with functions alone."""

    def normalise(name, x):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        x = x * weights[f"{name}.weight"][:, None, None] + weights[f"{name}.bias"][:, None, None]
        return x.clamp(min=0)

    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for stage in range(3):
        for block in range((depth - 4) // 6):
            name = f"stages.{stage}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            activated = normalise(f"{name}.bn1", x)
            out = F.conv2d(activated, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.dropout(normalise(f"{name}.bn2", out), dropout, train)
            out = F.conv2d(out, weights[f"{name}.conv2.weight"], padding=1)
            if out.shape != x.shape:
                x = F.conv2d(activated, weights[f"{name}.shortcut.weight"], stride=stride)
            x = x + out
    x = normalise("bn", x).mean((2, 3))
    return x @ weights["fc.weight"].T + weights["fc.bias"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("depth", "widen_factor", "dropout"), [(16, 2, 0.0), (16, 1, 0.3), (22, 2, 0.3)]
)
def test_wide_resnet_computes_what_the_paper_says(depth, widen_factor, dropout, train):
    model = build(
        WideResNet, depth=depth, widen_factor=widen_factor, dropout=dropout, num_classes=5
    )
    model = scramble(model).double().train(train)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    x = images(3, 3, 16, 16, dtype=torch.float64)
    torch.manual_seed(1)  # the masks are those of the model only if they are drawn in its order
    expected = wide_resnet_forward(weights, x, depth, dropout, train)
    torch.manual_seed(1)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_wide_resnet_feature_maps():
    model = WideResNet(num_classes=6, in_channels=1, depth=10, widen_factor=3)
    names = ["conv1", "stages.0", "stages.1", "stages.2"]
    shapes, logits = feature_maps(model, names, images(2, 1, 32, 32))
    assert shapes == [(16, 32, 32), (48, 32, 32), (96, 16, 16), (192, 8, 8)]
    assert logits == (2, 6)


# ---- all models


@pytest.mark.parametrize(
    "make", [SAMResNet18, SAMResNet50, lambda: WideResNet(depth=16, widen_factor=4)]
)
def test_convolutions_start_as_kaiming_normal_of_fan_out(make):
    model = build(make)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert any(m.in_channels != m.out_channels for m in convolutions)
    for conv in convolutions:
        weight = conv.weight.detach().double()
        out, _, height, width = weight.shape
        z = weight / math.sqrt(2 / (out * height * width))
        error = 1 / math.sqrt(z.numel())
        assert abs(z.mean()) < 5 * error
        assert abs(z.square().mean() - 1) < 5 * math.sqrt(2) * error
        # The fourth moment is 3 for a normal, 1.8 for a uniform; its variance is 96 / n.
        assert abs(z.pow(4).mean() - 3) < 6 * math.sqrt(96) * error


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_every_parameter(name):
    model = build(SMALL[name])
    F.cross_entropy(model(images(6, 3, 32, 32)), torch.arange(6)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


def relative_error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(
    ("layout", "least", "most", "of_gradients"),
    [(torch.contiguous_format, 0, 1e-6, 0.01), (torch.channels_last, 2e-6, 1e-4, 0.1)],
)
def test_how_coarse_the_rounding_in_channels_last_is(layout, least, most, of_gradients):
    torch.manual_seed(0)
    x = images(128, 4, 32, 32)
    normalised = nn.BatchNorm2d(4)(x.to(memory_format=layout))
    assert least < relative_error(normalised, nn.BatchNorm2d(4).double()(x.double())) < most
    model, x, labels = SAMResNet18(width=4), images(128, 3, 32, 32), torch.arange(128) % 10
    exact = copy.deepcopy(model).double()
    F.cross_entropy(exact(x.double()), labels).backward()
    model.to(memory_format=layout)
    F.cross_entropy(model(x.to(memory_format=layout)), labels).backward()
    for ours, expected in zip(model.parameters(), exact.parameters(), strict=True):
        assert relative_error(ours.grad, expected.grad) < of_gradients


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_changes_nothing(name):
    model = build(SMALL[name]).double()
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = images(4, 3, 32, 32, dtype=torch.float64)
    expected, logits = model(x), other(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected)
    expected.square().sum().backward()
    logits.square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize(
    ("make", "key", "value"),
    [
        (SAMResNet18, "num_classes", 0),
        (SAMResNet34, "in_channels", 0),
        (SAMResNet50, "width", -8),
        (SAMResNet18, "stem", "resnet"),
        (WideResNet, "num_classes", 0),
        (WideResNet, "in_channels", -1),
        (WideResNet, "widen_factor", 0),
        (WideResNet, "depth", 27),
        (WideResNet, "depth", 4),
        (WideResNet, "depth", -2),
        (WideResNet, "dropout", -0.1),
        (WideResNet, "dropout", 1.0),
        (WideResNet, "dropout", float("nan")),
    ],
)
def test_bad_values_are_named(make, key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: "):
        make(**{key: value})


# ---- running statistics in a second pass


def seen_once(lazy, shape):
    lazy(images(*shape))
    return lazy


LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d(6), (5, 6)),
    "BatchNorm1d of sequences": (nn.BatchNorm1d(6), (5, 6, 7)),
    "BatchNorm2d": (nn.BatchNorm2d(6), (5, 6, 4, 3)),
    "BatchNorm3d": (nn.BatchNorm3d(6), (5, 6, 2, 4, 3)),
    "BatchNorm2d of cumulative averages": (nn.BatchNorm2d(6, momentum=None), (5, 6, 4, 3)),
    "BatchNorm2d without weights": (nn.BatchNorm2d(6, affine=False), (5, 6, 4, 3)),
    "SyncBatchNorm": (nn.SyncBatchNorm(6), (5, 6, 4, 3)),
    "SyncBatchNorm of cumulative averages": (nn.SyncBatchNorm(6, momentum=None), (5, 6, 4, 3)),
    "LazyBatchNorm1d": (seen_once(nn.LazyBatchNorm1d(), (5, 6)), (5, 6)),
    "LazyBatchNorm2d": (seen_once(nn.LazyBatchNorm2d(), (5, 6, 4, 3)), (5, 6, 4, 3)),
    "InstanceNorm1d": (nn.InstanceNorm1d(6, track_running_stats=True), (3, 6, 7)),
    "InstanceNorm2d": (
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        (3, 6, 4, 3),
    ),
    "InstanceNorm3d": (nn.InstanceNorm3d(6, track_running_stats=True), (3, 6, 2, 4, 3)),
    "InstanceNorm2d of one image": (nn.InstanceNorm2d(6, track_running_stats=True), (6, 4, 3)),
    "LazyInstanceNorm2d": (
        seen_once(nn.LazyInstanceNorm2d(track_running_stats=True), (3, 6, 4, 3)),
        (3, 6, 4, 3),
    ),
}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def statistics(model):
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if name.rpartition(".")[2] in STATISTICS
    }


def assert_same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


told = pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])


@told
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_stay_and_the_batch_normalises(name, told):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    first, second, third = (3 * images(*shape, seed=seed) + seed for seed in (1, 2, 3))
    layer(first)
    before = statistics(layer)
    assert len(before) == 3
    twin = copy.deepcopy(layer)  # does without the frozen pass
    expected = copy.deepcopy(layer)(second)
    with frozen_running_stats(layer if told else None):
        out = layer(second)
    assert torch.equal(out, expected)
    assert_same(statistics(layer), before)
    layer(third)
    twin(third)
    assert_same(statistics(layer), statistics(twin))
    assert not torch.equal(layer.running_mean, before["running_mean"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_diverged_second_pass_leaves_no_trace(name, value):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    before = statistics(layer)
    with frozen_running_stats(layer):
        assert layer(torch.full(shape, value)).isnan().any()
    assert_same(statistics(layer), before)


@told
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_layers_are_as_before_after_an_error(name, error, told):
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer)
    twin, x = copy.deepcopy(layer), images(*shape, seed=4)

    def fail():
        with frozen_running_stats(layer if told else None):
            layer(x)
            raise error

    with pytest.raises(error):
        fail()
    assert layer.track_running_stats is True
    assert torch.equal(layer(x), twin(x))
    assert_same(statistics(layer), statistics(twin))
    assert torch.equal(layer.eval()(x), twin.eval()(x))


class Chain(nn.Sequential):
    """torch 2.6 compiles no ``Sequential`` as such, but a class that calls its ``forward``."""

    def forward(self, x):
        return super().forward(x)


def mixed_network():
    """Layers that track, that do not, and that are in evaluation mode."""
    torch.manual_seed(0)
    model = Chain(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.InstanceNorm2d(4),
        nn.BatchNorm2d(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.LazyLinear(5),
    )
    model(images(4, 3, 8, 8))  # so that no layer has its first statistics
    model[6].eval()
    model[7].eval()
    return model


def residual_network():
    torch.manual_seed(0)
    return nn.Sequential(BasicBlock(3, 4, 2), nn.AdaptiveAvgPool2d(1))


@told
def test_only_layers_that_are_to_learn_statistics_change(told):
    model, x = mixed_network(), images(4, 3, 8, 8, seed=1)
    before = statistics(model)
    expected = copy.deepcopy(model)(x)
    flags = [getattr(m, "track_running_stats", None) for m in model]
    modes = [m.training for m in model]
    with frozen_running_stats(model if told else None):
        assert torch.equal(model(x), expected)
    assert_same(statistics(model), before)
    assert [getattr(m, "track_running_stats", None) for m in model] == flags
    assert [m.training for m in model] == modes


def test_nested_blocks_end_with_the_outer():
    model, x = mixed_network(), images(4, 3, 8, 8, seed=1)
    before = statistics(model)
    with frozen_running_stats(model):
        with frozen_running_stats(model):
            model(x)
        model(x)
    assert_same(statistics(model), before)
    model(x)
    changed = [k for k, v in statistics(model).items() if not torch.equal(v, before[k])]
    means = [k for k in changed if k.endswith("running_mean")]
    assert means == ["1.running_mean", "2.running_mean"]


def test_a_model_in_evaluation_mode_is_left_alone():
    model, x = mixed_network().eval(), images(4, 3, 8, 8, seed=1)
    before, expected = statistics(model), model(x)
    with frozen_running_stats(model):
        assert torch.equal(model(x), expected)
    assert_same(statistics(model), before)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.`")  # with a hook for all modules
def test_a_compiled_model_keeps_its_statistics_without_being_told(in_place):
    torch._dynamo.reset()
    model = compiled = mixed_network()
    if in_place:
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    for step in range(3):
        x = images(4, 3, 8, 8, seed=step)
        compiled(x)
        before = statistics(model)
        with frozen_running_stats():
            compiled(x)
        assert_same(statistics(model), before)


@pytest.mark.parametrize("make", [mixed_network, residual_network])
def test_a_compiled_model_keeps_its_statistics_in_two_graphs(make):
    torch._dynamo.reset()
    model = make()
    reference = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.compile(backend=counter)
    for step in range(4):
        x = images(4, 3, 8, 8, seed=step)
        model(x).sum().backward()
        reference(x)
        before = statistics(model)
        with frozen_running_stats(model):
            model(x).sum().backward()
        assert_same(statistics(model), before)
    assert counter.frame_count == 2
    for name, value in statistics(reference).items():
        torch.testing.assert_close(model.state_dict()[name], value)
