"""What perturb and restore do to the weights, and what they leave alone."""

import itertools
import math

import pytest
import torch
from torch import nn

from host_syncs import HostSyncs
from sam_lightning import SAM
from sam_lightning.optim.foreach import global_norm
from sam_lightning.optim.methods.asam import AdaptiveAscent
from steps import (
    BASES,
    METHODS,
    assert_close,
    assert_equal,
    batches,
    closure_of,
    loss_at,
    network,
    step_with_context,
    weights_of,
)


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


def test_without_a_gradient_nothing_can_be_perturbed():
    model = network()
    before = weights_of(model)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1)
    with pytest.raises(RuntimeError, match="no gradient since the last step"), sam.perturbed():
        raise AssertionError
    assert_equal(weights_of(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_zero_gradient_moves_nothing_and_stays_finite(dtype):
    w = nn.Parameter(torch.randn(5, dtype=dtype))
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


LAYOUTS = [torch.contiguous_format, torch.channels_last]


def parameters_of(dtype, layout, grad_layout):
    """A kernel, a vector and a transposed matrix, with gradients laid out their own way."""
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3).to(dtype).to(memory_format=layout)
    params = [nn.Parameter(t) for t in (kernel, torch.randn(5).to(dtype))]
    params.append(nn.Parameter(torch.randn(6, 5).to(dtype).t()))
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    params[0].grad = params[0].grad.to(memory_format=grad_layout)
    return params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("count", [2, 3])
def test_every_dtype_and_memory_layout_moves_by_the_formula(dtype, layout, grad_layout, count):
    params = parameters_of(dtype, layout, grad_layout)[:count]
    groups = [{"params": params[:1], "rho": 0.3}, {"params": params[1:]}]
    sam = SAM(groups, torch.optim.SGD, rho=0.1, lr=0.1)
    before = [p.detach().clone() for p in params]
    norm = torch.cat([p.grad.double().flatten() for p in params]).norm()
    sam.perturb()
    for p, w, rho in zip(params, before, [0.3, 0.1, 0.1], strict=False):
        expected = w.double() + rho * p.grad.double() / (norm + 1e-12)
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        assert (p.double() - expected).abs().max() <= rounding
    sam.restore()
    assert_equal(params, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graph_from_before_the_move_cannot_be_used_after_it(dtype):
    w = nn.Parameter(torch.randn(3, dtype=dtype))
    loss = (w * w).sum()
    loss.backward(retain_graph=True)
    sam = SAM([w], torch.optim.SGD, rho=0.1, lr=0.1)
    with sam.perturbed(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
        with sam.perturbed(scaler=scaler):
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


def test_adaptive_sam_knows_weights_as_its_authors_do():
    names = ["lstm.weight_ih_l0", "parametrizations.weight.original0", "fc.weight", "fc.bias"]
    weights, grads = ([torch.full((1,), x) for _ in names] for x in (3.0, 1.0))
    direction, norm = AdaptiveAscent(eta=0)(weights, grads, names, [{} for _ in names])
    assert [d.item() for d in direction] == [9, 9, 9, 1]
    assert norm.item() == pytest.approx(math.sqrt(9 + 9 + 9 + 1))


@pytest.mark.parametrize("eta", [0.0, 0.01])
def test_adaptive_sam_of_complex_weights_takes_their_sizes(eta):
    torch.manual_seed(0)
    weight, grad = torch.randn(2, 6, 5, dtype=torch.complex64)
    direction, norm = AdaptiveAscent(eta)([weight], [grad], ["weight"], [{}])
    t = weight.abs() + eta
    torch.testing.assert_close(direction[0], t.square() * grad)
    torch.testing.assert_close(norm, (t * grad).abs().square().sum().sqrt())


@pytest.mark.parametrize("direction", [[], [torch.ones(2)] * 2, (torch.ones(2),) * 2])
def test_a_direction_of_another_length_moves_nothing(direction):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    sam = SAM(
        [weight], torch.optim.SGD, perturbation=lambda *_: (direction, torch.ones(())), lr=0.1
    )
    with pytest.raises(ValueError, match=f"a direction of {len(direction)} tensors for 1 weights"):
        sam.perturb()
    assert torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("eta", [0.0, 0.01])
@pytest.mark.parametrize("normalize_bias", [False, True])
def test_adaptive_sam_of_many_weights_follows_the_formula(eta, normalize_bias):
    """Made part by part, it is what equation 7 of ASAM says of all weights as one vector."""
    torch.manual_seed(0)
    sizes = {"a.weight": (700, 400), "a.bias": (400,), "b.weight": (600, 500), "b.bias": (9,)}
    weights = {name: nn.Parameter(torch.randn(size)) for name, size in sizes.items()}
    for w in weights.values():
        w.grad = torch.randn_like(w)
    names, before = list(sizes), [w.detach().double() for w in weights.values()]
    t = [
        w.abs() + eta if normalize_bias or name.endswith("weight") else torch.ones_like(w)
        for name, w in zip(names, before, strict=True)
    ]
    t_g = [x * w.grad.double() for x, w in zip(t, weights.values(), strict=True)]
    norm = math.sqrt(sum(x.square().sum().item() for x in t_g))
    ascent = AdaptiveAscent(eta=eta, normalize_bias=normalize_bias)
    sam = SAM(weights.items(), torch.optim.SGD, rho=2.0, perturbation=ascent, lr=0.1)
    sam.perturb()
    for w, old, x, y in zip(weights.values(), before, t, t_g, strict=True):
        expected = 2.0 * x * y / norm
        moved = w.detach().double() - old
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=5e-7)
    sam.restore()
    direction, _ = ascent(
        list(weights.values()), [w.grad for w in weights.values()], names, [{} for _ in names]
    )
    assert len(list(direction)) == len(direction) == 4
    for i in (*range(4), -1):
        torch.testing.assert_close(direction[i].double(), t[i] * t_g[i], rtol=1e-5, atol=0)
