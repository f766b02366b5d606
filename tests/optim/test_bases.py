"""SAM around every optimizer of torch, and what is copied, saved and loaded of both."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import pytorch_optimizer
import schedulefree
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sam_lightning import SAM
from sam_lightning.optim.methods.asam import AdaptiveAscent
from steps import (
    RELATIVES,
    along_gradient,
    assert_close,
    assert_equal,
    batches,
    closure_of,
    in_turn,
    loss_at,
    network,
    plain_sam_step,
    set_weights,
    step_in_two,
    step_with_closure,
    step_with_context,
    weights_of,
)

SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
UNSUPPORTED = {"LBFGS", "SparseAdam"}
BASES = {
    name: functools.partial(cls, lr=0.01)
    for name, cls in vars(torch.optim).items()
    if inspect.isclass(cls) and cls is not torch.optim.Optimizer and name not in UNSUPPORTED
}
BASES |= {
    "Adadelta": functools.partial(torch.optim.Adadelta, rho=0.95, lr=0.5),
    "SGD": SGD,
    "fused SGD": functools.partial(SGD, fused=True),
    "foreach SGD": functools.partial(SGD, foreach=True),
    "fused AdamW": functools.partial(ADAMW, fused=True),
    "foreach AMSGrad": functools.partial(torch.optim.Adam, lr=0.01, foreach=True, amsgrad=True),
}


def network_for(base, dtype=torch.float64):
    model = network(dtype)
    if base == "Muon":  # for matrices only
        model[0].bias = model[3].bias = None
        model[2] = nn.Identity()
    return model


def saved(optimizer):
    """What a file of this optimizer would bring back."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(one, two):
    assert one.keys() == two.keys()
    for i in one:
        assert one[i].keys() == two[i].keys()
        for name, value in one[i].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[i][name])), name


@pytest.mark.parametrize("base", BASES)
def test_with_rho_0_weights_and_state_are_those_of_the_base_optimizer(base):
    ours, theirs = (network_for(base, torch.float32) for _ in range(2))
    sam = SAM(ours.parameters(), BASES[base], rho=0.0)
    alone = BASES[base](theirs.parameters())
    for i, batch in enumerate(batches(20, torch.float32)):
        in_turn(i, ours, sam, batch)
        alone.zero_grad()
        loss_at(theirs, batch).backward()
        alone.step()
    assert_equal(weights_of(ours), weights_of(theirs))
    one, two = sam.state_dict(), alone.state_dict()
    assert_same_state(one["state"], two["state"])
    (group,), (expected,) = one["param_groups"], two["param_groups"]
    del group["adaptive"]
    expected["rho"], own = 0.0, expected.get("rho")
    assert group.pop("base_rho", None) == own
    assert group == expected


@pytest.mark.parametrize("base", BASES)
def test_steps_around_every_base_are_those_of_a_loop_by_hand(base):
    ours, theirs = network_for(base), network_for(base)
    sam = SAM(ours.parameters(), BASES[base], rho=0.3)
    alone = BASES[base](theirs.parameters())
    for i, batch in enumerate(batches(20)):
        in_turn(i, ours, sam, batch)
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("method", ["friendly", "looksam"])
def test_what_is_remembered_is_not_shown_to_the_base_optimizer(method, base):
    """After a skipped step its own may still have to be made."""
    ours, theirs = network(), network()
    sam, fresh = (SAM(m.parameters(), BASES[base], **RELATIVES[method]) for m in (ours, theirs))
    data = list(batches(5))
    sam.found_inf = torch.ones(())
    step_with_context(ours, sam, data[0])
    assert_equal(weights_of(ours), weights_of(theirs))
    sam.method_state.clear()
    for batch in data[1:]:
        step_with_context(ours, sam, batch)
        step_with_context(theirs, fresh, batch)
    assert_equal(weights_of(ours), weights_of(theirs))


@pytest.mark.parametrize("base", BASES)
def test_a_file_of_the_base_optimizer_alone_is_taken_up(base):
    ours, theirs = network_for(base), network_for(base)
    alone = BASES[base](theirs.parameters())
    data = list(batches(8))
    for batch in data[:4]:
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    set_weights(ours, weights_of(theirs))
    sam = SAM(ours.parameters(), functools.partial(BASES[base], lr=7.0), rho=0.3)
    sam.load_state_dict(saved(alone))
    alone.load_state_dict(saved(alone))  # which casts the state
    for batch in data[4:]:
        step_in_two(ours, sam, batch)
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)
    assert sam.param_groups[0].get("base_rho") == (0.95 if base == "Adadelta" else None)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
@pytest.mark.parametrize(
    "given", [lambda c: c, lambda c: functools.partial(c, lr=1), lambda c: lambda p: c(list(p))]
)
def test_a_base_that_cannot_be_is_refused_by_name(name, given):
    with pytest.raises(ValueError, match=name):
        SAM(network().parameters(), given(getattr(torch.optim, name)), rho=0.1)


def test_an_optimizer_in_place_of_its_class_is_refused():
    made = torch.optim.Adam(network().parameters())
    with pytest.raises(TypeError, match=r"pass the class itself, SAM\(params, Adam"):
        SAM(network().parameters(), made)


def test_a_bad_rho_is_named_before_bad_parameters():
    with pytest.raises(ValueError, match="rho=-1"):
        SAM(None, torch.optim.SGD, rho=-1, lr=0.1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("method", ["sam", "friendly", "looksam"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_distributed_checkpoints_continue_a_run(method, base, flat, on_disk, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    data = list(batches(10))

    def step(model, sam, i):
        if method == "looksam" and i % 3:
            sam.skip_perturbation()
            sam.step(closure_of(model, sam, data[i]))
        else:
            in_turn(i, model, sam, data[i])

    whole, fresh = network(), network(seed=3)
    sam, other = (
        SAM(m.parameters(), BASES[base], rho=r, **RELATIVES[method])
        for m, r in [(whole, 0.3), (fresh, 0.7)]
    )
    for i in range(4):
        step(whole, sam, i)
    sam.zero_grad()
    state = get_optimizer_state_dict(whole, sam, options=options)
    if on_disk:
        dcp.save({"optimizer": state}, checkpoint_id=tmp_path)
        state = get_optimizer_state_dict(fresh, other, options=options)
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path)
    else:
        state = copy.deepcopy(state)
    fresh.load_state_dict(whole.state_dict())
    set_optimizer_state_dict(fresh, other, state, options=options)
    assert other.param_groups[0]["rho"] == 0.3
    for i in range(4, 10):
        step(whole, sam, i)
        step(fresh, other, i)
    assert_equal(weights_of(whole), weights_of(fresh))


@pytest.mark.parametrize("base", ["SGD", "Adam"])
def test_a_file_of_the_usual_sam_is_taken_up_but_for_its_copies_of_weights(base):
    """It keeps them in ``old_p``, and saves nothing of its base optimizer's state."""
    ours, theirs = network(), network()
    cls = {"SGD": SGD, "Adam": functools.partial(torch.optim.Adam, lr=0.01)}[base]
    file = cls(theirs.parameters()).state_dict()
    file["param_groups"][0].update(rho=0.3, adaptive=True)
    file["state"] = {i: {"old_p": w} for i, w in enumerate(weights_of(theirs))}
    sam = SAM(ours.parameters(), cls, rho=0.9)
    with pytest.warns(UserWarning, match="another SAM") as caught:
        sam.load_state_dict(file)
    assert len(caught) == 1
    fresh = SAM(theirs.parameters(), cls, rho=0.3, adaptive=True)
    for batch in batches(4):
        step_in_two(ours, sam, batch)
        step_in_two(theirs, fresh, batch)
    assert_equal(weights_of(ours), weights_of(theirs))


def test_adadelta_goes_on_with_the_rho_that_another_sam_has_overwritten():
    sam = SAM(network().parameters(), torch.optim.Adadelta, rho=0.9)
    file = torch.optim.Adadelta(network().parameters(), rho=0.05).state_dict()
    file["param_groups"][0]["adaptive"] = True
    sam.load_state_dict(file)
    group = sam.param_groups[0]
    assert (group["rho"], group["base_rho"], group["adaptive"]) == (0.05, 0.05, True)


def test_groups_that_were_loaded_do_not_change_the_method_unnoticed():
    model = network()
    file = SAM(network().parameters(), SGD, adaptive=True).state_dict()
    sam = SAM(model.named_parameters(), SGD, perturbation=AdaptiveAscent())
    sam.load_state_dict(file)
    with pytest.raises(ValueError, match="adaptive=True: not together"):
        step_with_closure(model, sam, next(batches(1)))


@pytest.mark.parametrize("base", [SGD, ADAMW])
def test_a_file_of_pytorch_optimizer_is_taken_up(base):
    ours, theirs, data = network(), network(), list(batches(8))
    published = pytorch_optimizer.SAM(theirs.parameters(), base, rho=0.2, adaptive=True)
    for batch in data[:4]:
        step_in_two(theirs, published, batch)
    sam = SAM(ours.parameters(), base)
    sam.load_state_dict(saved(published))
    set_weights(ours, weights_of(theirs))
    for batch in data[4:]:
        step_in_two(theirs, published, batch)
        step_in_two(ours, sam, batch)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-7, rtol=0)


class Counting(torch.optim.SGD):
    """Saves more than its state, and has state that is not of the weights' dtype."""

    count = 0

    def step(self, closure=None):
        for group in self.param_groups:
            group["lr"] = 0.1 / (1 + self.count)
        super().step()
        self.count += 1
        for values in self.state.values():
            values["whole"] = torch.tensor([self.count], dtype=torch.uint8)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self.count = state_dict.pop("count")
        for values, saved in zip(self.state.values(), state_dict["state"].values(), strict=True):
            values["whole"] = saved["whole"].clone()


SAVING = {
    "counting": functools.partial(Counting, momentum=0.9),
    "ranger": functools.partial(pytorch_optimizer.Ranger21, num_iterations=20, lr=0.1),
    "spam": functools.partial(pytorch_optimizer.StableSPAM, lr=0.1),
    "schedule-free": functools.partial(schedulefree.AdamWScheduleFree, lr=0.05),
}


@pytest.mark.parametrize("base", SAVING)
@pytest.mark.parametrize("method", ["sam", "friendly", "looksam"])
def test_what_a_base_optimizer_saves_in_its_own_way(method, base):
    ours, theirs, data = network(), network(), list(batches(12))
    sam = SAM(ours.parameters(), SAVING[base], rho=0.3, **RELATIVES[method])
    getattr(sam, "train", list)()
    for batch in data[:6]:
        step_with_context(ours, sam, batch)
    state = saved(sam)
    set_weights(theirs, weights_of(ours))
    other = SAM(theirs.parameters(), SAVING[base], rho=0.9, **RELATIVES[method])
    kept, seen = copy.deepcopy(state), []
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()["state"]))
    other.load_state_dict(state)
    assert_same_state(kept["state"], state["state"])  # what was given is not changed
    assert kept.keys() == state.keys() == other.state_dict().keys()
    assert_same_state(seen[0], sam.state_dict()["state"])
    for now, before in zip(other.state.values(), sam.state.values(), strict=True):
        for name, value in before.items():
            assert getattr(now[name], "dtype", None) == getattr(value, "dtype", None), name
    for batch in data[6:]:
        step_with_context(ours, sam, batch)
        step_with_context(theirs, other, batch)
    assert_equal(weights_of(ours), weights_of(theirs))
    assert other.param_groups[0]["rho"] == 0.3


def test_a_file_of_a_base_optimizer_that_saves_in_its_own_way():
    ours, theirs, data = network(), network(), list(batches(8))
    alone = SAVING["counting"](theirs.parameters())
    for batch in data[:4]:
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    set_weights(ours, weights_of(theirs))
    sam = SAM(ours.parameters(), SAVING["counting"], rho=0.3)
    sam.load_state_dict(saved(alone))
    for batch in data[4:]:
        step_in_two(ours, sam, batch)
        plain_sam_step(theirs, alone, batch, along_gradient(0.3))
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-11, rtol=1e-11)
    assert sam.base_optimizer.count == alone.count == 8


def through_a_file(objects):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["sam", "friendly", "gsam", "looksam"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), through_a_file]
)
def test_a_copy_made_at_the_perturbed_weights_finishes_the_step(copied, method):
    model, data = network(), list(batches(6))
    sam = SAM(model.parameters(), SGD, rho=0.3, **RELATIVES[method])
    for batch in data[:3]:
        step_with_closure(model, sam, batch)
    sam.zero_grad()
    loss_at(model, data[3]).backward()
    sam.first_step(zero_grad=True)
    other_model, other = copied((model, sam))
    for one, optimizer in ((model, sam), (other_model, other)):
        loss_at(one, data[3]).backward()
        optimizer.second_step(zero_grad=True)
        for batch in data[4:]:
            step_with_context(one, optimizer, batch)
    assert_equal(weights_of(model), weights_of(other_model))
