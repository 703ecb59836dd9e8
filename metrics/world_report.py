"""Plots and report lines of runs on storyworld: excess over its entropy, and grades of samples."""

from collections.abc import Iterable

from metrics.plots import add_legend, in_style, line_colour
from metrics.proportion import CONFIDENCE, proportion_interval
from metrics.world_floor import Floor, world_floor
from metrics.world_grades import BROKEN
from runs.folder import Run
from runs.tables import at_most

SHARES = ("accepted", *BROKEN)  # which add up to 1
COLOURS = ("C2", "C1", "C4", "C0", "C3", "0.6", "0.85")


def draw_floors(axes, floors: Iterable[Floor | None]):
    """Draw the distinct entropies of the world as lines, in nats per token."""
    for nats in sorted({floor.nats_per_token for floor in floors if floor is not None}):
        draw_entropy(axes, nats)


def draw_entropy(axes, entropy: float):
    """Draw the entropy of the world as a dashed line, in the unit of the axes."""
    axes.axhline(entropy, color="grey", linestyle="--", linewidth=1, label=f"entropy of the world, {entropy:.4f}")


def log_with_excess(name: str):
    """Read log_data.csv as a pandas DataFrame and add the excess of the validation loss over the entropy of the world.

    The columns are excess, in nats per token, and excess_bits_per_byte; NaN if the entropy is not known.
    """
    log, floor = Run(name).log(), world_floor(name) or Floor(float("nan"), float("nan"))
    log["excess"] = log["validation_loss"] - floor.nats_per_token
    log["excess_bits_per_byte"] = log["bits_per_byte"] - floor.bits_per_byte
    return log


def graded_log(name: str):
    """Select the rows of `log_with_excess` with grades. Raises ValueError if there are none."""
    log = log_with_excess(name)
    if "accepted" not in log or log["accepted"].isna().all():
        raise ValueError(f"no samples of the run {name!r} were graded: train on storyworld with --train.grade_stories 64")
    return log.dropna(subset="accepted")


@in_style
def plot_grades(*names: str):
    """Plot the storyworld grades of runs over training.

    Left: the share of accepted samples with 95% intervals, and (dashed) the share of sentences before the first error, against
    the excess of the loss over the world's entropy, which falls from left to right. Right: samples by first error and step.

    Parameters
    ----------
    *names : str
        Runs on storyworld with --train.grade_stories.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        For a run without grades.

    Examples
    --------
    >>> plot_grades("my_run")  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    logs = {name: graded_log(name) for name in names}
    figure, (left, *others) = plt.subplots(1, 1 + len(logs), figsize=(4 * (1 + len(logs)), 3.8))
    plt.close(figure)  # otherwise a notebook shows it a second time
    for number, (name, log) in enumerate(logs.items()):
        num_samples = Run(name).train_config.grade_stories
        bounds = [proportion_interval(round(share * num_samples), num_samples) for share in log["accepted"]]
        below = log["accepted"] - [low for low, _ in bounds]
        above = [high for _, high in bounds] - log["accepted"]
        style = {"color": line_colour(number), "marker": "."}
        label = f"{name}: accepted stories ({num_samples} samples, {CONFIDENCE:.0%})"
        left.errorbar(log["excess"], log["accepted"], (below, above), elinewidth=0.6, label=label, **style)
        label = f"{name}: sentences before the first error"
        left.plot(log["excess"], log["sentences_right"], linestyle="--", linewidth=1, label=label, **style)
    if all((log["excess"] > 0).all() for log in logs.values()):
        left.set_xscale("log")
        left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.xaxis.set_minor_locator(NullLocator())
        left.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    left.invert_xaxis()
    left.set(xlabel="loss over the entropy of the world (nats per token)", ylabel="share that is right")
    left.set_ylim(bottom=0)
    for (name, log), axes in zip(logs.items(), others, strict=True):
        labels = [column.removeprefix("broken_") for column in SHARES]
        axes.stackplot(log["step"], *(log[column] for column in SHARES), labels=labels, colors=COLOURS)
        axes.set(xlabel="steps", ylabel="samples by first error", title=name, ylim=(0, 1), xlim=log["step"].iloc[[0, -1]])
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.legend(reverse=True, loc="upper left", bbox_to_anchor=(1, 1))
    add_legend(left)
    return figure


def lines_of_the_world(name: str) -> list[str]:
    """Lines for the README.md of a run: excess over the entropy, and grades at the best step; none for other data."""
    floor, log = world_floor(name), Run(name).log()
    best, lines = log.loc[log["validation_loss"].idxmin()], []
    if floor is not None:
        bits, nats = best.bits_per_byte - floor.bits_per_byte, best.validation_loss - floor.nats_per_token
        bits, nats = (at_most(excess, Run(name).is_bound) for excess in (bits, nats))
        lines.append(
            f"{bits} bits per byte and {nats} nats per token over the exact entropy of these stories, {floor.bits_per_byte:.4f} "
            f"and {floor.nats_per_token:.4f}"
        )
    if "accepted" in log:
        num_samples = Run(name).train_config.grade_stories
        low, high = proportion_interval(round(best.accepted * num_samples), num_samples)
        broken = ", ".join(f"{column.removeprefix('broken_')} {best[column]:.0%}" for column in BROKEN)
        lines.append(
            f"of {num_samples} samples at temperature 1 the world accepts {best.accepted:.1%} ({CONFIDENCE:.0%} interval "
            f"{low:.1%} to {high:.1%}), and of their sentences {best.sentences_right:.1%} stand before the first error; "
            f"first errors: {broken}"
        )
    return lines
