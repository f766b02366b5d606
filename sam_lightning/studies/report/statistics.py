"""Means, intervals and tests over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

LEVEL = 0.95
# Below six pairs the exact Wilcoxon test cannot come below 0.05, whatever the data: 2 / 2**5.
WILCOXON_PAIRS = 6


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds. ``sd`` and ``half``, half the width of its interval, need two values."""

    n: int
    mean: float
    sd: float | None = None
    half: float | None = None


@dataclass(frozen=True)
class Paired:
    """Differences between pairs with the same seed; a probability that is None is undefined."""

    difference: Estimate
    t: float | None = None
    p: float | None = None
    wilcoxon: float | None = None


def estimate(values: Sequence[float]) -> Estimate | None:
    """The mean with its 95 % confidence interval by Student's t; None of no values."""
    n = len(values)
    if n == 0:
        return None
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(1, mean)
    sd = float(np.std(values, ddof=1))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Estimate(n, mean, sd, quantile * sd / math.sqrt(n))


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    """Test whether ``first - second`` is zero on average: two-sided, a pair per seed.

    The t test assumes about normal differences; the exact Wilcoxon signed-rank test does not, and
    is added from ``WILCOXON_PAIRS`` pairs on. Differences that are all the same have no t.
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    found = estimate(differences)
    if found is None or found.sd is None:
        return None if found is None else Paired(found)
    wilcoxon = None
    if found.n >= WILCOXON_PAIRS and any(differences):
        wilcoxon = _signed_rank(np.array(differences))
    # Equal differences of floats are equal up to rounding only.
    if found.sd <= 1e-12 * max(map(abs, [*first, *second])):
        return Paired(found, wilcoxon=wilcoxon)
    t = found.mean * math.sqrt(found.n) / found.sd
    return Paired(found, t, float(2 * stats.t.sf(abs(t), found.n - 1)), wilcoxon)


def _signed_rank(differences: np.ndarray) -> float:
    """The exact p value of the signed-rank test, two-sided, also with ties; zeros are left out.

    All signs of the ranks are equally likely. F. Wilcoxon, "Individual comparisons by ranking
    methods", 1945; scipy's exact method has no ties and zeros.
    """
    differences = differences[differences != 0]
    ranks = (2 * stats.rankdata(np.abs(differences))).astype(int)  # of ties the mean: k or k + 1/2
    shares = np.ones(1)  # of all signs, by the sum of the positive ranks
    for rank in ranks:
        shares = (np.pad(shares, (0, rank)) + np.pad(shares, (rank, 0))) / 2
    distances = np.abs(2 * np.arange(len(shares)) - ranks.sum())  # from the mean
    seen = abs(2 * ranks[differences > 0].sum() - ranks.sum())
    return min(1.0, float(shares[distances >= seen].sum()))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjust p values so that any false finding among all of them is as rare as the level says.

    Step-down, S. Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i])
    adjusted = [0.0] * len(order)
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * probabilities[i]))
        adjusted[i] = highest
    return adjusted
