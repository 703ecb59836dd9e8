"""A scaling law of the loss with model size, L(N) = E + A N^-alpha, fitted to a few sizes, with intervals.

N parameters; L loss; E irreducible loss at this training budget; alpha exponent (Hoffmann et al. 2022, arXiv 2203.15556, equation
2, with the amount of data held fixed).

At a fixed alpha the law is linear in E and A and has an exact least-squares fit, so that alpha is the only number to search
(variable projection, Golub and Pereyra 1973). E and A are never negative. An interval covers all laws that do not fit
significantly worse than the best: a likelihood-ratio interval, by Fisher's F if the noise is estimated (Bates and Watts 1988,
Nonlinear Regression Analysis, section 6.1). Unlike the usual linearized intervals it is as wide as a few sizes leave it, even if
they are fewer than the three numbers.

G values of alpha.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2, f

from evaluation.statistics import CONFIDENCE

ALPHAS = np.geomspace(1e-3, 10, 80)  # doubling the size leaves 99.9% to 0.1% of A N^-alpha
ACTIVE_SETS = ((0, 1), (0,), (1,))  # E and A free, A = 0, E = 0
NUMBERS = 3  # E, A and alpha
SIZES = 100  # grid on which two laws are compared


class Interval(NamedTuple):
    low: float | np.ndarray
    high: float | np.ndarray


@dataclass(frozen=True)
class Forecast:
    """The prediction for a held-out size from the other sizes."""

    size: float
    measured: float  # the mean of the runs of that size
    expected: float  # NaN if the others do not determine a law
    interval: Interval  # of the mean of as many runs

    @property
    def error(self) -> float:
        return self.measured - self.expected

    @property
    def came_true(self) -> bool:
        return bool(self.interval.low <= self.measured <= self.interval.high)


@dataclass(frozen=True)
class Law:
    """A law fitted to runs.  noise: source of the intervals, "seeds", "stories", the "scatter" of runs, or "nothing"."""

    sizes: np.ndarray  # (runs,)
    losses: np.ndarray  # (runs,)
    weights: np.ndarray  # (runs,) 1 / standard deviation of each loss, up to a common factor
    held_out: np.ndarray  # (runs,) True if the loss is used only to estimate the noise
    freedom: int  # degrees of freedom of the noise
    noise: str
    simultaneous: bool = False  # intervals cover all sizes at once with 95%, not each alone

    @cached_property
    def reference(self) -> float:
        """The geometric mean size, where A is measured to keep the numbers well scaled."""
        return float(np.exp(np.log(self.sizes).mean()))

    def terms(self, alphas: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(G, sizes, 3): the factors of E, of A reference^-alpha and of the held-out deviation in each loss."""
        powers = (sizes / self.reference) ** -alphas[:, None]  # (G, sizes)
        return np.stack([np.ones_like(powers), powers, np.zeros_like(powers)], axis=-1)

    def solve(self, alphas: np.ndarray, active: tuple[int, ...]):
        """Least squares with E or A zero unless active.

        Returns the columns in use, the solution (G, columns), its covariance for unit noise (G, columns, columns), and the
        residual sum of squares (G,).
        """
        columns = [*active, *([2] if self.held_out.any() else [])]
        design = self.terms(alphas, self.sizes)  # (G, runs, 3)
        design[..., 2] = self.held_out
        design = design[..., columns] * self.weights[:, None]
        inverse = np.linalg.pinv(design)  # (G, columns, runs)
        solution = inverse @ (self.losses * self.weights)
        residuals = self.losses * self.weights - (design @ solution[..., None])[..., 0]
        return columns, solution, inverse @ inverse.transpose(0, 2, 1), (residuals**2).sum(axis=1)

    def best_at(self, alphas) -> tuple[np.ndarray, np.ndarray]:
        """The least residual sum of squares (G,) at each alpha, and E, A reference^-alpha and the held-out deviation (G, 3)."""
        alphas = np.asarray(alphas)
        least, best = np.full(len(alphas), np.inf), np.zeros((len(alphas), 3))
        for active in ACTIVE_SETS:
            columns, solution, _, squares = self.solve(alphas, active)
            better = (solution[:, : len(active)] >= 0).all(axis=1) & (squares < least)
            least[better], best[better] = squares[better], 0.0
            best[np.ix_(better, columns)] = solution[better]
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
        minimum = minimize_scalar(lambda log: self.squares(np.exp([log]))[0], bounds=bounds, options={"xatol": 1e-7})
        return float(np.exp(minimum.x)) if minimum.fun < self.grid_squares[i] else float(ALPHAS[i])

    @cached_property
    def best(self) -> np.ndarray:
        """(3,): E, A reference^-alpha and the held-out deviation of the best law."""
        return self.best_at([self.best_alpha])[1][0]

    @property
    def is_determined(self) -> bool:
        """Whether there are at least as many sizes as numbers, and the loss falls with size."""
        return len(set(self.sizes[~self.held_out])) >= NUMBERS and self.best[1] > 0

    @property
    def numbers(self) -> dict[str, float]:
        """E, A and alpha of the best law; NaN if it is not determined."""
        E, A, _ = self.best
        numbers = {"E": E, "A": A * self.reference**self.best_alpha, "alpha": self.best_alpha}
        return numbers if self.is_determined else dict.fromkeys(numbers, np.nan)

    @cached_property
    def max_squares(self) -> float:
        """The largest residual sum of squares that does not differ significantly from the best."""
        best, numbers = self.squares([self.best_alpha])[0], NUMBERS if self.simultaneous else 1
        rounding = 1e-13 * ((self.losses * self.weights) ** 2).sum()
        if self.noise == "stories":  # the weights hold their standard errors; scaled up if the runs lie further from the law
            scale = max(1.0, best / self.freedom) if self.freedom else 1.0
            return best + scale * chi2.ppf(CONFIDENCE, numbers) + rounding
        return best * (1 + numbers * f.ppf(CONFIDENCE, numbers, self.freedom) / self.freedom) + rounding

    @cached_property
    def alphas(self) -> np.ndarray:
        """(G,): a grid over the interval of alpha, with the best alpha; NaN without noise."""
        if self.noise == "nothing":
            return np.array([np.nan])
        i = np.searchsorted(ALPHAS, self.best_alpha)
        grid = np.insert(ALPHAS, i, self.best_alpha)
        inside = np.flatnonzero(np.insert(self.grid_squares, i, 0.0) <= self.max_squares)

        def edge(inside: int, outside: int) -> float:
            if not 0 <= outside < len(grid):
                return grid[inside]
            ends = np.log(grid[[outside, inside]])
            root = brentq(lambda log: self.squares(np.exp([log]))[0] - self.max_squares, *ends, xtol=1e-7)
            return np.exp(root + 1e-6 * np.sign(ends[1] - ends[0]))  # a little inside the interval

        low, high = edge(inside[0], inside[0] - 1), edge(inside[-1], inside[-1] + 1)
        return np.unique(np.append(np.geomspace(low, high, 60), self.best_alpha))

    def interval(self, terms: np.ndarray) -> Interval:
        """The interval of linear combinations of the numbers; NaN without noise.  terms (G, sums, 3) -> two of (sums,)

        The extremes of a sum lie inside the ellipse of E and A that fit, or on the boundary where one of them is zero.
        """
        if self.noise == "nothing":
            return Interval(*np.full((2, terms.shape[1]), np.nan))
        low, high = np.full(terms.shape[1], np.inf), np.full(terms.shape[1], -np.inf)
        for active in ACTIVE_SETS:
            columns, solution, covariance, squares = self.solve(self.alphas, active)
            factors = terms[..., columns]  # (G, sums, columns)
            along = np.einsum("gsc,gcd->gsd", factors, covariance)
            variance = np.einsum("gsc,gsc->gs", along, factors)
            room = np.sqrt(np.maximum(self.max_squares - squares, 0))[:, None]  # (G, 1)
            step = along * (room / np.sqrt(np.where(variance > 0, variance, np.inf)))[..., None]
            for sign in (-1, 1):
                extreme = solution[:, None] + sign * step  # (G, sums, columns)
                allowed = (squares <= self.max_squares)[:, None] & (extreme[..., : len(active)] >= 0).all(axis=-1)
                value = np.einsum("gsc,gsc->gs", factors, extreme)
                low = np.minimum(low, np.where(allowed, value, np.inf).min(axis=0))
                high = np.maximum(high, np.where(allowed, value, -np.inf).max(axis=0))
        return Interval(low, high)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """The intervals of E, A and alpha; NaN without noise."""
        terms = np.zeros((len(self.alphas), 2, 3))
        terms[:, 0, 0], terms[:, 1, 1] = 1, self.reference**self.alphas
        low, high = self.interval(terms)
        return {"E": Interval(low[0], high[0]), "A": Interval(low[1], high[1]),
                "alpha": Interval(self.alphas[0], self.alphas[-1])}  # fmt: skip

    @property
    def open_numbers(self) -> list[str]:
        """Which of E and alpha are undetermined: E may be zero, or alpha arbitrarily large or small."""
        E, alpha = self.intervals["E"], self.intervals["alpha"]
        no_floor, no_slope = E.low < 1e-3 * self.losses.min(), alpha.low <= ALPHAS[0] or alpha.high >= ALPHAS[-1]
        return [name for name, is_open in {"E": no_floor, "alpha": no_slope}.items() if is_open]

    def at(self, sizes) -> np.ndarray:
        """The loss at other sizes by the best law.  (sizes,) -> (sizes,)"""
        return self.terms(np.array([self.best_alpha]), np.asarray(sizes, float))[0] @ self.best

    def band(self, sizes) -> Interval:
        """The interval of the law at each size.  (sizes,) -> two of (sizes,)"""
        return self.interval(self.terms(self.alphas, np.asarray(sizes, float)))

    @property
    def forecast(self) -> Forecast:
        """The forecast of the held-out size."""
        assert self.held_out.any()
        size, measured = self.sizes[self.held_out][0], self.losses[self.held_out].mean()
        expected = self.at([size])[0] if self.is_determined else np.nan
        terms = np.zeros((len(self.alphas), 1, 3))
        terms[..., 2] = 1
        (low,), (high,) = self.interval(terms)
        return Forecast(size, measured, expected, Interval(measured - high, measured - low))

    @property
    def misfit(self) -> float:
        """The p-value of a lack-of-fit test: are sizes further from the law than seeds from each other? NaN if untestable."""
        sizes = np.unique(self.sizes)
        within = sum(((self.losses[self.sizes == size] - self.losses[self.sizes == size].mean()) ** 2).sum() for size in sizes)
        between, freedom = len(sizes) - NUMBERS, len(self.sizes) - len(sizes)
        if self.held_out.any() or between < 1 or freedom < 1 or within == 0:
            return np.nan
        lack = self.squares([self.best_alpha])[0] - within
        return float(f.sf(max(0.0, lack / between) / (within / freedom), between, freedom))


def fit(sizes, losses, errors=None, held_out: float | None = None) -> Law:
    """Fit a law to runs.  sizes, losses (runs,); several runs of a size are its seeds

    errors (runs,): standard errors of the losses, such as over stories; used only if no size has several runs, and scaled up if
    the runs lie further from the law (Birge 1932, Physical Review 40, page 207). held_out: a size that is forecast instead of
    fitted. Raises ValueError for fewer than two sizes to fit, or a size or loss that is not finite and positive.

    >>> round(fit([1e6, 2e6, 4e6, 8e6], [1.0, 0.9, 0.85, 0.825]).numbers["alpha"], 3)
    1.0
    """
    sizes, losses = np.asarray(sizes, float), np.asarray(losses, float)
    if not (np.isfinite(losses).all() and (losses > 0).all() and (sizes > 0).all()):
        raise ValueError("a loss law needs finite and positive sizes and losses: leave out runs that diverged")
    hidden = sizes == held_out
    fitted = len(set(sizes[~hidden]))
    if fitted < 2:
        raise ValueError(f"a loss law needs at least two sizes to fit to, and there are {fitted}: train more sizes")
    freedom = len(sizes) - min(NUMBERS, fitted) - bool(hidden.any())
    weights, noise = np.ones(len(sizes)), "scatter" if freedom else "nothing"
    if len(sizes) > len(set(sizes)):
        noise = "seeds"
    elif errors is not None:
        weights, noise = 1 / np.asarray(errors, float), "stories"
    return Law(sizes, losses, weights, hidden, freedom, noise)


@dataclass(frozen=True)
class Race:
    """Two laws over the sizes at which both were measured: other - one, negative if the other is better."""

    sizes: np.ndarray  # (SIZES,) over the range of both
    difference: np.ndarray  # (SIZES,)
    pointwise: Interval  # (SIZES,) of the difference at each size alone
    simultaneous: Interval  # (SIZES,) for all sizes at once: where it excludes 0, one of them is better
    crossings: list[float]  # sizes at which the best laws cross, also outside the measured range

    @property
    def stretches(self) -> list[tuple[int, float, float]]:
        """(which, from, to) for each range of sizes where one is significantly better: -1 is the other, 1 the one."""
        significant = np.where(self.simultaneous.high < 0, -1, np.where(self.simultaneous.low > 0, 1, 0))
        stretches: list[tuple[int, float, float]] = []
        for which, size in zip(significant, self.sizes, strict=True):
            if which and stretches and stretches[-1][0] == which:
                stretches[-1] = (which, stretches[-1][1], size)
            elif which:
                stretches.append((int(which), size, size))
        return stretches

    @property
    def overtaking(self) -> tuple[int, float, Interval] | None:
        """Which is better above the crossing, its size, and its interval; None unless each is significantly better on one side.

        The interval holds the sizes at which the difference may be zero (Fieller 1954).
        """
        if len(self.stretches) != 2:
            return None
        (_, _, below), (which, above, _) = self.stretches
        between = (self.sizes >= below) & (self.sizes <= above)
        zeros = self.sizes[between & (self.pointwise.low <= 0) & (self.pointwise.high >= 0)]
        at = next(size for size in self.crossings if below <= size <= above)
        return which, at, Interval(min([at, *zeros]), max([at, *zeros]))


def race(one: Law, other: Law) -> Race:
    """Compare two laws; crossings are searched from 1/100 to 100 times the measured sizes.

    The interval of the difference combines those of both as if they were independent (Zou and Donner 2008, Statistics in Medicine
    27, equation 3), which is conservative if they share seeds or stories. Raises ValueError if their sizes do not overlap.
    """
    low, high = max(one.sizes.min(), other.sizes.min()), min(one.sizes.max(), other.sizes.max())
    if low >= high:
        raise ValueError("the sizes of the two do not overlap, so their laws cannot be compared: train both at the same sizes")
    sizes = np.geomspace(low, high, SIZES)
    a, b = one.at(sizes), other.at(sizes)

    def interval(simultaneous: bool) -> Interval:
        band_a, band_b = (replace(law, simultaneous=simultaneous).band(sizes) for law in (one, other))
        down, up = np.hypot(b - band_b.low, band_a.high - a), np.hypot(band_b.high - b, a - band_a.low)
        return Interval(b - a - down, b - a + up)

    wide = np.geomspace(low / 100, high * 100, 10 * SIZES)
    difference = other.at(wide) - one.at(wide)
    changes = np.flatnonzero(np.sign(difference[:-1]) * np.sign(difference[1:]) < 0)
    crossings = [brentq(lambda size: (other.at([size]) - one.at([size]))[0], *wide[[i, i + 1]]) for i in changes]
    return Race(sizes, b - a, interval(simultaneous=False), interval(simultaneous=True), crossings)
