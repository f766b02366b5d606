"""Means, intervals and tests over seeds; NaN stands for what too few values leave undefined."""

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np
from scipy import stats

WILCOXON_PAIRS = 6  # with five, the smallest p value of the signed-rank test is 2 / 2**5 > 0.05


def estimate(values: Sequence[float]) -> dict[str, float]:
    """The mean of ``n`` values, their ``sd``, and the 95 % confidence interval of the mean.

    It is from ``low`` to ``high``, by Student's t; ``half`` is half of its width.
    """
    n = len(values)
    mean = fmean(values) if n else math.nan
    sd = float(np.std(values, ddof=1)) if n > 1 else math.nan
    half = float(stats.t.ppf(0.975, n - 1)) * sd / math.sqrt(n) if n > 1 else math.nan
    return {"n": n, "mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "half": half}


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Estimate ``first - second``, and test whether it is zero on average (two-sided).

    The t test, ``p``, needs differences that are not all the same (up to rounding). The Wilcoxon
    test does not assume normal differences; scipy's is exact up to 13 pairs, also with ties.
    """
    differences = np.subtract(first, second)
    found = estimate(differences.tolist()) | {"p": math.nan, "wilcoxon": math.nan}
    if found["n"] > 1 and found["sd"] > 1e-12 * np.abs([first, second]).max():
        found["p"] = float(stats.ttest_rel(first, second).pvalue)
    if found["n"] >= WILCOXON_PAIRS and differences.any():
        found["wilcoxon"] = float(stats.wilcoxon(differences).pvalue)
    return found


def holm(probabilities: Sequence[float]) -> np.ndarray:
    """Adjust p values for multiple tests (Holm 1979), step-down; NaN is no test and stays NaN."""
    p = np.array(probabilities, float)
    order = np.argsort(p)  # NaN last
    factors = np.isfinite(p).sum() - np.arange(len(p))
    p[order] = np.minimum(1, np.maximum.accumulate(factors * p[order]))
    return p
