"""The optimizer alone: against formulas in float64, plain loops and a published implementation."""

import copy
import io
import itertools
import pickle

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sam_lightning import SAM
from sam_lightning.perturbations import AdaptiveAscent
from sam_lightning.sam import global_norm

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "nesterov": (
        torch.optim.SGD,
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    ),
    "fused": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


def network(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3)).to(dtype)


def batches(count, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield (
            torch.randn(10, 6, generator=generator, dtype=dtype),
            torch.randint(3, (10,), generator=generator),
        )


def loss_at(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def gradient(model, batch):
    return torch.autograd.grad(loss_at(model, batch), list(model.parameters()))


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def set_weights(model, weights):
    with torch.no_grad():
        for p, w in zip(model.parameters(), weights, strict=True):
            p.copy_(w)


def assert_close(one, two, **tolerance):
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_equal(one, two):
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def closure_of(model, optimizer, batch):
    def closure():
        optimizer.zero_grad()
        loss = loss_at(model, batch)
        loss.backward()
        return loss

    return closure


def step_with_closure(model, optimizer, batch):
    return optimizer.step(closure_of(model, optimizer, batch))


def step_in_two(model, optimizer, batch):
    loss = loss_at(model, batch)
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_at(model, batch).backward()
    optimizer.second_step(zero_grad=True)
    return loss


def step_with_context(model, optimizer, batch):
    optimizer.zero_grad()
    loss = loss_at(model, batch)
    loss.backward()
    with optimizer.perturbed():
        loss_at(model, batch).backward()
    optimizer.step()
    return loss


STEPS = [step_with_closure, step_in_two, step_with_context]


def ascent(weights, grads, names, rho, method):
    """e of the papers, for all weights as one vector: SAM's equation 2, ASAM's equation 7."""
    w = torch.cat([x.flatten() for x in weights])
    g = torch.cat([x.flatten() for x in grads])
    if method == "sam":
        e = rho * g / g.norm()
    else:
        is_weight = torch.cat(
            [
                torch.full((x.numel(),), n.endswith("weight"))
                for x, n in zip(weights, names, strict=True)
            ]
        )
        t = w.abs() if method == "adaptive" else torch.where(is_weight, w.abs() + 0.01, 1.0)
        e = rho * t**2 * g / (t * g).norm()
    return [
        part.view_as(x)
        for part, x in zip(e.split([x.numel() for x in weights]), weights, strict=True)
    ]


METHODS = {
    "sam": {},
    "asam": {"perturbation": AdaptiveAscent(eta=0.01)},
    "adaptive": {"adaptive": True},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_follow_the_formula(method, base, step):
    cls, options = BASES[base]
    ours, theirs = network(), network()
    names = [name for name, _ in theirs.named_parameters()]
    sam = SAM(ours.named_parameters(), cls, rho=0.3, **METHODS[method], **options)
    reference = cls(theirs.parameters(), **options)
    for batch in batches(20):
        loss = step(ours, sam, batch)
        torch.testing.assert_close(loss, loss_at(theirs, batch), atol=1e-12, rtol=0)
        kept = weights_of(theirs)
        e = ascent(kept, gradient(theirs, batch), names, 0.3, method)
        set_weights(theirs, [w + d for w, d in zip(kept, e, strict=True)])
        grads = gradient(theirs, batch)
        set_weights(theirs, kept)
        for p, g in zip(theirs.parameters(), grads, strict=True):
            p.grad = g
        reference.step()
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-10, rtol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_twenty_steps_are_those_of_pytorch_optimizer(adaptive):
    ours, theirs = network(), network()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}
    sam = SAM(ours.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, **options)
    published = pytorch_optimizer.SAM(
        theirs.parameters(), torch.optim.SGD, rho=0.2, adaptive=adaptive, **options
    )
    for batch in batches(20):
        step_in_two(ours, sam, batch)
        step_in_two(theirs, published, batch)
    # the published one rounds its norm to float32
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-7, rtol=0)


def test_on_a_quadratic_the_second_gradient_is_known():
    torch.manual_seed(0)
    a = torch.randn(7, 7, dtype=torch.float64)
    hessian = a @ a.T
    w = nn.Parameter(torch.randn(7, dtype=torch.float64))
    before = w.detach().clone()
    sam = SAM([w], torch.optim.SGD, rho=0.5, lr=0.01)
    sam.step(lambda: (loss := w @ hessian @ w / 2).backward() or loss)
    g = hessian @ before
    expected = before - 0.01 * (g + 0.5 * hessian @ g / g.norm())
    torch.testing.assert_close(w.detach(), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("base", BASES)
def test_rho_0_is_the_base_optimizer_bit_for_bit_at_one_pass(base):
    cls, options = BASES[base]
    ours, theirs = network(torch.float32), network(torch.float32)
    forwards = []
    ours.register_forward_hook(lambda *_: forwards.append(1))
    sam = SAM(ours.parameters(), cls, rho=0.0, **options)
    reference = cls(theirs.parameters(), **options)
    for batch in batches(20, torch.float32):
        sam.step(closure_of(ours, sam, batch))
        reference.zero_grad()
        loss_at(theirs, batch).backward()
        reference.step()
    assert_equal(weights_of(ours), weights_of(theirs))
    assert len(forwards) == 20
    assert not sam.climbs


# ---------------------------------------------------------------------- perturb and restore


def perturbed_by(model, sam, batch):
    before = weights_of(model)
    loss_at(model, batch).backward()
    sam.perturb()
    moved = [p.detach() - w for p, w in zip(model.parameters(), before, strict=True)]
    sam.restore()
    assert_equal(weights_of(model), before)
    return moved


def test_the_perturbation_has_one_norm_over_all_parameters():
    model, (batch,) = network(), batches(1)
    moved = perturbed_by(model, SAM(model.parameters(), torch.optim.SGD, rho=0.7, lr=1), batch)
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.7, rel=1e-9)
    grads = torch.cat([p.grad.flatten() for p in model.parameters()])
    cosine = torch.cat([m.flatten() for m in moved]) @ grads / (0.7 * grads.norm())
    assert cosine.item() == pytest.approx(1, rel=1e-9)


def test_groups_have_their_own_rho_and_share_the_norm():
    model, (batch,) = network(), batches(1)
    groups = [
        {"params": model[0].parameters(), "rho": 0.5},
        {"params": model[2].parameters(), "rho": 0.0},
        {"params": model[3].parameters()},
    ]
    sam = SAM(groups, torch.optim.SGD, rho=2.0, lr=1)
    moved = perturbed_by(model, sam, batch)
    grads = [p.grad for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in grads]).norm()
    rhos = [0.5, 0.5, 0.0, 0.0, 2.0, 2.0]
    assert_close(moved, [rho * g / norm for rho, g in zip(rhos, grads, strict=True)])
    sam.param_groups[2]["rho"] = 1.0  # as a schedule of rho would
    for p in model.parameters():
        p.grad = None
    moved = perturbed_by(model, sam, batch)
    assert_close(moved[4:], [g / norm for g in grads[4:]])


def test_frozen_unused_and_missing_parameters_are_left_alone():
    model, (batch,) = network(), batches(1)
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    groups = [{"params": [*model.parameters(), unused]}, {"params": []}]
    sam = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    bias = model[0].bias.detach().clone()
    loss_at(model, batch).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    weight = model[0].weight.detach().clone()
    with sam.perturbed(zero_grad=False):
        assert torch.equal(model[0].bias, bias)
        assert torch.equal(unused, torch.ones_like(unused))
        expected = weight + 0.1 * model[0].weight.grad / norm
        torch.testing.assert_close(model[0].weight.detach(), expected)
    sam.step()
    assert torch.equal(model[0].bias, bias)
    assert torch.equal(unused, torch.ones_like(unused))


def test_without_any_gradient_a_step_does_nothing():
    model = network()
    before = weights_of(model)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    with sam.perturbed():
        assert_equal(weights_of(model), before)
    sam.step()
    assert_equal(weights_of(model), before)


def test_a_zero_gradient_moves_nothing_and_stays_finite():
    w = nn.Parameter(torch.randn(5))
    before = w.detach().clone()
    sam = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)
    (w * 0).sum().backward()
    with sam.perturbed():
        assert torch.equal(w, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_restored_bit_for_bit(dtype):
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter((torch.randn(20_000, generator=generator) * 10).to(dtype))
    w.grad = torch.randn(20_000, generator=generator).to(dtype)
    before = w.detach().clone()
    sam = SAM([w], torch.optim.SGD, rho=50.0, lr=0.1)
    with sam.perturbed():
        assert (w != before).float().mean() > 0.3
    assert torch.equal(w, before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_in_the_second_pass_restores_the_weights(error):
    model, (batch,) = network(), batches(1)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = weights_of(model)
    loss_at(model, batch).backward()

    def second_pass():
        with sam.perturbed():
            assert not torch.equal(model[0].weight, before[0])
            raise error

    with pytest.raises(error):
        second_pass()
    assert_equal(weights_of(model), before)
    calls = itertools.count()

    def closure():
        if next(calls) == 1:
            raise error
        return closure_of(model, sam, batch)()

    with pytest.raises(error):
        sam.step(closure)
    assert_equal(weights_of(model), before)


def test_perturbing_twice_is_refused_and_loses_nothing():
    model, (batch,) = network(), batches(1)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    before = weights_of(model)
    loss_at(model, batch).backward()
    sam.perturb()
    with pytest.raises(RuntimeError, match="perturbed already"):
        sam.perturb()
    sam.restore()
    assert_equal(weights_of(model), before)
    sam.restore()  # without a perturbation: nothing happens
    assert_equal(weights_of(model), before)


def test_perturbed_clears_the_gradients_unless_told_not_to():
    model, (batch,) = network(), batches(1)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    loss_at(model, batch).backward()
    kept = [p.grad.clone() for p in model.parameters()]
    with sam.perturbed(zero_grad=False):
        assert_equal([p.grad for p in model.parameters()], kept)
    with sam.perturbed():
        assert all(p.grad is None for p in model.parameters())


def test_decay_in_ascent_adds_the_l2_term_to_the_ascent_only():
    ours, theirs = network(), network()
    options = {"lr": 0.1, "weight_decay": 0.2}
    sam = SAM(ours.parameters(), torch.optim.SGD, rho=0.3, decay_in_ascent=True, **options)
    reference = torch.optim.SGD(theirs.parameters(), **options)
    for batch in batches(5):
        step_with_closure(ours, sam, batch)
        kept = weights_of(theirs)
        l2 = [g + 0.2 * w for g, w in zip(gradient(theirs, batch), kept, strict=True)]
        e = ascent(kept, l2, [], 0.3, "sam")
        set_weights(theirs, [w + d for w, d in zip(kept, e, strict=True)])
        grads = gradient(theirs, batch)
        set_weights(theirs, kept)
        for p, g in zip(theirs.parameters(), grads, strict=True):
            p.grad = g
        reference.step()
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-12, rtol=0)


# -------------------------------------------------------------------- non-finite and scaled


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_gradient_moves_nothing(method, bad):
    model, (batch,) = network(), batches(1)
    sam = SAM(model.named_parameters(), torch.optim.SGD, rho=0.5, lr=0.1, **METHODS[method])
    before = weights_of(model)
    loss_at(model, batch).backward()
    model[2].weight.grad[1] = bad
    with sam.perturbed():
        assert_equal(weights_of(model), before)
    assert_equal(weights_of(model), before)


@pytest.mark.parametrize("base", BASES)
def test_found_inf_skips_one_step_only(base):
    cls, options = BASES[base]
    ours, theirs = network(torch.float32), network(torch.float32)
    sam = SAM(ours.parameters(), cls, rho=0.0, **options)
    reference = cls(theirs.parameters(), **options)
    for i, batch in enumerate(batches(6, torch.float32)):
        skip = i in (0, 3)
        sam.zero_grad()
        loss_at(ours, batch).backward()
        if skip:
            ours[0].weight.grad.fill_(float("nan"))
        sam.found_inf = torch.tensor(float(skip))
        sam.step()
        if not skip:
            reference.zero_grad()
            loss_at(theirs, batch).backward()
            reference.step()
    assert_equal(weights_of(ours), weights_of(theirs))


def test_a_gradient_scaler_sees_through_it():
    ours, theirs = network(torch.float32), network(torch.float32)
    options = {"rho": 0.5, "lr": 0.1, "momentum": 0.9}
    sam = SAM(ours.parameters(), torch.optim.SGD, **options)
    plain = SAM(theirs.parameters(), torch.optim.SGD, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for batch in batches(8, torch.float32):
        sam.zero_grad()
        scaler.scale(loss_at(ours, batch)).backward()
        with sam.perturbed(inv_scale=1 / scaler.scale(torch.ones(()))):
            scaler.scale(loss_at(ours, batch)).backward()
        scaler.step(sam)
        scaler.update()
        step_with_context(theirs, plain, batch)
    assert scaler.get_scale() > 2.0**10
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-5, rtol=0)


def test_mixed_dtypes_share_one_norm_which_does_not_overflow():
    halves = [nn.Parameter(torch.zeros(4, dtype=d)) for d in (torch.float16, torch.float32)]
    halves[0].grad = torch.full((4,), 60_000.0, dtype=torch.float16)  # squares overflow float16
    halves[1].grad = torch.full((4,), 80_000.0)
    norm = global_norm(p.grad for p in halves)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(200_000, rel=1e-3)
    sam = SAM(halves, torch.optim.SGD, rho=1.0, lr=0.1)
    with sam.perturbed():
        torch.testing.assert_close(
            halves[0].detach(), torch.full((4,), 0.3).half(), rtol=2e-3, atol=0
        )
        torch.testing.assert_close(halves[1].detach(), torch.full((4,), 0.4), rtol=2e-3, atol=0)


class HostSyncs(TorchDispatchMode):
    """Collects operations whose result the host has to wait for."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_never_waits_for_the_device(method, foreach):
    model = network(torch.float32)
    options = {"lr": 0.1, "momentum": 0.9, "foreach": foreach}
    sam = SAM(model.named_parameters(), torch.optim.SGD, rho=0.1, **METHODS[method], **options)
    with HostSyncs() as syncs:
        for batch in batches(3, torch.float32):
            step_with_context(model, sam, batch)
        assert not syncs.found
        assert torch.ones(()).item() == 1  # what the test looks for is seen
        assert syncs.found


# ------------------------------------------------------------------------ state and groups


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


def test_nothing_is_kept_between_steps():
    _, sam = trained(3)
    assert sam._saved is None
    assert {name for s in sam.state.values() for name in s} == {"momentum_buffer"}


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
