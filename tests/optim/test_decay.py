"""Weight decay as an L2 term of the loss, as in the training step of google-research/sam."""

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, RMSprop

from sam_lightning import SAM
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.msam import MomentumAscent
from steps import assert_close, assert_equal, batches, closure_of, loss_at, network, weights_of

RHO, CLIP = 0.3, 0.4
NESTEROV = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
BASES = {
    "sgd": (SGD, {"lr": 0.1}),
    "nesterov": (SGD, NESTEROV),
    "fused": (SGD, {**NESTEROV, "fused": True}),
    "adam": (Adam, {"lr": 0.01}),
    "rmsprop": (RMSprop, {"lr": 0.01, "momentum": 0.9}),
}


def decay_of(p):
    return 0.05 if p.ndim > 1 else 0.2


def sam_of(model, base="nesterov", **options):
    groups = [
        {"params": [p for p in model.parameters() if decay_of(p) == decay], "weight_decay": decay}
        for decay in (0.05, 0.2)
    ]
    cls, own = BASES[base]
    return SAM(groups, cls, **{"rho": RHO, "decay_in_ascent": "both", **own, **options})


def with_penalty(model, batch):
    """The gradient of the loss with its L2 term, by autograd."""
    penalty = sum(decay_of(p) / 2 * p.square().sum() for p in model.parameters())
    return torch.autograd.grad(loss_at(model, batch) + penalty, list(model.parameters()))


class PlainLoop:
    """The official step: penalised gradients, one norm, clipping, an optimizer without decay."""

    def __init__(self, base="nesterov", clip=None):
        self.model, self.clip = network(), clip
        cls, own = BASES[base]
        self.optimizer = cls(self.model.parameters(), **own)

    def step(self, batch, perturb=True):
        kept = weights_of(self.model)
        grads = with_penalty(self.model, batch)
        if perturb:
            norm = torch.cat([g.flatten() for g in grads]).norm()
            with torch.no_grad():
                for p, g in zip(self.model.parameters(), grads, strict=True):
                    p += RHO * g / norm
            grads = with_penalty(self.model, batch)
            with torch.no_grad():
                for p, w in zip(self.model.parameters(), kept, strict=True):
                    p.copy_(w)
        for p, g in zip(self.model.parameters(), grads, strict=True):
            p.grad = g.clone()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()


def clip_grads(model, clip):
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)


def in_a_block(model, sam, batch, clip):
    loss_at(model, batch).backward()
    with sam.perturbed(model):
        loss_at(model, batch).backward()
    clip_grads(model, clip)
    sam.step()


def restored_by_hand(model, sam, batch, clip):
    loss_at(model, batch).backward()
    sam.first_step(zero_grad=True)
    loss_at(model, batch).backward()
    sam.restore()
    clip_grads(model, clip)
    sam.step()


def combined_by_hand(model, sam, batch, clip):
    loss_at(model, batch).backward()
    sam.first_step(zero_grad=True)
    loss_at(model, batch).backward()
    sam.combine()
    clip_grads(model, clip)
    sam.second_step()


def in_two_calls(model, sam, batch, clip):
    loss_at(model, batch).backward()
    sam.first_step(zero_grad=True)
    loss_at(model, batch).backward()
    sam.second_step()


def by_closure(model, sam, batch, clip):
    sam.step(closure_of(model, sam, batch), model)


FORMS = {
    **{f.__name__: (f, CLIP) for f in (in_a_block, restored_by_hand, combined_by_hand)},
    **{f.__name__: (f, None) for f in (in_two_calls, by_closure)},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
def test_decay_in_both_passes_is_an_l2_term_of_the_loss(form, base):
    step, clip = FORMS[form]
    model, loop = network(), PlainLoop(base, clip)
    sam = sam_of(model, base)
    for i, batch in enumerate(batches(20)):
        sam.zero_grad()
        if i % 3 == 2:  # a plain step has the term too
            loss_at(model, batch).backward()
            sam.skip_perturbation()
            sam.combine()
            clip_grads(model, clip)
            sam.step()
        else:
            step(model, sam, batch, clip)
        loop.step(batch, perturb=i % 3 != 2)
    assert_close(weights_of(model), weights_of(loop.model), atol=1e-10, rtol=0)
    assert [group["weight_decay"] for group in sam.param_groups] == [0.05, 0.2]


def test_at_rho_0_and_with_maximize_too():
    ours, loop = network(), PlainLoop()
    sam = sam_of(ours, rho=0.0)
    larger, theirs = network(), PlainLoop()
    maximizing = sam_of(larger, maximize=True)
    for batch in batches(8):
        sam.step(closure_of(ours, sam, batch))
        loop.step(batch, perturb=False)
        maximizing.zero_grad()
        (-loss_at(larger, batch)).backward()
        with maximizing.perturbed():
            (-loss_at(larger, batch)).backward()
        maximizing.step()
        theirs.step(batch)
    assert_close(weights_of(ours), weights_of(loop.model), atol=1e-12, rtol=0)
    assert_close(weights_of(larger), weights_of(theirs.model), atol=1e-12, rtol=0)


def test_shares_of_a_step_share_the_decay():
    """Two micro-batches, each with its own perturbation."""
    model, loop = network(), PlainLoop()
    sam = sam_of(model)
    for one, two in zip(batches(8), reversed(list(batches(8))), strict=True):
        kept = []
        for batch, share in ((one, 0.25), (two, 0.75)):
            sam.zero_grad()
            loss_at(model, batch).backward()
            with sam.perturbed(share=share):
                (share * loss_at(model, batch)).backward()
            kept.append([p.grad for p in model.parameters()])
        for p, a, b in zip(model.parameters(), *kept, strict=True):
            p.grad = a + b
        sam.step()
        found = []
        for batch in (one, two):
            before = weights_of(loop.model)
            grads = with_penalty(loop.model, batch)
            norm = torch.cat([g.flatten() for g in grads]).norm()
            with torch.no_grad():
                for p, g in zip(loop.model.parameters(), grads, strict=True):
                    p += RHO * g / norm
            found.append(with_penalty(loop.model, batch))
            with torch.no_grad():
                for p, w in zip(loop.model.parameters(), before, strict=True):
                    p.copy_(w)
        for p, a, b in zip(loop.model.parameters(), *found, strict=True):
            p.grad = 0.25 * a + 0.75 * b
        loop.optimizer.step()
    assert_close(weights_of(model), weights_of(loop.model), atol=1e-11, rtol=0)


def test_a_method_combines_the_gradients_before_they_are_decayed():
    ours, theirs = network(), network()
    (batch,) = batches(1)
    both = sam_of(ours, gradient_transform=SurrogateGap(0.4))
    ascent = sam_of(theirs, gradient_transform=SurrogateGap(0.4), decay_in_ascent=True)
    for model, sam in ((ours, both), (theirs, ascent)):
        loss_at(model, batch).backward()
        with sam.perturbed(model):
            moved = weights_of(model)
            loss_at(model, batch).backward()
    expected = [q.grad + decay_of(q) * w for q, w in zip(theirs.parameters(), moved, strict=True)]
    assert_close([p.grad for p in ours.parameters()], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("block", [True, False])
@pytest.mark.parametrize("clip", [None, CLIP])
def test_with_a_scaler(block, clip):
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    model, loop = network(), PlainLoop(clip=clip if block else None)
    sam = sam_of(model)
    scales = set()
    for i, batch in enumerate(batches(12)):
        scales.add(scaler.get_scale())
        scaler.scale(loss_at(model, batch)).backward()
        if i % 4 == 3:
            sam.skip_perturbation()
            if block:
                sam.combine(scaler)
        elif block:
            with sam.perturbed(model, scaler=scaler):
                scaler.scale(loss_at(model, batch)).backward()
        else:
            sam.first_step(zero_grad=True, scaler=scaler)
            scaler.scale(loss_at(model, batch)).backward()
        if block:
            scaler.unscale_(sam)
            clip_grads(model, clip)
        scaler.step(sam)
        scaler.update()
        model.zero_grad()
        loop.step(batch, perturb=i % 4 != 3)
    assert len(scales) > 2
    assert_close(weights_of(model), weights_of(loop.model), atol=1e-10, rtol=0)


def test_a_gradient_that_is_unscaled_too_early_is_refused():
    scaler = torch.amp.GradScaler("cpu")
    model = network()
    sam = sam_of(model)
    before = weights_of(model)
    (batch,) = batches(1)
    scaler.scale(loss_at(model, batch)).backward()
    sam.first_step(zero_grad=True, scaler=scaler)
    scaler.scale(loss_at(model, batch)).backward()
    scaler.unscale_(sam)
    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(\): it has unscaled one"):
        scaler.step(sam)
    assert_equal(weights_of(model), before)


def test_a_failed_second_pass_leaves_the_next_step_as_it_is():
    model, loop = network(), PlainLoop()
    sam = sam_of(model)
    one, two = batches(2)
    loss_at(model, one).backward()
    with pytest.raises(KeyboardInterrupt), sam.perturbed(model):
        raise KeyboardInterrupt
    sam.zero_grad()
    in_a_block(model, sam, two, None)
    loop.step(two)
    assert_close(weights_of(model), weights_of(loop.model), atol=1e-12, rtol=0)


def test_a_base_optimizer_that_fails_keeps_its_weight_decay():
    class Failing(SGD):
        def step(self, closure=None):
            assert [group["weight_decay"] for group in self.param_groups] == [0.0]
            raise OSError(5, "broken")

    model = network()
    sam = SAM(model.parameters(), Failing, lr=0.1, weight_decay=0.1, decay_in_ascent="both")
    with pytest.raises(OSError, match="broken"):
        sam.step(closure_of(model, sam, next(batches(1))))
    assert sam.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (SGD, {"decay_in_ascent": "all"}, "decay_in_ascent=all: allowed are false, true, both"),
        (AdamW, {}, "decay_in_ascent=both: AdamW does not add its weight_decay to the gradient"),
        (torch.optim.Rprop, {}, "decay_in_ascent=both: Rprop does not"),
        (
            SGD,
            {"perturbation": MomentumAscent(), "momentum": 0.9, "decay_in_ascent": True},
            "decay_in_ascent=True: not with MomentumAscent",
        ),
    ],
)
def test_what_is_refused(base, options, message):
    with pytest.raises(ValueError, match=message):
        SAM(network().parameters(), base, lr=0.1, **{"decay_in_ascent": "both", **options})
