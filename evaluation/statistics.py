"""How much one number differs from another, and how sure that is: intervals and p-values over stories and over seeds.

Differences are B - A, in bits per byte, so that a negative one says that B is better. Arrays have the seeds or the stories in
their first axis; there may be more axes, which are compared one by one.
"""

import math
from dataclasses import dataclass

import numpy as np

BITS = "bits per byte"
CONFIDENCE = 0.95  # of an interval
SIGNIFICANCE = 0.05  # two-sided: the largest p-value that counts as a difference
UNEQUAL = 1.5  # times as many seeds as the other has: above, Welch's test is too sure
POWER = 0.8  # how likely a difference is to be seen, with as many seeds as are said to be needed
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """B - A. The interval and the p-value are NaN where nothing tells them."""

    mean: float | np.ndarray
    low: float | np.ndarray  # of the 95% interval
    high: float | np.ndarray
    p: float | np.ndarray  # two-sided, of no difference

    @property
    def margin(self) -> float | np.ndarray:
        """Half of the interval: the ± behind the mean."""
        return (self.high - self.low) / 2


def over_stories(nats_a, nats_b, story_bytes) -> Difference:
    """Two models on the same stories (stories, ...): would other stories say so, too? Other seeds are another question.

    Bits per byte are a ratio of sums, whose spread is that of its linearisation (Cochran 1977, Sampling Techniques, section 6.3):
    the difference of each story less what its length makes expected. Student's t of those numbers, paired by story.
    """
    bits = (np.asarray(nats_b, float) - np.asarray(nats_a, float)) / math.log(2)
    story_bytes = np.asarray(story_bytes, float)
    mean = bits.sum(axis=0) / story_bytes.sum(axis=0)
    return _one_sample(mean + (bits - mean * story_bytes) / story_bytes.mean(axis=0), mean)


def over_seeds(values_a, values_b, paired: bool) -> Difference:
    """Several runs of A and of B (seeds, ...), a value each: would other seeds say so, too?

    Student's t of the differences where the runs are paired, one behind the other by their seeds; Welch's t else, which lets the
    spreads differ. Where one has far fewer runs and the wider spread, Welch's degrees of freedom are too many, and false alarms
    come in up to 11%: then it has no more of them than the smaller group, with which they are 5% at most (Mickey and Brown 1966).
    Two runs of each at least.
    """
    from scipy.stats import t, ttest_ind

    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    assert len(values_a) > 1 and len(values_b) > 1
    mean = values_b.mean(axis=0) - values_a.mean(axis=0)
    if paired:
        return _one_sample(values_b - values_a, mean)
    if not (np.ptp(values_a, axis=0) + np.ptp(values_b, axis=0)).all():
        return _without_spread(mean)
    fewer, more = sorted((len(values_a), len(values_b)))
    if more > UNEQUAL * fewer:
        error = np.sqrt(np.var(values_a, axis=0, ddof=1) / len(values_a) + np.var(values_b, axis=0, ddof=1) / len(values_b))
        margin = t.isf((1 - CONFIDENCE) / 2, fewer - 1) * error
        return Difference(mean, mean - margin, mean + margin, 2 * t.sf(np.abs(mean) / error, fewer - 1))
    test = ttest_ind(values_b, values_a, equal_var=False, axis=0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, interval.low, interval.high, test.pvalue)


def _one_sample(differences: np.ndarray, mean) -> Difference:
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    if not np.ptp(differences, axis=0).all():
        return _without_spread(mean)
    test = ttest_1samp(differences, 0.0, axis=0)
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, interval.low, interval.high, test.pvalue)


def _without_spread(mean) -> Difference:
    """All runs or stories say exactly the same, as those of two copies do: none tells how much another one would differ."""
    if np.all(mean == 0):
        return Difference(mean, mean, mean, mean + 1.0)
    return Difference(mean, mean + math.nan, mean + math.nan, mean + math.nan)


def holm(p_values) -> np.ndarray:
    """p-values of many comparisons, so that one of them is at most 0.05 by mere luck with a chance of 5% in all (Holm 1979).

    The k-th smallest of n is multiplied by n + 1 - k, and none is below one that was smaller before. NaN counts for nothing.
    """
    p_values = np.asarray(p_values, float)
    told = np.flatnonzero(~np.isnan(p_values))
    order = told[np.argsort(p_values[told], kind="stable")]
    corrected = p_values.copy()
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return corrected


def seeds_needed(values_a, values_b, paired: bool, significance: float = SIGNIFICANCE) -> int | None:
    """How many seeds of each would see this difference with a chance of 80%, if it and the spread are as they look now.

    None where even 1,000 would not. By the noncentral t distribution; with Welch's degrees of freedom where they are not paired.
    """
    from scipy.stats import nct, t

    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    mean = values_b.mean() - values_a.mean()
    seeds = np.arange(2, MOST_SEEDS + 1)
    if paired:
        variance, freedom = np.var(values_b - values_a, ddof=1), seeds - 1.0
    else:
        var_a, var_b = np.var(values_a, ddof=1), np.var(values_b, ddof=1)
        variance = var_a + var_b
        freedom = (seeds - 1.0) * (variance**2 / (var_a**2 + var_b**2) if variance else 1.0)
    if mean == 0 or variance == 0:
        return None if mean == 0 else 2
    shift = abs(mean) / np.sqrt(variance / seeds)
    least = t.isf(significance / 2, freedom)
    power = nct.sf(least, freedom, shift)  # the chance of the other side is beneath notice
    enough = seeds[np.nan_to_num(power, nan=1.0) >= POWER]  # scipy has no number where the shift is so large that the chance is 1
    return int(enough[0]) if len(enough) else None
