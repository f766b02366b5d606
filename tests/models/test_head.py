"""The head and the order of layers: timm's own, and those of torchvision's models and ours."""

import warnings

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay
from torch import nn

from sam_lightning.models import PyramidNet, SAMResNet50, WideResNet
from sam_lightning.models.head import head_of, head_parameters, layer_ids, layer_lr_factors
from sam_lightning.optim.param_groups import norm_and_bias

TIMM = [
    *("resnet18", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_lite0", "regnety_002"),
    *("swin_tiny_patch4_window7_224", "deit_tiny_distilled_patch16_224", "mobilenetv3_small_050"),
    *("xcit_nano_12_p16_224", "densenet121", "vgg11", "nfnet_f0", "levit_128s", "inception_v3"),
    *("pit_ti_distilled_224", "poolformerv2_s12"),
]


@pytest.mark.parametrize("name", TIMM)
def test_layer_decay_is_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    own = getattr(model, "no_weight_decay", set)()
    groups = param_groups_layer_decay(model, 0.05, own, layer_decay=0.7)
    expected = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    factors, undecayed = layer_lr_factors(model, 0.7), norm_and_bias(model)
    for parameter, p in model.named_parameters():
        decay = 0.0 if parameter in undecayed else 0.05
        assert expected[id(p)] == (factors[parameter], decay), parameter


def test_heads_of_timms_models_are_its_classifiers():
    with torch.device("meta"):
        heads = {
            name: [*head_of(timm.create_model(name))]
            for name in ("convnext_atto", "deit_tiny_distilled_patch16_224", "efficientnet_lite0")
        }
        assert [*heads.values()] == [["head.fc"], ["head", "head_dist"], ["classifier"]]
        # Auxiliary heads add to the logits too.
        assert [*head_of(timm.create_model("volo_d1_224"))] == ["aux_head", "head"]
        assert [*head_of(timm.create_model("crossvit_9_240"))] == ["head.0", "head.1"]
        # timm's own description of this one leaves out the second head.
        assert [*head_of(timm.create_model("levit_384_s8"))] == ["head.linear", "head_dist.linear"]


def torchvisions(name):
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        return torchvision.models.get_model(name, num_classes=7)


# The head, the number of layers, and where some parameters are.
ORDERS = {
    "resnet18": ("fc", 10, {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.bn1.bias": 1}),
    "vit_b_16": (
        "heads.head",
        14,
        {"class_token": 0, "encoder.pos_embedding": 0, "conv_proj.bias": 0, "encoder.ln.bias": 12},
    ),
    "convnext_tiny": (
        "classifier.2",
        23,
        {
            "classifier.0.bias": 21,
            "features.1.0.layer_scale": 1,
            "features.2.0.weight": 4,
            "features.2.1.weight": 4,
        },
    ),
    "swin_t": ("head", 17, {"features.2.reduction.weight": 3, "norm.weight": 15}),
    "efficientnet_b0": ("classifier.1", 19, {"features.2.1.block.0.0.weight": 3}),
    "squeezenet1_0": ("classifier.1", 10, {"features.12.squeeze.weight": 8}),
    "vgg11": ("classifier.6", 11, {"features.3.weight": 1, "classifier.3.weight": 9}),
}
OURS = {
    "resnet50": (lambda: SAMResNet50(width=2), 18, {"layer4.2.bn3.bias": 16}),
    "wide_resnet": (lambda: WideResNet(depth=16, widen_factor=1), 8, {"bn.weight": 6}),
    "pyramidnet": (lambda: PyramidNet(depth=20, alpha=9), 11, {"bn.weight": 9}),
}


@pytest.mark.parametrize("name", [*ORDERS, *OURS])
def test_the_order_of_layers(name):
    if name in ORDERS:
        head, count, some = ORDERS[name]
        model = torchvisions(name)
    else:
        make, count, some = OURS[name]
        head, model = "fc", make()
    ids = layer_ids(model)
    assert [*head_of(model)] == [head]
    assert {*ids} == {parameter for parameter, _ in model.named_parameters()}
    assert {*ids.values()} == {*range(count)}
    for parameter, where in {
        **some,
        f"{head}.weight": count - 1,
        f"{head}.bias": count - 1,
    }.items():
        assert ids[parameter] == where, parameter
    assert layer_lr_factors(model, 0.5)[f"{head}.weight"] == 1
    assert all(f == 0.5 ** (count - 1 - ids[n]) for n, f in layer_lr_factors(model, 0.5).items())


class Own(nn.Module):
    """One block that says nothing of the order inside."""

    def __init__(self):
        super().__init__()
        self.net = nn.LSTM(2, 3, 2)
        self.fc = nn.Linear(3, 2)


def test_a_model_without_a_known_order_is_refused_until_it_says_it():
    with pytest.raises(ValueError, match=r"Own has no layers in an order that is known; give it"):
        layer_ids(Own())
    Own.group_matcher = lambda self, coarse: {"layers": r"^net\.\w+_l(\d)"}
    ids = layer_ids(Own())
    assert {ids["net.weight_hh_l0"], ids["net.bias_ih_l0"]} == {0}
    assert (ids["net.weight_hh_l1"], ids["fc.weight"]) == (1, 2)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="has no linear layer or convolution"):
        head_parameters(nn.Sequential(nn.BatchNorm2d(2)))
