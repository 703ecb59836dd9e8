"""Differences between models with intervals and p-values, over stories and over seeds.

A difference is B - A in bits per byte: negative if B is better. The first axis of an array holds the seeds or the stories; each
element of the other axes is compared separately.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from runs.looks import MAX_SEEDS

BITS = "bits per byte"
CONFIDENCE = 0.95  # level of all intervals
SIGNIFICANCE = 0.05  # two-sided: the largest corrected p-value that counts as a difference
FIRST_LOOK = 2 / 3  # share of SIGNIFICANCE that the first look spends; the rest is for seeds that are added after it
POWER = 0.8  # probability of detecting a difference with the recommended number of seeds
SEED_DEVIATION = 0.0156  # bits per byte: pooled over the three 0.5m_* groups in trained_models/, three seeds each
SIMULATIONS = 50_000  # of looks where nothing differs


@dataclass(frozen=True)
class Difference:
    """B - A with its interval and two-sided p-value, which are NaN if the data do not determine them."""

    mean: float | np.ndarray
    low: float | np.ndarray
    high: float | np.ndarray
    p: float | np.ndarray

    @property
    def margin(self) -> float | np.ndarray:
        """Half the width of the interval: the ± after the mean."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Correction:
    """The correction of p-values and intervals for several comparisons and for repeated looks.

    Adding seeds after an open verdict tests the same difference again, and each test may be a false alarm. So the first look
    spends two thirds of the 5%, and the other third is spent on the smallest p-value of all later looks up to 20 seeds: repeated
    significance tests at a constant level (Armitage, McPherson and Rowe 1969; Jennison and Turnbull 2000, Group Sequential
    Methods, chapter 2). Unequal groups of unequal deviations may have up to 6% false alarms, as Welch's test has too many there.

    Comparisons are corrected by Bonferroni, as Holm's method has no intervals that agree with its p-values: an interval at the
    confidence 1 - level excludes zero exactly if the corrected p-value is below 5%.

    >>> round(Correction(comparisons=2).p(0.01), 3), round(Correction(comparisons=2).level, 4)
    (0.03, 0.0167)
    """

    comparisons: int = 1
    first_look: int | None = None  # seeds per group at the first look, if seeds were added since; the smaller group counts

    @property
    def level(self) -> float:
        """The uncorrected p-value that corresponds to 5%."""
        if self.first_look is None:
            return FIRST_LOOK * SIGNIFICANCE / self.comparisons
        smallest = smallest_p(self.first_look)
        return float(smallest[int((1 - FIRST_LOOK) * SIGNIFICANCE / self.comparisons * len(smallest))])

    def p(self, p: float) -> float:
        """The corrected p-value."""
        if self.first_look is None:
            corrected = p / FIRST_LOOK
        else:
            smallest = smallest_p(self.first_look)
            corrected = np.searchsorted(smallest, p, side="right") / len(smallest) / (1 - FIRST_LOOK)
        return p if math.isnan(p) else min(1.0, float(corrected) * self.comparisons)


@cache
def smallest_p(first_look: int) -> np.ndarray:
    """Sorted smallest p-values of t-tests after each further pair up to MAX_SEEDS, where nothing differs. The first one is 0.

    For pairs; independent samples, which have more degrees of freedom, have no more false alarms at the same level.
    """
    from scipy.special import stdtr

    smallest, values = np.ones(SIMULATIONS), np.random.default_rng(0).normal(size=(MAX_SEEDS, SIMULATIONS))
    sums, squares = values.cumsum(axis=0), (values**2).cumsum(axis=0)
    for seeds in range(first_look + 1, MAX_SEEDS + 1):
        variance = (squares[seeds - 1] - sums[seeds - 1] ** 2 / seeds) / (seeds - 1)
        t = np.abs(sums[seeds - 1]) / np.sqrt(seeds * variance)
        smallest = np.minimum(smallest, 2 * stdtr(seeds - 1, -t))
    return np.concatenate([[0.0], np.sort(smallest)])


def over_stories(nats_a, nats_b, story_bytes, confidence: float = CONFIDENCE) -> Difference:
    """Compare two models on the same stories, by a paired t-test over stories.  All arrays (stories, ...)

    The interval covers the choice of stories, not that of seeds. Bits per byte are a ratio of sums; its variance is that of its
    linearization, each story's difference minus what its length predicts (Cochran 1977, Sampling Techniques, section 6.3).
    """
    bits = (np.asarray(nats_b, float) - np.asarray(nats_a, float)) / math.log(2)
    story_bytes = np.asarray(story_bytes, float)
    mean = bits.sum(axis=0) / story_bytes.sum(axis=0)
    return _difference(mean, *_one_sample((bits - mean * story_bytes) / story_bytes.mean(axis=0)), confidence)


def over_seeds(values_a, values_b, paired: bool, confidence: float = CONFIDENCE) -> Difference:
    """Compare two groups of at least two seeds, one value per seed.  values_a, values_b (seeds, ...)

    A paired t-test if paired, where row i of both has the same seed; else Welch's t-test. At 5% it raises up to 8% false alarms
    from 3 seeds on, but 10% with 2 seeds against more; so there the degrees of freedom are those of the smaller group (Mickey and
    Brown 1966).

    >>> over_seeds([0.91, 0.90, 0.92], [0.88, 0.88, 0.89], paired=True).p.round(3).item()
    0.015
    """
    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    mean = values_b.mean(axis=0) - values_a.mean(axis=0)
    return _difference(mean, *_standard_error(values_a, values_b, paired), confidence)


def _standard_error(values_a: np.ndarray, values_b: np.ndarray, paired: bool) -> tuple:
    """The standard error of the mean difference and its degrees of freedom; the error is 0 where all values are equal."""
    assert len(values_a) > 1 and len(values_b) > 1
    if paired:
        return _one_sample(values_b - values_a)
    (error_a, freedom_a), (error_b, freedom_b) = _one_sample(values_a), _one_sample(values_b)
    error = np.hypot(error_a, error_b)
    if min(len(values_a), len(values_b)) == 2 < max(len(values_a), len(values_b)):
        return error, 1
    with np.errstate(invalid="ignore"):
        return error, error**4 / (error_a**4 / freedom_a + error_b**4 / freedom_b)


def _one_sample(values: np.ndarray) -> tuple:
    error = np.std(values, axis=0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return np.where(np.ptp(values, axis=0) > 0, error, 0.0), len(values) - 1  # equal values may have a deviation of 1e-17


def _difference(mean, error, freedom, confidence: float) -> Difference:
    """Without variance, as for copies of a run, there is no p-value, unless the difference is zero."""
    from scipy.special import stdtr, stdtrit

    with np.errstate(divide="ignore", invalid="ignore"):
        margin = -stdtrit(freedom, (1 - confidence) / 2) * error
        p = 2 * stdtr(freedom, -np.abs(mean) / error)
    margin = np.where(error > 0, margin, np.where(mean == 0, 0.0, np.nan))[()]
    return Difference(mean, mean - margin, mean + margin, np.where(error > 0, p, np.where(mean == 0, 1.0, np.nan))[()])


def seeds_for(effect: float, level: float, freedom: float, most: int) -> int | None:
    """The number of seeds per group that detects a difference with 80% power, or None if it is above `most`.

    Parameters
    ----------
    effect : float
        The difference over its standard error for one seed of each.
    level : float
        The two-sided p-value that counts.
    freedom : float
        Degrees of freedom per seed after the first: 1 for pairs, 2 for independent samples of equal deviation.

    >>> seeds_for(effect=1.0, level=0.05, freedom=1, most=20)  # a paired t-test
    10
    """
    from scipy.stats import nct, t

    seeds = np.arange(2, most + 1)
    degrees = (seeds - 1) * freedom
    power = nct.sf(t.isf(level / 2, degrees), degrees, effect * np.sqrt(seeds))  # the other tail is negligible
    enough = seeds[np.nan_to_num(power, nan=1.0) >= POWER]  # scipy returns NaN where the power is 1 to machine precision
    return int(enough[0]) if len(enough) else None


def seeds_needed(values_a, values_b, paired: bool, level: float) -> tuple[int | None, int | None]:
    """The 80% interval of the number of seeds per group that detects the true difference; None is above MAX_SEEDS.

    Mean and variance of the seeds at hand are uncertain. The interval is that of the noncentrality of their t statistic: t times
    a chi variable for the deviation, minus a normal one for the mean.

    >>> seeds_needed([0.91, 0.90, 0.92], [0.895, 0.88, 0.90], paired=True, level=0.05)
    (3, 5)
    """
    values_a, values_b = np.asarray(values_a, float), np.asarray(values_b, float)
    error, degrees = _standard_error(values_a, values_b, paired)
    var_a, var_b = np.var(values_a, ddof=1), np.var(values_b, ddof=1)
    variance = np.var(values_b - values_a, ddof=1) if paired else var_a + var_b
    freedom = 1.0 if paired else variance**2 / (var_a**2 + var_b**2)
    random, t = np.random.default_rng(0), abs(values_b.mean() - values_a.mean()) / error
    shifts = t * np.sqrt(random.chisquare(degrees, 10_000) / degrees) - random.normal(size=10_000)
    effects = np.maximum(0.0, np.quantile(shifts, [0.9, 0.1])) * error / math.sqrt(variance)
    return tuple(seeds_for(effect, level, freedom, MAX_SEEDS) for effect in effects)
