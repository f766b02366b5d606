"""What people do with any optimizer: schedulers, groups, hooks, modes, gradients of before."""

import copy
import functools
import pickle
import warnings

import pytest
import pytorch_optimizer
import schedulefree
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from sam_lightning import SAM
from steps import (
    RELATIVES,
    STEPS,
    along_gradient,
    assert_close,
    assert_equal,
    batches,
    in_turn,
    loss_at,
    network,
    plain_sam_step,
    set_weights,
    step_with_closure,
    weights_of,
)

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)


# ------------------------------------------------------------------ schedulers and groups


def sequential(optimizer):
    parts = [lr_scheduler.ConstantLR(optimizer, 0.5), lr_scheduler.ExponentialLR(optimizer, 0.7)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: i / 4),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.03, anneal_epochs=4),
    "SequentialLR": sequential,
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("inside", [False, True])
def test_schedulers_set_what_they_set_for_the_base(name, inside):
    ours, theirs = network(), network()
    sam, alone = SAM(ours.parameters(), SGD, rho=0.3), SGD(theirs.parameters())
    calls = []
    sam.register_step_post_hook(lambda *_: calls.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules = [SCHEDULERS[name](o) for o in (sam.base_optimizer if inside else sam, alone)]
        for i, batch in enumerate(batches(8)):
            in_turn(i, ours, sam, batch)
            plain_sam_step(theirs, alone, batch, along_gradient(0.3))
            for schedule in schedules:
                schedule.step(*[1.0] * (name == "ReduceLROnPlateau"))
            for key in ("lr", "momentum"):
                assert sam.param_groups[0][key] == alone.param_groups[0][key]
    assert len(calls) == 8
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)


def test_groups_with_settings_of_their_own_move_as_in_the_usual_sam():
    """Also one that comes later, a rho that is scheduled, and groups that are assigned."""
    ours, theirs = network(), network()
    rhos, adaptive = [0.5, 0.2, 0.3], [True, False, False]

    def parts(model):
        return [list(model[i].parameters()) for i in (0, 2, 3)]

    first, second, third = parts(ours)
    sam = SAM([{"params": first, "rho": 0.5, "adaptive": True}, {"params": second}], SGD, rho=0.2)
    alone = SGD([{"params": group} for group in parts(theirs)])

    def ascent(grads, weights):
        settings = [(r, a) for r, a in zip(rhos, adaptive, strict=True) for _ in range(2)]
        t = [w.abs() if a else 1.0 for w, (_, a) in zip(weights, settings, strict=True)]
        norm = sum((x * g).square().sum() for x, g in zip(t, grads, strict=True)) ** 0.5
        return [r * x**2 * g / norm for x, g, (r, _) in zip(t, grads, settings, strict=True)]

    data = list(batches(12))
    for p in theirs[3].parameters():
        p.requires_grad_(True)
    for i, batch in enumerate(data):
        if i == 3:
            sam.add_param_group({"params": third, "rho": 0.3})
            set_weights(theirs, weights_of(ours))
            alone.state.clear()
            alone.state.update(
                {
                    t: {"momentum_buffer": sam.state[o]["momentum_buffer"].clone()}
                    for o, t in zip(ours.parameters(), theirs.parameters(), strict=True)
                    if o in sam.state
                }
            )
        if i == 6:
            rhos[1] = sam.param_groups[1]["rho"] = 0.9
        if i == 9:
            sam.param_groups = [{**group, "lr": 0.02} for group in sam.param_groups]
            assert sam.base_optimizer.param_groups is sam.param_groups
            alone.param_groups = [{**group, "lr": 0.02} for group in alone.param_groups]
        in_turn(i, ours, sam, batch)
        if i >= 3:
            plain_sam_step(theirs, alone, batch, ascent)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)


def test_averaged_models_average_the_weights_between_steps():
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    sam = SAM(model.parameters(), SGD, rho=0.3)
    average, seen, data = swa_utils.AveragedModel(model), [], list(batches(5))
    for batch in data:
        step_with_closure(model, sam, batch)
        average.update_parameters(model)
        seen.append(weights_of(model))
    expected = [torch.stack(w).mean(0) for w in zip(*seen, strict=True)]
    assert_close(list(average.module.parameters()), expected)
    swa_utils.update_bn([x for x, _ in data], average)
    mean = torch.stack([average.module[0](x).mean(0) for x, _ in data]).mean(0)
    torch.testing.assert_close(average.module[1].running_mean, mean)


# ------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("copied", [None, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_step_hooks_run_once_with_the_optimizer_that_everybody_sees(step, copied):
    model = network()
    sam, seen = SAM(model.parameters(), SGD, rho=0.3), []

    def hook(name):
        return lambda optimizer, args, kwargs: seen.append((name, optimizer))

    if copied:
        sam.register_step_pre_hook(print)  # torch's optimizers lose hooks when copied
        model, sam = copied((model, sam))
    handles = [
        sam.register_step_pre_hook(hook("pre")),
        sam.base_optimizer.register_step_pre_hook(hook("base pre")),
        sam.register_step_post_hook(hook("post")),
        sam.base_optimizer.register_step_post_hook(hook("base post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    try:
        step(model, sam, next(batches(1)))
    finally:
        for handle in handles:
            handle.remove()
    names = ["pre", "base pre", "global pre", "post", "base post", "global post"]
    assert sorted(name for name, _ in seen) == sorted(names)
    assert all(optimizer is sam for _, optimizer in seen)
    step(model, sam, next(batches(1)))
    assert len(seen) == len(names)


def test_hooks_of_the_state_run_once_and_see_it_as_it_is():
    model, seen = network(), []
    sam = SAM(model.parameters(), SGD, rho=0.3)
    step_with_closure(model, sam, next(batches(1)))
    sam.register_state_dict_pre_hook(lambda o: seen.append(("pre", o)))
    sam.register_state_dict_post_hook(lambda o, state: seen.append(("post", o)) or {"in": state})
    wrapped = sam.state_dict()
    assert seen == [("pre", sam), ("post", sam)]
    other = SAM(network().parameters(), SGD, rho=0.9)
    other.register_load_state_dict_pre_hook(
        lambda o, state: seen.append(("load pre", o)) or state["in"]
    )
    other.register_load_state_dict_post_hook(lambda o: seen.append(("load post", o)))
    other.load_state_dict(wrapped)
    assert seen[2:] == [("load pre", other), ("load post", other)]
    assert other.param_groups[0]["rho"] == 0.3
    one, two = other.state_dict()["state"], wrapped["in"]["state"]
    torch.testing.assert_close(one, two, atol=0, rtol=0)
    del seen[:]
    copy.deepcopy(other).load_state_dict(wrapped["in"])
    assert not seen


# ------------------------------------------------------------------- maximize, sparse, modes


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("method", [*RELATIVES, "decay"])
def test_to_maximize_is_to_minimize_the_negative_loss(method, base):
    options = RELATIVES.get(method, {"decay_in_ascent": True})
    momentum = {"momentum": 0.9} if base is torch.optim.SGD else {}
    cls = functools.partial(base, lr=0.01, weight_decay=0.1, **momentum)
    ours, theirs = network(), network()
    sam = SAM(ours.named_parameters(), cls, rho=0.3, maximize=True, **options)
    negative = SAM(theirs.named_parameters(), cls, rho=0.3, **options)

    def closure(model, optimizer, batch, sign):
        optimizer.zero_grad()
        (sign * loss_at(model, batch)).backward()

    for i, batch in enumerate(batches(12)):
        for model, optimizer, sign in ((ours, sam, 1), (theirs, negative, -1)):
            if method == "looksam" and i % 3:
                optimizer.skip_perturbation()
            optimizer.step(functools.partial(closure, model, optimizer, batch, sign))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)


def test_a_maximizing_step_starts_from_where_the_goal_is_lowest():
    model, (batch,) = network(), batches(1)
    sam = SAM(model.parameters(), SGD, rho=0.3, maximize=True)
    loss = loss_at(model, batch)
    loss.backward()
    with sam.perturbed():
        assert loss_at(model, batch) < loss


@pytest.mark.parametrize("step", ["closure", "set to zero", "plain"])
def test_sparse_gradients_need_rho_0(step):
    ours, theirs = (nn.Embedding(5, 3, sparse=True) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    sam = SAM(ours.parameters(), torch.optim.SGD, rho=0.0, lr=0.1, momentum=0.9)
    alone = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)

    def closure(model, optimizer):
        optimizer.zero_grad(set_to_none=step != "set to zero")
        loss = model(torch.tensor([1, 2, 1])).square().sum()
        loss.backward()

    for _ in range(5):
        closure(theirs, alone)
        alone.step()
        if step == "plain":
            closure(ours, sam)
            sam.step()
        else:
            sam.step(lambda: closure(ours, sam))
    assert torch.equal(ours.weight, theirs.weight)
    sam.param_groups[0]["rho"] = 0.1
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        sam.step(lambda: closure(ours, sam))
    assert torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("cls", [schedulefree.SGDScheduleFree, schedulefree.AdamWScheduleFree])
def test_schedule_free_optimizers_keep_their_two_modes(cls):
    ours, theirs = network(), network()
    sam, alone = SAM(ours.parameters(), cls, rho=0.3, lr=0.05), cls(theirs.parameters(), lr=0.05)
    for i, batch in enumerate(batches(9)):
        if i == 5:
            sam.eval()
            alone.eval()
            assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=0)
        sam.train()
        alone.train()
        in_turn(i, ours, sam, batch)
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_other_optimizers_have_no_modes(name):
    sam = SAM(network().parameters(), SGD)
    assert not hasattr(sam, name)
    with pytest.raises(AttributeError, match=name):
        getattr(sam, name)


# ---------------------------------------------------------------------------- old gradients


def test_a_step_that_nobody_perturbed_is_an_error_and_moves_nothing():
    model, data = network(), list(batches(3))
    sam = SAM(model.parameters(), SGD, rho=0.3)
    loss_at(model, data[0]).backward()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="without a perturbation"):
        sam.step()
    assert_equal(weights_of(model), before)
    assert not sam.state_dict()["state"]
    with sam.perturbed():
        loss_at(model, data[0]).backward()
    sam.step()
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="without a perturbation"):
        sam.step()
    with pytest.raises(RuntimeError, match="no gradient since the last step"):
        sam.perturb()
    with pytest.raises(RuntimeError, match="no gradient since the last step"):
        sam.first_step()
    assert_equal(weights_of(model), before)


def model_to_zero(model, optimizer):
    model.zero_grad(set_to_none=False)


def twice_to_zero(model, optimizer):
    model.zero_grad(set_to_none=False)
    model.zero_grad(set_to_none=False)


def optimizer_to_zero(model, optimizer):
    optimizer.zero_grad(set_to_none=False)


def nothing(model, optimizer):
    pass


CLEARINGS = [model_to_zero, twice_to_zero, optimizer_to_zero, nothing]


@pytest.mark.parametrize("inner", [model_to_zero, optimizer_to_zero, nothing])
@pytest.mark.parametrize("outer", CLEARINGS)
@pytest.mark.parametrize("given", [False, True])
def test_cleared_gradients_are_none_and_given_ones_are_used(given, outer, inner):
    """Two passes a step in any idiom, also where the first weights are not in every batch."""
    ours, theirs = Partly(), Partly()
    sam = SAM(ours.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    alone = torch.optim.SGD(theirs.parameters(), lr=0.1)
    passes = []
    for i, batch in enumerate(batches(9)):
        ours.skips = theirs.skips = i % 3 == 1
        outer(ours, sam)

        def closure():
            inner(ours, sam)
            passes.append(1)
            loss = loss_at(ours, batch)  # noqa: B023
            loss.backward()
            return loss

        if given:
            if outer is nothing:
                sam.zero_grad()
            closure()
        sam.step(closure)
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert len(passes) == 18
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)


class Partly(nn.Module):
    """Its first weights are left out of some passes."""

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.rest = network()
        self.skips = False

    def forward(self, x):
        return self.rest(x) if self.skips else self.rest(x) + self.extra.square()


def test_a_gradient_of_zeros_is_a_gradient():
    model, data = network(), list(batches(3))
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    for factor in (1, 0, 1):
        before = weights_of(model)
        (factor * loss_at(model, data[factor])).backward()
        with sam.perturbed(zero_grad=False):
            sam.zero_grad(set_to_none=False)
            (factor * loss_at(model, data[factor])).backward()
        sam.step()
        sam.zero_grad(set_to_none=False)
        assert torch.equal(before[0], model[0].weight) == (factor == 0)


def test_a_wrapper_that_only_steps_needs_somebody_to_perturb():
    ours, theirs = network(), network()
    options = {"k": 2, "alpha": 0.5}
    sam = SAM(ours.parameters(), SGD, rho=0.3)
    wrapper = pytorch_optimizer.Lookahead(sam, **options)
    alone = pytorch_optimizer.Lookahead(SGD(theirs.parameters()), **options)
    for batch in batches(6):
        wrapper.zero_grad()
        loss_at(ours, batch).backward()
        with pytest.raises(RuntimeError, match="without a perturbation"):
            wrapper.step()
        sam.first_step(zero_grad=True)
        loss_at(ours, batch).backward()
        wrapper.step()
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)
