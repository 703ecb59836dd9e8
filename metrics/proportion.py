"""Confidence intervals of shares."""

import math

CONFIDENCE = 0.95
ROUNDING = 1e-4  # of a total of float32 values


def proportion_interval(total: float, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Clopper-Pearson interval of the mean of values from 0 to 1, given their total (Clopper and Pearson 1934).

    It has a width even if all values are equal. Values between 0 and 1, such as the share of right answers to a prompt, vary less
    than values of 0 or 1 with the same mean; with the total rounded down for the low end and up for the high end, the interval is
    conservative for them.

    >>> [round(end, 3) for end in proportion_interval(10, 10)]
    [0.692, 1.0]
    """
    from scipy.stats import binomtest

    low = binomtest(math.floor(total + ROUNDING), trials).proportion_ci(confidence, method="exact").low
    high = binomtest(math.ceil(total - ROUNDING), trials).proportion_ci(confidence, method="exact").high
    return float(low), float(high)
