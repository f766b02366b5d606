"""Interleaved timing: cases take turns in one process, and their ratio in a round counts.

Machines drift: another process starts, the clock throttles. Cases that take turns see the same
machine, so the ratio within a round holds when the seconds do not. The order changes from round to
round, so no case always follows the same one.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Seconds = dict[str, list[float]]


@dataclass(frozen=True)
class Measurement:
    """One line of the report: the median over rounds and the quartiles around it.

    Attributes:
        part: which part of the benchmarks measured it.
        what: what was measured; a ratio names both sides.
        median, lower, upper: of the rounds, in ``unit``.
        rounds: how many.
        unit: ``x`` for a ratio, or the unit of an absolute figure.
    """

    part: str
    what: str
    median: float
    lower: float
    upper: float
    rounds: int
    unit: str = "x"


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, read when the device is done: on CUDA, calls return earlier."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def turns(names: Sequence[str], round_index: int) -> list[str]:
    """The order of a round: rotated by one each round, and mirrored every other round."""
    shift = round_index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if round_index % 2 else order


def interleave(
    cases: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Seconds:
    """Time every case once a round.

    Args:
        cases: what to time. A case may return the seconds to count; otherwise the whole call
            counts.
        rounds: how often each case is timed.
        warmup: rounds before these that do not count.
        clock: seconds from an arbitrary start.

    Returns:
        the seconds of each case, a value per round.
    """
    seconds: Seconds = {name: [] for name in cases}
    for index in range(-warmup, rounds):
        for name in turns(list(cases), index + warmup):
            started = clock()
            own = cases[name]()
            elapsed = clock() - started
            if index >= 0:
                seconds[name].append(own if isinstance(own, float) else elapsed)
    return seconds


def ratio(part: str, what: str, over: Sequence[float], under: Sequence[float]) -> Measurement:
    """Median and quartiles of the ratios of each round, not the ratio of the medians."""
    return summary(part, what, [a / b for a, b in zip(over, under, strict=True)], "x")


def summary(part: str, what: str, values: Sequence[float], unit: str) -> Measurement:
    """Median and quartiles of values that were measured once a round."""
    if len(values) == 1:
        lower = middle = upper = values[0]
    else:
        lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Measurement(part, what, middle, lower, upper, len(values), unit)
