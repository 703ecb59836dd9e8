"""Promises of the statistics: intervals that cover, at most 5% false alarms, the seeds that a verdict takes."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from evaluation.statistics import SEED_DEVIATION, Correction, over_seeds, over_stories, seeds_for, seeds_needed
from runs.folder import Run
from runs.looks import MAX_SEEDS

SIMULATED = 2000
MANY = 20_000  # simulations of a rate of 5%, which chance raises by at most CHANCE
CHANCE = 3 * math.sqrt(0.05 * 0.95 / MANY)


def alarms(a, b, paired):
    """The share of comparisons that call a difference where there is none."""
    return np.mean(over_seeds(a, b, paired).p <= 0.05)


def covered(difference, truth):
    return (difference.low <= truth) & (truth <= difference.high)


class TestOneComparison:
    @pytest.mark.parametrize("seeds", [3, 5])
    def test_intervals_of_pairs_cover_in_95_percent(self, seeds):
        random = np.random.default_rng(seeds)
        order = random.normal(0.9, 0.02, (seeds, SIMULATED))  # what both owe to the seed
        a, b = order + random.normal(0, 0.01, order.shape), order - 0.02 + random.normal(0, 0.01, order.shape)
        assert 0.93 <= covered(over_seeds(a, b, paired=True), -0.02).mean() <= 0.97

    @pytest.mark.parametrize("spread", [0.01, 0.02])
    def test_intervals_of_independent_seeds_cover_in_95_percent(self, spread):
        random = np.random.default_rng(0)
        a, b = random.normal(0.9, 0.01, (5, SIMULATED)), random.normal(0.88, spread, (4, SIMULATED))
        assert 0.93 <= covered(over_seeds(a, b, paired=False), -0.02).mean() <= 0.97

    def test_intervals_over_stories_cover_in_95_percent(self):
        """Stories of very different length, whose losses depend on it."""
        random = np.random.default_rng(2)
        length = random.lognormal(6.5, 0.5, (300, SIMULATED)).round()
        hard = random.normal(0, 40, length.shape)
        a = 0.60 * length + hard + random.normal(0, 0.6, length.shape) * np.sqrt(length)
        b = 0.59 * length + hard + random.normal(0, 0.6, length.shape) * np.sqrt(length)
        assert 0.93 <= covered(over_stories(a, b, length), -0.01 / math.log(2)).mean() <= 0.97

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_pairs_raise_5_percent_false_alarms(self, seeds):
        random = np.random.default_rng(seeds)
        order = random.normal(0.9, 0.02, (seeds, MANY))
        a, b = (order + random.normal(0, 0.01, order.shape) for _ in range(2))
        assert abs(alarms(a, b, paired=True) - 0.05) <= CHANCE

    @pytest.mark.parametrize("seeds, most", [
        ((2, 2), 0.05), ((2, 3), 0.05), ((2, 5), 0.05), ((3, 3), 0.05), ((3, 5), 0.069), ((3, 8), 0.069), ((5, 10), 0.055),
    ])  # fmt: skip
    @pytest.mark.parametrize("spread", [1, 2])  # of the smaller group, where Welch's degrees of freedom are too many
    def test_independent_seeds_raise_few_false_alarms(self, seeds, most, spread):
        random = np.random.default_rng(sum(seeds))
        a, b = random.normal(0.9, 0.01 * spread, (seeds[0], MANY)), random.normal(0.9, 0.01, (seeds[1], MANY))
        assert alarms(a, b, paired=False) <= most + CHANCE
        if seeds == (2, 5) and spread == 2:
            assert np.mean(stats.ttest_ind(b, a, equal_var=False).pvalue <= 0.05) > 0.08

    def test_each_seed_of_one_group_alone_adds_power(self):
        """Three against five detect 3 deviations in 82%; with the degrees of freedom of the smaller group it was 53%."""
        random = np.random.default_rng(0)
        a, b = random.normal(0, 1, (3, MANY)), random.normal(3, 1, (8, MANY))
        power = [np.mean(over_seeds(a, b[:seeds], paired=False).p <= 0.05) for seeds in (3, 4, 5, 8)]
        assert power == sorted(power) and power[2] > 0.8

    def test_stories_against_the_bootstrap(self):
        random = np.random.default_rng(5)
        length = random.integers(200, 1500, 400)
        a = 0.6 * length + random.normal(0, 20, 400)
        b = a - 0.02 * length + random.normal(0, 6, 400)
        ours = over_stories(a, b, length)

        def bits(a, b, length, axis=-1):
            return (b - a).sum(axis) / length.sum(axis) / math.log(2)

        resampled = stats.bootstrap((a, b, length), bits, paired=True, n_resamples=2000, rng=0, method="percentile")
        boot = resampled.confidence_interval
        assert ours.mean == pytest.approx(bits(a, b, length))
        assert (ours.low, ours.high) == pytest.approx((boot.low, boot.high), abs=0.05 * (boot.high - boot.low))

    def test_independent_seeds_against_scipy(self):
        a, b = [0.90, 0.91, 0.93], [0.88, 0.87, 0.90, 0.80]
        ours, theirs = over_seeds(a, b, paired=False, confidence=0.9), stats.ttest_ind(b, a, equal_var=False)
        assert (ours.low, ours.high, ours.p) == pytest.approx((*theirs.confidence_interval(0.9), theirs.pvalue))

    def test_copies_and_what_has_no_spread(self):
        values = [0.9, 0.91]
        assert over_seeds(values, values, paired=True).p == 1.0
        assert np.isnan(over_seeds([0.9, 0.9], [0.8, 0.8], paired=False).p)


class TestManyComparisons:
    def test_all_intervals_cover_at_once_in_95_percent(self):
        """Eight ideas against one base model, half of which change something."""
        random, correction = np.random.default_rng(3), Correction(comparisons=8)
        truth = np.repeat([0.0, -0.05], 4)
        base = random.normal(0.9, 0.01, (5, MANY))
        ideas = random.normal(0.9, 0.01, (5, 8, MANY)) + truth[:, None]
        apart, together = (
            covered(over_seeds(base[:, None], ideas, False, confidence), truth[:, None]).all(axis=0)
            for confidence in (0.95, 1 - correction.level)
        )
        assert apart.mean() < 0.85 and together.mean() >= 0.95 - CHANCE

    @pytest.mark.parametrize("correction", [Correction(), Correction(7), Correction(1, 3), Correction(7, 2)])
    def test_an_interval_excludes_zero_exactly_if_p_is_below_5_percent(self, correction):
        a, b = np.random.default_rng(0).normal(0, 1, (2, 6, 500)) + np.array([0, 2.5])[:, None, None]
        result = over_seeds(a, b, paired=False, confidence=1 - correction.level)
        excluded = ~covered(result, 0)
        assert excluded.tolist() == [correction.p(p) < 0.05 for p in result.p] and 0 < excluded.sum() < 500


class TestLooks:
    """A look after each added seed, where nothing differs: at most 5% false alarms in all, with Welch's test 6% at worst."""

    @pytest.mark.parametrize("first", [2, 3])
    def test_pairs(self, first):
        a, b = np.random.default_rng(first).normal(0, 1, (2, MAX_SEEDS, MANY))
        assert self.ever(first, [(a[:seeds], b[:seeds]) for seeds in range(first, MAX_SEEDS + 1)], True) <= 0.05 + CHANCE
        plain = [over_seeds(a[:seeds], b[:seeds], True).p <= 0.05 for seeds in range(first, MAX_SEEDS + 1)]
        assert np.any(plain, axis=0).mean() > 0.15  # without the correction

    @pytest.mark.parametrize("first, spread, most", [
        ((2, 2), 2, 0.05), ((3, 3), 1, 0.05), ((3, 3), 2, 0.05), ((5, 3), 1, 0.05), ((3, 5), 1, 0.05), ((3, 5), 2, 0.06),
    ])  # fmt: skip
    def test_independent_seeds(self, first, spread, most):
        """Equal groups both grow; of unequal ones the second grows."""
        random = np.random.default_rng(sum(first))
        a, b = random.normal(0, spread, (MAX_SEEDS, MANY)), random.normal(0, 1, (MAX_SEEDS, MANY))
        fixed = first[0] if first[0] != first[1] else None
        looks = [(a[: fixed or seeds], b[:seeds]) for seeds in range(first[1], MAX_SEEDS + 1)]
        assert self.ever(min(first), looks, False) <= most + CHANCE

    @staticmethod
    def ever(first, looks, paired):
        levels = [Correction(1, None if number == 0 else first).level for number in range(len(looks))]
        return np.any([over_seeds(*look, paired).p <= level for look, level in zip(looks, levels, strict=True)], axis=0).mean()


class TestNeededSeeds:
    def test_that_many_seeds_have_80_percent_power(self):
        random, effect = np.random.default_rng(4), 1.1
        for paired, freedom in ((True, 1), (False, 2)):
            needed = seeds_for(effect, 0.05, freedom, 1000)
            power = {}
            for seeds in (needed - 1, needed):
                a, b = random.normal(0, math.sqrt(0.5), (2, seeds, SIMULATED)) + np.array([0, effect])[:, None, None]
                power[seeds] = np.mean(over_seeds(a, b, paired).p <= 0.05)
            assert power[needed] > 0.77 and power[needed - 1] < 0.83

    @pytest.mark.parametrize("paired, freedom", [(True, 1), (False, 2)])
    def test_the_range_covers_the_truth_in_80_percent(self, paired, freedom):
        random, effect, repeats = np.random.default_rng(1), 1.5, 150
        truth = seeds_for(effect, 0.01, freedom, MAX_SEEDS)
        covers = []
        for _ in range(repeats):
            a, b = random.normal(0, math.sqrt(0.5), (2, 3)) + np.array([[0], [effect]])
            low, high = seeds_needed(a, b, paired, 0.01)
            covers.append(low is not None and low <= truth <= (high or math.inf))
        assert 0.7 <= np.mean(covers) <= 0.9

    def test_the_typical_deviation_is_that_of_the_shipped_runs(self, shipped):
        files = [Run(name).path("story_losses.csv") for name in shipped if name.startswith("0.5m_")]
        losses = [pd.read_csv(file)[["nats", "bytes"]].sum() for file in files]
        bits = np.reshape([loss["nats"] / loss["bytes"] / math.log(2) for loss in losses], (3, 3))
        assert math.sqrt(np.var(bits, axis=1, ddof=1).mean()) == pytest.approx(SEED_DEVIATION, abs=5e-5)
