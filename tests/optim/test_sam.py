"""SAM steps against formulas in float64, plain loops and a published implementation."""

import pytest
import pytorch_optimizer
import torch
from torch import nn

from sam_lightning import SAM
from steps import (
    BASES,
    METHODS,
    STEPS,
    assert_close,
    assert_equal,
    batches,
    closure_of,
    gradient,
    loss_at,
    network,
    set_weights,
    step_in_two,
    step_with_closure,
    weights_of,
)


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


def step_from(model, base, batch, e):
    """Step ``base`` at w with the gradient at w + e, and leave the moving to plain additions."""
    kept = weights_of(model)
    set_weights(model, [w + d for w, d in zip(kept, e, strict=True)])
    grads = gradient(model, batch)
    set_weights(model, kept)
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g
    base.step()


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
        step_from(theirs, reference, batch, e)
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
    assert not sam.perturbs


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
        step_from(theirs, reference, batch, e)
    assert_close(weights_of(ours), weights_of(theirs), atol=1e-12, rtol=0)
