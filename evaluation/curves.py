"""Validation curves of runs and groups of seeds: the mean over seeds and its 95% interval.

    figure = plot_all_curves("base", "my_idea")      # bits per byte by steps, tokens, FLOPs and seconds
    curve("base", "flops").mean                      # the numbers of one line

The interval is where the mean of many seeds would lie, at each point alone; single seeds scatter more widely. If all runs were
trained on storyworld, a line shows its exact entropy, and the axis on the right the excess over it.
"""

from dataclasses import dataclass

import numpy as np

from evaluation.statistics import BITS, CONFIDENCE
from metrics.plots import add_legend, in_style, line_colour
from metrics.world_floor import world_floor
from metrics.world_report import draw_entropy
from runs.folder import Run, group_members
from runs.tables import BOUND
from training.report import AXES, log_with_flops


@dataclass(frozen=True)
class Curve:
    """Bits per byte on the validation stories during training: mean over seeds and the 95% interval of the mean."""

    name: str
    by: str  # step, tokens, flops or seconds
    seeds: int
    x: np.ndarray  # (points,)
    mean: np.ndarray  # (points,)
    low: np.ndarray  # (points,) NaN for a single seed
    high: np.ndarray  # (points,) NaN for a single seed


def curve(name: str, by: str = "step", members: tuple[str, ...] | None = None) -> Curve:
    """Compute the validation curve of a run or of a group of seeds.

    Parameters
    ----------
    name : str
        A run or a group in trained_models/.
    by : {"step", "tokens", "flops", "seconds"}, default "step"
        The x axis.
    members : tuple of str, optional
        The runs of the group to average; by default all that did not diverge.

    Returns
    -------
    Curve
        At every point where one of the runs was evaluated, interpolated for the others, over the range common to all.

    Raises
    ------
    ValueError
        If all runs diverged, one was never evaluated, or they have no range in common.
    """
    from scipy.stats import sem, t

    if by not in AXES:
        raise ValueError(f"by={by!r}: it must be one of {', '.join(AXES)}")
    members = converged(name) if members is None else members
    logs = [log_with_flops(member).dropna(subset="bits_per_byte") for member in members]
    for member, log in zip(members, logs, strict=True):
        if log.empty:
            raise ValueError(f"the run {member!r} was stopped before it was evaluated: resume it, then compare")
    points = np.unique(np.concatenate([log[by] for log in logs]))  # (points,)
    start, end = max(log[by].min() for log in logs), min(log[by].max() for log in logs)
    points = points[(start <= points) & (points <= end)]
    if not len(points):
        raise ValueError(f"the seeds of {name!r} have no range of {AXES[by]} in common: train them equally long")
    values = np.array([np.interp(points, log[by], log["bits_per_byte"]) for log in logs])  # (seeds, points)
    mean, margin = values.mean(axis=0), np.nan  # no interval for one seed
    if len(logs) > 1:
        margin = t.isf((1 - CONFIDENCE) / 2, len(logs) - 1) * sem(values, axis=0)
    return Curve(name, by, len(logs), points, mean, mean - margin, mean + margin)


def converged(name: str) -> tuple[str, ...]:
    """List the runs of a name that did not diverge. Raises ValueError if all of them did."""
    members = tuple(member for member in group_members(name) if Run(member).diverged is None)
    if not members:
        raise ValueError(f"{name!r} diverged: there is no curve to compare. Train it with a lower --train.lr_max")
    return members


def common_floor(members: tuple[str, ...]) -> float | None:
    """The entropy of the validation stories in bits per byte, if it is known and the same for all runs."""
    floors = {floor and floor.bits_per_byte for floor in map(world_floor, members)}
    return floors.pop() if len(floors) == 1 else None


@in_style
def plot_curves(*names: str, by: str = "step", axes=None, members: dict[str, tuple[str, ...]] | None = None):
    """Plot the validation curves of runs and groups of seeds.

    A group has a band, the 95% interval of the mean over seeds, which is not the range of single seeds; a single seed has a thin
    line without a band. The y range leaves out the steep start.

    Parameters
    ----------
    *names : str
        Runs or groups in trained_models/.
    by : {"step", "tokens", "flops", "seconds"}, default "step"
        The x axis.
    axes : matplotlib Axes, optional
        Where to draw; by default in a new figure.
    members : dict of str to tuple of str, optional
        The runs to average for each name; by default all that did not diverge.

    Returns
    -------
    matplotlib Axes

    Raises
    ------
    ValueError, OSError
        As `curve`, or for an unknown name.

    Examples
    --------
    >>> plot_curves("0.5m_short_and_thick", "0.5m_tall_and_skinny", by="flops")  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    axes = axes or plt.subplots()[1]
    members = members or {name: converged(name) for name in names}
    curves = [curve(name, by, members[name]) for name in names]
    for number, drawn in enumerate(curves):
        several = drawn.seeds > 1
        label = f"{drawn.name} (mean of {drawn.seeds} seeds)" if several else f"{drawn.name} (one seed, no band)"
        label = f"{BOUND * Run(members[drawn.name][0]).is_bound}{label}"
        axes.plot(drawn.x, drawn.mean, color=line_colour(number), linewidth=1.8 if several else 0.8, label=label)
        if several:
            axes.fill_between(drawn.x, drawn.low, drawn.high, color=line_colour(number), alpha=0.25, linewidth=0)
    axes.set(xlabel=AXES[by], ylabel=BITS)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    runs = tuple(member for name in names for member in members[name])
    key = "validation_fingerprint"
    if len({Run(member).load("model.pth", {key})[key] for member in runs}) > 1:
        axes.set_title("Different data: do not compare!")
    floor = common_floor(runs)
    if floor is not None:
        draw_entropy(axes, floor)
        excess = axes.secondary_yaxis("right", functions=(lambda bits: bits - floor, lambda over: over + floor))
        excess.set_ylabel("excess over the entropy")
    axes.set_ylim(*visible_range(curves, floor))
    add_legend(*axes.figure.axes, title="band: 95% interval of the mean" if any(drawn.seeds > 1 for drawn in curves) else None)
    return axes


@in_style
def plot_positions(losses):
    """Plot the loss by position in the story, and its difference to the first model.

    Parameters
    ----------
    losses : pandas.DataFrame
        Nats per token, a column for each model, a row for positions "1 to 1", "2 to 3", "4 to 7" and so on: the first table of
        `evaluation.page.where_the_loss_is`.

    Returns
    -------
    matplotlib.figure.Figure

    Examples
    --------
    >>> plot_positions(pd.DataFrame({"base": [1.4, 0.4], "my_idea": [1.3, 0.4]}, index=["1 to 1", "2 to 3"]))  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
    plt.close(figure)  # or a notebook would show it twice
    for name, values in losses.items():
        left.plot(losses.index, values, marker=".", label=name)
        right.plot(losses.index, values - losses.iloc[:, 0], marker=".", label=name)
    first, last = zip(*(position.split(" to ") for position in losses.index), strict=True)
    ticks = [one if one == other else f"{one}–{other}" for one, other in zip(first, last, strict=True)]
    for axes, label in ((left, "nats per token"), (right, f"difference to {losses.columns[0]}")):
        axes.set_xticks(range(len(ticks)), ticks, rotation=45)
        axes.set(xlabel="position of the token in its story", ylabel=label)
    add_legend(left)
    return figure


def visible_range(curves: list[Curve], floor: float | None) -> tuple[float, float]:
    """The y range: from the floor, or the lowest end of a band, to the highest mean after the first tenth of a curve."""
    highest = max(drawn.mean[drawn.x >= 0.1 * drawn.x[-1]].max() for drawn in curves)
    lowest = min(drawn.mean.min() for drawn in curves)
    cut = 2 * lowest - highest  # wider bands are cut off
    ends = [max(drawn.low[-1], cut) for drawn in curves if drawn.seeds > 1]
    lowest = min([lowest, *ends, *([floor] if floor is not None else [])])
    room = 0.05 * (highest - lowest) or 0.05
    return lowest - room, highest + room


@in_style
def plot_all_curves(*names: str):
    """Plot the curves of runs and groups by steps, tokens, FLOPs and seconds.

    Parameters
    ----------
    *names : str
        Runs or groups in trained_models/.

    Returns
    -------
    matplotlib Figure
        With four axes, as `plot_curves` draws them.

    Raises
    ------
    ValueError, OSError
        As `plot_curves`.

    Examples
    --------
    >>> plot_all_curves("0.5m_short_and_thick", "0.5m_tall_and_skinny")  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6))
    plt.close(figure)  # or a notebook would show it twice
    for by, ax in zip(("step", "tokens", "flops", "seconds"), axes.flat, strict=True):
        plot_curves(*names, by=by, axes=ax)
    return figure
