"""Every file of conf/method as options of SAMModule, and the same methods as plain vector loops."""

import math
from pathlib import Path

import torch
from omegaconf import OmegaConf

from reference import SGD, mean_gradient
from sam_lightning.config.instantiate import build
from sam_lightning.optim.methods.esam import RandomSubsetAscent
from sam_lightning.optim.methods.wsam import WeightedSharpness

CONF = Path(__file__).parents[2] / "conf" / "method"
FAMILY = sorted(file.stem for file in CONF.glob("*.yaml"))
OWN = ("defaults", "name", "perturbation", "descent", "passes")
# What a method needs to be comparable with its plain loop: rho 0.2 is far for a sign, and ESAM's
# draws are left out by beta = 1.
CHANGED = {
    "linf": {"rho": 0.002},
    "esam": {"perturbation": RandomSubsetAscent(beta=1.0)},
    "three_steps": {"ascent_steps": 3},
    "wsam_in_one": {"gradient_transform": WeightedSharpness(decouple=False)},
}


def options_of(name, **options):
    """The options that ``method=name`` gives to SAMModule, and further ones."""
    parts = [OmegaConf.load(CONF / f"{part}.yaml") for part in ("sam", name)]
    cfg = OmegaConf.create({"rho": 0.2, "method": OmegaConf.merge(*parts)})
    plain = {k: v for k, v in cfg.method.items() if k not in OWN}
    plain["perturbation"] = build(cfg, "method.perturbation")
    plain["gradient_transform"] = build(cfg, "method.descent") if cfg.method.descent else None
    return {**plain, **options}


class PlainLoop:
    """SGD with weight decay and Nesterov momentum, and a method's gradient, as flat vectors."""

    def __init__(self, model, method, rho, lr_factor=lambda step: 1.0):
        self.model, self.method, self.rho, self.lr_factor = model, method, rho, lr_factor
        self.parameters = list(model.parameters())
        self.velocity = self.memory = None
        self.step = 0

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def set(self, w):
        sizes = [p.numel() for p in self.parameters]
        with torch.no_grad():
            for p, part in zip(self.parameters, w.split(sizes), strict=True):
                p.copy_(part.view_as(p))

    def gradient(self, w, group):
        kept = self.weights()
        self.set(w)
        grads, _ = mean_gradient(self.model, group)
        self.set(kept)
        return torch.cat([g.flatten() for g in grads.values()])

    def losses(self, w, batch):
        kept = self.weights()
        self.set(w)
        with torch.no_grad():
            log_p = torch.log_softmax(self.model(batch[0]), 1)
        self.set(kept)
        return -log_p[torch.arange(len(batch[1])), batch[1]]

    def update(self, group, clip=None):
        w = self.weights()
        self.beside = 0.0  # the step, times the learning rate
        d = getattr(self, self.method)(w, group)
        if clip is not None:
            factor = min(1.0, clip / (d.norm().item() + 1e-6))
            d, self.beside = factor * d, factor * self.beside
        d = d + SGD["weight_decay"] * w
        first = self.velocity is None
        self.velocity = d.clone() if first else SGD["momentum"] * self.velocity + d
        lr = SGD["lr"] * self.lr_factor(self.step)
        self.set(w - lr * (d + SGD["momentum"] * self.velocity + self.beside))
        self.step += 1

    # ------------------------------------------------------------------------------ methods

    def sgd(self, w, group):
        return self.gradient(w, group)

    def sam(self, w, group):
        g = self.gradient(w, group)
        return self.gradient(w + self.rho * g / g.norm(), group)

    def asam(self, w, group):
        g = self.gradient(w, group)
        named = self.model.named_parameters()
        weight = torch.cat([torch.full((p.numel(),), n.endswith("weight")) for n, p in named])
        t = torch.where(weight, w.abs() + 0.01, 1.0)
        return self.gradient(w + self.rho * t**2 * g / (t * g).norm(), group)

    def gsam(self, w, group, alpha=0.4):
        rho = self.rho * self.lr_factor(self.step)  # from rho at the largest lr to 0 at lr 0
        g = self.gradient(w, group)
        there = self.gradient(w + rho * g / g.norm(), group)
        orthogonal = g - (g @ there) / (there @ there) * there
        return there - alpha * orthogonal

    def friendly_sam(self, w, group, sigma=1.0, decay=0.9):
        g = self.gradient(w, group)
        d = g if self.memory is None else g - sigma * self.memory
        self.memory = g if self.memory is None else decay * self.memory + (1 - decay) * g
        return self.gradient(w + self.rho * d / d.norm(), group)

    def looksam(self, w, group, alpha=0.2, k=5):
        g = self.gradient(w, group)
        if self.step % k:
            return g + alpha * g.norm() / self.memory.norm() * self.memory
        there = self.gradient(w + self.rho * g / g.norm(), group)
        cosine = g @ there / (g.norm() * there.norm())
        self.memory = there - there.norm() * cosine * g / g.norm()
        return there

    def sam_on(self, w, group):
        named = self.model.named_parameters()  # all vectors are of BatchNorm, but one
        mask = torch.cat(
            [torch.full((p.numel(),), p.ndim == 1 and n != "fc.bias") for n, p in named]
        )
        g = self.gradient(w, group) * mask
        return self.gradient(w + self.rho * g / g.norm(), group)

    def esam(self, w, group, gamma=0.5):  # of all weights: beta = 1
        g = self.gradient(w, group)
        e = self.rho * g / g.norm()
        chosen = []
        for images, labels in group:
            rise = self.losses(w + e, (images, labels)) - self.losses(w, (images, labels))
            count = math.ceil(gamma * len(labels))
            index = rise.argsort(descending=True)[:count]
            chosen.append((images[index], labels[index]))
        return self.gradient(w + e, chosen)

    def msam(self, w, group):
        v = self.velocity
        return self.gradient(w if v is None else w - self.rho * v / v.norm(), group)

    def linf(self, w, group):
        return self.gradient(w + self.rho * self.gradient(w, group).sign(), group)

    def vasso(self, w, group, theta=0.9):
        g, d = self.gradient(w, group), self.memory
        self.memory = d = g if d is None else (1 - theta) * d + theta * g
        return self.gradient(w + self.rho * d / d.norm(), group)

    def fisher_sam(self, w, group, eta=1.0):
        g = self.gradient(w, group)
        natural = g / (1 + eta * g**2)
        return self.gradient(w + self.rho * natural / (g @ natural).sqrt(), group)

    def wsam(self, w, group, gamma=0.88):
        g = self.gradient(w, group)
        there = self.gradient(w + self.rho * g / g.norm(), group)
        self.beside = gamma / (1 - gamma) * (there - g)
        return g

    def wsam_in_one(self, w, group, gamma=0.88):
        g = self.gradient(w, group)
        there = self.gradient(w + self.rho * g / g.norm(), group)
        return (1 - 2 * gamma) / (1 - gamma) * g + gamma / (1 - gamma) * there

    def three_steps(self, w, group):
        e = torch.zeros_like(w)
        for _ in range(3):
            g = self.gradient(w + e, group)
            e = e + self.rho / 3 * g / g.norm()
        return self.gradient(w + e, group)
