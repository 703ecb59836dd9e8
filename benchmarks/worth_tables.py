"""Tables and plots of the raw results of worth.py."""

import math
from pathlib import Path

import numpy as np
from script import Row

from evaluation.comparison import format_p
from evaluation.statistics import Difference, over_seeds
from metrics.plots import add_legend, in_style, line_colour


def tables(raw: dict) -> dict[str, list[Row]]:
    """The scores of all presets and, if measured, their losses by position in the story."""
    result = {raw["caption"]: score_rows(raw["results"])}
    if "by_position" in raw:
        stories = f"{raw['by_position']['stories']} validation stories"
        caption = (f"Nats per token by position in the story, on {stories}: the mean over seeds, and the difference to the first "
                   "row with its 95% interval over seeds (uncorrected).")  # fmt: skip
        result[caption] = position_rows(raw)
    return result


def score_rows(results: dict[str, dict]) -> list[Row]:
    """A row for each preset. Interval and p of a difference are corrected for all comparisons."""
    first, *others = results
    rows = []
    for name, of in results.items():
        row = {
            "": name, "seeds": f"{len(of['seeds'])}", "parameters": f"{of['parameters']}",
            "tokens/s": f"{of['tokens_per_second']:.0f}", "steps": f"{np.mean(of['steps']):.0f}",
            "tokens seen": f"{np.mean(of['tokens']):.0f}",
        }  # fmt: skip
        row |= with_margin("bits per byte", mean_over_seeds(np.array(of["bits_per_byte"])), ".4f")
        if "difference" in of:
            over_seeds_column = f"difference to {first} over seeds (95%, corrected)"
            row |= with_margin(over_seeds_column, Difference(**of["difference"]), "+.4f")
            row[f"p (corrected, of {len(others)})"] = format_p(of["p_corrected"])
            row |= with_margin("over stories (95%, no verdict)", Difference(**of["over_stories"]), "+.4f")
        rows.append(row)
    return rows


def position_rows(raw: dict) -> list[Row]:
    positions = raw["by_position"]
    first, *_ = positions["losses"]
    counts = dict(zip(positions["octaves"], map(str, positions["tokens"]), strict=True))
    rows = [{"": "tokens scored"} | counts]
    for preset, losses in positions["losses"].items():
        row, differences = {"": preset}, to_first(raw, preset)
        for i, octave in enumerate(positions["octaves"]):
            row[octave] = f"{np.mean(losses, axis=0)[i]:.3f}"
            if preset != first:
                row |= with_margin(f"{octave}: difference", element(differences, i), "+.3f", f"{octave}: ±")
        rows.append(row)
    return rows


def to_first(raw: dict, preset: str) -> Difference:
    """Difference to the first preset by octave, paired if the seeds are equal."""
    results, losses = raw["results"], raw["by_position"]["losses"]
    base = next(iter(losses))
    first, other = np.array(losses[base]), np.array(losses[preset])
    if results[base]["seeds"] == results[preset]["seeds"]:
        return mean_over_seeds(other - first)
    if min(len(first), len(other)) < 2:
        return without_interval(other.mean(axis=0) - first.mean(axis=0))
    return over_seeds(first, other, paired=False)


def element(difference: Difference, i: int) -> Difference:
    return Difference(difference.mean[i], difference.low[i], difference.high[i], difference.p[i])


def mean_over_seeds(values: np.ndarray) -> Difference:
    """Mean of values (seeds, ...) with its interval; a single seed has none."""
    return without_interval(values[0]) if len(values) < 2 else over_seeds(np.zeros_like(values), values, paired=True)


def without_interval(mean) -> Difference:
    return Difference(mean, *[mean + math.nan] * 3)


def with_margin(column: str, value: Difference, style: str, margin_column: str | None = None) -> Row:
    cells = {column: f"{value.mean:{style}}"}
    if not np.isnan(value.margin):
        cells[margin_column or f"{column}: ±"] = f"{value.margin:{style.removeprefix('+')}}"
    return cells


@in_style
def draw_differences(raw: dict, path: Path):
    """Plot the difference of each preset to the first."""
    from matplotlib.figure import Figure

    first = next(iter(raw["results"]))
    compared = [(name, Difference(**of["difference"])) for name, of in raw["results"].items() if "difference" in of]
    figure = Figure(figsize=(7, 1 + 0.25 * len(compared)))
    axes = figure.subplots()
    axes.errorbar([difference.mean for _, difference in compared], range(len(compared)),
                  xerr=[difference.margin for _, difference in compared], fmt=".", capsize=2)  # fmt: skip
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(compared)), [name for name, _ in compared])
    axes.invert_yaxis()
    axes.set(xlabel=f"bits per byte more than {first}, 95% interval over seeds, corrected")
    figure.savefig(path)


@in_style
def draw_positions(raw: dict, path: Path):
    """Plot the loss by position (left) and its difference to the first preset (right)."""
    from matplotlib.figure import Figure

    losses = raw["by_position"]["losses"]
    figure = Figure(figsize=(9, 4.5))
    left, right = figure.subplots(1, 2)
    positions = 2.0 ** np.arange(len(raw["by_position"]["octaves"])) * 1.5
    for number, (name, of) in enumerate(losses.items()):
        left.plot(positions, np.mean(of, axis=0), marker=".", color=line_colour(number), label=name)
        if number:
            difference, style = to_first(raw, name), {"color": line_colour(number), "linewidth": 1, "capsize": 2}
            shifted = positions * 1.03 ** (number - len(losses) / 2)  # so that the intervals stand apart
            margin = None if np.isnan(difference.margin).all() else difference.margin
            right.errorbar(shifted, difference.mean, margin, marker=".", label=name, **style)
    right.axhline(0, color=line_colour(0), linewidth=1, label=next(iter(losses)))
    left.set(xlabel="position in the story (tokens)", ylabel="nats per token", xscale="log")
    right.set(xlabel="position in the story (tokens)", ylabel="difference, 95% interval over seeds, uncorrected", xscale="log")
    add_legend(left)
    figure.savefig(path)
