"""What a few seeds say: means, 95% intervals, differences and their p values.

Curves and bars have interquartile means with intervals of a bootstrap that is stratified by task:
Agarwal et al. (2021), Deep Reinforcement Learning at the Edge of the Statistical Precipice.
Differences are of plain means, after Welch: a percentile bootstrap is too narrow for a few seeds.
"""

import math
import warnings
from typing import NamedTuple

import numpy as np
from scipy import stats

RESAMPLES = 2_000


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


# --- interquartile means ------------------------------------------------------
def iqm(*tasks: np.ndarray, axis: int = 0) -> np.ndarray:
    """Interquartile mean over the seeds of all tasks, (seeds, ...) each; of up to three: mean."""
    return stats.trim_mean(np.concatenate(tasks, axis=axis), 0.25, axis=axis)


def interval(*tasks: np.ndarray) -> np.ndarray:
    """Bounds (2, ...) of the 95% interval of the interquartile mean of (seeds, ...).

    Seeds are drawn anew within each task. NaN where a task has one seed only, or no value, as the
    active ratios before the first update.
    """
    if min(len(scores) for scores in tasks) < 2:
        return np.full((2, *tasks[0].shape[1:]), np.nan)
    how = {"axis": 0, "method": "percentile", "n_resamples": RESAMPLES}
    with warnings.catch_warnings(action="ignore", category=stats.DegenerateDataWarning):  # of NaN
        result = stats.bootstrap(tasks, iqm, rng=np.random.default_rng(0), **how)
    return np.stack(result.confidence_interval)


def aggregate(tasks: list[np.ndarray]) -> Estimate:
    """Interquartile mean of (seeds,) of each task, NaN where one has none."""
    if min(map(len, tasks), default=0) == 0:
        return Estimate(math.nan)
    return Estimate(iqm(*tasks), *interval(*tasks))


# --- means --------------------------------------------------------------------
def estimate(plus: list[np.ndarray], minus: list[np.ndarray] = ()) -> Estimate:
    """Sum of the means of `plus` less the means of `minus`.

    Each array holds a number per seed, (seeds,). One array gives Student's interval of a mean, two
    Welch's of a difference, four that of a difference of differences. There is no interval where
    an array has a single number, or where none of them varies.
    """
    samples = [*plus, *minus]
    if min(map(len, samples)) == 0:
        return Estimate(math.nan)
    value = float(sum(x.mean() for x in plus) - sum(x.mean() for x in minus))
    if min(map(len, samples)) == 1:
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
    fewest = min(len(above), len(below))
    if fewest < 2 or min(above.var(), below.var()) == 0:
        return Estimate(math.nan)
    ratio = above.var(ddof=1) / below.var(ddof=1)
    chance = stats.f(len(above) - 1, len(below) - 1)  # of the ratio, were the variances equal
    bounds = ratio / chance.ppf([0.975, 0.025])
    p = math.nan
    if fewest >= 4:
        p = float(stats.levene(above, below).pvalue)
    return Estimate(math.sqrt(ratio), *np.sqrt(bounds), p)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Corrected for how many are looked at, (n,) (Holm 1979); NaN stays and does not count."""
    order = np.argsort(p_values)  # NaN last
    known = np.count_nonzero(~np.isnan(p_values))
    scaled = (known - np.arange(len(order))) * p_values[order]
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return corrected


def versus(
    values: dict[str, np.ndarray], reference: str, spec: str, compare=difference
) -> dict[str, list[str]]:
    """{name: cells of its difference from the reference and of Holm's p}, (seeds,) of each."""
    compared = dict.fromkeys(values, Estimate(math.nan))
    for name in values:
        if name != reference and reference in values:
            compared[name] = compare(values[name], values[reference])
    corrected = holm(np.array([own.p for own in compared.values()]))
    cells = {}
    for (name, own), p in zip(compared.items(), corrected, strict=True):
        text = "< 0.001" if p < 0.001 else f"{p:.2g}".replace("nan", "–")
        cells[name] = [format(own, spec), text]
    return cells
