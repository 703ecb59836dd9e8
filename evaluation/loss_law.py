"""How the loss falls with the size of a model: L(N) = E + A N^-alpha, fitted to a few sizes, with intervals.

N parameters; L the loss; E what no size takes away as long as the training stays the same; alpha how fast the rest is won
(Hoffmann et al. 2022, arXiv 2203.15556, equation 2, with the amount of data held fixed).

For each alpha the law is linear in E and A, so that its best fit is solved exactly, and one number alone is searched for
(variable projection, Golub and Pereyra 1973). E and A are never below zero. An interval holds what all laws say that fit not
significantly worse than the best one: the likelihood ratio, by Fisher's F where the noise is estimated (Bates and Watts 1988,
Nonlinear Regression Analysis, section 6.1). So it is as wide as what a few sizes leave open, also where they are fewer than the
three numbers. The usual intervals by derivatives are not.

G values of alpha that are looked at.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import chi2, f

from evaluation.statistics import CONFIDENCE

ALPHAS = np.geomspace(1e-3, 10, 80)  # twice the size then leaves 99.9% to 0.1% of A N^-alpha
FACES = ((0, 1), (0,), (1,))  # E and A both free, A = 0, E = 0
NUMBERS = 3  # E, A and alpha
SIZES = 100  # at which two laws are compared


class Interval(NamedTuple):
    low: float | np.ndarray
    high: float | np.ndarray


@dataclass(frozen=True)
class Forecast:
    """What the other sizes say of the one that was held out."""

    size: float
    measured: float  # the mean of the runs of that size
    expected: float  # NaN where the others do not determine a law
    interval: Interval  # of what so many runs of that size would measure

    @property
    def error(self) -> float:
        return self.measured - self.expected

    @property
    def came_true(self) -> bool:
        return bool(self.interval.low <= self.measured <= self.interval.high)


@dataclass(frozen=True)
class Law:
    """The law of these runs. noise says what the intervals are from: "seeds", "stories", the "scatter" of runs, or "nothing"."""

    sizes: np.ndarray  # (runs,)
    losses: np.ndarray  # (runs,)
    weights: np.ndarray  # (runs,) one over the standard deviation of each loss, up to a factor that all share
    held_out: np.ndarray  # (runs,) true where the loss was not looked at, but for its noise
    freedom: int  # degrees of it, for the noise
    noise: str
    at_once: bool = False  # intervals hold for all sizes at once with their 95%, not for each alone: they are wider

    @cached_property
    def reference(self) -> float:
        """A size in the middle: A is counted from there, so that the numbers stay of one magnitude."""
        return float(np.exp(np.log(self.sizes).mean()))

    def shares(self, alphas: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """(G, sizes, 3): what E, A reference^-alpha and the surprise of what was held out add to each loss."""
        powers = (sizes / self.reference) ** -alphas[:, None]  # (G, sizes)
        return np.stack([np.ones_like(powers), powers, np.zeros_like(powers)], axis=-1)

    def solve(self, alphas: np.ndarray, face: tuple[int, ...]):
        """Least squares where the numbers of FACES that are not in the face are zero.

        Columns in use, numbers (G, columns), their covariance (G, columns, columns) for noise of one, squares left over (G,).
        """
        columns = [*face, *([2] if self.held_out.any() else [])]
        design = self.shares(alphas, self.sizes)  # (G, runs, 3)
        design[..., 2] = self.held_out
        design = design[..., columns] * self.weights[:, None]
        inverse = np.linalg.pinv(design)  # (G, columns, runs)
        numbers = inverse @ (self.losses * self.weights)
        left = self.losses * self.weights - (design @ numbers[..., None])[..., 0]
        return columns, numbers, inverse @ inverse.transpose(0, 2, 1), (left**2).sum(axis=1)

    def squares(self, alphas) -> np.ndarray:
        """(G,): what is left over by the best E and A of each alpha."""
        best = np.full(np.shape(alphas), np.inf)
        for face in FACES:
            _, numbers, _, left = self.solve(np.asarray(alphas), face)
            best = np.where((numbers[:, : len(face)] >= 0).all(axis=1), np.minimum(best, left), best)
        return best

    @cached_property
    def squares_of_alphas(self) -> np.ndarray:
        return self.squares(ALPHAS)

    @cached_property
    def best_alpha(self) -> float:
        left = self.squares_of_alphas
        place = int(left.argmin())
        near = np.log(ALPHAS[[max(place - 1, 0), min(place + 1, len(ALPHAS) - 1)]])
        found = minimize_scalar(lambda log: self.squares(np.exp([log]))[0], bounds=near, options={"xatol": 1e-7})
        return float(np.exp(found.x)) if found.fun < left[place] else float(ALPHAS[place])

    @cached_property
    def best(self) -> np.ndarray:
        """(3,): E, A reference^-alpha, and the surprise."""
        chosen, least = np.zeros(3), np.inf
        for face in FACES:
            columns, (numbers,), _, (left,) = self.solve(np.array([self.best_alpha]), face)
            if (numbers[: len(face)] >= 0).all() and left < least:
                chosen, least = np.zeros(3), left
                chosen[columns] = numbers
        return chosen

    @property
    def is_determined(self) -> bool:
        """Whether there are as many sizes as numbers, and the losses fall with the size at all."""
        return len(set(self.sizes[~self.held_out])) >= NUMBERS and self.best[1] > 0

    @property
    def numbers(self) -> dict[str, float]:
        """E, A and alpha of the best law; NaN where none is."""
        E, A, _ = self.best
        found = {"E": E, "A": A * self.reference**self.best_alpha, "alpha": self.best_alpha}
        return found if self.is_determined else dict.fromkeys(found, np.nan)

    @cached_property
    def most_left(self) -> float:
        """The squares that a law may leave over: those of the best, and as much more as luck explains."""
        best, numbers = self.squares(np.array([self.best_alpha]))[0], NUMBERS if self.at_once else 1
        rounding = 1e-13 * ((self.losses * self.weights) ** 2).sum()
        if self.noise == "stories":  # whose spread is in the weights, and scaled up where runs lie further from the law
            scale = max(1.0, best / self.freedom) if self.freedom else 1.0
            return best + scale * chi2.ppf(CONFIDENCE, numbers) + rounding
        return best * (1 + numbers * f.ppf(CONFIDENCE, numbers, self.freedom) / self.freedom) + rounding

    @cached_property
    def alphas(self) -> np.ndarray:
        """(G,): values of alpha over the whole of its interval, the best one among them."""
        place = np.searchsorted(ALPHAS, self.best_alpha)
        grid = np.insert(ALPHAS, place, self.best_alpha)
        fits = np.flatnonzero(np.insert(self.squares_of_alphas, place, 0.0) <= self.most_left)

        def edge(inside: int, outside: int) -> float:
            if not 0 <= outside < len(grid):
                return grid[inside]
            ends = np.log(grid[[outside, inside]])
            root = brentq(lambda log: self.squares(np.exp([log]))[0] - self.most_left, *ends, xtol=1e-7)
            return np.exp(root + 1e-6 * np.sign(ends[1] - ends[0]))  # on the inside for sure: what follows is of laws that fit

        low, high = edge(fits[0], fits[0] - 1), edge(fits[-1], fits[-1] + 1)
        return np.unique(np.append(np.geomspace(low, high, 60), self.best_alpha))

    def interval(self, wanted: np.ndarray) -> Interval:
        """Of sums of the numbers, for all laws that fit.  wanted (G, sums, 3) → two of (sums,)

        A sum is largest and smallest either inside the ellipse of E and A that fit, or on a face of what they may be.
        """
        low, high = np.full(wanted.shape[1], np.inf), np.full(wanted.shape[1], -np.inf)
        for face in FACES:
            columns, numbers, covariance, left = self.solve(self.alphas, face)
            shares = wanted[..., columns]  # (G, sums, columns)
            along = np.einsum("gsc,gcd->gsd", shares, covariance)
            spread = np.einsum("gsc,gsc->gs", along, shares)
            room = np.sqrt(np.maximum(self.most_left - left, 0))[:, None]  # (G, 1)
            step = along * (room / np.sqrt(np.where(spread > 0, spread, np.inf)))[..., None]
            for sign in (-1, 1):
                reached = numbers[:, None] + sign * step  # (G, sums, columns)
                allowed = (left <= self.most_left)[:, None] & (reached[..., : len(face)] >= 0).all(axis=-1)
                value = np.einsum("gsc,gsc->gs", shares, reached)
                low = np.minimum(low, np.where(allowed, value, np.inf).min(axis=0))
                high = np.maximum(high, np.where(allowed, value, -np.inf).max(axis=0))
        return Interval(low, high)

    @cached_property
    def intervals(self) -> dict[str, Interval]:
        """Of E, A and alpha. NaN without noise to judge by."""
        if self.noise == "nothing":
            return dict.fromkeys(("E", "A", "alpha"), Interval(np.nan, np.nan))
        wanted = np.zeros((len(self.alphas), 2, 3))
        wanted[:, 0, 0], wanted[:, 1, 1] = 1, self.reference**self.alphas
        low, high = self.interval(wanted)
        return {"E": Interval(low[0], high[0]), "A": Interval(low[1], high[1]),
                "alpha": Interval(self.alphas[0], self.alphas[-1])}  # fmt: skip

    @property
    def open_numbers(self) -> list[str]:
        """Those of E and alpha that the losses leave open: E may as well be zero, alpha as large or small as one likes."""
        E, alpha = self.intervals["E"], self.intervals["alpha"]
        no_floor, no_slope = E.low < 1e-3 * self.losses.min(), alpha.low <= ALPHAS[0] or alpha.high >= ALPHAS[-1]
        return [name for name, is_open in {"E": no_floor, "alpha": no_slope}.items() if is_open]

    def at(self, sizes) -> np.ndarray:
        """The loss of other sizes, by the best law.  (sizes,) → (sizes,)"""
        return self.shares(np.array([self.best_alpha]), np.asarray(sizes, float))[0] @ self.best

    def band(self, sizes) -> Interval:
        """The interval of the law at each of these sizes.  (sizes,) → two of (sizes,)"""
        sizes = np.asarray(sizes, float)
        if self.noise == "nothing":
            return Interval(np.full(sizes.shape, np.nan), np.full(sizes.shape, np.nan))
        return self.interval(self.shares(self.alphas, sizes))

    @property
    def forecast(self) -> Forecast:
        """Of the size that was held out."""
        assert self.held_out.any()
        size, measured = self.sizes[self.held_out][0], self.losses[self.held_out].mean()
        expected = self.at([size])[0] if self.is_determined else np.nan
        if self.noise == "nothing":
            return Forecast(size, measured, expected, Interval(np.nan, np.nan))
        wanted = np.zeros((len(self.alphas), 1, 3))
        wanted[..., 2] = 1
        low, high = self.interval(wanted)
        return Forecast(size, measured, expected, Interval(measured - high[0], measured - low[0]))

    @property
    def misfit(self) -> float:
        """The p-value of the law itself: do sizes lie further from it than seeds from each other? NaN where nothing can tell."""
        sizes = np.unique(self.sizes)
        within = sum(((self.losses[self.sizes == size] - self.losses[self.sizes == size].mean()) ** 2).sum() for size in sizes)
        between, freedom = len(sizes) - NUMBERS, len(self.sizes) - len(sizes)
        if self.held_out.any() or between < 1 or freedom < 1 or within == 0:
            return np.nan
        outside = self.squares(np.array([self.best_alpha]))[0] - within
        return float(f.sf(max(0.0, outside / between) / (within / freedom), between, freedom))


def fit(sizes, losses, errors=None, held_out: float | None = None) -> Law:
    """The law of runs: their sizes (runs,) and losses (runs,), several for a size where there are several seeds.

    errors (runs,) are standard errors of the losses from elsewhere, such as from their stories. They are taken where no size has
    several runs, and scaled up to how far the runs lie from the law, if that is more (Birge 1932, Physical Review 40, page 207).
    held_out is a size that the law is not fitted to, but shall foretell. Raises ValueError for fewer than two sizes to fit to,
    and for losses that are not finite and positive.
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
    """Two laws over the sizes that both were measured at: other - one, so that a negative number says the other is better."""

    sizes: np.ndarray  # (SIZES,) from the smallest to the largest that both have
    difference: np.ndarray  # (SIZES,)
    interval: Interval  # (SIZES,) of the difference at each size alone
    at_once: Interval  # (SIZES,) for all sizes at once: where this leaves no doubt one is better, wherever one looks
    crossings: list[float]  # where the best laws cross, also where nothing was measured

    @property
    def stretches(self) -> list[tuple[int, float, float]]:
        """(which, from, to) for each stretch of sizes where one is better for sure: which is -1 for the other, 1 for the one."""
        sure = np.where(self.at_once.high < 0, -1, np.where(self.at_once.low > 0, 1, 0))
        found: list[tuple[int, float, float]] = []
        for which, size in zip(sure, self.sizes, strict=True):
            if which and found and found[-1][0] == which:
                found[-1] = (which, found[-1][1], size)
            elif which:
                found.append((int(which), size, size))
        return found

    @property
    def overtaking(self) -> tuple[int, float, Interval] | None:
        """Which is better behind the crossing, where that is, and its interval; None unless each is better for sure on one side.

        The interval holds the sizes at which the difference may be none (Fieller's way, 1954).
        """
        if len(self.stretches) != 2:
            return None
        (_, _, before), (which, after, _) = self.stretches
        between = (self.sizes >= before) & (self.sizes <= after)
        open_ones = self.sizes[between & (self.interval.low <= 0) & (self.interval.high >= 0)]
        at = next(size for size in self.crossings if before <= size <= after)
        return which, at, Interval(min([at, *open_ones]), max([at, *open_ones]))


def race(one: Law, other: Law) -> Race:
    """Set two laws side by side. That they cross is told from a hundredth to a hundred times of what was measured.

    The interval of the difference is put together from those of both as if they were independent (Zou and Donner 2008, Statistics
    in Medicine 27, equation 3), which is too wide rather than too narrow where they share seeds or stories. Raises ValueError
    where no size is within the range of both.
    """
    low, high = max(one.sizes.min(), other.sizes.min()), min(one.sizes.max(), other.sizes.max())
    if low >= high:
        raise ValueError("the sizes of the two do not overlap, so their laws cannot be compared: train both at the same sizes")
    sizes = np.geomspace(low, high, SIZES)
    mine, theirs = one.at(sizes), other.at(sizes)

    def difference(at_once: bool) -> Interval:
        my_band, their_band = (replace(law, at_once=at_once).band(sizes) for law in (one, other))
        down = np.hypot(theirs - their_band.low, my_band.high - mine)
        up = np.hypot(their_band.high - theirs, mine - my_band.low)
        return Interval(theirs - mine - down, theirs - mine + up)

    wide = np.geomspace(low / 100, high * 100, 10 * SIZES)
    apart = other.at(wide) - one.at(wide)
    changes = np.flatnonzero(np.sign(apart[:-1]) * np.sign(apart[1:]) < 0)
    crossings = [brentq(lambda size: (other.at([size]) - one.at([size]))[0], *wide[[place, place + 1]]) for place in changes]
    return Race(sizes, theirs - mine, difference(at_once=False), difference(at_once=True), crossings)
