"""A small network, its batches, and a SAM step in the three forms that people write."""

import torch
from torch import nn

from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.fisher_sam import FisherAscent
from sam_lightning.optim.methods.friendly_sam import FriendlyAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.looksam import LookSAM
from sam_lightning.optim.methods.msam import MomentumAscent
from sam_lightning.optim.methods.vasso import AveragedAscent
from sam_lightning.optim.methods.wsam import WeightedSharpness

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

METHODS = {
    "sam": {},
    "asam": {"perturbation": AdaptiveAscent(eta=0.01)},
    "adaptive": {"adaptive": True},
}
RELATIVES = {
    **METHODS,
    "friendly": {"perturbation": FriendlyAscent()},
    "gsam": {"gradient_transform": SurrogateGap()},
    "looksam": {"gradient_transform": LookSAM()},
    "msam": {"perturbation": MomentumAscent()},
    "vasso": {"perturbation": AveragedAscent(theta=0.4)},
    "fisher": {"perturbation": FisherAscent(eta=10.0)},
    "wsam": {"gradient_transform": WeightedSharpness(gamma=0.7)},
}


def in_turn(i, model, optimizer, batch):
    """Step in one of the three forms, each in its turn."""
    optimizer.zero_grad()
    return STEPS[i % len(STEPS)](model, optimizer, batch)


def plain_sam_step(model, base, batch, ascent):
    """A SAM step by hand; ``ascent`` maps gradients and weights to e."""
    at_w = weights_of(model)
    base.zero_grad()
    params = list(model.parameters())

    def gradient():
        return torch.autograd.grad(loss_at(model, batch), params, materialize_grads=True)

    e = ascent(gradient(), at_w)
    set_weights(model, [w + d for w, d in zip(at_w, e, strict=True)])
    grads = gradient()
    set_weights(model, at_w)
    for p, g in zip(model.parameters(), grads, strict=True):
        p.grad = g.clone()
    base.step()


def along_gradient(rho):
    def ascent(grads, weights):
        norm = torch.cat([g.flatten() for g in grads]).norm()
        return [rho * g / norm for g in grads]

    return ascent
