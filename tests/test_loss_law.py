"""Promises of the loss law: known laws are found again, intervals cover, nothing is claimed that the losses leave open."""

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares
from scipy.stats import t

from evaluation.loss_law import ALPHAS, fit, race
from tests.errors import one_line_error

SIZES = np.array([0.25e6, 0.5e6, 1e6, 2e6])
SEEDS = np.repeat(SIZES, 3)
NOISE = 0.004


def law_of(E, alpha, at_a_million=0.85):
    """The law that goes through a loss at a million parameters."""
    return lambda sizes: E + (at_a_million - E) * (np.asarray(sizes) / 1e6) ** -alpha


class TestFit:
    def test_it_is_that_of_scipy_where_the_losses_determine_it(self):
        """Least squares, and where the noise is small intervals by derivatives, too."""
        sizes, random = np.repeat(np.geomspace(1e5, 1e8, 10), 2), np.random.default_rng(0)
        losses = law_of(0.5, 0.3)(sizes) + random.normal(0, 1e-4, len(sizes))
        law = fit(sizes, losses)
        expected, covariance = curve_fit(lambda N, E, A, alpha: E + A * N**-alpha, sizes, losses, p0=(0.4, 20, 0.25))
        assert list(law.parameters.values()) == pytest.approx(expected, rel=1e-4)
        for (low, high), middle, variance in zip(law.intervals.values(), expected, covariance.diagonal(), strict=True):
            margin = t.ppf(0.975, len(sizes) - 3) * variance**0.5
            assert (low, high) == pytest.approx((middle - margin, middle + margin), abs=0.03 * margin)
        low, high = law.band(sizes)
        assert (low < law.at(sizes)).all() and (law.at(sizes) < high).all()

    def test_nothing_is_below_zero(self):
        """Losses that fall faster than a power of the size would want E below zero."""
        losses = np.array([1.0, 0.85, 0.70, 0.55])
        law = fit(SIZES, losses)

        def residuals(parameters):
            return parameters[0] + parameters[1] * (SIZES / 1e6) ** -parameters[2] - losses

        assert least_squares(residuals, (0.5, 0.5, 0.2)).x[0] < 0
        expected = least_squares(residuals, (0.5, 0.5, 0.2), bounds=([0, 0, 0], np.inf)).x
        assert law.parameters["E"] == pytest.approx(0) == pytest.approx(expected[0], abs=1e-4)
        assert law.parameters["alpha"] == pytest.approx(expected[2], rel=1e-3)
        seeds = fit(SEEDS, np.repeat(losses, 3) + 0.002 * np.tile([-1, 0, 1], 4))
        assert all(low >= 0 for low, _ in seeds.intervals.values())

    def test_an_interval_holds_what_fits_by_brute_force(self):
        losses = law_of(0.5, 0.3)(SEEDS) + np.random.default_rng(1).normal(0, NOISE, len(SEEDS))
        law, wanted = fit(SEEDS, losses), [0.4e6, 3e6]
        E, middle, alpha = np.meshgrid(np.linspace(0, 0.8, 161), np.linspace(0.82, 0.87, 101), np.linspace(0.02, 2, 199))
        values = [E + (middle - E) * (size / 1e6) ** -alpha for size in (*SEEDS[::3], *wanted)]
        means, within = losses.reshape(4, 3).mean(axis=1), losses.reshape(4, 3).var(axis=1).sum() * 3
        left = within + 3 * sum((value - mean) ** 2 for value, mean in zip(values, means, strict=False))
        fits = left <= left.min() * (1 + t.ppf(0.975, 9) ** 2 / 9)
        assert left.min() == pytest.approx(law.squares([law.best_alpha])[0], rel=1e-2)
        assert law.intervals["E"] == pytest.approx((E[fits].min(), E[fits].max()), abs=0.015)
        assert law.intervals["alpha"] == pytest.approx((alpha[fits].min(), alpha[fits].max()), abs=0.02)
        for place, value in enumerate(values[4:]):
            band = [side[place] for side in law.band(wanted)]
            assert band == pytest.approx((value[fits].min(), value[fits].max()), abs=0.002)

    @pytest.mark.parametrize("E, alpha, simulated, at_most", [(0.55, 0.18, 100, 0.99), (0.03, 0.12, 25, 1.0)])
    def test_intervals_cover(self, E, alpha, simulated, at_most):
        """95% intervals hold the known truth in about 95% of ladders, in more of them where E is next to its bound."""
        truth, random = law_of(E, alpha), np.random.default_rng(3)
        hits = {"E": 0, "alpha": 0, "at a size": 0, "forecast": 0}
        for _ in range(simulated):
            losses = truth(SEEDS) + random.normal(0, NOISE, len(SEEDS))
            law = fit(SEEDS, losses)
            for number, value in {"E": E, "alpha": alpha}.items():
                low, high = law.intervals[number]
                hits[number] += low <= value <= high
            (low,), (high,) = law.band([0.7e6])
            hits["at a size"] += low <= truth(0.7e6) <= high
            hits["forecast"] += fit(SEEDS, losses, held_out=SIZES[-1]).forecast.is_inside
        assert all(0.90 <= count / simulated <= at_most for count in hits.values()), hits

    def test_two_sizes_leave_a_range_open(self):
        truth, sizes = law_of(0.5, 0.3), SEEDS[:9]
        law = fit(sizes, truth(sizes) + 1e-6 * np.tile([-1, 0, 1], 3), held_out=1e6)
        forecast = law.forecast
        assert math.isnan(forecast.expected) and not law.is_determined and law.undetermined == ["E", "alpha"]
        straight = truth(0.5e6) ** 2 / truth(0.25e6)  # E = 0: each doubling takes the same share
        assert forecast.interval == pytest.approx((straight, truth(0.5e6)), abs=1e-3) and forecast.is_inside
        assert all(math.isnan(value) for value in law.parameters.values())

    def test_losses_that_do_not_fall_are_no_law(self):
        law = fit(SEEDS, 0.85 + np.random.default_rng(2).normal(0, NOISE, len(SEEDS)) + 0.02 * np.log(SEEDS / 1e6))
        assert not law.is_determined and "alpha" in law.undetermined and law.best[1] == 0
        assert law.intervals["alpha"] == pytest.approx((ALPHAS[0], ALPHAS[-1]))

    def test_lack_of_fit_is_tested_against_the_seeds(self):
        random = np.random.default_rng(3)
        bent = np.repeat([0.95, 0.80, 0.79, 0.70], 3)
        assert fit(SEEDS, bent + random.normal(0, NOISE, 12)).lack_of_fit < 0.001
        p = [fit(SEEDS, law_of(0.5, 0.3)(SEEDS) + random.normal(0, NOISE, 12)).lack_of_fit for _ in range(60)]
        assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) <= 0.05) <= 0.1
        assert math.isnan(fit(SIZES, bent[::3]).lack_of_fit) and math.isnan(fit(SEEDS[:9], bent[:9]).lack_of_fit)

    def test_one_seed_has_no_intervals(self):
        law = fit(SIZES, law_of(0.5, 0.3)(SIZES), held_out=SIZES[-1])
        assert not law.has_noise and all(np.isnan(interval).all() for interval in law.intervals.values())
        assert law.parameters["alpha"] == pytest.approx(0.3, rel=1e-3) and np.isnan(law.band(SIZES)).all()
        assert np.isnan(law.forecast.interval).all() and not law.undetermined

    def test_bad_input(self):
        one_line_error(lambda: fit([1e6, 1e6], [0.9, 0.8]), "at least two sizes", "train more sizes")
        one_line_error(lambda: fit(SIZES[:2], [0.9, 0.8], held_out=0.5e6), "at least two sizes")
        one_line_error(lambda: fit(SIZES, [0.9, 0.8, math.nan, 0.7]), "diverged")


def simulated_race(one, other, random, seeds=3):
    return race(*(fit(sizes, truth(sizes) + random.normal(0, NOISE, len(sizes)))
                  for truth, sizes in ((one, np.repeat(SIZES, seeds)), (other, np.repeat(1.03 * SIZES, seeds)))))  # fmt: skip


class TestRace:
    def test_a_crossing_is_found_with_its_interval(self):
        random = np.random.default_rng(4)
        races = [simulated_race(law_of(0.5, 0.15), law_of(0.5, 0.35), random) for _ in range(30)]
        crossings = [race.overtaking for race in races if race.overtaking]
        assert len(crossings) >= 25 and {which for which, _, _ in crossings} == {-1}  # one in ten has a law that does not fit
        assert np.mean([low <= 1e6 <= high for _, _, (low, high) in crossings]) >= 0.9
        assert np.median([at for _, at, _ in crossings]) == pytest.approx(1e6, rel=0.05)
        assert np.median([high / low for _, _, (low, high) in crossings]) < 1.5
        which, at, _ = simulated_race(law_of(0.5, 0.35), law_of(0.5, 0.15), random).overtaking
        assert which == 1 and at == pytest.approx(1e6, rel=0.2)

    @pytest.mark.parametrize("num_sizes", [3, 4])
    def test_equal_laws_race_and_forecast_as_promised(self, num_sizes):
        """Seed deviation 0.01: false alarms in at most 5% of races, forecasts inside in about 95%."""
        random, truth = np.random.default_rng(5), law_of(0.5, 0.3)
        sizes, simulated = SEEDS[: 3 * num_sizes], 20
        better = inside = 0
        for _ in range(simulated):
            one, other = (truth(sizes) + random.normal(0, 0.01, len(sizes)) for _ in range(2))
            better += bool(race(fit(sizes, one), fit(sizes, other)).leads)
            inside += fit(sizes, one, held_out=sizes[-1]).forecast.is_inside
        assert better <= 0.05 * simulated and inside >= 0.9 * simulated

    def test_a_law_without_seeds_or_fit_races_nobody(self):
        spread = 0.002 * np.tile([-1, 0, 1], 4)
        good = fit(SEEDS, law_of(0.5, 0.2, at_a_million=0.6)(SEEDS) + spread)
        single, bent = fit(SIZES, law_of(0.5, 0.2)(SIZES)), fit(SEEDS, np.repeat([0.95, 0.80, 0.79, 0.70], 3) + spread)
        assert not race(single, good).leads and not race(bent, good).leads and not bent.fits

    def test_several_races_have_wider_intervals(self):
        one, other = (fit(SEEDS, law_of(0.5, alpha)(SEEDS) + 0.002 * np.tile([-1, 0, 1], 4)) for alpha in (0.2, 0.3))
        alone, one_of_three = race(one, other).simultaneous, race(one, other, 1 - 0.05 / 3).simultaneous
        assert (one_of_three.low < alone.low).all() and (one_of_three.high > alone.high).all()

    def test_one_that_is_always_better_crosses_nowhere(self):
        found = simulated_race(law_of(0.5, 0.2), law_of(0.45, 0.2, at_a_million=0.80), np.random.default_rng(6))
        ((which, start, end),) = found.leads
        assert which == -1 and (start, end) == (found.sizes[0], found.sizes[-1]) and found.overtaking is None
        assert (found.sizes[0], found.sizes[-1]) == pytest.approx((1.03 * SIZES[0], SIZES[-1]))

    def test_a_crossing_beyond_what_was_measured_is_no_overtaking(self):
        meet_at_8 = law_of(0.5, 0.2)(8e6)
        other = law_of(0.5, 0.4, at_a_million=0.5 + (meet_at_8 - 0.5) * 8**0.4)
        found = race(*(fit(SEEDS, truth(SEEDS) + 1e-4 * np.tile([-1, 0, 1], 4)) for truth in (law_of(0.5, 0.2), other)))
        assert found.crossings == pytest.approx([8e6], rel=0.02)
        assert found.overtaking is None and [which for which, _, _ in found.leads] == [1]

    def test_sizes_must_overlap(self):
        near, far = (fit(sizes, law_of(0.5, 0.2)(sizes)) for sizes in (SIZES, 100 * SIZES))
        one_line_error(lambda: race(near, far), "do not overlap", "same sizes")
