"""Does it scale? Train each architecture at several sizes and fit a scaling law to the losses.

    python -m evaluation scaling 1m mamba_like --sizes 0.25m 0.5m 1m 2m      # presets, EXPERIMENT/PRESET, runs or groups
    python -m evaluation scaling 1m my_idea --sizes 0.25m 0.5m 1m 2m --seeds 3 --steps 4000 --save scaling

Runs and groups only supply an architecture (ladder.py explains the sizes). All models use the training options of the first name:
the same data in the same order, the same learning rate. `--train.lr_max 2e-3`, or any other --train option of train.py, overrides
them for all. The same command resumes a stopped ladder and skips finished runs.

By default all models train for the same number of steps, and so of tokens, as the law assumes (see loss_law.py). With equal
minutes or tokens per parameter, more than the size varies, and the law is only a curve through the points.

The largest size is held out and forecast from the others. The laws and their crossings use all sizes. Losses are bits per byte
on all validation stories. With several seeds the intervals cover the choice of seed on these stories.
"""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from config import TrainConfig
from evaluation.comparison import bits_per_byte
from evaluation.ladder import EQUAL_STEPS, FEWEST_SIZES, Budget, Plan, architecture, plan, read_size, train_all
from evaluation.loss_law import Law, Race, fit, race
from evaluation.statistics import BITS, SIGNIFICANCE, over_stories
from metrics.story_losses import losses_of, too_lossy
from runs.folder import Run
from training.seeds import is_over, member_names

COLUMNS = ["architecture", "size", "parameters", "seed", BITS, "error", "tokens", "minutes", "run"]
NOISE = {"seeds": "over seeds", "stories": "from the stories alone; another seed may say otherwise"}


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
            row = {"parameters": f"{parameters:,}", "seeds": len(runs), BITS: losses.mean(),
                   "deviation": losses.std(ddof=1) if len(runs) > 1 else np.nan}  # fmt: skip
            if law := self.laws.get(name):
                (low,), (high,) = law.band([parameters])
                row |= {"law": law.at([parameters])[0] if law.is_determined else np.nan, "95% of the law": span(low, high)}
                forecast = self.held_out[name].forecast
                if forecast.size == parameters:
                    row |= {"forecast": forecast.expected, "95% of the forecast": span(*forecast.interval)}
            rows[name, size] = row | {"tokens": f"{runs['tokens'].mean():,.0f}", "minutes": f"{runs['minutes'].mean():.1f}"}
        return pd.DataFrame.from_dict(rows, orient="index")

    @property
    def numbers(self) -> pd.DataFrame:
        """E, A and alpha of each architecture, with intervals."""
        rows = {}
        for name, law in self.laws.items():
            told = {number: f"{value:.3g} ({span(*law.intervals[number], '.3g')})" for number, value in law.numbers.items()}
            rows[name] = told | ({"A": "open, as alpha is"} if "alpha" in law.open_numbers else {})
        return pd.DataFrame.from_dict(rows, orient="index")

    def __str__(self) -> str:
        parts = [self.notes]
        if len(self.runs):
            parts.append([self.table.to_string(float_format="{:.4f}".format, na_rep="")])
        if self.laws:
            heading = f"L(N) = E + A N^-alpha, the {BITS} of a model with N parameters (95% intervals):"
            parts.append([heading, self.numbers.to_string()])
        return "\n\n".join("\n".join(lines) for lines in [*parts, self.verdicts] if lines)


def scaling(*specs: str, sizes: tuple[str, ...], seeds: int = 1, budget: Budget = EQUAL_STEPS, train: TrainConfig | None = None,
            name: str = "scaling") -> Scaling | None:  # fmt: skip
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
        if own["size"].nunique() < FEWEST_SIZES:
            verdicts.append(f"{name}: a law needs three sizes, but runs of only {own['size'].nunique()} are left")
            continue
        sizes, losses, errors = (own[column].to_numpy(float) for column in ("parameters", BITS, "error"))
        laws[name], held_out[name] = fit(sizes, losses, errors), fit(sizes, losses, errors, held_out=sizes.max())
        verdicts += [*told_law(name, laws[name]), told_forecast(name, held_out[name])]
    races = {(one, other): race(laws[one], laws[other]) for one, other in itertools.combinations(laws, 2)}
    verdicts += [told_race(*pair, found, {laws[name].noise for name in pair}) for pair, found in races.items()]
    return Scaling(runs, laws, held_out, races, notes, verdicts)


def gather(planned: Plan) -> tuple[pd.DataFrame, list[str]]:
    """Tabulate the runs and note excluded ones. Raises ValueError if a run is unfinished."""
    rows, notes, facts = [], [], {}
    for rung, group in zip(planned.rungs, planned.groups, strict=True):
        for run in map(Run, member_names(group)):
            if not is_over(run):
                raise ValueError(f"the run {run.name!r} is not trained to its end: train the ladder first")
            if (problem := run.diverged) is not None:
                notes.append(f"{run.name} diverged and is left out: {problem}. Try a lower --train.lr_max, with another --name")
                continue
            losses, scored = losses_of(run.name)
            if problem := too_lossy(run.name, scored):
                notes.append(problem)
                continue
            facts[run.name], log = scored, run.log()
            rows.append([
                rung.architecture, rung.label, rung.parameters, run.train_config.seed, bits_per_byte(losses), story_error(losses),
                int(log["tokens"].max()), log["seconds"].max() / 60, run.name,
            ])  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS), notes + check_same_data(facts)


def story_error(losses: pd.DataFrame) -> float:
    """Standard error of bits per byte over the choice of stories."""
    from scipy.stats import t

    alone = over_stories(np.zeros(len(losses)), losses["nats"], losses["bytes"])
    return alone.margin / t.isf(SIGNIFICANCE / 2, len(losses) - 1)


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
    return [f"other code trained {len(others)} runs, such as {others[0]}, than {first}"] if others else []


def told_law(name: str, law: Law) -> list[str]:
    """Report a poor fit or undetermined numbers, one per line."""
    if law.best[1] == 0:
        return [f"{name}: the loss does not fall with the size, so there is no law"]
    lines = []
    if law.misfit <= SIGNIFICANCE:
        lines.append(f"{name}: the law does not fit (p = {law.misfit:.2g}): sizes lie further from it than seeds explain")
    if law.open_numbers:
        told = {number: span(*law.intervals[number], ".2g") for number in ("E", "alpha")}
        lines.append(f"{name}: these sizes do not determine {' and '.join(law.open_numbers)}: "
                     f"E = {told['E']} and alpha = {told['alpha']} fit as well")  # fmt: skip
    return lines


def told_forecast(name: str, law: Law) -> str:
    forecast = law.forecast
    where = "inside" if forecast.came_true else "outside"
    begin = f"{name}: held out, {size_told(forecast.size)} parameters measured {forecast.measured:.4f} {BITS}"
    interval = f"{where} of the 95% interval {span(*forecast.interval)} ({NOISE[law.noise]})"
    if np.isnan(forecast.expected):
        return f"{begin}, {interval} that the smaller sizes leave open: they do not determine a law"
    share = forecast.error / forecast.measured
    return f"{begin}; forecast {forecast.expected:.4f}: an error of {forecast.error:+.4f} ({share:+.1%}), {interval}"


def told_race(one: str, other: str, found: Race, noise: set[str]) -> str:
    """State in one sentence which is better at the measured sizes, and where they cross."""
    names, low, high = {-1: other, 1: one}, found.sizes[0], found.sizes[-1]
    measured = f"from {size_told(low)} to {size_told(high)} parameters"
    if found.overtaking is not None:
        which, at, interval = found.overtaking
        told = (f"{names[which]} is better than {names[-which]} from about {size_told(at)} parameters on (95% interval "
                f"{span(*interval, size_told)}), and worse below that")  # fmt: skip
    elif not found.stretches:
        told = (f"can't tell which of {one} and {other} is better {measured}: at the largest {other} - {one} is "
                f"{span(found.simultaneous.low[-1], found.simultaneous.high[-1], '+.4f')} {BITS}")  # fmt: skip
    elif len(found.stretches) > 1:
        each = "; ".join(f"{names[which]} {span(start, end, size_told)}" for which, start, end in found.stretches)
        told = f"{one} and {other} overtake each other more than once: better is {each}"
    else:
        ((which, start, end),) = found.stretches
        where = f"from {size_told(start)} to {size_told(end)} parameters; else can't tell, nor where one overtakes the other"
        everywhere = (start, end) == (low, high)
        told = f"{names[which]} is better than {names[-which]} {f'at all sizes {measured}' if everywhere else where}"
    beyond = [size_told(size) for size in found.crossings if not low <= size <= high]
    if beyond and found.overtaking is None:
        told += f". The laws would cross at about {' and '.join(beyond)}, where nothing was measured: no more than a guess"
    return told + (f" ({NOISE['stories']})" if "stories" in noise else "")


def span(low: float, high: float, way=".4f") -> str:
    low, high = (way(value) if callable(way) else format(value, way) for value in (low, high))
    return f"{low} to {high}"


def size_told(size: float) -> str:
    """Format 1234567 as '1.23m'."""
    return f"{size / 1e6:.3g}m"


def plot(result: Scaling):
    """Plot loss against size on log-log axes, with the laws, their 95% bands, and the forecasts."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    plt.close(figure)  # otherwise a notebook shows it twice
    axes.set(xscale="log", yscale="log", xlabel="parameters", ylabel=f"{BITS} of the validation stories")
    for number, (name, runs) in enumerate(result.runs.groupby("architecture", sort=False)):
        colour, means = f"C{number}", runs.groupby("parameters")[BITS].mean()
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
        axes.fill_between(sizes, *law.band(sizes), color=colour, alpha=0.15, linewidth=0)
        if others.is_determined:
            axes.plot(sizes, others.at(sizes), "--", color=colour, linewidth=1)
        (low, high), beside = others.forecast.interval, means.index[-1] * (1.03 + 0.03 * number)
        middle = (low + high) / 2
        axes.errorbar(beside, middle, (high - low) / 2, fmt="none", color=colour, capsize=4, label="forecast from the others")
        axes.plot(beside, others.forecast.expected, "_", color=colour)
    for found in result.races.values():
        if found.overtaking is not None:
            _, at, interval = found.overtaking
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
    axes.grid(alpha=0.3, which="both")
    axes.set_title("law of all sizes and its 95% band; dashed: law without the largest size")
    axes.legend(fontsize="small")
    return figure


def save(result: Scaling, folder: Path):
    """Write scaling.png, runs.csv with a row for each run, and verdict.txt into a folder."""
    result.runs.to_csv(folder / "runs.csv", index=False)
    (folder / "verdict.txt").write_text(f"{result}\n", encoding="utf-8")
    if len(result.runs):
        plot(result).savefig(folder / "scaling.png", dpi=120)


def main(words: list[str]):
    """Run the command line. Errors exit with one line; after Ctrl-C the same command resumes."""
    try:
        finished = run(words)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # between two runs
        finished = False
    if not finished:
        print("stopped; what was begun is saved. The same command goes on with it", file=sys.stderr)
        sys.exit(130)  # exit code of the shell for Ctrl-C


def run(words: list[str]) -> bool:
    """Parse the options and run. Returns False on Ctrl-C. Raises ValueError, OSError or ImportError."""
    import tyro

    @dataclass(frozen=True)
    class Options:
        train: TrainConfig

    parser = argparse.ArgumentParser(prog="python -m evaluation scaling", description="Which architecture scales better? "
                                     "Options of train.py that begin with --train. are for all rungs.")  # fmt: skip
    parser.add_argument("specs", nargs="+", metavar="ARCHITECTURE", help="a preset, EXPERIMENT/PRESET, a run or a group of runs")
    parser.add_argument("--sizes", nargs="+", required=True, help="parameters, embeddings included, such as 0.25m 0.5m 1m 2m")
    parser.add_argument("--seeds", type=int, default=1, help="models of each size")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=float, help=f"of training, equal for all; {EQUAL_STEPS.amount:,} by default")
    budget.add_argument("--minutes", type=float, help="of training, equal for all")
    budget.add_argument("--tokens_per_parameter", type=float, help="so that larger models see more; 20 is a common number")
    parser.add_argument("--name", default="scaling", help="what the names of the runs begin with")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="the plot, the table of runs and the verdict there")
    arguments, rest = parser.parse_known_args(words)
    named = {kind: getattr(arguments, kind) for kind in ("steps", "minutes", "tokens_per_parameter")}
    chosen = next((Budget(kind, amount) for kind, amount in named.items() if amount is not None), EQUAL_STEPS)
    _, by_itself = architecture(arguments.specs[0])
    train = tyro.cli(Options, prog=parser.prog, args=rest, default=Options(by_itself), use_underscores=True).train
    for field in ("max_steps", "max_minutes"):
        if getattr(train, field) != getattr(by_itself, field):
            raise ValueError(f"--train.{field}: give --steps, --minutes or --tokens_per_parameter instead")
    if arguments.save is not None:
        arguments.save.mkdir(parents=True, exist_ok=True)
    result = scaling(
        *arguments.specs, sizes=tuple(arguments.sizes), seeds=arguments.seeds, budget=chosen, train=train, name=arguments.name
    )
    if result is None:
        return False
    print(f"\n{result}")
    if arguments.save is not None:
        save(result, arguments.save)
        print(f"\nthe plot, the runs and this verdict are in {arguments.save}")
    return True
