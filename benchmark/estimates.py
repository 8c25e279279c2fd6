"""Means of a few seeds and what lies between them: 95% intervals and p values, after Welch.

For a handful of seeds, where a percentile bootstrap gives intervals that are too narrow.
"""

import math
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A mean or a difference of means, NaN without data.

    Written with a format: f"{own:,.0f}" gives 5 [3, 7], or a dash for NaN.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan  # two-sided, of a true value of 0

    def __format__(self, spec: str) -> str:
        if math.isnan(self.value):
            return "–"
        text = format(self.value, spec)
        if math.isnan(self.low):
            return text
        return f"{text} [{format(self.low, spec)}, {format(self.high, spec)}]"


def estimate(plus: list[np.ndarray], minus: list[np.ndarray] = ()) -> Estimate:
    """Sum of the means of `plus` less the means of `minus`.

    Each array holds a number per seed, (seeds,). One array gives Student's interval of a mean, two
    Welch's of a difference, four that of a difference of differences. There is no interval where
    an array has a single number, or where none of them varies.
    """
    from scipy import stats  # here, as it takes a second that other commands need not wait

    samples = [*plus, *minus]
    if min(len(x) for x in samples) == 0:
        return Estimate(math.nan)
    value = float(sum(x.mean() for x in plus) - sum(x.mean() for x in minus))
    if min(len(x) for x in samples) == 1:
        return Estimate(value)
    variances = [x.var(ddof=1) / len(x) for x in samples]  # of the means
    total = sum(variances)
    if total == 0:
        return Estimate(value)
    # degrees of freedom, Welch-Satterthwaite; of a single array its number of seeds less 1
    shares = [v**2 / (len(x) - 1) for v, x in zip(variances, samples, strict=True)]
    error = stats.t(total**2 / sum(shares), scale=math.sqrt(total))
    low, high = error.interval(0.95)
    return Estimate(value, value + low, value + high, float(2 * error.sf(abs(value))))


def difference(plus: np.ndarray, minus: np.ndarray) -> Estimate:
    """Of the means of (seeds,) and (seeds,)."""
    return estimate([plus], [minus])


def ratio_of_spreads(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Of the standard deviations of (seeds,) and (seeds,). NaN for single or equal values.

    The interval is that of an F test, which takes the values for normal. p is of Levene's test
    about the medians, which does not (Brown and Forsythe 1974); it needs four values of each.
    """
    from scipy import stats

    if min(len(above), len(below)) < 2 or min(above.var(), below.var()) == 0:
        return Estimate(math.nan)
    ratio = above.var(ddof=1) / below.var(ddof=1)
    chance = stats.f(len(above) - 1, len(below) - 1)  # of the ratio, were the variances equal
    low = ratio / chance.ppf(0.975)
    high = ratio / chance.ppf(0.025)
    p = math.nan
    if min(len(above), len(below)) >= 4:
        p = float(stats.levene(above, below, center="median").pvalue)
    return Estimate(math.sqrt(ratio), math.sqrt(low), math.sqrt(high), p)


def holm(p_values: list[float]) -> list[float]:
    """Corrected for how many are looked at (Holm 1979); NaN stays and does not count."""
    corrected = list(p_values)
    known = [i for i, p in enumerate(p_values) if not math.isnan(p)]
    known.sort(key=lambda i: p_values[i])
    largest = 0.0
    for rank, i in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def p_cell(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def versus(
    values: dict[str, np.ndarray], reference: str, spec: str, compare=difference
) -> dict[str, list[str]]:
    """{name: cells of its difference from the reference and of Holm's p}, (seeds,) of each."""
    compared = dict.fromkeys(values, Estimate(math.nan))
    for name in values:
        if name != reference and reference in values:
            compared[name] = compare(values[name], values[reference])
    corrected = holm([own.p for own in compared.values()])
    cells = {}
    for (name, own), p in zip(compared.items(), corrected, strict=True):
        cells[name] = [format(own, spec), p_cell(p)]
    return cells
