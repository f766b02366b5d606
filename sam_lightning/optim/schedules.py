"""Learning rate schedules: from the number of finished steps to a factor on the learning rate.

Each begins with a linear warm-up of ``warmup_epochs``, whose first step has a factor above 0. Each
raises a ValueError that names an argument out of range.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence

LRFactor = Callable[[int], float]


def cosine(
    total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0.0, final: float = 0.0
) -> LRFactor:
    """Half a cosine from 1 to ``final`` (Loshchilov and Hutter 2017, equation 5, no restarts)."""
    warmup = _warmup_steps(warmup_epochs, steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

    return factor


def multistep(
    total_steps: int,
    steps_per_epoch: int,
    warmup_epochs: float = 0.0,
    milestones: Sequence[float] = (0.3, 0.6, 0.8),
    gamma: float = 0.2,
) -> LRFactor:
    """Multiply by ``gamma`` at each of ``milestones``, which are fractions of the run."""
    # Milestones in epochs, as other libraries have them, would silently never be reached.
    if not all(0 <= m <= 1 for m in milestones):
        raise ValueError(f"milestones={list(milestones)}: must be fractions of the run, in [0, 1]")
    warmup = _warmup_steps(warmup_epochs, steps_per_epoch)
    at = sorted(round(m * total_steps) for m in milestones)

    def factor(step: int) -> float:
        warm = (step + 1) / warmup if step < warmup else 1.0
        return warm * gamma ** bisect_right(at, step)

    return factor


def constant(total_steps: int, steps_per_epoch: int, warmup_epochs: float = 0.0) -> LRFactor:
    """1 after the warm-up."""
    return multistep(total_steps, steps_per_epoch, warmup_epochs, milestones=())


def _warmup_steps(warmup_epochs: float, steps_per_epoch: int) -> int:
    if warmup_epochs < 0:
        raise ValueError(f"warmup_epochs={warmup_epochs}: must be a number >= 0")
    return round(warmup_epochs * steps_per_epoch)
