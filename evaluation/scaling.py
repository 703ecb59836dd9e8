"""Does it scale? Train each architecture at several sizes and fit a scaling law to the losses.

    python -m evaluation scaling 1m mamba_like --sizes 0.25m 0.5m 1m 2m      # presets, EXPERIMENT/PRESET, runs or groups
    python -m evaluation scaling 1m my_idea --sizes 0.25m 0.5m 1m 2m --seeds 5 --steps 4000 --save scaling

Runs and groups only supply an architecture (ladder.py explains the sizes). All models use the training options of the first name:
the same data in the same order, the same learning rate. `--train.lr_max 2e-3`, or any other --train option of train.py, overrides
them for all. The same command resumes a stopped ladder and skips finished runs; with more --seeds it adds them.

By default all models train for the same number of steps, and so of tokens, as the law assumes (see loss_law.py). With equal
minutes or tokens per parameter, more than the size varies, and the law is only a curve through the points.

The largest size is held out and forecast from the others. The laws and their crossings use all sizes. Losses are bits per byte
on all validation stories. Intervals and verdicts cover the choice of seed on these stories; a single seed gives estimates only.
Several comparisons are corrected for their number.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from config import TrainConfig
from evaluation.comparison import bits_per_byte
from evaluation.ladder import EQUAL_STEPS, MIN_SIZES, SEEDS, Budget, Plan, architecture, format_size, plan, read_size, train_all
from evaluation.loss_law import Law, Race, fit, race
from evaluation.statistics import BITS, CONFIDENCE
from metrics.plots import add_legend, in_style, line_colour
from metrics.story_losses import losses_of, why_left_out
from runs.folder import Run
from runs.tables import FrameTable, marked, paragraphs, plain, show
from runs.terminal import UsageError
from training.seeds import is_over, member_names

COLUMNS = ["architecture", "size", "parameters", "seed", BITS, "tokens", "minutes", "is bound", "run"]


@dataclass(frozen=True)
class Scaling:
    """Runs, laws and verdicts. Laws and races are keyed by architecture."""

    runs: pd.DataFrame  # a row for each trained model
    laws: dict[str, Law]  # fitted to all sizes
    held_out: dict[str, Law]  # fitted without the largest, to forecast it
    races: dict[tuple[str, str], Race]
    notes: list[str]
    verdicts: list[str]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each architecture and size: measured loss, fitted law, forecast."""
        rows = {}
        for (name, size), runs in self.runs.groupby(["architecture", "size"], sort=False):
            parameters, losses = runs["parameters"].iloc[0], runs[BITS]
            bits = marked(losses.mean(), runs["is bound"].any())
            row = {"parameters": f"{parameters:,}", "seeds": len(runs), BITS: bits, "deviation": losses.std(ddof=1)}
            if law := self.laws.get(name):
                row["law"] = law.at([parameters])[0] if law.is_determined else np.nan
                if law.has_noise and law.fits:
                    (low,), (high,) = law.band([parameters])
                    row["95% of the law"] = format_range(low, high)
                forecast = self.held_out[name].forecast
                if forecast.size == parameters:
                    row["forecast"] = forecast.expected
                    if law.has_noise:
                        row["95% of the forecast"] = format_range(*forecast.interval)
            rows[name, size] = row | {"tokens": f"{runs['tokens'].mean():,.0f}", "minutes": f"{runs['minutes'].mean():.1f}"}
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def parameters(self) -> pd.DataFrame:
        """E, A and alpha of each architecture whose law fits, with intervals if there are several seeds."""
        rows = {}
        for name, law in self.laws.items():
            if law.fits:
                rows[name] = {key: f"{value:.3g}" + f" ({format_range(*law.intervals[key], '.3g')})" * law.has_noise
                              for key, value in law.parameters.items()}  # fmt: skip
                if "alpha" in law.undetermined:
                    rows[name]["A"] = "not determined, as alpha is not"
        return pd.DataFrame.from_dict(rows, orient="index")

    def __rich_console__(self, console, options) -> Iterator:
        parts = [self.notes]
        if len(self.runs):
            parts.append([FrameTable(self.table)])
        if len(parameters := self.parameters):
            untested = ", which three sizes cannot test" * (self.runs["size"].nunique() == MIN_SIZES)
            intervals = f"95% intervals, if the loss follows such a law{untested}"
            if not any(law.has_noise for law in self.laws.values()):
                intervals = "one seed of each size: estimates without intervals"
            heading = f"L(N) = E + A N^-alpha, the {BITS} of a model with N parameters"
            parts.append([f"{heading} ({intervals}):", FrameTable(parameters)])
        yield from paragraphs(*parts, self.verdicts)

    def __str__(self) -> str:
        return plain(self)


def scaling(*specs: str, sizes: tuple[str, ...], seeds: int = SEEDS, budget: Budget = EQUAL_STEPS,
            train: TrainConfig | None = None, name: str = "scaling") -> Scaling | None:  # fmt: skip
    """Train the unfinished runs of each architecture's ladder and fit the laws. Returns None on Ctrl-C.

    sizes: such as "0.25m". train: training options of all runs, by default those of the first architecture. Runs are named
    NAME-ARCHITECTURE-SIZE-BUDGET-seed0. Raises ValueError, OSError, ImportError or ChildProcessError with a one-line message.
    """
    planned = plan(specs, sizes, seeds, budget, train, name)
    for line in [*map(str, planned.rungs), *planned.notes]:
        print(line)
    return measure(planned) if train_all(planned) else None


def measure(planned: Plan) -> Scaling:
    """Fit the laws, forecast the largest size, and find where one architecture overtakes another.

    Raises ValueError if a run is unfinished or the runs' data differ.
    """
    runs, notes = gather(planned)
    laws, held_out, verdicts = {}, {}, []
    for name in dict.fromkeys(rung.architecture for rung in planned.rungs):
        own = runs[runs["architecture"] == name]
        if own["size"].nunique() < MIN_SIZES:
            verdicts.append(f"{name}: a law needs three sizes, but only {own['size'].nunique()} have usable runs")
            continue
        sizes, losses = own["parameters"].to_numpy(float), own[BITS].to_numpy(float)
        laws[name], held_out[name] = fit(sizes, losses), fit(sizes, losses, held_out=sizes.max())
        verdicts += [*describe_law(name, laws[name]), describe_forecast(name, held_out[name])]
    pairs = list(itertools.combinations(laws, 2))
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(pairs))  # Bonferroni: the intervals of all races hold at once
    races = {(one, other): race(laws[one], laws[other], confidence) for one, other in pairs}
    verdicts += [describe_race(one, other, races[one, other], laws[one], laws[other]) for one, other in pairs]
    if len(pairs) > 1 and any(law.has_noise for law in laws.values()):
        notes.append(f"the {len(pairs)} comparisons of two architectures are corrected for their number: "
                     "with 95% confidence all of their intervals hold")  # fmt: skip
    return Scaling(runs, laws, held_out, races, notes, verdicts)


def gather(planned: Plan) -> tuple[pd.DataFrame, list[str]]:
    """Tabulate the runs and note excluded ones. Raises ValueError if a run is unfinished."""
    rows, notes, facts = [], [], {}
    for rung, group in zip(planned.rungs, planned.groups, strict=True):
        for run in map(Run, member_names(group)):
            if not is_over(run):
                raise ValueError(f"the run {run.name!r} is not finished: train the ladder first")
            if (problem := run.diverged) is not None:
                notes.append(f"{run.name} diverged and is left out: {problem}. Try a lower --train.lr_max, with another --name")
                continue
            losses, scored = losses_of(run.name)
            if problem := why_left_out(run.name, scored):
                notes.append(problem)
                continue
            facts[run.name], log = scored, run.log()
            rows.append([
                rung.architecture, rung.label, rung.parameters, run.train_config.seed, bits_per_byte(losses),
                int(log["tokens"].max()), log["seconds"].max() / 60, scored.is_bound, run.name,
            ])  # fmt: skip
    bounds = list(dict.fromkeys(row[0] for row in rows if facts[row[-1]].is_bound))
    notes += [f"{name} is scored by upper bounds: its laws are those of the bounds" for name in bounds]
    return pd.DataFrame(rows, columns=COLUMNS), notes + check_same_data(facts)


def check_same_data(facts: dict) -> list[str]:
    """Raise ValueError if training or validation data differ; note if the code does."""
    if not facts:
        return []
    first = next(iter(facts))
    for field, what in {"validation": "scored on other stories", "data_fingerprint": "trained on other data"}.items():
        for name, scored in facts.items():
            if getattr(scored, field) != getattr(facts[first], field):
                raise ValueError(f"{name!r} was {what} than {first!r}: train the ladder again, with another --name")
    others = [name for name, scored in facts.items() if scored.code != facts[first].code]
    return [f"{len(others)} runs, such as {others[0]}, were trained by other code than {first}"] if others else []


def describe_law(name: str, law: Law) -> list[str]:
    """Report a law that does not fit, or parameters that the sizes do not determine."""
    if law.best[1] == 0:
        return [f"{name}: the loss does not fall with the size, so there is no law"]
    if not law.fits:
        return [f"{name}: no such law fits (p = {law.lack_of_fit:.2g}): the sizes deviate from it by more than seeds explain, so "
                "E, A and alpha mean nothing"]  # fmt: skip
    if law.undetermined:
        E, alpha = (format_range(*law.intervals[key], ".2g") for key in ("E", "alpha"))
        return [f"{name}: these sizes do not determine {' and '.join(law.undetermined)}: E = {E} and alpha = {alpha} fit as well"]
    return []


def describe_forecast(name: str, law: Law) -> str:
    """Compare the forecast of the held-out size with its measured loss."""
    forecast = law.forecast
    sentence = f"{name}: {format_size(forecast.size)} parameters, held out, measured {forecast.measured:.4f} {BITS}"
    if np.isnan(forecast.expected):
        sentence += "; the smaller sizes do not determine a forecast"
    else:
        error = forecast.measured - forecast.expected
        sentence += f"; forecast {forecast.expected:.4f}, an error of {error:+.4f} ({error / forecast.measured:+.1%})"
    if not law.has_noise:
        return f"{sentence}; one seed of each size, so there is no interval"
    where = "inside" if forecast.is_inside else "outside"
    return f"{sentence}; {where} the 95% interval {format_range(*forecast.interval)}"


def describe_race(one: str, other: str, race: Race, law: Law, other_law: Law) -> str:
    """State in one sentence which is better at the measured sizes, and where they cross."""
    names, low, high = {-1: other, 1: one}, race.sizes[0], race.sizes[-1]
    measured, laws = f"from {format_size(low)} to {format_size(high)} parameters", {one: law, other: other_law}
    if single := [name for name in laws if not laws[name].has_noise]:
        return (f"no verdict on {one} and {other} from one seed of each size of {' and '.join(single)} (--seeds {SEEDS} adds "
                f"more): by the laws {other} - {one} is {race.difference[-1]:+.4f} {BITS} at {format_size(high)}")  # fmt: skip
    if misfits := [name for name in laws if not laws[name].fits]:
        return (f"no verdict on {one} and {other} across sizes, as no law fits {' and '.join(misfits)}: "
                "compare their groups of one size by `python -m evaluation compare`")  # fmt: skip
    if race.overtaking is not None:
        which, at, interval = race.overtaking
        return (f"{names[which]} is better than {names[-which]} from about {format_size(at)} parameters on (95% interval "
                f"{format_range(*interval, format_size)}), and worse below that")  # fmt: skip
    if not race.leads:
        interval = format_range(race.simultaneous.low[-1], race.simultaneous.high[-1], "+.4f")
        sentence = (f"{one} and {other} are not distinguishable {measured}: at the largest {other} - {one} is "
                    f"{interval} {BITS} (95% interval)")  # fmt: skip
    elif len(race.leads) > 1:
        each = "; ".join(f"{names[which]} {format_range(start, end, format_size)}" for which, start, end in race.leads)
        sentence = f"{one} and {other} overtake each other more than once; better is {each}"
    else:
        ((which, start, end),) = race.leads
        sentence = f"{names[which]} is better than {names[-which]} from {format_size(start)} to {format_size(end)} parameters"
        if (start, end) != (low, high):
            sentence += f"; at the other sizes {measured} they are not distinguishable"
    if beyond := [format_size(size) for size in race.crossings if not low <= size <= high]:
        sentence += f". The laws would cross at about {' and '.join(beyond)}, where nothing was measured: no more than a guess"
    return sentence


def format_range(low: float, high: float, style=".4f") -> str:
    low, high = (style(value) if callable(style) else format(value, style) for value in (low, high))
    return f"{low} to {high}"


@in_style
def plot(result: Scaling):
    """Plot loss against size on log-log axes, with the laws, their 95% bands, and the forecasts."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(7, 5))
    plt.close(figure)  # otherwise a notebook shows it twice
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=f"{BITS} of the validation stories")
    for number, (name, runs) in enumerate(result.runs.groupby("architecture", sort=False)):
        colour, means = line_colour(number), runs.groupby("parameters")[BITS].mean()
        axes.plot(runs["parameters"], runs[BITS], ".", color=colour, alpha=0.4)
        if name not in result.laws:
            axes.plot(means.index, means, "o", color=colour, label=f"{name}: no law")
            continue
        law, others = result.laws[name], result.held_out[name]
        axes.plot(means.index[:-1], means.iloc[:-1], "o", color=colour, label=name)
        axes.plot(means.index[-1:], means.iloc[-1:], "o", color=colour, markerfacecolor="white", label=f"{name}, held out")
        sizes = np.geomspace(means.index[0], means.index[-1], 100)
        if law.is_determined:
            axes.plot(sizes, law.at(sizes), color=colour)
        if law.has_noise and law.fits:
            axes.fill_between(sizes, *law.band(sizes), color=colour, alpha=0.15, linewidth=0)
        if others.is_determined:
            axes.plot(sizes, others.at(sizes), "--", color=colour, linewidth=1)
        forecast, beside = others.forecast, means.index[-1] * (1.03 + 0.03 * number)
        axes.plot(beside, forecast.expected, "_", color=colour, label="forecast from the others")
        if law.has_noise:
            axes.vlines(beside, *forecast.interval, color=colour)
    for overtaking in (pair.overtaking for pair in result.races.values()):
        if overtaking is not None:
            _, at, interval = overtaking
            axes.axvline(at, color="grey", linewidth=1)
            axes.axvspan(*interval, color="grey", alpha=0.15, linewidth=0, label="where they cross")
    least, most = np.log(result.runs[BITS].min()), np.log(result.runs[BITS].max())
    margin = max(0.3 * (most - least), 0.01)
    axes.set_ylim(np.exp(least - margin), np.exp(most + margin))  # do not let wide bands set the scale
    labels = dict.fromkeys(result.runs["size"])
    axes.set_xticks([read_size(label) for label in labels], labels)
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(which="both")
    axes.set_title("law of all sizes, with its 95% band if there are seeds; dashed: without the largest size")
    add_legend(axes)
    return figure


def save(result: Scaling, folder: Path):
    """Write scaling.png, runs.csv with a row for each run, and verdict.txt into a folder."""
    result.runs.to_csv(folder / "runs.csv", index=False)
    (folder / "verdict.txt").write_text(f"{result}\n", encoding="utf-8")
    if len(result.runs):
        plot(result).savefig(folder / "scaling.png")


def main(arguments, train_words: list[str]):
    """Run the command `scaling`, with the --train options for all runs. Raises KeyboardInterrupt if it was stopped."""
    import tyro

    @dataclass(frozen=True)
    class Options:
        train: TrainConfig

    if not arguments.specs:
        raise UsageError("name at least one preset, run or group of runs")
    amounts = {kind: getattr(arguments, kind) for kind in ("steps", "minutes", "tokens_per_parameter")}
    selected = next((Budget(kind, amount) for kind, amount in amounts.items() if amount is not None), EQUAL_STEPS)
    _, default = architecture(arguments.specs[0])
    prog = "python -m evaluation scaling"
    train = tyro.cli(Options, prog=prog, args=train_words, default=Options(default), use_underscores=True).train
    for field in ("max_steps", "max_minutes"):
        if getattr(train, field) != getattr(default, field):
            raise UsageError(f"--train.{field}: give --steps, --minutes or --tokens_per_parameter instead")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
    result = scaling(
        *arguments.specs, sizes=arguments.sizes, seeds=arguments.seeds, budget=selected, train=train, name=arguments.name
    )
    if result is None:
        raise KeyboardInterrupt
    show("", result)
    if arguments.save is not None:
        save(result, arguments.save)
        print(f"\nthe plot, the runs and this verdict are in {arguments.save}")
