"""Losses, class weights and mixed labels against probabilities for each class, in float64."""

import math
import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.ops import sigmoid_focal_loss

from reference import CLASSES, SGD, assert_close, batches, fit, mlp, module_of, sgd, state, trainer
from runs import configuration, run, summary
from sam_lightning.config.errors import ConfigError
from sam_lightning.data.augment import MixedLabels
from sam_lightning.training.losses import CrossEntropy, accuracy, check_loss, losses_of

COUNTS = [40, 30, 20, 10]


def mixed(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    other = torch.randint(CLASSES, labels.shape, generator=generator)
    share = torch.rand(labels.shape, generator=generator, dtype=torch.float64)
    return MixedLabels(labels, other, share)


def targets(labels, smoothing=0.0):
    """A row of probabilities for each image."""
    hot = torch.eye(CLASSES, dtype=torch.float64)
    if isinstance(labels, MixedLabels):
        share = labels.share[:, None]
        rows = share * hot[labels.labels] + (1 - share) * hot[labels.other]
    else:
        rows = hot[labels]
    return rows * (1 - smoothing) + smoothing / CLASSES


def reference_losses(logits, labels, smoothing=0.0, weights=None):
    weights = torch.ones(CLASSES, dtype=torch.float64) if weights is None else weights
    return -(targets(labels, smoothing) * weights * logits.log_softmax(1)).sum(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, "balanced", [1, 0, 2.5, 4]])
@pytest.mark.parametrize("mix", [False, True])
def test_cross_entropy_is_that_of_probabilities(smoothing, weights, mix):
    logits = torch.randn(50, CLASSES, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (50,))
    labels = mixed(labels) if mix else labels
    loss = CrossEntropy(smoothing, weights, COUNTS).double()
    scaled = None
    if weights is not None:
        given = [25 / count for count in COUNTS] if weights == "balanced" else weights
        mean = sum(w * n for w, n in zip(given, COUNTS, strict=True)) / 100
        scaled = torch.tensor(given, dtype=torch.float64) / mean
    expected = reference_losses(logits, labels, smoothing, scaled)
    ours = losses_of(loss, logits, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)
    gradients = [torch.autograd.grad(v.mean(), logits)[0] for v in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weights", ["balanced", [3, 1, 2.5, 4]])
def test_over_all_training_images_the_mean_is_torchs_weighted_one(weights):
    labels = torch.arange(CLASSES).repeat_interleave(torch.tensor(COUNTS))
    logits = torch.randn(100, CLASSES)
    given = [25 / count for count in COUNTS] if weights == "balanced" else weights
    theirs = nn.CrossEntropyLoss(weight=torch.tensor(given).float())(logits, labels)
    torch.testing.assert_close(CrossEntropy(0.0, weights, COUNTS)(logits, labels).mean(), theirs)


def test_a_mixture_is_right_with_the_share_of_the_label_that_is_found():
    logits = torch.eye(CLASSES)[[0, 1, 2, 3]]
    labels = MixedLabels(
        torch.tensor([0, 0, 0, 3]), torch.tensor([1, 1, 1, 3]), torch.tensor([0.7, 0.6, 0.5, 0.1])
    )
    assert accuracy(logits, labels) == pytest.approx((0.7 + 0.4 + 0.0 + 1.0) / 4)
    assert accuracy(logits, labels.labels) == 0.5


class MixedBatches(DataLoader):
    """Float64 batches of mixtures, which Lightning leaves on the CPU."""

    def __init__(self, data):
        super().__init__([(x, mixed(y, seed)) for seed, (x, y) in enumerate(data)], batch_size=None)


def plain_steps(model, groups, rho, weights=None, ascent=1.0, descent=1.0):
    """SAM around SGD for the loss of whole groups of batches, in plain PyTorch."""
    optimizer, params = sgd(model.parameters()), list(model.parameters())
    for group in groups:
        parts = [(x, y, math.ceil(ascent * len(y))) for x, y in group]
        before = [reference_losses(model(x), y, 0.1, weights) for x, y, _ in parts]
        first = torch.cat([each[:n] for each, (*_, n) in zip(before, parts, strict=True)])
        grads = torch.autograd.grad(first.mean(), params)
        norm = sum(g.square().sum() for g in grads).sqrt() + 1e-12
        moved = [rho * g / norm for g in grads]
        with torch.no_grad():
            for p, e in zip(params, moved, strict=True):
                p.add_(e)
        after = [reference_losses(model(x), y, 0.1, weights) for x, y, _ in parts]
        chosen = []
        for now, then in zip(after, before, strict=True):
            size = math.ceil(descent * len(now))
            chosen.append(now[(now - then).topk(size).indices])
        optimizer.zero_grad()
        torch.cat(chosen).mean().backward()
        with torch.no_grad():
            for p, e in zip(params, moved, strict=True):
                p.sub_(e)
        optimizer.step()


@pytest.mark.parametrize("weights", [None, "balanced"])
@pytest.mark.parametrize(
    "options", [{}, {"ascent_fraction": 0.5}, {"descent_fraction": 0.5}], ids=["", "part", "esam"]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_on_mixtures_are_those_on_probabilities(weights, options, accumulate):
    data = batches([8, 8, 8, 8])
    ours, theirs = mlp(torch.float64), mlp(torch.float64)
    loss = CrossEntropy(0.1, weights, COUNTS)
    module = module_of(ours, rho=0.2, loss=loss, accumulate_grad_batches=accumulate, **options)
    loader = MixedBatches(data)
    trainer().fit(module, loader)
    groups = [loader.dataset[i : i + accumulate] for i in range(0, 4, accumulate)]
    scaled = None if weights is None else loss.weight.double()
    parts = {f"{name.partition('_')[0]}": part for name, part in options.items()}
    plain_steps(theirs, groups, 0.2, scaled, **parts)
    assert_close(state(ours), state(theirs), atol=1e-9, rtol=0)


def test_micro_batches_have_the_weighted_loss_of_the_whole_batch():
    ((images, labels),) = batches([32])
    whole, parts = mlp(torch.float64), mlp(torch.float64)
    options = {"rho": 0.2, "loss": CrossEntropy(0.0, [5, 1, 1, 3], COUNTS)}
    fit(whole, [(images, labels)], **options)
    order = labels.argsort()  # parts of one class each, nearly
    small = [(images[i], labels[i]) for i in order.split(8)]
    fit(parts, small, accumulate_grad_batches=4, **options)
    assert_close(state(whole), state(parts), atol=1e-12, rtol=0)


class Focal(nn.Module):
    """torchvision's focal loss as a loss of one's own."""

    def __init__(self, gamma=2.0):
        super().__init__()
        self.gamma = gamma

    def forward(self, logits, labels):
        hot = nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return sigmoid_focal_loss(logits, hot, gamma=self.gamma, reduction="none").sum(1)


def test_a_loss_of_ones_own_is_what_is_trained_with():
    data = batches([16] * 4)
    ours, theirs = mlp(torch.float64), mlp(torch.float64)
    fit(ours, data, rho=0.0, loss=Focal())
    optimizer = torch.optim.SGD(theirs.parameters(), **SGD)
    for images, labels in data:
        optimizer.zero_grad()
        hot = nn.functional.one_hot(labels, CLASSES).double()
        (sigmoid_focal_loss(theirs(images), hot, gamma=2.0, reduction="sum") / 16).backward()
        optimizer.step()
    assert_close(state(ours), state(theirs), atol=1e-10, rtol=0)


@pytest.mark.slow
def test_losses_by_target(tmp_path):
    focal = f"loss._target_={Focal.__module__}.Focal"
    none = ["loss=custom", "epochs=1"]
    run(tmp_path / "focal", focal, *none, "+loss.gamma=1.0", "augment.mixup.alpha=0.4")
    run(tmp_path / "torch", "loss._target_=torch.nn.MultiMarginLoss", *none)  # as a loss per image
    run(tmp_path / "cross", "loss.class_weights=balanced", "data.sampler=balanced", "epochs=1")
    losses = [summary(tmp_path / n)["metrics"]["train/loss"] for n in ("focal", "torch", "cross")]
    assert len(set(losses)) == 3
    assert all(map(math.isfinite, losses))
    stored = torch.load(tmp_path / "cross" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in stored["state_dict"]} == {"model"}
    assert stored["hyper_parameters"]["loss"]["class_weights"] == "balanced"
    with pytest.raises(ConfigError, match=r"^label_smoothing=0.1: must be 0 with .*Focal has"):
        run(tmp_path / "smooth", focal, *none, "label_smoothing=0.1")


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.CrossEntropyLoss(), "loss: returns () for 2 images; must be (2,), a loss for each"),
        (nn.Linear(4, 4), "loss: has parameters, and only those of the model are trained"),
        (lambda logits, labels: None, "loss: returns NoneType for 2 images; must be (2,)"),
        (nn.L1Loss(reduction="none"), "loss: does not take logits 2 x 4 and labels [0, 3] ("),
    ],
)
def test_what_is_no_loss_of_each_image_is_refused(loss, said):
    with pytest.raises(ConfigError, match=rf"^{re.escape(said)}") as caught:
        check_loss(loss, CLASSES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"class_weights": "even"}, "class_weights=even: must be 4 numbers >= 0"),
        ({"class_weights": [1, 2]}, "class_weights=[1, 2]: must be 4 numbers >= 0"),
        ({"class_weights": [1, -1, 1, 1]}, "class_weights=[1, -1, 1, 1]: must be 4 numbers"),
        ({"class_weights": [0, 0, 0, 0]}, "class_weights=[0, 0, 0, 0]: must be above 0"),
        ({"class_weights": "balanced", "class_counts": [1, 0]}, "class_weights=balanced: needs"),
    ],
)
def test_wrong_arguments_are_named(options, said):
    with pytest.raises(ValueError, match=rf"^{re.escape(said)}"):
        CrossEntropy(**{"class_counts": COUNTS, **options})


def test_label_smoothing_is_a_key_of_the_loss_too():
    assert configuration("label_smoothing=0.2").loss.smoothing == 0.2
    assert configuration("loss.smoothing=0.1").loss.smoothing == 0.1
