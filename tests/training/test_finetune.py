"""Fine-tuning: frozen parts, layers and heads of their own, networks without BatchNorm."""

import importlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress

import lightning as L
import pytest
import timm
import torch
import torchvision
from timm.layers import RmsNorm
from torch import nn
from torchvision.models.convnext import CNBlockConfig
from torchvision.ops import StochasticDepth

from inject import begin, forked
from random_resume import differences
from reference import SGD, assert_close, assert_equal, convnet, loader, module_of, state, trainer
from runs import SMALL, children, command, configuration, equal, run, summary, wait_for_end, weights
from sam_lightning.config.errors import ConfigError
from sam_lightning.models.head import layer_ids, layer_lr_factors
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.sam_on import normalization_parameters
from sam_lightning.runs.checkpoint import newest, read
from sam_lightning.training.callbacks.ema import EMA
from sam_lightning.training.finetune import fine_tuning
from sam_lightning.training.run import train

SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# ------------------------------------------------------------------- networks without BatchNorm


def vit(**options):
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 2}
    sizes |= {"hidden_dim": 16, "mlp_dim": 32, "num_classes": 4}
    return torchvision.models.VisionTransformer(**sizes, **options)


def convnext(**options):
    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)]
    return torchvision.models.ConvNeXt(blocks, num_classes=4, layer_scale=0.1, **options)


def of_timm(name):
    def make(**options):
        size = {"img_size": 32} if "vit" in name else {}
        return timm.create_model(name, num_classes=4, **size, **options)

    return make


# How to make it, what to freeze of it, and the number of norms.
NETWORKS = {
    "vit": (vit, ["conv_proj", "encoder.layers.encoder_layer_0"], 7),
    "convnext": (convnext, ["features.0", "features.1.0"], 7),
    "test_vit": (of_timm("test_vit"), ["patch_embed", "blocks.0"], None),
    "test_convnext": (of_timm("test_convnext"), ["stem"], None),
    "convnext_atto": (of_timm("convnext_atto"), ["stem", "stages.0"], None),
}


def made(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = NETWORKS[name][0](**options).to(dtype)
    with torch.no_grad():  # a head of zeros, as torchvision's ViT has, hides the rest at first
        for p in model.parameters():
            p.add_(torch.randn(p.shape, dtype=torch.float64).to(dtype) * 0.02)
    return model


def images(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(6, 3, 32, 32, generator=generator, dtype=torch.float64)
        yield x.to(dtype), torch.randint(4, (6,), generator=generator)


def tuned(model, options, epochs=1, rules=None, **arguments):
    config = {"finetune": options, "param_groups": rules}
    settings, freezing = fine_tuning(config, model, epochs)
    return module_of(model, param_settings=settings, freezing=freezing, **arguments)


def plain_loop(model, data, settings, rho, adaptive, only):
    """SAM around SGD with Nesterov momentum; settings are factor, weight decay, rho by name."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    momentum = {}

    def gradient(x, y):
        loss = nn.functional.cross_entropy(model(x), y)
        return dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))

    for x, y in data:
        at_w = {name: p.detach().clone() for name, p in named.items()}
        first = {n: g for n, g in gradient(x, y).items() if only is None or n in only}
        size = {n: at_w[n].abs() + 0.01 if adaptive and "weight" in n else 1.0 for n in first}
        norm = math.sqrt(sum(float((size[n] * g).square().sum()) for n, g in first.items()))
        with torch.no_grad():
            for n, g in first.items():
                named[n] += settings[n][2] * size[n] ** 2 * g / norm
        second = gradient(x, y)
        with torch.no_grad():
            for n, p in named.items():
                factor, decay, _ = settings[n]
                d = second[n] + decay * at_w[n]
                momentum[n] = SGD["momentum"] * momentum[n] + d if n in momentum else d.clone()
                p.copy_(at_w[n] - SGD["lr"] * factor * (d + SGD["momentum"] * momentum[n]))


METHODS = {
    "sam": {},
    "asam": {"perturbation": AdaptiveAscent(eta=0.01)},
    "sam_on": {"perturbed_layers": "normalization"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", [n if n != "convnext_atto" else pytest.param(n, marks=SLOW) for n in NETWORKS]
)
def test_groups_on_a_network_without_batch_norm_equal_a_plain_loop(name, method):
    ours, theirs = made(name), made(name)
    frozen = NETWORKS[name][1]
    options = {"freeze": frozen, "layer_decay": 0.7, "head_lr_factor": 3.0, "head_rho": 0.3}
    options["decay_norm_and_bias"] = False
    before = state(ours)
    module = tuned(ours, options, rho=0.1, **METHODS[method])
    trainer().fit(module, loader([*images(6)]))

    settings, head = {}, [n for n, p in theirs.named_parameters()][-2:]
    token = ("pos_embed", "cls_token", "class_token", "pos_embedding", "layer_scale")
    for n, p in theirs.named_parameters():
        p.requires_grad_(not n.startswith(tuple(f"{part}." for part in frozen)))
        factor = layer_lr_factors(theirs, 0.7)[n] * (3.0 if n in head else 1.0)
        decay = 0.0 if p.ndim <= 1 or n.endswith(token) else SGD["weight_decay"]
        settings[n] = factor, decay, 0.3 if n in head else 0.1
    norms = {
        f"{prefix}.{n}"
        for prefix, layer in theirs.named_modules()
        if isinstance(layer, nn.LayerNorm)
        for n, p in layer.named_parameters()
        if p.requires_grad
    }
    only = norms if method == "sam_on" else None
    plain_loop(theirs, images(6), settings, 0.1, method == "asam", only)
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)
    assert_equal(
        {n: w for n, w in state(ours).items() if n.startswith(tuple(frozen))},
        {n: w for n, w in before.items() if n.startswith(tuple(frozen))},
    )
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    perturbed = sum(theirs.get_parameter(n).numel() for n in norms) if only else trained
    assert module.groups.counts() == (trained, perturbed)


@pytest.mark.parametrize("name", ["vit", "convnext", "test_vit", "test_convnext"])
def test_sam_on_finds_the_norms_whose_type_torch_does_not_know_too(name):
    model = made(name)
    layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    if NETWORKS[name][2]:
        assert len(layers) == NETWORKS[name][2]
    ids = {id(p) for layer in layers for p in layer.parameters()}
    found = normalization_parameters(model)
    assert {n for n, p in model.named_parameters() if id(p) in ids} == found
    mixed = nn.Sequential(RmsNorm(4), nn.Linear(4, 2))
    assert normalization_parameters(mixed) == {"0.weight"}


@pytest.mark.parametrize("name", ["vit", "convnext", "test_vit", "test_convnext"])
def test_drop_path_has_the_same_masks_in_both_passes(name):
    rates = {"convnext": {"stochastic_depth_prob": 0.9}, "vit": {"dropout": 0.5}}
    model = made(name, torch.float32, **rates.get(name, {"drop_path_rate": 0.9}))
    kinds = ("DropPath", StochasticDepth.__name__, "Dropout")
    masks = []
    for layer in model.modules():
        if type(layer).__name__ in kinds and getattr(layer, "p", 1) != 0:
            layer.register_forward_hook(lambda _m, _i, out: masks.append(out == 0))
    module = module_of(model, rho=1e-7)
    trainer().fit(module, loader([*images(3, torch.float32)]))
    per_pass = len(masks) // 6
    passes = [masks[i : i + per_pass] for i in range(0, len(masks), per_pass)]
    assert per_pass > 0
    assert len(passes) == 6
    for one, two in zip(passes[::2], passes[1::2], strict=True):
        assert all(map(torch.equal, one, two))
    assert any(mask.any() for mask in masks)
    assert not all(map(torch.equal, passes[0], passes[2]))


@pytest.mark.parametrize("name", ["vit", "convnext", pytest.param("test_convnext", marks=SLOW)])
def test_channels_last_trains_the_same_without_batch_norm(name):
    ours, theirs = made(name), made(name)
    for model, layout in ((ours, "channels_last"), (theirs, "contiguous")):
        module = tuned(model, {"layer_decay": 0.7}, rho=0.1, memory_format=layout)
        trainer().fit(module, loader([*images(4)]))
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vit", marks=SLOW),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("convnext", "test_vit")),
    ],
)
def test_compiled_networks_train_the_same_with_gradual_unfreezing(name):
    ours, theirs = made(name, torch.float32), made(name, torch.float32)
    torch._dynamo.reset()
    ours.compile(backend="aot_eager")
    for model in (ours, theirs):
        options = {"freeze": "backbone", "unfreeze": {1: "backbone"}}
        module = tuned(model, options, 2, rho=0.1)
        trainer(max_epochs=2).fit(module, loader([*images(3, torch.float32)]))
    assert_close(state(ours), state(theirs), atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------------------------- what is frozen


class Watch(L.Callback):
    """What has changed in each epoch, and the modes after an evaluation in between."""

    def __init__(self):
        self.changed = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.before = state(pl_module.model)

    def on_train_epoch_end(self, trainer, pl_module):
        after = state(pl_module.model)
        self.changed.append({n for n in after if not torch.equal(after[n], self.before[n])})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_unfreezing_epoch_by_epoch_with_evaluation_in_between(accumulate):
    model, watch = convnet(torch.float32), Watch()
    names = {*model.state_dict()}
    options = {"freeze": ["backbone"], "unfreeze": {1: ["layer4"], 3: ["layer[1-3]", "layer4"]}}
    module = tuned(model, options, 4, rho=0.1, accumulate_grad_batches=accumulate)
    data = [(x[:, :, :8, :8], y) for x, y in images(4, torch.float32)]
    trainer(max_epochs=4, callbacks=[watch]).fit(module, loader(data), loader(data[:2]))
    head = {"fc.weight", "fc.bias"}
    of = {i: {n for n in names if n.startswith(f"layer{i}")} for i in range(1, 5)}
    expected = [head, head | of[4], head | of[4], head | of[1] | of[2] | of[3] | of[4]]
    assert watch.changed == expected
    assert not model.bn1.num_batches_tracked
    lrs = {g.get("name"): len(g["params"]) for g in module.groups.sam.param_groups}
    assert lrs["default"] == 2
    assert len(lrs) == 3


def test_running_statistics_stay_where_they_are_to():
    model, watch = convnet(torch.float32), Watch()
    module = tuned(model, {"freeze_batchnorm": True}, rho=0.1)
    data = [(x[:, :, :8, :8], y) for x, y in images(3, torch.float32)]
    trainer(callbacks=[watch]).fit(module, loader(data), loader(data))
    assert watch.changed == [{name for name, _ in model.named_parameters()}]


FROZEN = ["finetune=full", "finetune.freeze=[conv1,bn1,'layer[1-3]']", "data.val_size=50"]


def assert_frozen(one, other):
    parts = ("conv1", "bn1", "layer1", "layer2", "layer3")
    of_parts = [{n: w for n, w in s.items() if n[6:].startswith(parts)} for s in (one, other)]
    assert equal(*of_parts)
    assert not torch.equal(one["model.fc.weight"], other["model.fc.weight"])
    for name, value in of_parts[0].items():  # as they were made
        if "running_mean" in name or "tracked" in name:
            assert not value.any(), name
        if "running_var" in name:
            assert (value == 1).all(), name
    assert one["model.layer4.0.bn1.running_mean"].any()


@pytest.mark.parametrize("callbacks", ["default", "ema"])
def test_frozen_layers_keep_weights_and_statistics(tmp_path, callbacks):
    options = [*FROZEN, f"callbacks={callbacks}"]
    options += ["callbacks.ema.decay=0.7"] if callbacks == "ema" else []
    for lr in (0.1, 0.05):
        run(tmp_path / str(lr), *options, f"lr={lr}", "method=gsam")
    for name in ("last", "best"):
        assert_frozen(*(weights(tmp_path / str(lr), name) for lr in (0.1, 0.05)))
    found = summary(tmp_path / "0.1")
    stored = weights(tmp_path / "0.1")
    head = {n: w for n, w in stored.items() if n.startswith(("model.layer4", "model.fc"))}
    count = sum(w.numel() for n, w in head.items() if "running" not in n and "tracked" not in n)
    assert found["trained_parameters"] == found["perturbed_parameters"] == count
    assert found["parameters"] > count


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("method", ["sam", "gsam"])
def test_frozen_layers_and_unfreezing_over_two_processes(tmp_path, method):
    options = [*SMALL, *FROZEN, "trainer=ddp_cpu", "epochs=3", f"method={method}"]
    options += ["finetune.unfreeze={1:[layer3]}", "callbacks=ema", "callbacks.ema.decay=0.7"]
    options += ["+callbacks.same._target_=same_weights.SameWeights"]
    for lr in (0.1, 0.05):
        done = command(tmp_path, *options, f"lr={lr}", f"hydra.run.dir={tmp_path / str(lr)}")
        assert done.returncode == 0, done.stderr
        assert "6 comparisons" in done.stdout
    one, other = (
        {n: w for n, w in weights(tmp_path / str(lr)).items() if "layer3" not in n}
        for lr in (0.1, 0.05)
    )
    assert_frozen(one, other)
    layer3 = (weights(tmp_path / str(lr))["model.layer3.0.bn1.weight"] for lr in (0.1, 0.05))
    assert not torch.equal(*layer3)


def test_the_average_of_what_stays_is_exact():
    model = convnet(torch.float32)
    average = EMA(decay=0.9)
    module = tuned(model, {"freeze": ["layer1"]}, 2, rho=0.1)
    before, data = state(model), [(x[:, :, :8, :8], y) for x, y in images(8, torch.float32)]
    trainer(callbacks=[average], max_epochs=2).fit(module, loader(data), loader(data[:1]))
    after = state(model)
    assert_equal(
        {n: w for n, w in before.items() if "layer1" in n},
        {n: w for n, w in after.items() if "layer1" in n},
    )
    assert model.layer2[0].bn1.num_batches_tracked == 16  # as the model has it


# ------------------------------------------------------------------- runs: equal, resumed, refused


@pytest.mark.parametrize("method", ["sam", "asam"])
def test_choices_that_change_nothing_change_no_bit(tmp_path, method):
    own = ["finetune=full", "finetune.head_lr_factor=1", "param_groups=[{params:[fc],lr_factor:1}]"]
    for folder, options in (("none", []), ("full", [*own, "finetune.layer_decay=1"])):
        run(tmp_path / folder, *options, f"method={method}")
    assert equal(weights(tmp_path / "none"), weights(tmp_path / "full"))


def settings_of(folder):
    """Learning rate, weight decay and rho of each parameter, as a run's checkpoint has them."""
    groups = read(folder / "checkpoints" / "last.ckpt")["optimizer_states"][0]["param_groups"]
    keys = ("initial_lr", "weight_decay", "rho")
    return {n: tuple(g[key] for key in keys) for g in groups for n in g["param_names"]}


def test_settings_follow_what_is_given_when_a_run_continues(tmp_path):
    rules = "param_groups=[{params:[layer1],rho:0.01},{params:[layer1.0.bn1],weight_decay:0.3}]"
    options = ["finetune=layer_decay", "finetune.head_lr_factor=2", rules, "test=false"]
    options += ["method.rho_min=0", "scheduler=constant"]
    folder = tmp_path / "run"
    run(folder, *options, "epochs=1")

    ids = layer_lr_factors(convnet(), 0.75)
    for lr, decay, rho, epochs in ((0.1, 5e-4, 0.05, 1), (0.02, 0.1, 0.2, 2)):
        if epochs == 2:
            given = [f"lr={lr}", f"weight_decay={decay}", f"rho={rho}", "epochs=2"]
            run(folder, *options, *given, f"ckpt_path={folder}/checkpoints/last.ckpt")
        found = settings_of(folder)
        assert found.keys() == ids.keys()
        for name, of_layer in ids.items():
            factor = 2.0 if name.startswith("fc.") else of_layer
            is_norm = "bn" in name or "downsample.1" in name or name == "fc.bias"
            own = 0.3 if name.startswith("layer1.0.bn1") else 0.0 if is_norm else decay
            radius = pytest.approx(0.01 if name.startswith("layer1") else rho, rel=1e-15)
            assert found[name] == (lr * factor, own, radius), name


def module_command(cwd, *arguments):
    words = [sys.executable, "-m", "sam_lightning", *arguments]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True)


FIXED = ["data=digits", "data.subset=250", "data.val_size=100", "data.label_noise=0.2", "epochs=4"]
FIXED += ["model.width=4", "batch_size=32", "trainer.log_every_n_steps=3", "trainer=ddp_cpu"]
FIXED += ["data.eval_batch_size=1000", "checkpoint_every_n_steps=3", "augment.mixup.alpha=0.4"]
FIXED += ["finetune=layer_decay", "finetune.head_rho=0.1", "callbacks=ema"]
FIXED += ["callbacks.ema.decay=0.9", "optimizer=adamw"]
GRADUAL = ["finetune.freeze=[backbone]", "finetune.unfreeze={1:['layer[34]'],2:[layer1,layer2]}"]


def steps_saved(folder):
    try:
        path = newest(folder / "checkpoints")
        return 0 if path is None else read(path)["global_step"]
    except ConfigError:  # between two names
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "at"),
    [
        pytest.param(FIXED, 9, marks=pytest.mark.long),  # steps that a checkpoint has
        # In the third epoch.
        pytest.param([*FIXED, *GRADUAL, "optimizer=sgd"], 18, marks=pytest.mark.long),
        ([*FIXED, *GRADUAL, "trainer=cpu", "method=looksam"], "save:3"),  # as the first one ends
    ],
)
def test_killed_and_continued(tmp_path, options, at):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    done = forked(tmp_path, *options, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    into = [f"hydra.run.dir={folder}", "ckpt_path=last"]
    if isinstance(at, int):  # with two processes
        process = begin(tmp_path, *options, *into)
        while process.is_alive() and steps_saved(folder) < at:
            time.sleep(0.05)
        others = children(process.pid)
        for pid in (*others, process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.join()
        wait_for_end(others)
        assert at <= steps_saved(folder) < 32
    else:
        assert forked(tmp_path, *options, *into, fault=("SIGKILL", at)).returncode < 0
    assert not (folder / "metrics.json").exists()
    done = forked(tmp_path, *into)
    assert done.returncode == 0, done.stderr
    assert differences(folder, whole) == []


@pytest.mark.long
@pytest.mark.slow
def test_low_rank_additions_of_peft_train_continue_and_evaluate(tmp_path):
    options = ["data=digits", "data.subset=100", "trainer=cpu", "epochs=2", "batch_size=25"]
    options += ["model=custom", "model._target_=peft_models.lora", "checkpoint_every_n_steps=1"]
    options += ["finetune=layer_decay", "finetune.freeze_batchnorm=true", "method=asam"]
    folder, whole = tmp_path / "run", tmp_path / "whole"
    done = forked(tmp_path, *options, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    into = [f"hydra.run.dir={folder}", "ckpt_path=last", "model._target_=peft_models.lora"]
    killed = forked(tmp_path, *options, *into[:2], fault=("SIGKILL", "pass:7"))
    assert killed.returncode < 0
    done = forked(tmp_path, *into)
    assert done.returncode == 0, done.stderr
    assert differences(folder, whole) == []
    after = weights(folder)
    trained = {n for n in after if "lora_" in n or "modules_to_save" in n}
    found = summary(folder)
    assert found["trained_parameters"] == sum(after[n].numel() for n in trained)
    assert found["parameters"] > 2 * found["trained_parameters"]
    for name in after.keys() - trained:
        assert "running_mean" not in name or not after[name].any()
    lora = importlib.import_module("peft_models").lora(10, 1)
    assert {f"model.{n}" for n in lora.state_dict()} == after.keys()
    inside = layer_ids(lora)  # as of the network itself
    for name, layer in layer_ids(lora.get_base_model().__class__(10, 1, 4)).items():
        prefix = f"base_model.model.{name.rpartition('.')[0]}."
        assert {i for n, i in inside.items() if n.startswith(prefix)} == {layer}
    for argument, code in (("trust=peft_models.lora", 0), ("split=test", 2)):
        ran = module_command(tmp_path, "evaluate", f"ckpt_path={folder}", argument)
        assert ran.returncode == code, ran.stderr


REFUSED = [
    (
        "finetune=head param_groups=[{params:[head],rho:0}]",
        "rho=0.05: no weight that trains is per",
    ),
    ("callbacks=ema callbacks.ema.decay=1", "callbacks.ema.decay=1: allowed is "),
    ("finetune=full finetune.freeze=[lay]", "finetune.freeze=lay: matches no parameter that tra"),
    ("finetune=full finetune.freeze=['*']", "leaves no parameter to train"),
    (
        "finetune=head finetune.unfreeze={2:[backbone]}",
        "finetune.unfreeze.2: this run has epochs=2; allowed is a number above 0",
    ),
    (
        "finetune=head +finetune.unfreeze.3=[fc]",
        "finetune.unfreeze.3: this run has epochs=2; allow",
    ),
    ("finetune=full finetune.unfreeze={1:[fc]}", "finetune.unfreeze.1=['fc']: matches nothing in"),
    (
        "param_groups=[{params:[head],rho:0.1},{params:[x],lr_factor:2}]",
        "param_groups[1].params=x: matches no parameter that trains; the model has conv1, bn1, ",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_meant_is_one_line(tmp_path, options, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        run(tmp_path, *options.split())
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_a_run_that_perturbs_nothing_at_first_says_so(tmp_path, caplog):
    options = ["data=digits", "data.subset=60", "trainer=cpu", "batch_size=30", "epochs=2"]
    options += ["model.width=8", "finetune=head", "finetune.unfreeze={1:[backbone]}"]
    for method in ("sam", "sam_on"):
        cfg = configuration(*options, f"method={method}")
        cfg.output_dir = str(tmp_path / method)
        train(cfg)
        said = "epochs 1 to 1 perturb nothing: what is to be perturbed is frozen" in caplog.text
        assert said == (method == "sam_on")


def test_what_tunes_may_not_change_within_a_run(tmp_path):
    run(tmp_path, "finetune=head", "test=false", "epochs=1")
    with pytest.raises(ConfigError, match=r"may not change within a run"):
        run(tmp_path, "finetune=full", "epochs=2", f"ckpt_path={tmp_path}/checkpoints/last.ckpt")
