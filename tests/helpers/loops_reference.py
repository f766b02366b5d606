"""SAM's methods as plain float64 loops over flat vectors, and a SAM step as people write it."""

import torch
from torch import Tensor, nn

from sam_lightning import SAM, frozen_running_stats
from sam_lightning.optim.methods.asam import AdaptiveAscent
from sam_lightning.optim.methods.friendly_sam import FriendlyAscent
from sam_lightning.optim.methods.gsam import SurrogateGap
from sam_lightning.optim.methods.looksam import LookSAM

STEPS, RHO, EVERY = 20, 0.3, 5
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-2

METHODS = {
    "sam": {},
    "asam": {"perturbation": AdaptiveAscent(eta=0.01)},
    "adaptive": {"adaptive": True},
    "gsam": {"gradient_transform": SurrogateGap(0.4)},
    "friendly": {"perturbation": FriendlyAscent(sigma=1.0, decay=0.9)},
    "looksam": {"gradient_transform": LookSAM(0.7)},
}
COMBINES = ["gsam", "looksam"]
DECAYS = {"decay": {"decay_in_ascent": "both"}}  # is averaged after combine(), as those are


def network(dtype=torch.float64, batch_norm=True):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(12) if batch_norm else nn.LayerNorm(12)
    first = [nn.Linear(6, 12), norm, nn.Tanh()]
    second = [nn.Linear(12, 9), nn.GELU(), nn.LayerNorm(9), nn.Linear(9, 3)]
    return nn.Sequential(*first, *second).to(dtype)


def batches(dtype=torch.float64, count=STEPS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 6, generator=generator, dtype=dtype),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_at(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def sam_of(model, method, rho=RHO, **options):
    sgd = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY}
    parameters = model.named_parameters()
    own = {**METHODS, **DECAYS}[method]
    return SAM(parameters, torch.optim.SGD, rho=rho, **own, **{**sgd, **options})


def perturbs_at(method, step):
    return method != "looksam" or step % EVERY == 0


def state_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(one, two, tolerance=1e-10):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name].to(two[name]), two[name], atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------- the forms


def with_perturbed(
    model, optimizer, batch, perturb=True, backward=Tensor.backward, sam=None, scaler=None
):
    sam = sam or optimizer
    loss = loss_at(model, batch)
    backward(loss)
    if perturb:
        with sam.perturbed(model, scaler=scaler):
            backward(loss_at(model, batch))
    else:
        sam.skip_perturbation()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def in_two(model, optimizer, batch, perturb=True, backward=Tensor.backward, sam=None, scaler=None):
    sam = sam or optimizer
    loss = loss_at(model, batch)
    backward(loss)
    if not perturb:
        sam.skip_perturbation()
        optimizer.step()
        optimizer.zero_grad()
        return loss
    sam.first_step(zero_grad=True, model=model, scaler=scaler)
    with frozen_running_stats(model):
        backward(loss_at(model, batch))
    sam.second_step(zero_grad=True)
    return loss


def with_closure(
    model, optimizer, batch, perturb=True, backward=Tensor.backward, sam=None, told=True
):
    def closure():
        optimizer.zero_grad()
        loss = loss_at(model, batch)
        backward(loss)
        return loss

    if not perturb:
        (sam or optimizer).skip_perturbation()
    return optimizer.step(closure, *[model] * told)


def with_gradients_given(
    model, optimizer, batch, perturb=True, backward=Tensor.backward, sam=None, told=True
):
    def closure():
        loss = loss_at(model, batch)
        backward(loss)
        return loss

    if not perturb:
        (sam or optimizer).skip_perturbation()
    loss = closure()
    optimizer.step(closure, *[model] * told)
    optimizer.zero_grad()
    return loss


FORMS = {
    "perturbed": with_perturbed,
    "in two": in_two,
    "closure": with_closure,
    "gradients given": with_gradients_given,
}


# --------------------------------------------------------------------------- the plain loop


class PlainLoop:
    """One method with SGD's decay and Nesterov momentum, as vectors of all weights.

    An update is given the batches of all devices. Each device perturbs along its own gradient if
    ``own``, and otherwise along the mean gradient.
    """

    def __init__(self, method, model=None, own=False, rho=RHO):
        self.method, self.own, self.rho = method, own, rho
        self.model = model or network()
        self.velocity = None
        self.memory = {}  # of every device

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def set(self, w):
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(w[: p.numel()].view_as(p))
                w = w[p.numel() :]

    def gradient(self, w, batch, first=False):
        buffers = [b.clone() for b in self.model.buffers()]
        kept = self.weights()
        self.set(w)
        loss = -self.model(batch[0]).log_softmax(1)[range(len(batch[1])), batch[1]].mean()
        grads = torch.autograd.grad(loss, list(self.model.parameters()))
        self.set(kept)
        if not first:
            for b, old in zip(self.model.buffers(), buffers, strict=True):
                b.copy_(old)
        return torch.cat([g.flatten() for g in grads])

    def update(self, *devices, perturb=True, overflows=(False, False), clip=None):
        parts = [[batch] for batch in devices] if self.own else [devices]
        ds = [self.direction(i, part, perturb, overflows) for i, part in enumerate(parts)]
        d = sum(ds) / len(ds)
        if not d.isfinite().all():
            return
        if clip is not None:
            d = d * min(1.0, clip / (d.norm().item() + 1e-6))
        w = self.weights()
        d = d if self.method in DECAYS else d + DECAY * w
        self.velocity = d if self.velocity is None else MOMENTUM * self.velocity + d
        self.set(w - LR * (d + MOMENTUM * self.velocity))

    def direction(self, device, part, perturb, overflows):
        def mean(w, first):
            overflow = float("inf") if overflows[not first] else 1.0
            decay = DECAY * w if self.method in DECAYS else 0  # an L2 term of the loss
            return overflow * sum(self.gradient(w, b, first) + decay for b in part) / len(part)

        w = self.weights()
        g = mean(w, True)
        kept = self.memory.get(device)
        if not perturb:
            return g + 0.7 * g.norm() * kept
        d = t = torch.ones_like(g)
        if self.method == "asam":
            named = self.model.named_parameters()
            is_weight = torch.cat([torch.full((p.numel(),), "weight" in n) for n, p in named])
            t = torch.where(is_weight, w.abs() + 0.01, 1.0)
        if self.method == "adaptive":
            t = w.abs()
        d = g
        if self.method == "friendly":
            d = g if kept is None else g - kept
            if g.isfinite().all():
                self.memory[device] = g if kept is None else 0.9 * kept + 0.1 * g
        e = self.rho * t**2 * d / (t * d).norm()
        there = mean(w + e if e.isfinite().all() else w, False)
        if self.method == "gsam" and self.rho:
            orthogonal = g - (g @ there) / (there @ there) * there
            return there - 0.4 * orthogonal
        if self.method == "looksam":
            rest = there - (there @ g) / (g @ g) * g
            if rest.isfinite().all():
                self.memory[device] = rest / rest.norm()
        return there


def plain(method, batch_norm=True, **options):
    """Weights and running statistics after a plain loop."""
    loop = PlainLoop(method, network(batch_norm=batch_norm))
    for i, batch in enumerate(batches()):
        loop.update(batch, perturb=perturbs_at(method, i), **options)
    return state_of(loop.model)
