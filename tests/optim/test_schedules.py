"""Schedules against their formulas and against torch's schedulers."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from sam_lightning.optim.schedules import constant, cosine, multistep


def values(schedule, total, steps_per_epoch=10, **options):
    factor = schedule(total_steps=total, steps_per_epoch=steps_per_epoch, **options)
    return [factor(step) for step in range(total)]


def torchs(total, make):
    """The learning rates of ``total`` updates, at a base of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(total):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def after_warmup(optimizer, warmup, make):
    """Linear to the full rate over ``warmup`` updates, the first at 1 / warmup, then another."""
    linear = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)
    return SequentialLR(optimizer, [linear, make(optimizer)], milestones=[warmup])


# ---- cosine


def test_cosine_at_the_angles_one_knows():
    half = math.sqrt(0.5)
    assert values(cosine, 4) == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])
    third = values(cosine, 3, final=0.2)
    assert third == pytest.approx([1, 0.2 + 0.8 * 0.75, 0.2 + 0.8 * 0.25])


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_cosine_as_torch_has_it(final):
    expected = torchs(50, lambda o: CosineAnnealingLR(o, T_max=50, eta_min=final))
    assert values(cosine, 50, final=final) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize(("warmup_epochs", "warmup"), [(2, 20), (0.5, 5), (1.25, 12), (0.2, 2)])
def test_cosine_after_a_warmup_as_torch_has_it(warmup_epochs, warmup, final):
    expected = torchs(
        80,
        lambda o: after_warmup(
            o, warmup, lambda o: CosineAnnealingLR(o, T_max=80 - warmup, eta_min=final)
        ),
    )
    actual = values(cosine, 80, warmup_epochs=warmup_epochs, final=final)
    assert actual == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [1, 2, 7, 391])
@pytest.mark.parametrize("final", [0.0, 0.3])
@pytest.mark.parametrize("warmup_epochs", [0, 0.3])
def test_cosine_rises_then_falls_and_ends_above_final(total, final, warmup_epochs):
    actual = values(cosine, total, total, warmup_epochs=warmup_epochs, final=final)
    warmup = round(0.3 * total) if warmup_epochs else 0
    assert all(a < b for a, b in pairwise(actual[:warmup]))
    assert all(a > b for a, b in pairwise(actual[warmup:]))
    assert actual[0] == (1 / warmup if warmup else 1)
    assert actual[warmup] == max(actual) == 1
    last = 1 - 1 / (total - warmup)
    assert actual[-1] == pytest.approx(final + (1 - final) * math.cos(math.pi * last / 2) ** 2)
    assert actual[-1] > final


@pytest.mark.parametrize(("warmup_epochs", "final"), [(0, 0.0), (0, 0.25), (1, 0.25)])
def test_cosine_stays_at_final_after_the_run(warmup_epochs, final):
    factor = cosine(20, 10, warmup_epochs=warmup_epochs, final=final)
    # Schedulers ask for one value more than there are updates.
    assert [factor(20), factor(21), factor(1000)] == pytest.approx([final] * 3, abs=1e-12)


@pytest.mark.parametrize("schedule", [cosine, multistep, constant])
def test_a_warmup_may_fill_the_run_or_exceed_it(schedule):
    options = {"milestones": ()} if schedule is multistep else {}
    assert values(schedule, 4, 4, warmup_epochs=1, **options) == [0.25, 0.5, 0.75, 1]
    assert values(schedule, 4, 4, warmup_epochs=2, **options) == [0.125, 0.25, 0.375, 0.5]


# ---- multistep and constant


def test_multistep_by_default_falls_at_30_60_and_80_percent():
    expected = [1] * 3 + [0.2] * 3 + [0.04] * 2 + [0.008] * 2
    assert values(multistep, 10) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("milestones", "steps"),
    [
        ((0.5, 0.75), [50, 75]),
        ((0.75, 0.5), [50, 75]),  # in any order
        ((0.5, 0.5), [50, 50]),  # twice at once
        ((0.334,), [33]),
        ((0, 1), [0, 100]),
        ((), []),
    ],
)
def test_multistep_as_torch_has_it(milestones, steps):
    expected = torchs(100, lambda o: MultiStepLR(o, [s for s in steps if s > 0], gamma=0.1))
    expected = [rate * 0.1 ** steps.count(0) for rate in expected]
    actual = values(multistep, 100, milestones=milestones, gamma=0.1)
    assert actual == pytest.approx(expected, rel=1e-9)


def test_multistep_after_a_warmup_as_torch_has_it():
    # Milestones are of the whole run; torch's count from the end of the warm-up.
    expected = torchs(
        60,
        lambda o: after_warmup(o, 15, lambda o: MultiStepLR(o, [30 - 15, 45 - 15], gamma=0.3)),
    )
    options = {"warmup_epochs": 1.5, "milestones": (0.5, 0.75), "gamma": 0.3}
    assert values(multistep, 60, **options) == pytest.approx(expected, rel=1e-9)


def test_a_milestone_within_the_warmup_applies_at_once():
    actual = values(multistep, 8, 4, warmup_epochs=1, milestones=(0.25,), gamma=0.1)
    assert actual == pytest.approx([0.25, 0.5, 0.075, 0.1, 0.1, 0.1, 0.1, 0.1])


def test_constant_is_one_after_its_warmup():
    assert values(constant, 5) == [1] * 5
    assert values(constant, 6, 4, warmup_epochs=0.5) == [0.5, 1, 1, 1, 1, 1]
    assert constant(6, 4)(1000) == 1


# ---- errors


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (cosine, {"warmup_epochs": -1}, "warmup_epochs=-1: "),
        (multistep, {"warmup_epochs": -0.5}, "warmup_epochs=-0.5: "),
        (constant, {"warmup_epochs": -1}, "warmup_epochs=-1: "),
        (multistep, {"milestones": [60, 120, 160]}, "milestones=[60, 120, 160]: "),
        (multistep, {"milestones": (-0.1, 0.5)}, "milestones=[-0.1, 0.5]: "),
    ],
)
def test_bad_values_are_named(schedule, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        schedule(100, 10, **options)
