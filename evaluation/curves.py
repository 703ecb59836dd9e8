"""Validation curves of runs and groups of seeds: the mean over the seeds, and the band that other seeds would stay in.

    figure = plot_all_curves("base", "my_idea")      # bits per byte by steps, tokens, FLOPs and seconds
    curve("base", "flops").mean                      # the numbers of one line

Where all runs were trained on storyworld, its exact entropy is a line, and the axis on the right is the excess over it.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.statistics import BITS, CONFIDENCE
from metrics.world_floor import world_floor
from metrics.world_report import draw_entropy
from runs.folder import Run, group_members
from training.report import AXES, check_axis, log_with_flops


@dataclass(frozen=True)
class Curve:
    """Bits per byte on the validation stories of a training, as the mean over its seeds, with its 95% interval at each point."""

    name: str
    by: str  # step, tokens, flops or seconds
    seeds: int
    x: np.ndarray  # (points,) what was spent
    mean: np.ndarray  # (points,)
    low: np.ndarray  # (points,) of the interval; NaN where there is one seed alone
    high: np.ndarray  # (points,)


def curve(name: str, by: str = "step", members: tuple[str, ...] | None = None) -> Curve:
    """The curve of a run, or of a group of seeds: of those `members` of it, by default of all that did not diverge.

    A seed is read at the points of all others on the line between two of its evaluations, so only where all of them were
    evaluated. The band is Student's t over the seeds at each point. Raises ValueError where nothing is left to draw.
    """
    check_axis(by)
    members = converged(name) if members is None else members
    logs = [log_with_flops(member).dropna(subset="bits_per_byte") for member in members]
    for member, log in zip(members, logs, strict=True):
        if log.empty:
            raise ValueError(f"the run {member!r} was stopped before it was evaluated: go on with it by resume, and compare then")
    points = np.unique(np.concatenate([log[by] for log in logs]))  # (points,)
    first, last = max(log[by].min() for log in logs), min(log[by].max() for log in logs)
    points = points[(first <= points) & (points <= last)]
    if not len(points):
        raise ValueError(f"the seeds of {name!r} have no stretch of {AXES[by]} in common: train them equally long")
    values = np.array([np.interp(points, log[by], log["bits_per_byte"]) for log in logs])  # (seeds, points)
    mean, margin = values.mean(axis=0), margin_of(values)
    return Curve(name, by, len(logs), points, mean, mean - margin, mean + margin)


def margin_of(values: np.ndarray) -> np.ndarray:
    """Half of the 95% interval of the mean over seeds, at each point; NaN for one seed.  (seeds, points) → (points,)"""
    from scipy.stats import sem, t

    if len(values) == 1:
        return np.full(values.shape[1], np.nan)
    return t.isf((1 - CONFIDENCE) / 2, len(values) - 1) * sem(values, axis=0)


def converged(name: str) -> tuple[str, ...]:
    """The seeds of a run or group, without those that diverged. Raises ValueError where all of them did."""
    left = tuple(member for member in group_members(name) if Run(member).diverged is None)
    if not left:
        raise ValueError(f"{name!r} diverged: there is no curve to compare. Train it with a lower --train.lr_max")
    return left


def common_floor(members: tuple[str, ...]) -> float | None:
    """The bits per byte that no model can pass on the validation stories of all these runs; None where that is not known."""
    floors = {floor and floor.bits_per_byte for floor in map(world_floor, members)}
    return floors.pop() if len(floors) == 1 else None


def plot_curves(*names: str, by: str = "step", axes=None, members: dict[str, tuple[str, ...]] | None = None):
    """Draw the curves of runs or groups of seeds by steps, tokens, flops or seconds, and return the matplotlib axes.

    A band is the 95% interval of the mean over seeds. A run of one seed has a thin line and no band, and the legend says so.
    The range of bits per byte leaves out the steep beginning.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    axes = axes or plt.subplots(figsize=(8, 4), dpi=75, layout="constrained")[1]
    members = members or {name: converged(name) for name in names}
    curves = [curve(name, by, members[name]) for name in names]
    for number, drawn in enumerate(curves):
        several = drawn.seeds > 1
        label = f"{drawn.name} ({drawn.seeds} seeds, 95%)" if several else f"{drawn.name} (one seed, no band)"
        axes.plot(drawn.x, drawn.mean, color=f"C{number}", linewidth=1.8 if several else 0.8, label=label)
        if several:
            axes.fill_between(drawn.x, drawn.low, drawn.high, color=f"C{number}", alpha=0.25, linewidth=0)
    axes.set(xlabel=AXES[by], ylabel=BITS)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    drawn_runs = tuple(member for name in names for member in members[name])
    key = "validation_fingerprint"
    if len({Run(member).load("model.pth", {key})[key] for member in drawn_runs}) > 1:
        axes.set_title("Different data: do not compare!")
    floor = common_floor(drawn_runs)
    if floor is not None:
        draw_entropy(axes, floor)
        excess = axes.secondary_yaxis("right", functions=(lambda bits: bits - floor, lambda over: over + floor))
        excess.set_ylabel("excess over the entropy")
    axes.set_ylim(*visible_range(curves, floor))
    axes.legend()
    return axes


def visible_range(curves: list[Curve], floor: float | None) -> tuple[float, float]:
    """From the floor, or the lowest band at an end, to the highest mean behind the first tenth, where all fall steeply."""
    highest = max(drawn.mean[drawn.x >= 0.1 * drawn.x[-1]].max() for drawn in curves)
    lowest = min(drawn.mean.min() for drawn in curves)
    deepest = 2 * lowest - highest  # of a very wide band so much is seen
    ends = [max(drawn.low[-1], deepest) for drawn in curves if drawn.seeds > 1]
    lowest = min([lowest, *ends, *([floor] if floor is not None else [])])
    room = 0.05 * (highest - lowest) or 0.05
    return lowest - room, highest + room


def plot_all_curves(*names: str):
    """A matplotlib figure with the curves by steps, tokens, FLOPs and seconds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), dpi=70, layout="constrained")
    plt.close(figure)  # or a notebook would show it a second time
    for by, ax in zip(("step", "tokens", "flops", "seconds"), axes.flat, strict=True):
        plot_curves(*names, by=by, axes=ax)
    return figure
