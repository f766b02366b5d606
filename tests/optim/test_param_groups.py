"""Groups by name: which settings each parameter gets, and a step with them against the formulas."""

import math

import pytest
import torch
from torch import nn

from sam_lightning import SAM
from sam_lightning.optim.param_groups import norm_and_bias, param_groups
from steps import assert_close, assert_equal, batches, gradient, network, set_weights, weights_of

RULES = [
    {"params": "*", "lr_factor": 0.5},
    {"params": ["norm_and_bias"], "weight_decay": 0.0},
    {"params": ["3"], "lr_factor": 2.0, "rho": 0.3},
    {"params": ["3.bi?s", "2"], "rho": 0.0, "lr_factor": None},
]
# Of network(): Linear, Tanh, LayerNorm, Linear. Learning rate factor, weight decay, rho.
SETTINGS = {
    "0.weight": (0.5, 0.1, 0.2),
    "0.bias": (0.5, 0.0, 0.2),
    "2.weight": (0.5, 0.0, 0.0),
    "2.bias": (0.5, 0.0, 0.0),
    "3.weight": (2.0, 0.1, 0.3),
    "3.bias": (2.0, 0.0, 0.0),
}


def sam(model, rules, **options):
    given = {"rho": 0.2, "lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, **options}
    return SAM(param_groups(model, rules, lr=0.05), torch.optim.SGD, **given)


def test_later_rules_override_earlier_ones_setting_by_setting():
    optimizer = sam(network(), RULES)
    found = {
        name: (group["lr"] / 0.05, group["weight_decay"], group["rho"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert found == SETTINGS
    assert len(optimizer.param_groups) == len({*SETTINGS.values()}) == 5
    assert len({group["name"] for group in optimizer.param_groups}) == 5


def test_a_step_with_groups_is_that_of_the_formulas_in_float64():
    ours, theirs = network(), network()
    optimizer, momentum = sam(ours, RULES), [0.0] * 6
    settings = [*SETTINGS.values()]
    for batch in batches(10):
        nn.functional.cross_entropy(ours(batch[0]), batch[1]).backward()
        with optimizer.perturbed(ours):
            nn.functional.cross_entropy(ours(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()

        weights, grads = weights_of(theirs), gradient(theirs, batch)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))  # over all groups
        rows = list(zip(weights, grads, settings, strict=True))
        set_weights(theirs, [w + rho * g / norm for w, g, (_, _, rho) in rows])
        second = gradient(theirs, batch)
        for i, (w, (factor, decay, _)) in enumerate(zip(weights, settings, strict=True)):
            momentum[i] = 0.9 * momentum[i] + second[i] + decay * w
            weights[i] = w - 0.05 * factor * momentum[i]
        set_weights(theirs, weights)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-10, rtol=0)


def test_rules_that_change_nothing_change_no_bit():
    models = network(torch.float32), network(torch.float32)
    optimizers = [
        SAM(models[0].named_parameters(), torch.optim.SGD, rho=0.2, lr=0.05, momentum=0.9),
        sam(models[1], [{"params": ["0", "norm_and_bias"], "lr_factor": 1}], weight_decay=0.0),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        assert len(optimizer.param_groups) == 1
        for batch in batches(5, torch.float32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            with optimizer.perturbed(model):
                nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    assert_equal(*map(weights_of, models))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            {"params": ["4"], "rho": 1.0},
            "params=4: matches no parameter that trains; the model h",
        ),
        ({"params": ["bias"], "rho": 1.0}, "params=bias: matches no parameter that trains"),
        ({"params": ["0"], "rho": -1.0}, "rho=-1.0: must be a number >= 0"),
        ({"params": ["0"], "lr_factor": 0.0}, "lr_factor=0.0: must be a number > 0"),
        ({"params": ["0"], "weight_decay": math.nan}, "weight_decay=nan: must be a number >= 0"),
        ({"params": ["0"], "lr": 0.1}, "lr=0.1: allowed are params, lr_factor, weight_decay, rho"),
    ],
)
def test_a_wrong_rule_is_refused(rule, message):
    with pytest.raises(ValueError, match=message) as caught:
        param_groups(network(), [rule], lr=0.1)
    assert "\n" not in str(caught.value)


def test_a_factor_needs_a_rate_and_frozen_parameters_match_nothing():
    with pytest.raises(ValueError, match=r"lr_factor=0.5: needs lr"):
        param_groups(network(), RULES[:1])
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="params=0: matches no parameter that trains"):
        param_groups(model, [{"params": ["0"], "rho": 0.0}])


class Everything(nn.Module):
    """Parameters of each kind."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.plain = nn.LayerNorm([4, 6, 6])
        self.group = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.gamma = nn.Parameter(torch.ones(4))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.table = nn.Parameter(torch.zeros(5, 4))
        self.other = nn.Parameter(torch.zeros(5, 4))

    def no_weight_decay(self):
        return {"tab*"}


def test_what_norm_and_bias_are():
    model = Everything()
    decayed = {name for name, _ in model.named_parameters()} - norm_and_bias(model)
    weights = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert decayed == {*weights, "other"}


@pytest.mark.parametrize("rest", [{}, {"nesterov": True}])
def test_a_skipped_first_step_of_later_parameters_leaves_no_momentum(monkeypatch, rest):
    def unclean(tensor, **options):
        return torch.full_like(tensor, math.nan, **options)

    model = network(torch.float32)
    rules = [{"params": ["3"], "weight_decay": 0.0}]
    optimizer = sam(model, rules, fused=True, **rest)
    for batch, names in zip(batches(3, torch.float32), ["012", "0123", "0123"], strict=True):
        optimizer.zero_grad()
        for name, p in model.named_parameters():
            p.requires_grad_(name[0] in names)
        optimizer.skip_perturbation()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        new = "3" in names and not optimizer.state[model[3].weight]
        with monkeypatch.context() as patch:
            if new:  # as memory may be
                patch.setattr(torch, "empty_like", unclean)
                optimizer.found_inf = torch.ones(())
            optimizer.step()
        if new:
            assert torch.equal(
                optimizer.state[model[3].weight]["momentum_buffer"], torch.zeros(3, 12)
            )
            assert optimizer.state[model[0].weight]["momentum_buffer"].any()
    assert all(w.isfinite().all() for w in weights_of(model))
