"""``method.decay_in_ascent=both`` in training: the L2 term of the official code."""

import pytest
import torch

from reference import (
    SGD,
    assert_close,
    batches,
    fit,
    mean_gradient,
    mlp,
    perturbed_gradient,
    state,
)

RHO = 0.5
WITHOUT = {**SGD, "weight_decay": 0.0}


def decay_of(name):
    return 0.2 if name.endswith("bias") else SGD["weight_decay"]


def plain_loop(model, groups, clip, micro, every):
    """Each loss has the term, also that of a micro-batch; one norm, clipping, then plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), **WITHOUT)
    weights = dict(model.named_parameters())
    for step, group in enumerate(groups):
        total = sum(len(labels) for _, labels in group)
        mean = dict.fromkeys(weights, 0.0)
        for part in [[batch] for batch in group] if micro else [group]:
            share = sum(len(labels) for _, labels in part) / total
            w = {name: p.detach().clone() for name, p in weights.items()}
            first, _ = mean_gradient(model, part)
            first = {name: g + decay_of(name) * w[name] for name, g in first.items()}
            if step % every:
                mean = first
                continue
            norm = torch.cat([g.flatten() for g in first.values()]).norm()
            second, _ = perturbed_gradient(model, part, first, RHO, adaptive=False, total=total)
            for name, g in second.items():
                moved = w[name] + RHO * first[name] / norm
                mean[name] = mean[name] + g + share * decay_of(name) * moved
        for name, p in weights.items():
            p.grad = mean[name].clone()
        if clip is not None:
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step()


@pytest.mark.parametrize(
    ("clip", "accumulate", "micro", "every"),
    [(None, 1, False, 1), (0.2, 3, False, 1), (0.2, 3, True, 1), (0.2, 1, False, 2)],
)
def test_decay_in_both_passes_is_that_of_the_official_code(clip, accumulate, micro, every):
    data = batches([32, 32, 20] * 6)
    groups = [data[i : i + accumulate] for i in range(0, len(data), accumulate)]
    ours, theirs = mlp(torch.float64), mlp(torch.float64)
    biases = [name for name, _ in ours.named_parameters() if name.endswith("bias")]
    fit(
        ours,
        data,
        rho=RHO,
        decay_in_ascent="both",
        param_settings={name: {"weight_decay": 0.2} for name in biases},
        gradient_clip_val=clip,
        accumulate_grad_batches=accumulate,
        ascent_per_micro_batch=micro,
        every=every,
    )
    plain_loop(theirs, groups, clip, micro, every)
    assert_close(state(ours), state(theirs), atol=1e-9, rtol=0)
