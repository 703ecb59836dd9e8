"""Differences between models with intervals and p-values, over stories and over seeds.

A difference is B - A in bits per byte: negative if B is better. The first axis of an array holds the seeds or the stories; each
element of the other axes is compared separately.
"""

import math
from dataclasses import dataclass

import numpy as np

BITS = "bits per byte"
CONFIDENCE = 0.95  # level of all intervals
SIGNIFICANCE = 0.05  # two-sided: the largest p-value that counts as a difference
MAX_SEED_RATIO = 1.5  # of two groups, up to which Welch's degrees of freedom are trusted
POWER = 0.8  # probability of detecting a difference with the recommended number of seeds
MAX_SEEDS = 1000


@dataclass(frozen=True)
class Difference:
    """B - A with its 95% interval and two-sided p-value, which are NaN if the data do not determine them."""

    mean: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray
    p: float | np.ndarray

    @property
    def margin(self) -> float | np.ndarray:
        """Half the width of the interval: the ± after the mean."""
        return (self.high - self.low) / 2


def over_stories(nats_a, nats_b, story_bytes) -> Difference:
    """Compare two models on the same stories, by a paired t-test over stories.  All arguments (stories, ...)

    The interval covers the choice of stories, not that of seeds. Bits per byte are a ratio of sums; its variance is that of its
    linearization, each story's difference minus what its length predicts (Cochran 1977, Sampling Techniques, section 6.3).
    """
    bits = (np.asarray(nats_b, float) - np.asarray(nats_a, float)) / math.log(2)
    story_bytes = np.asarray(story_bytes, float)
    mean = bits.sum(axis=0) / story_bytes.sum(axis=0)
    return _one_sample(mean + (bits - mean * story_bytes) / story_bytes.mean(axis=0), mean)


def over_seeds(values_a, values_b, paired: bool) -> Difference:
    """Compare two groups of at least two seeds, one value per seed.  values_a, values_b (seeds, ...)

    A paired t-test if paired, where row i of both has the same seed; else Welch's t-test. If one group has far fewer seeds and
    the larger variance, Welch's degrees of freedom are too high and up to 11% of the tests are false alarms; the degrees of
    freedom of the smaller group keep them at 5% or less (Mickey and Brown 1966).

    >>> over_seeds([0.91, 0.90, 0.92], [0.88, 0.88, 0.89], paired=True).p.round(3).item()
    0.015
    """
    from scipy.stats import t, ttest_ind

    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    assert len(values_a) > 1 and len(values_b) > 1
    mean = values_b.mean(axis=0) - values_a.mean(axis=0)
    if paired:
        return _one_sample(values_b - values_a, mean)
    if not (np.ptp(values_a, axis=0) + np.ptp(values_b, axis=0)).all():
        return _without_variance(mean)
    smaller, larger = sorted((len(values_a), len(values_b)))
    if larger > MAX_SEED_RATIO * smaller:
        error = np.sqrt(np.var(values_a, axis=0, ddof=1) / len(values_a) + np.var(values_b, axis=0, ddof=1) / len(values_b))
        margin = t.isf((1 - CONFIDENCE) / 2, smaller - 1) * error
        return Difference(mean, mean - margin, mean + margin, 2 * t.sf(np.abs(mean) / error, smaller - 1))
    return _difference(mean, ttest_ind(values_b, values_a, equal_var=False, axis=0))


def _one_sample(differences: np.ndarray, mean) -> Difference:
    from scipy.stats import ttest_1samp

    if len(differences) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    if not np.ptp(differences, axis=0).all():
        return _without_variance(mean)
    return _difference(mean, ttest_1samp(differences, 0.0, axis=0))


def _difference(mean, test) -> Difference:
    interval = test.confidence_interval(CONFIDENCE)
    return Difference(mean, interval.low, interval.high, test.pvalue)


def _without_variance(mean) -> Difference:
    """All values are equal, as for two copies of a run: nothing to estimate the noise from."""
    if np.all(mean == 0):
        return Difference(mean, mean, mean, mean + 1.0)
    return Difference(mean, mean + math.nan, mean + math.nan, mean + math.nan)


def holm(p_values) -> np.ndarray:
    """Correct p-values for multiple comparisons (Holm 1979); NaN is not counted.

    The k-th smallest of n is multiplied by n + 1 - k, and is at least as large as the corrected one before it.

    >>> holm([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p_values = np.asarray(p_values, float)
    tested = np.flatnonzero(~np.isnan(p_values))
    order = tested[np.argsort(p_values[tested], kind="stable")]
    corrected = p_values.copy()
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)))
    return corrected


def seeds_needed(values_a, values_b, paired: bool, significance: float = SIGNIFICANCE) -> int | None:
    """Estimate how many seeds per group would detect this difference with 80% power, or None if 1,000 would not.

    Mean and variance are taken from the seeds at hand; the power is that of the noncentral t distribution, with Welch's degrees
    of freedom if the seeds are not paired.

    >>> seeds_needed([0.91, 0.90, 0.92], [0.90, 0.91, 0.91], paired=True)
    97
    """
    from scipy.stats import nct, t

    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    mean = values_b.mean() - values_a.mean()
    seeds = np.arange(2, MAX_SEEDS + 1)
    if paired:
        variance, freedom = np.var(values_b - values_a, ddof=1), seeds - 1.0
    else:
        var_a, var_b = np.var(values_a, ddof=1), np.var(values_b, ddof=1)
        variance = var_a + var_b
        freedom = (seeds - 1.0) * (variance**2 / (var_a**2 + var_b**2) if variance else 1.0)
    if mean == 0 or variance == 0:
        return None if mean == 0 else 2
    shift = abs(mean) / np.sqrt(variance / seeds)
    power = nct.sf(t.isf(significance / 2, freedom), freedom, shift)  # the other tail is negligible
    enough = seeds[np.nan_to_num(power, nan=1.0) >= POWER]  # scipy returns NaN where the power is 1 to machine precision
    return int(enough[0]) if len(enough) else None
