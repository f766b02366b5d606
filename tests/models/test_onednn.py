"""Narrow 1x1 convolutions with a stride: away from oneDNN's broken kernel, and the same results."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from inject import forked
from runs import column
from sam_lightning.config.conf import CONF
from sam_lightning.models import SAMResNet18
from sam_lightning.models.onednn import MIN_CHANNELS, reaches_fault, subsample_first

ROOT = CONF.parent
FIRST_RIGHT = {"AVX2": 8, "AVX512_CORE": MIN_CHANNELS}  # channels that a kernel takes at a time


def measured(*arguments):
    """The last column of the map that a process of its own draws, for each row."""
    # Only what is broken takes longer than a second; a busy machine may take its time.
    command = [sys.executable, "-m", "benchmarks.onednn", "--limit=120", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.split(" | ")[-1].removesuffix(" |") for line in done.stdout.splitlines()[2:]]


def right(isa, case, *widths):
    found = measured("--isa", isa, "--case", case, "--widths", *widths)
    # With one thread and with two.
    return found == (["not on this CPU"] if not_here(isa) else ["none", "none"])


def not_here(isa):
    return isa == "AVX512_CORE" and torch.backends.cpu.get_cpu_capability() != "AVX512"


@pytest.mark.slow
def test_our_models_are_right_where_the_layer_is_broken():
    assert right("AVX2", "model", 1, MIN_CHANNELS - 1)


@pytest.mark.slow
@pytest.mark.parametrize("isa", FIRST_RIGHT)
def test_the_layer_itself_is_right_beyond_the_boundary(isa):
    assert right(isa, "layer", FIRST_RIGHT[isa], 17)


@pytest.mark.slow
def test_our_models_are_right_with_avx_512():
    assert right("AVX512_CORE", "model", 8, MIN_CHANNELS - 1)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["SSE41", "AVX"])
def test_older_instruction_sets_are_right_at_any_width(isa):
    assert right(isa, "model", 1, MIN_CHANNELS - 1)
    assert right(isa, "layer", 1, 7, MIN_CHANNELS - 1)


def test_the_map_in_the_documentation_has_the_boundary_of_the_code():
    page = (ROOT / "docs" / "semantics.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([12]) \| (layer|model) \| (.*) \|$", page, re.M)
    assert len(rows) == 4 * 2 * 2
    for isa, _, case, wrong in rows:
        widths = [int(width) for width in re.findall(r"\b\d+\b", wrong.partition("(")[0])]
        # Within the boundary a gradient may come out right by chance.
        boundary = FIRST_RIGHT.get(isa, 1) if case == "layer" else 1
        assert max(widths, default=0) == boundary - 1


CHANGED = {
    "conv": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "without bias": lambda: nn.Conv2d(7, 3, 1, stride=(1, 3), bias=False),
    "valid": lambda: nn.Conv2d(1, 6, 1, stride=2, padding="valid"),
    "one stride": lambda: nn.Conv2d(6, 6, 1, stride=(2, 1)),
}
KEPT = {
    "wide": lambda: nn.Conv2d(16, 6, 1, stride=2),
    "no stride": lambda: nn.Conv2d(4, 6, 1),
    "larger kernel": lambda: nn.Conv2d(4, 6, (1, 3), stride=2),
    "groups": lambda: nn.Conv2d(6, 6, 1, stride=2, groups=3),
    "padded": lambda: nn.Conv2d(4, 6, 1, stride=2, padding=1),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 1, stride=2),
}


@pytest.mark.parametrize("make", [*CHANGED.values(), *KEPT.values()], ids=[*CHANGED, *KEPT])
@pytest.mark.parametrize("side", [8, 7])
def test_a_changed_layer_computes_the_same(make, side):
    model = nn.Sequential(nn.Sequential(make().double()))
    other = copy.deepcopy(model)
    assert subsample_first(model) == (["0.0"] if make in CHANGED.values() else [])
    assert subsample_first(model) == []
    images = torch.randn(3, other[0][0].in_channels, side, side + 2, dtype=torch.float64)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert copied[0][0].stride == other[0][0].stride
    assert copied.state_dict().keys() == other.state_dict().keys()
    images.requires_grad_()
    # A layer's forward() and keywords, past hooks.
    expected, logits = other(images), copied[0][0].forward(input=images)
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits, expected, atol=1e-12, rtol=0)
    ours, theirs = (
        torch.autograd.grad(out.square().sum(), [images, *m.parameters()])
        for out, m in ((logits, copied), (expected, other))
    )
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-11, rtol=0)


def test_our_models_need_no_change():
    assert subsample_first(SAMResNet18(width=1)) == []


MODELS = """
import torch
from torch import nn

class Subclass(nn.Conv2d):
    pass

class Functional(nn.Conv2d):
    def forward(self, images):
        return nn.functional.conv2d(images, self.weight, self.bias, 2)

class Net(nn.Sequential):
    def __init__(self, middle, num_classes, in_channels):
        layer = {
            "layer": lambda: nn.Conv2d(4, 16, 1, stride=2),
            "subclass": lambda: Subclass(4, 16, 1, stride=2),
            "function": lambda: Functional(4, 16, 1),
            "transposed": lambda: nn.ConvTranspose2d(4, 7, 1, stride=2, output_padding=1),
        }[middle]()
        super().__init__(
            nn.Conv2d(in_channels, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), layer,
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(num_classes),
        )
        self(torch.zeros(2, in_channels, 8, 8))
"""
OPTIONS = ["--config-dir=conf", "model=net", "data=digits", "trainer=cpu", "epochs=1"]
OPTIONS += ["data.subset=256", "trainer.log_every_n_steps=1", "test=false"]


@pytest.fixture
def users_models(tmp_path, monkeypatch):
    """Models of which a convolution has a broken kernel, chosen by ``model.middle``."""
    (tmp_path / "mine.py").write_text(MODELS)
    conf = tmp_path / "conf" / "model"
    conf.mkdir(parents=True)
    (conf / "net.yaml").write_text("_target_: mine.Net\nmiddle: layer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train(folder, isa, *options):
    return forked(folder, *OPTIONS, *options, ONEDNN_MAX_CPU_ISA=isa)


COMPILED = pytest.mark.skipif(not shutil.which("c++"), reason="compiling needs c++")


@pytest.mark.long
@pytest.mark.parametrize(
    ("middle", "compiled"),
    [
        *(pytest.param(m, "false", marks=pytest.mark.slow) for m in ("layer", "function")),
        pytest.param("function", "true", marks=[pytest.mark.slow, COMPILED]),
        *(pytest.param(m, "false", marks=pytest.mark.long) for m in ("subclass", "transposed")),
        pytest.param("layer", "true", marks=[pytest.mark.long, COMPILED]),
    ],
)
def test_a_model_of_the_user_trains_and_is_analysed(users_models, middle, compiled):
    """Compiling arranges images in channels_last by itself."""
    options = [f"model.middle={middle}", f"compile={compiled}"]
    losses, eigenvalues = [], []
    for isa in ("AVX", "AVX2"):  # the second has the broken kernel
        done = train(users_models, isa, *options, f"hydra.run.dir={isa}")
        assert done.returncode == 0, done.stderr
        assert ("layer 3 subsamples before its convolution" in done.stdout) == (middle == "layer")
        kept_contiguous = "memory_format=auto: contiguous" in done.stdout
        assert kept_contiguous == (isa == "AVX2" and middle != "layer")
        losses.append(column(users_models / isa, "train/loss"))
        # The run of AVX is in channels_last.
        command = [sys.executable, "-m", "sam_lightning", "sharpness", "ckpt_path=AVX"]
        done = subprocess.run(
            [*command, "images=50", "top_k=1", f"out={isa}", "trust=mine.Net"],
            cwd=users_models,
            env=os.environ | {"ONEDNN_MAX_CPU_ISA": isa},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (found,) = json.loads((users_models / isa / "sharpness.json").read_text())["checkpoints"]
        eigenvalues += found["eigenvalues"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert eigenvalues[0] == pytest.approx(eigenvalues[1], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX", "AVX2"])
@pytest.mark.parametrize("middle", ["layer", "function"])
def test_channels_last_is_refused_in_one_line_where_it_is_broken(users_models, isa, middle):
    options = [f"model.middle={middle}", "memory_format=channels_last", "hydra.run.dir=run"]
    done = train(users_models, isa, *options)
    if (isa, middle) == ("AVX2", "function"):
        assert done.returncode == 2
        assert done.stderr.startswith("error: memory_format=channels_last: on this CPU")
        assert done.stderr.count("\n") == 1
    else:
        assert done.returncode == 0, done.stderr


LIMITS = {"AVX2": True, "avx2_vnni": True, "AVX": False, "SSE41": False}


@pytest.mark.parametrize("isa", LIMITS)
def test_a_fault_is_seen_where_the_kernel_is(isa, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)

    def function(x, w, **options):
        model = nn.Module()
        model.w = nn.Parameter(w)
        model.forward = lambda images: nn.functional.conv2d(images, model.w, **options)
        return reaches_fault(model, x)

    assert function((4, 8, 8), torch.zeros(6, 4, 1, 1), stride=2) == LIMITS[isa]
    assert function((4, 8, 8), torch.zeros(6, 4, 1, 1), stride=(1, 2)) == LIMITS[isa]
    for other in ({"stride": 1}, {"stride": 2, "padding": 1}, {"stride": 2, "groups": 2}):
        channels = 4 // other.get("groups", 1)
        assert not function((4, 8, 8), torch.zeros(6, channels, 1, 1), **other)
    assert not function((16, 8, 8), torch.zeros(6, 16, 1, 1), stride=2)
    assert not function((4, 8, 8), torch.zeros(6, 4, 3, 3), stride=2)
    # Looking changes nothing.
    model = SAMResNet18(width=1, num_classes=3)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert not reaches_fault(model, (3, 8, 8))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
