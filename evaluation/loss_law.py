"""A scaling law of the loss with model size, L(N) = E + A N^-alpha, fitted to a few sizes, with intervals.

N parameters; L loss; E irreducible loss at this training budget; alpha exponent (Hoffmann et al. 2022, arXiv 2203.15556, equation
2, with the amount of data held fixed).

At a fixed alpha the law is linear in E and A and has an exact least-squares fit, so alpha is the only parameter to search
(variable projection, Golub and Pereyra 1973). E and A are never negative. An interval covers all laws that do not fit
significantly worse than the best by an F test (Bates and Watts 1988, Nonlinear Regression Analysis, section 6.1). Unlike the
usual linearized intervals it is as wide as a few sizes leave it, even if they are fewer than the three parameters.

The noise is the deviation between seeds of a size: without several seeds there are no intervals. If the means of the sizes lie
further from the law than seeds explain, intervals mean nothing; Law.lack_of_fit tests that.

G values of alpha.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import f

from evaluation.statistics import CONFIDENCE, SIGNIFICANCE

ALPHAS = np.geomspace(1e-3, 10, 80)  # doubling the size multiplies A N^-alpha by 0.999 to 0.001
FREE = ((0, 1), (0,), (1,))  # E and A; A is zero; E is zero
PARAMETERS = 3  # E, A and alpha
SIZES = 100  # grid on which two laws are compared


class Interval(NamedTuple):
    low: float | np.ndarray
    high: float | np.ndarray


NO_INTERVAL = Interval(np.nan, np.nan)


@dataclass(frozen=True)
class Forecast:
    """The prediction for a held-out size from the other sizes."""

    size: float
    measured: float  # the mean of the runs of that size
    expected: float  # NaN if the others do not determine a law
    interval: Interval  # of the mean of as many runs; NaN if no size has several runs

    @property
    def is_inside(self) -> bool:
        return bool(self.interval.low <= self.measured <= self.interval.high)


class HeldOut(NamedTuple):
    """The runs of a size that is forecast."""

    size: float
    mean: float  # loss
    count: int  # runs


@dataclass(frozen=True)
class Law:
    """A law fitted to the mean losses of S sizes."""

    sizes: np.ndarray  # (S,) ascending
    means: np.ndarray  # (S,)
    counts: np.ndarray  # (S,) runs of each size
    squares_within: float  # sum of the squared deviations of all runs from the mean of their size, held-out runs included
    freedom_within: int  # its degrees of freedom
    held_out: HeldOut | None = None

    @cached_property
    def reference(self) -> float:
        """The geometric mean size, where A is measured to keep the parameters well scaled."""
        return float(np.exp(np.log(self.sizes).mean()))

    def factors(self, alphas, sizes) -> np.ndarray:
        """(G, sizes, 2): the factors of E and of A reference^-alpha in each loss."""
        powers = (np.asarray(sizes, float) / self.reference) ** -np.asarray(alphas)[:, None]  # (G, sizes)
        return np.stack([np.ones_like(powers), powers], axis=-1)

    def regress(self, alphas: np.ndarray, free: tuple[int, ...]):
        """Least squares at each alpha, with E or A zero unless it is free.

        Returns E and A reference^-alpha (G, 2), their covariance for unit noise (G, 2, 2), and the residual sum of squares (G,).
        """
        factors = self.factors(alphas, self.sizes)  # (G, S, 2)
        design = factors[..., free]
        weighted = design.transpose(0, 2, 1) * self.counts  # (G, free, S)
        index = np.ix_(range(len(factors)), free, free)
        covariance = np.zeros((len(factors), 2, 2))
        covariance[index] = np.linalg.inv(weighted @ design)
        solution = np.zeros((len(factors), 2))
        solution[:, free] = (covariance[index] @ weighted) @ self.means
        residuals = self.means - (factors @ solution[..., None])[..., 0]
        return solution, covariance, self.squares_within + (self.counts * residuals**2).sum(axis=1)

    def best_at(self, alphas) -> tuple[np.ndarray, np.ndarray]:
        """The least residual sum of squares (G,) at each alpha, and E and A reference^-alpha (G, 2)."""
        least, best = np.full(len(alphas), np.inf), np.zeros((len(alphas), 2))
        for free in FREE:
            solution, _, squares = self.regress(alphas, free)
            better = (solution >= 0).all(axis=1) & (squares < least)
            least[better], best[better] = squares[better], solution[better]
        return least, best

    def squares(self, alphas) -> np.ndarray:
        """(G,): the least residual sum of squares at each alpha."""
        return self.best_at(alphas)[0]

    @cached_property
    def grid_squares(self) -> np.ndarray:
        return self.squares(ALPHAS)

    @cached_property
    def best_alpha(self) -> float:
        i = int(self.grid_squares.argmin())
        bounds = np.log(ALPHAS[[max(i - 1, 0), min(i + 1, len(ALPHAS) - 1)]])
        minimum = minimize_scalar(lambda log: self.squares(np.exp([log]))[0], bounds=bounds, options={"xatol": 1e-6})
        return float(np.exp(minimum.x)) if minimum.fun < self.grid_squares[i] else float(ALPHAS[i])

    @cached_property
    def best(self) -> np.ndarray:
        """(2,): E and A reference^-alpha of the best law."""
        return self.best_at([self.best_alpha])[1][0]

    @property
    def is_determined(self) -> bool:
        """Whether there are at least as many sizes as parameters, and the loss falls with size."""
        return len(self.sizes) >= PARAMETERS and self.best[1] > 0

    @property
    def parameters(self) -> dict[str, float]:
        """E, A and alpha of the best law; NaN if it is not determined."""
        E, A = self.best
        parameters = {"E": E, "A": A * self.reference**self.best_alpha, "alpha": self.best_alpha}
        return parameters if self.is_determined else dict.fromkeys(parameters, np.nan)

    @property
    def has_noise(self) -> bool:
        """Whether a size has several runs, from which the noise is estimated."""
        return self.freedom_within > 0

    def max_squares(self, confidence: float = CONFIDENCE, simultaneous: bool = False) -> float:
        """The largest residual sum of squares that does not differ significantly from the best.

        simultaneous: intervals then cover all sizes at once, not each alone.
        """
        freedom = self.freedom_within + max(0, len(self.sizes) - PARAMETERS)
        compared, rounding = PARAMETERS if simultaneous else 1, 1e-13 * (self.counts * self.means**2).sum()
        ratio = compared * f.ppf(confidence, compared, freedom) / freedom
        return self.squares([self.best_alpha])[0] * (1 + ratio) + rounding

    def alphas_within(self, max_squares: float) -> np.ndarray:
        """(G,): a grid over the interval of alpha, with the best alpha."""
        i = np.searchsorted(ALPHAS, self.best_alpha)
        grid = np.log(np.insert(ALPHAS, i, self.best_alpha))
        inside = np.flatnonzero(np.insert(self.grid_squares, i, 0.0) <= max_squares)

        def edge(inside: float, outside: float) -> float:
            for _ in range(3):  # each grid between two points of the one before
                logs = np.linspace(inside, outside, 40)
                last = np.flatnonzero(self.squares(np.exp(logs)) <= max_squares)[-1]
                inside, outside = logs[last], logs[min(last + 1, 39)]
            return inside

        low = edge(grid[inside[0]], grid[max(inside[0] - 1, 0)])
        high = edge(grid[inside[-1]], grid[min(inside[-1] + 1, len(grid) - 1)])
        return np.exp(np.unique(np.append(np.linspace(low, high, 60), np.log(self.best_alpha))))

    def interval(self, alphas, factors: np.ndarray, max_squares: float, variance: float = 0.0) -> Interval:
        """The interval of sums of E and A reference^-alpha.  factors (G, sums, 2) -> two of (sums,)

        variance: of a measurement that is forecast, for unit noise. The extremes of a sum lie on the ellipse of E and A that fit,
        or where one of them is zero.
        """
        low, high = np.full(factors.shape[1], np.inf), np.full(factors.shape[1], -np.inf)
        for free in FREE:
            solution, covariance, squares = self.regress(alphas, free)
            along = factors @ covariance  # (G, sums, 2)
            deviation = np.sqrt((along * factors).sum(axis=-1) + variance)  # (G, sums)
            room = np.sqrt(np.maximum(max_squares - squares, 0))[:, None]  # (G, 1)
            step = along * (room / np.where(deviation > 0, deviation, np.inf))[..., None]
            middle = (factors * solution[:, None]).sum(axis=-1)  # (G, sums)
            for sign in (-1, 1):
                allowed = (squares <= max_squares)[:, None] & (solution[:, None] + sign * step >= 0).all(axis=-1)
                value = middle + sign * room * deviation
                low = np.minimum(low, np.where(allowed, value, np.inf).min(axis=0))
                high = np.maximum(high, np.where(allowed, value, -np.inf).max(axis=0))
        return Interval(low, high)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The intervals of E, A and alpha, if the loss follows a law; NaN without noise."""
        if not self.has_noise:
            return dict.fromkeys(("E", "A", "alpha"), NO_INTERVAL)
        alphas = self.alphas_within(max_squares := self.max_squares())
        factors = np.zeros((len(alphas), 2, 2))
        factors[:, 0, 0], factors[:, 1, 1] = 1, self.reference**alphas
        low, high = self.interval(alphas, factors, max_squares)
        return {"E": Interval(low[0], high[0]), "A": Interval(low[1], high[1]), "alpha": Interval(alphas[0], alphas[-1])}

    @property
    def undetermined(self) -> list[str]:
        """Which of E and alpha the runs leave open: E may be zero, or alpha arbitrarily large or small."""
        E, alpha = self.intervals["E"], self.intervals["alpha"]
        no_floor, no_slope = E.low < 1e-3 * self.means.min(), alpha.low < 1.001 * ALPHAS[0] or alpha.high > 0.999 * ALPHAS[-1]
        return ["E"] * bool(no_floor) + ["alpha"] * bool(no_slope)

    def at(self, sizes) -> np.ndarray:
        """The loss at other sizes by the best law.  (sizes,) -> (sizes,)"""
        return self.factors([self.best_alpha], sizes)[0] @ self.best

    def band(self, sizes, confidence: float = CONFIDENCE, simultaneous: bool = False) -> Interval:
        """The interval of the law at each size, or at all at once; NaN without noise.  (sizes,) -> two of (sizes,)"""
        if not self.has_noise:
            return Interval(*np.full((2, len(sizes)), np.nan))
        alphas = self.alphas_within(max_squares := self.max_squares(confidence, simultaneous))
        return self.interval(alphas, self.factors(alphas, sizes), max_squares)

    @property
    def forecast(self) -> Forecast:
        """The forecast of the held-out size."""
        assert self.held_out is not None
        size, measured, count = self.held_out
        expected = self.at([size])[0] if self.is_determined else np.nan
        if not self.has_noise:
            return Forecast(size, measured, expected, NO_INTERVAL)
        alphas = self.alphas_within(max_squares := self.max_squares())
        (low,), (high,) = self.interval(alphas, self.factors(alphas, [size]), max_squares, variance=1 / count)
        return Forecast(size, measured, expected, Interval(low, high))

    @property
    def lack_of_fit(self) -> float:
        """The p-value of an F test for lack of fit; NaN if it cannot be tested.

        It asks whether the means of the sizes lie further from the law than the seeds from their means (Draper and Smith 1998,
        Applied Regression Analysis, section 2.1). It needs more sizes than the law has parameters, and several runs of a size.
        """
        between, within = len(self.sizes) - PARAMETERS, self.freedom_within
        if between < 1 or self.squares_within == 0:
            return np.nan
        lack = max(0.0, self.squares([self.best_alpha])[0] - self.squares_within)
        return float(f.sf((lack / between) / (self.squares_within / within), between, within))

    @property
    def fits(self) -> bool:
        """Whether the runs do not contradict the law."""
        return not self.lack_of_fit <= SIGNIFICANCE


def fit(sizes, losses, held_out: float | None = None) -> Law:
    """Fit a law to runs.  sizes, losses (runs,); several runs of a size are its seeds

    held_out: a size that is forecast instead of fitted. Raises ValueError for fewer than two sizes to fit, or a size or loss that
    is not finite and positive.

    >>> round(fit([1e6, 2e6, 4e6, 8e6], [1.0, 0.9, 0.85, 0.825]).parameters["alpha"], 3)
    1.0
    """
    sizes, losses = np.asarray(sizes, float), np.asarray(losses, float)
    if not (np.isfinite(losses).all() and (losses > 0).all() and (sizes > 0).all()):
        raise ValueError("a loss law needs finite and positive sizes and losses: leave out runs that diverged")
    unique, index, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    means = np.bincount(index, losses) / counts
    fitted = unique != held_out
    if fitted.sum() < 2:
        raise ValueError(f"a loss law needs at least two sizes to fit to, and there are {fitted.sum()}: train more sizes")
    squares_within, freedom_within = ((losses - means[index]) ** 2).sum(), len(sizes) - len(unique)
    left_out = None if fitted.all() else HeldOut(held_out, means[~fitted].item(), counts[~fitted].item())
    return Law(unique[fitted], means[fitted], counts[fitted], squares_within, freedom_within, left_out)


@dataclass(frozen=True)
class Race:
    """Two laws over the sizes at which both were measured: other - one, negative if the other is better."""

    sizes: np.ndarray  # (SIZES,) over the range of both
    difference: np.ndarray  # (SIZES,)
    pointwise: Interval  # (SIZES,) of the difference at each size alone
    simultaneous: Interval  # (SIZES,) for all sizes at once: where it excludes 0, one of them is better
    crossings: list[float]  # sizes at which the best laws cross, also outside the measured range

    @property
    def leads(self) -> list[tuple[int, float, float]]:
        """(which, from, to) for each range of sizes where one is significantly better: -1 is the other, 1 the one."""
        significant = np.where(self.simultaneous.high < 0, -1, np.where(self.simultaneous.low > 0, 1, 0))
        leads: list[tuple[int, float, float]] = []
        for which, size in zip(significant, self.sizes, strict=True):
            if which and leads and leads[-1][0] == which:
                leads[-1] = (which, leads[-1][1], size)
            elif which:
                leads.append((int(which), size, size))
        return leads

    @property
    def overtaking(self) -> tuple[int, float, Interval] | None:
        """Which is better above the crossing, its size, and its interval; None unless each is significantly better on one side.

        The interval holds the sizes at which the difference may be zero (Fieller 1954).
        """
        if len(self.leads) != 2:
            return None
        (_, _, below), (which, above, _) = self.leads
        between = (self.sizes >= below) & (self.sizes <= above)
        zeros = self.sizes[between & (self.pointwise.low <= 0) & (self.pointwise.high >= 0)]
        at = next(size for size in self.crossings if below <= size <= above)
        return which, at, Interval(min([at, *zeros]), max([at, *zeros]))


def race(one: Law, other: Law, confidence: float = CONFIDENCE) -> Race:
    """Compare two laws; crossings are searched from 1/100 to 100 times the measured sizes.

    The interval of the difference combines those of both as if they were independent (Zou and Donner 2008, Statistics in Medicine
    27, equation 3), which is conservative if they share seeds or stories. It is NaN if a law has no noise or does not fit.
    confidence: of the intervals; for n races at once use 1 - (1 - CONFIDENCE) / n (Bonferroni). Raises ValueError if their sizes
    do not overlap.
    """
    low, high = max(one.sizes.min(), other.sizes.min()), min(one.sizes.max(), other.sizes.max())
    if low >= high:
        raise ValueError("the sizes of the two do not overlap, so their laws cannot be compared: train both at the same sizes")
    sizes = np.geomspace(low, high, SIZES)
    a, b = one.at(sizes), other.at(sizes)

    def interval(simultaneous: bool) -> Interval:
        if not (one.fits and other.fits):
            return Interval(*np.full((2, SIZES), np.nan))
        (low_a, high_a), (low_b, high_b) = (law.band(sizes, confidence, simultaneous) for law in (one, other))
        return Interval(b - a - np.hypot(b - low_b, high_a - a), b - a + np.hypot(high_b - b, a - low_a))

    wide = np.geomspace(low / 100, high * 100, 10 * SIZES)
    difference = other.at(wide) - one.at(wide)
    changes = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    crossings = [brentq(lambda size: (other.at([size]) - one.at([size]))[0], *wide[[i, i + 1]]) for i in changes]
    return Race(sizes, b - a, interval(simultaneous=False), interval(simultaneous=True), crossings)
