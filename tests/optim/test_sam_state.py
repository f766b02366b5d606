"""State, groups, copies and wrong arguments of the optimizer."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import nn

from sam_lightning import SAM
from sam_lightning.optim.methods.asam import AdaptiveAscent
from steps import (
    BASES,
    assert_equal,
    batches,
    loss_at,
    network,
    set_weights,
    step_with_closure,
    weights_of,
)


def trained(steps, **options):
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9, **options)
    for batch in list(batches(10))[:steps]:
        step_with_closure(model, sam, batch)
    return model, sam


@pytest.mark.parametrize("base", BASES)
def test_a_run_continues_exactly_from_its_state_dict(base):
    cls, options = BASES[base]
    whole = network()
    sam = SAM(whole.parameters(), cls, rho=0.3, **options)
    data = list(batches(10))
    for i, batch in enumerate(data):
        if i == 4:
            file = io.BytesIO()
            torch.save({"model": whole.state_dict(), "sam": sam.state_dict()}, file)
        step_with_closure(whole, sam, batch)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network(seed=5)
    model.load_state_dict(saved["model"])
    resumed = SAM(model.parameters(), cls, rho=0.9, **options)
    resumed.load_state_dict(saved["sam"])
    assert resumed.param_groups[0]["rho"] == 0.3
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    assert resumed.state is resumed.base_optimizer.state
    for batch in data[4:]:
        step_with_closure(model, resumed, batch)
    assert_equal(weights_of(model), weights_of(whole))


def test_a_state_dict_of_the_base_optimizer_loads_too():
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_at(model, next(batches(1))).backward()
    base.step()
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)
    sam.load_state_dict(base.state_dict())
    assert (sam.param_groups[0]["lr"], sam.param_groups[0]["rho"]) == (0.05, 0.3)


def test_a_state_dict_taken_while_perturbed_holds_no_perturbed_weights():
    model, sam = trained(2)
    clean = copy.deepcopy(sam.state_dict())
    loss_at(model, next(batches(1))).backward()
    with sam.perturbed():
        taken = sam.state_dict()
    assert set(taken) == {"state", "param_groups"}
    assert taken["param_groups"] == clean["param_groups"]
    for key, values in clean["state"].items():
        assert set(taken["state"][key]) == set(values) == {"momentum_buffer"}
        assert torch.equal(taken["state"][key]["momentum_buffer"], values["momentum_buffer"])


def test_a_state_dict_has_no_weights():
    _, sam = trained(3)
    saved = sam.state_dict()
    assert {name for s in saved["state"].values() for name in s} == {"momentum_buffer"}
    assert set(saved) == {"state", "param_groups"}


@pytest.mark.parametrize("method", [{}, {"adaptive": True}])
@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.double(),
        lambda model: model.bfloat16(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: resize(model[0], torch.randn(5, 3, 2, 2)),
    ],
)
def test_weights_are_restored_after_a_conversion_between_two_steps(convert, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(80, 4))
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, **method)
    for step in range(4):
        if step == 2:
            convert(model)
        for w in model.parameters():
            w.data.add_(torch.randn_like(w))
            w.grad = torch.randn_like(w)
        clean = [w.clone() for w in weights_of(model)]
        with sam.perturbed():
            assert not torch.equal(model[0].weight, clean[0])
        assert_equal(weights_of(model), clean)


def resize(layer, weight):
    layer.weight.data = weight


def perturb_and_restore(model, sam):
    for w in model.parameters():
        w.grad = torch.ones_like(w)
    before = weights_of(model)
    with sam.perturbed(zero_grad=False):
        assert not torch.equal(model.weight, before[0])
    assert_equal(weights_of(model), before)


def copies_of(shape, weight):
    """Where the tensors of this shape are that are neither the weight nor its gradient."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    found = {t.data_ptr() for t in tensors if t.shape == shape}
    return found - {weight.data_ptr(), weight.grad.data_ptr()}


@pytest.mark.slow
def test_the_copies_keep_their_memory_and_go_with_their_weights():
    model = nn.Linear(17, 23)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    perturb_and_restore(model, sam)
    kept = copies_of((23, 17), model.weight)
    assert len(kept) == 1
    perturb_and_restore(model, sam)
    assert copies_of((23, 17), model.weight) == kept
    sam.param_groups[0]["params"][0] = model.weight = nn.Parameter(torch.randn(19, 17))
    sam.param_groups[0]["params"][1] = model.bias = nn.Parameter(torch.randn(19))
    perturb_and_restore(model, sam)
    assert copies_of((23, 17), model.weight) == set()
    assert len(copies_of((19, 17), model.weight)) == 1


def test_a_step_in_inference_mode_leaves_nothing_behind():
    model = nn.Linear(3, 3)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    with torch.inference_mode():
        for w in model.parameters():
            w.grad = torch.ones_like(w)
        with sam.perturbed(zero_grad=False):
            pass
    perturb_and_restore(model, sam)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_by_themselves(copied):
    model, sam = trained(3)
    other_model, other = copied((model, sam))
    assert other.state is other.base_optimizer.state
    batch = list(batches(4))[3]
    step_with_closure(model, sam, batch)
    assert not torch.equal(model[0].weight, other_model[0].weight)
    step_with_closure(other_model, other, batch)
    assert_equal(weights_of(model), weights_of(other_model))


def test_a_pickled_optimizer_has_weights_and_momentum_only():
    model = nn.Linear(100, 100)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1, momentum=0.9)
    model(torch.ones(1, 100)).sum().backward()
    with sam.perturbed(zero_grad=False):
        pass
    sam.step()
    nbytes = sum(w.numel() * w.element_size() for w in model.parameters())
    assert 2 * nbytes < len(pickle.dumps(sam)) < 2.5 * nbytes


def test_a_copy_made_at_the_perturbed_weights_goes_back():
    model, sam = trained(3)
    at_w = weights_of(model)
    loss_at(model, next(batches(1))).backward()
    with sam.perturbed():
        other_model, other = copy.deepcopy((model, sam))
        assert not torch.equal(other_model[0].weight, at_w[0])
    other.restore()
    assert_equal(weights_of(other_model), at_w)


def test_the_original_of_a_copy_goes_back_after_the_copy_was_perturbed():
    model, sam = trained(3)
    other_model, other = copy.deepcopy((model, sam))
    at_w, data = weights_of(model), list(batches(2))
    loss_at(model, data[0]).backward()
    loss_at(other_model, data[1]).backward()
    sam.perturb()
    set_weights(other_model, [w + 1 for w in at_w])
    other.perturb()
    sam.restore()
    other.restore()
    assert_equal(weights_of(model), at_w)
    assert_equal(weights_of(other_model), [w + 1 for w in at_w])


def test_schedulers_and_hooks_see_one_optimizer():
    model = network()
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(sam, 1, gamma=0.5)
    calls = []
    sam.register_step_post_hook(lambda *_: calls.append(1))
    before = weights_of(model)
    for i, batch in enumerate(batches(3)):
        step_with_closure(model, sam, batch)
        assert sam.base_optimizer.param_groups[0]["lr"] == 0.1 * 0.5**i
        scheduler.step()
    assert len(calls) == 3
    assert not torch.equal(before[0], model[0].weight)


def test_a_group_added_later_is_trained_and_perturbed():
    model, (batch,) = network(), batches(1)
    sam = SAM(model[0].parameters(), torch.optim.SGD, rho=0.5, lr=0.1, momentum=0.9)
    sam.add_param_group({"params": model[3].parameters(), "rho": 0.1, "lr": 0.01})
    assert sam.param_groups[1]["momentum"] == 0.9
    before = model[3].weight.detach().clone()
    loss_at(model, batch).backward()
    with sam.perturbed(zero_grad=False):
        assert not torch.equal(model[3].weight, before)
    sam.step()
    torch.testing.assert_close(model[3].weight.detach(), before - 0.01 * model[3].weight.grad)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf")])
def test_a_bad_rho_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        SAM(network().parameters(), torch.optim.SGD, rho=rho, lr=0.1)
    with pytest.raises(ValueError, match="rho"):
        SAM([{"params": network().parameters(), "rho": rho}], torch.optim.SGD, lr=0.1)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="adaptive"):
        SAM(
            network().parameters(),
            torch.optim.SGD,
            adaptive=True,
            perturbation=AdaptiveAscent(),
            lr=0.1,
        )
    with pytest.raises(ValueError, match="eta"):
        AdaptiveAscent(eta=-1)
    model, (batch,) = network(), batches(1)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, perturbation=AdaptiveAscent(), lr=0.1)
    loss_at(model, batch).backward()
    with pytest.raises(ValueError, match="named_parameters"):
        sam.perturb()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    sam = SAM(embedding.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        sam.perturb()
