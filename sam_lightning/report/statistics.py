"""Means, intervals and tests over seeds; NaN stands for what too few values leave undefined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
WILCOXON_PAIRS = 6  # with five, the smallest p value of the signed-rank test is 2 / 2**5 > 0.05


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` values, their standard deviation, and half the width of its interval."""

    n: int
    mean: float = math.nan
    sd: float = math.nan
    half: float = math.nan


@dataclass(frozen=True)
class Paired:
    """The mean difference of pairs, with two-sided p values of t test and signed-rank test."""

    difference: Estimate
    p: float = math.nan
    wilcoxon: float = math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """The mean and its 95 % confidence interval (Student's t)."""
    n = len(values)
    if n < 2:
        return Estimate(n, *values)
    sd = float(np.std(values, ddof=1))
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, n - 1))
    return Estimate(n, math.fsum(values) / n, sd, quantile * sd / math.sqrt(n))


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Test whether ``first - second`` is zero on average.

    The t test needs differences that are not all the same (up to rounding). The Wilcoxon test does
    not assume normal differences; scipy's is exact up to 13 pairs, also with ties and zeros.
    """
    differences = np.subtract(first, second)
    found = estimate(differences.tolist())
    p = wilcoxon = math.nan
    if found.n > 1 and found.sd > 1e-12 * np.abs([first, second]).max():
        p = float(stats.ttest_rel(first, second).pvalue)
    if found.n >= WILCOXON_PAIRS and differences.any():
        wilcoxon = float(stats.wilcoxon(differences).pvalue)
    return Paired(found, p, wilcoxon)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjust p values for multiple tests (Holm 1979), step-down; NaN is no test and stays NaN."""
    p = np.array(probabilities)
    order = np.argsort(p)  # NaN last
    factors = np.isfinite(p).sum() - np.arange(len(p))
    p[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return p.tolist()
