"""What the module is compared with: one update in plain PyTorch, written from the formulas."""

import copy
import math

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from sam_lightning import SAMModule, SAMResNet18

CLASSES = 4
SGD = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}


def convnet(dtype=torch.float64):
    torch.manual_seed(0)
    return SAMResNet18(num_classes=CLASSES, width=2).to(dtype)


def mlp(dtype=torch.float32, dropout=0.0, classes=CLASSES):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(3 * 8 * 8, 16), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(16, classes)).to(dtype)


def batches(sizes, dtype=torch.float64, classes=CLASSES, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(n, 3, 8, 8, generator=generator, dtype=dtype),
            torch.randint(classes, (n,), generator=generator),
        )
        for n in sizes
    ]


def sgd(params, **options):
    return torch.optim.SGD(params, **{**SGD, **options})


def loader(data):
    return DataLoader(data, batch_size=None)


def trainer(**options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return L.Trainer(**{**quiet, "max_epochs": 1, **options})


def module_of(model, optimizer=sgd, **options):
    return SAMModule(model, CLASSES, optimizer, **options)


def fit(model, data, trainer_options=None, **options):
    module = module_of(model, **options)
    runner = trainer(**(trainer_options or {}))
    runner.fit(module, loader(data))
    return module, runner


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(one, two, **tolerance):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], two[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ------------------------------------------------- the formulas of one update, in plain PyTorch


def mean_gradient(model, group, total=None, smoothing=0.0):
    """Gradient of the mean loss over all samples of ``group``, batch by batch, as a dict."""
    total = total or sum(len(labels) for _, labels in group)
    names = [name for name, _ in model.named_parameters()]
    sums = dict.fromkeys(names, 0.0)
    loss_sum = 0.0
    for images, labels in group:
        log_p = torch.log_softmax(model(images), 1)
        target = torch.nn.functional.one_hot(labels, log_p.shape[1]).to(log_p.dtype)
        target = target * (1 - smoothing) + smoothing / log_p.shape[1]
        loss = -(target * log_p).sum() / total
        for name, g in zip(names, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            sums[name] = sums[name] + g
        loss_sum += loss.item()
    return sums, loss_sum


def perturbed_gradient(model, group, grads, rho, adaptive, total=None, smoothing=0.0):
    """Gradient at w + e; weights and buffers are then set back from copies."""
    kept = copy.deepcopy(model.state_dict())
    weights = dict(model.named_parameters())
    t = {
        name: w.detach().abs() + 0.01 if adaptive and name.endswith("weight") else 1.0
        for name, w in weights.items()
    }
    norm = math.sqrt(sum(float((t[name] * g).square().sum()) for name, g in grads.items())) + 1e-12
    with torch.no_grad():
        for name, w in weights.items():
            w += rho * t[name] ** 2 * grads[name] / norm if adaptive else rho * grads[name] / norm
    result = mean_gradient(model, group, total, smoothing)
    model.load_state_dict(kept)
    return result


def plain_loop(
    model,
    groups,
    rho,
    adaptive=False,
    clip=None,
    per_micro_batch=False,
    lrs=None,
    smoothing=0.0,
    fraction=1.0,
    every=1,
):
    """SGD with weight decay and Nesterov momentum around the gradient at w + e."""
    momentum = {}
    log = []
    for step, group in enumerate(groups):
        if step % every:
            second, _ = mean_gradient(model, group)
        elif per_micro_batch:
            total = sum(len(labels) for _, labels in group)
            second = {name: 0.0 for name, _ in model.named_parameters()}
            for batch in group:
                g, _ = mean_gradient(model, [batch])
                d, _ = perturbed_gradient(model, [batch], g, rho, adaptive, total)
                second = {name: second[name] + d[name] for name in second}
        else:
            sizes = [math.ceil(fraction * len(labels)) for _, labels in group]
            part = [(x[:n], y[:n]) for (x, y), n in zip(group, sizes, strict=True)]
            first, loss = mean_gradient(model, part, smoothing=smoothing)
            second, up = perturbed_gradient(model, group, first, rho, adaptive, smoothing=smoothing)
            log.append((loss, up - loss))
        if clip is not None:
            norm = math.sqrt(sum(float(g.square().sum()) for g in second.values()))
            second = {name: g * min(1.0, clip / (norm + 1e-6)) for name, g in second.items()}
        with torch.no_grad():
            for name, w in model.named_parameters():
                d = second[name] + SGD["weight_decay"] * w
                momentum[name] = SGD["momentum"] * momentum[name] + d if step else d.clone()
                w -= (lrs[step] if lrs else SGD["lr"]) * (d + SGD["momentum"] * momentum[name])
    return log
