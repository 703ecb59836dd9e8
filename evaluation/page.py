"""A comparison as one page that can be mailed: the verdict, curves, where the loss is, stories, configs, how it was measured.

    python -m evaluation compare A B --html report.html

The page holds all that it shows: no picture, font or script is fetched. It is light or dark as its reader has it, and fits a
phone. page.jinja is how it looks.
"""

import io
import math
import os
import platform
import re
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from config import ModelConfig, TrainConfig
from evaluation.alignment import shown_field
from evaluation.comparison import Candidate, Comparison, Member, told_p
from evaluation.curves import AXES, plot_curves
from evaluation.diff import diff
from evaluation.statistics import BITS
from inference import generate, load_model
from metrics.measures import calibration, distinct, loss_by_position, loss_by_word_class, repetition, token_scores
from metrics.story_losses import validation_stories
from runs.command_line import command as training_command
from runs.folder import Run
from training.machine import cpu_name
from training.report import PROMPTS, samples

NUM_STORIES = 200  # that say where the loss is
NUM_SAMPLES = 10  # stories from the first word on, that say how often a model repeats itself
INK = "#0a0b0c"  # of plots, in whose place the page puts the color of its own text
PLOT_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "font.size": 9, "legend.fontsize": 8, "legend.facecolor": "none", "legend.edgecolor": "none", "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none", "svg.fonttype": "none", "svg.hashsalt": "comparison",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Texts. Those behind the first column are numbers, unless said."""

    headings: list[str]
    rows: list[list[str]]
    numbers: bool = True


def write_page(comparison: Comparison, path: str | Path, **options):
    """Write the page, in place of what was there. Options: see `as_page`. Raises OSError where it cannot be written."""
    text = as_page(comparison, **options)
    Path(path).write_text(text, encoding="utf-8")


def as_page(
    comparison: Comparison, *, prompts: tuple[str, ...] = PROMPTS, seed: int = 0, num_stories: int = NUM_STORIES,
    data_if_missing: str | None = None, measured: list | None = None, command: str | None = None,
) -> str:  # fmt: skip
    """The page as text. All models tell the prompts on, with the same seed; where their loss is, is measured on num_stories.

    Where the data of the runs are not here, and data_if_missing is None, the page says that it was not measured. `measured` is
    what `where_the_loss_is` gave before, and `command` what was typed to get the page. Raises ValueError where all runs diverged.
    """
    if not comparison.groups:
        raise ValueError("all runs diverged: there is nothing to report")
    groups = comparison.groups
    scored = groups[0].members[0]
    notes = [*comparison.notes, *seeds_noted(groups)]
    if measured is None:
        measured = where_the_loss_is(groups, num_stories, data_if_missing, notes)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    first, *others = groups
    return environment.get_template("page.jinja").render(
        title=" and ".join([", ".join(group.name for group in groups[:-1])] * (len(groups) > 1) + [groups[-1].name]),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        verdicts=comparison.verdicts,
        notes=notes,
        names=[group.name for group in groups],
        summary=table_of(comparison.candidates),
        differences=table_of(comparison.differences.rename(columns={"p (Holm)": "p, corrected"})),
        intervals=plot_of_differences(comparison),
        curves=[(label, plot_by(groups, by)) for by, label in AXES.items()],
        loss_tables=[(heading, explanation, table_of(frame)) for heading, explanation, frame in measured],
        num_stories=num_stories,
        stories=stories_of(groups, prompts, seed),
        seed=seed,
        settings=[("Architecture", changed_settings(groups, ModelConfig)), ("Training", changed_settings(groups, TrainConfig))],
        architectures=[(f"{first.name} and {other.name}, part by part", differing_parts(first, other))
                       for other in others if other.members[0].architecture != first.members[0].architecture],
        runs=table_of_runs(groups),
        scored={"data": scored.scored.data, "stories": len(scored.losses), "bytes": scored.losses["bytes"].sum()},
        over=set(comparison.differences.get("over", [])),
        at=comparison.at,
        command=command,
        machine=machine(),
    )  # fmt: skip


def differing_parts(one: Candidate, other: Candidate) -> Markup:
    """diff.py escapes all that it shows."""
    return Markup(diff(one.members[0].name, other.members[0].name)._repr_html_())


def seeds_noted(groups: list[Candidate]) -> list[str]:
    alone = [group.name for group in groups if len(group.members) == 1]
    return [f"one seed only: {', '.join(alone)}. How much another seed would change is not known"] if alone else []


def table_of(frame: pd.DataFrame) -> Table:
    rows = [[str(name), *(shown(column, value) for column, value in row.items())] for name, row in frame.iterrows()]
    return Table(["", *map(str, frame.columns)], rows)


def shown(column: str, value) -> str:
    """'0.8712', '+0.0210' for a difference, '< 0.001' for a small p, '–' where there is nothing."""
    if not isinstance(value, float | np.floating):
        return str(value)
    if column in ("p", "p, corrected"):
        return told_p(value)
    if math.isnan(value):
        return "–"
    if column in ("difference", "95% from", "to"):
        return f"{value:+.4f}"
    return f"{value:.4f}"


def where_the_loss_is(
    groups: list[Candidate], num_stories: int, data_if_missing: str | None, notes: list[str]
) -> list[tuple[str, str, pd.DataFrame]]:
    """Titles, explanations and tables by position, by kind of word, and of calibration and repetition: means over the seeds.

    What could not be measured is noted.
    """
    by_position, by_class, manner, found = {}, {}, {}, {}
    for group in groups:
        wanted = group.members[0].config.data
        try:
            if wanted not in found:
                found[wanted] = validation_stories(wanted, data_if_missing)
        except OSError as error:
            notes.append(f"where the loss of {group.name} is was not measured, as its data are not here ({error}): "
                         "--data_if_missing auto takes others")  # fmt: skip
            continue
        stories = found[wanted][1][:num_stories]
        print(f"measuring {group.name}")
        measured = [measures_of(member, stories) for member in group.members]
        by_position[group.name], by_class[group.name], manner[group.name] = (
            pd.concat(columns, axis=1).mean(axis=1) for columns in zip(*measured, strict=True)
        )
    if not by_position:
        return []
    if len({group.members[0].scored.tokenizer for group in groups}) > 1:
        notes.append("losses by position are in nats per token, which do not compare between tokenizers")
    positions = pd.DataFrame(by_position)
    positions = positions.loc[sorted(positions.index, key=lambda octave: int(octave.split()[0]))]
    classes = pd.DataFrame(by_class).fillna(0.0)  # what a set of stories has no words of adds nothing
    classes = classes.sort_values(classes.columns[0], ascending=False)
    classes.loc["all"] = classes.sum()
    return [
        ("By position", "Nats per token, by the place of the token in its story.", positions),
        ("By kind of word", f"What each kind adds to the {BITS} of these stories.", classes),
        ("Calibration and repetition", "The calibration error is 0 where of all tokens that are held 70% likely 70% come true. "
         f"Repetition and distinct words are those of {NUM_SAMPLES} stories of each seed, from the first word on: groups of 4 "
         "words that were in the same story before, and different groups of 1, 2 and 3 words, as a share of all.",
         pd.DataFrame(manner)),
    ]  # fmt: skip


def measures_of(member: Member, stories: list[str]) -> tuple[pd.Series, pd.Series, pd.Series]:
    """The loss of a run by position and by kind of word, and how it writes."""
    model, tokenizer = load_model(member.name)
    scores = token_scores(model, tokenizer, stories)
    classes = loss_by_word_class(scores, tokenizer, stories)
    num_bytes = sum(len(story.encode(errors="replace")) for story in stories)
    bits = classes["loss"] * classes["tokens"] / num_bytes / math.log(2)
    told = generate(model, tokenizer, [""] * NUM_SAMPLES)
    manner = {"calibration error": calibration(scores)[0], "4 words repeated": repetition(told)}
    manner |= {f"distinct-{n}": distinct(told, n) for n in (1, 2, 3)}
    return loss_by_position(scores)["loss"], bits, pd.Series(manner)


def stories_of(groups: list[Candidate], prompts: tuple[str, ...], seed: int) -> list[tuple[str, list[str]]]:
    """Each prompt, and what the first seed of each group makes of it."""
    told = samples(*(group.members[0].name for group in groups), prompts=prompts, seed=seed)
    return [(prompt, row.tolist()) for prompt, row in told.iterrows()]


def changed_settings(groups: list[Candidate], config_class: type) -> Table:
    """The fields of the configs that differ between the groups; the seed is no setting."""
    configs = [
        Run(group.members[0].name).model_config if config_class is ModelConfig else group.members[0].config for group in groups
    ]
    rows = []
    for field in fields(config_class):
        values = [shown_field(config, field.name) if config_class is ModelConfig else str(getattr(config, field.name))
                  for config in configs]  # fmt: skip
        if len(set(values)) > 1 and field.name not in ("seed", "data_seed"):
            rows.append([field.name, *values])
    return Table(["", *(group.name for group in groups)], rows, numbers=False)


def table_of_runs(groups: list[Candidate]) -> list[tuple[str, Table]]:
    """The command that trains each group again, and its seeds."""
    shown_runs = []
    for group in groups:
        rows = []
        for member, bits in zip(group.members, group.values, strict=True):
            last = member.log.iloc[-1]
            numbers = (f"{last['step']:,.0f}", f"{last['seconds'] / 60:.1f}", f"{member.log['tokens_per_second'].median():,.0f}")
            rows.append([member.name, str(member.config.seed), f"{bits:.4f}", *numbers, str(member.config.threads)])
        first = group.members[0]
        headings = ["run", "seed", BITS, "steps", "minutes", "tokens/s", "threads"]
        shown_runs.append((training_command(Run(first.name).model_config, first.config), Table(headings, rows)))
    return shown_runs


def machine() -> Table:
    """Where this page was made."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pandas"))
    rows = [
        ["system", platform.platform()], ["processor", cpu_name().rpartition(":")[2].strip()], ["cores", str(os.cpu_count())],
        ["Python", platform.python_version()], ["packages", packages],
    ]  # fmt: skip
    return Table(["", ""], rows, numbers=False)


def plot_by(groups: list[Candidate], by: str) -> Markup:
    members = {group.name: tuple(member.name for member in group.members) for group in groups}
    with drawing((5, 3.4)) as (figure, axes):
        plot_curves(*members, by=by, axes=axes, members=members)
        return inline(figure, by, f"{BITS} by {AXES[by]}")


def plot_of_differences(comparison: Comparison) -> Markup:
    """A line for each difference, with its 95% interval and a line where there is none."""
    rows = comparison.differences
    if rows.empty:
        return Markup("")
    with drawing((5, 0.8 + 0.5 * len(rows))) as (figure, axes):
        places = np.arange(len(rows))[::-1]
        for place, (name, row) in zip(places, rows.iterrows(), strict=True):
            margin = (row["to"] - row["95% from"]) / 2
            axes.errorbar(row["difference"], place, xerr=margin if np.isfinite(margin) else None, fmt="o", color="C0", capsize=3)
            axes.annotate(name, (0, place), (4, 9), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=8)
        axes.vlines(np.zeros(len(rows)), places - 0.25, places + 0.12, color="grey", linewidth=1)
        axes.set(yticks=[], ylim=(-0.5, len(rows) - 0.2), xlabel=f"difference in {BITS}: left of 0 is better")
        axes.spines[["left", "right", "top"]].set_visible(False)
        return inline(figure, "differences", "differences with their intervals")


@contextmanager
def drawing(size: tuple[float, float]):
    """A figure that is gone afterwards, and would be shown by no notebook."""
    import matplotlib.pyplot as plt

    with plt.rc_context(PLOT_STYLE):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def inline(figure, name: str, label: str) -> Markup:
    """A figure as SVG to stand in a page, in the colors of the page; its ids are its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
