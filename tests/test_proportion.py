"""Promises of the intervals of shares: the right coverage, and a width wherever all agree."""

import numpy as np
import pytest
from scipy.stats import binom

from metrics.proportion import proportion_interval


@pytest.mark.parametrize("total, trials", [(0, 16), (3, 20), (64, 64), (117, 200)])
def test_ends_leave_a_fortieth_in_each_tail(total, trials):
    low, high = proportion_interval(total, trials)
    assert low < high
    assert low == 0 if total == 0 else binom.sf(total - 1, trials, low) == pytest.approx(0.025)
    assert high == 1 if total == trials else binom.cdf(total, trials, high) == pytest.approx(0.025)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_dependent_answers_of_a_prompt_do_not_narrow_it(share):
    """Eight answers of each of 12 prompts, of which all are alike in half of the prompts."""
    random, inside = np.random.default_rng(0), []
    for _ in range(100):
        alike, alone = random.random((12, 1)) < share, random.random((12, 8)) < share
        shares = np.where(random.random((12, 1)) < 0.5, alike, alone).mean(axis=1)
        low, high = proportion_interval(shares.sum(), 12)
        inside.append(low <= share <= high)
    assert np.mean(inside) >= 0.95
