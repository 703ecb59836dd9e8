"""A comparison as one self-contained HTML page: verdicts, curves, losses by position and word class, stories, configs.

    python -m evaluation compare A B --html report.html

The page loads nothing from elsewhere, follows the reader's light or dark mode and fits a phone. Its layout is page.jinja.
"""

import io
import math
import os
import platform
import re
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import fields
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup
from tqdm import tqdm

from data.cache import in_notebook
from evaluation.alignment import format_field
from evaluation.comparison import Candidate, Comparison, Member, format_p
from evaluation.curves import AXES, plot_curves
from evaluation.diff import diff
from evaluation.statistics import BITS
from inference import generate, load_model
from metrics.measures import calibration, distinct, loss_by_position, loss_by_word_class, repetition, token_scores
from metrics.plots import STYLE, alt_text
from metrics.scores import count_bytes
from metrics.story_losses import NOT_ITS_OWN, label, validation_stories
from pages import render
from runs.command_line import command as training_command
from runs.folder import Run
from runs.tables import marked
from training.machine import cpu_name
from training.report import PROMPTS, samples

NUM_STORIES = 200  # scored by position and word class
NUM_SAMPLES = 10  # unprompted stories per seed, to measure repetition
INK = "#0a0b0c"  # color of plots, replaced by the text color of the page
PLOT_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), "none"),
    "svg.fonttype": "none", "svg.hashsalt": "comparison",
}


def write_page(comparison: Comparison, path: str | Path, **options):
    """Write a comparison as a self-contained HTML page, replacing any file at that path.

    Parameters
    ----------
    comparison : Comparison
        The result of `compare`.
    path : str or Path
        The file.
    prompts : tuple of str, optional
        What the sample stories start with.
    seed : int, default 0
        Of the sample stories.
    num_stories : int, default 200
        Validation stories to score by position and word class.
    data_if_missing : str, optional
        Data to score instead if those of a run are not available; without it the page says that it was not measured.
    measured : list, optional
        The result of `where_the_loss_is`, if it was called before.
    command : str, optional
        The command that makes the page, to be shown on it.

    Raises
    ------
    ValueError
        If all runs diverged.
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> write_page(compare("base", "my_idea"), "report.html", prompts=("Once upon a time",))  # doctest: +SKIP
    """
    Path(path).write_text(as_page(comparison, **options), encoding="utf-8")


def as_page(
    comparison: Comparison, *, prompts: tuple[str, ...] = PROMPTS, seed: int = 0, num_stories: int = NUM_STORIES,
    data_if_missing: str | None = None, measured: list | None = None, command: str | None = None,
) -> str:  # fmt: skip
    """Render the page that `write_page` writes."""
    groups = comparison.groups
    if not groups:
        raise ValueError("all runs diverged: there is nothing to report")
    names, notes = [group.name for group in groups], list(comparison.notes)
    if single := [group.name for group in groups if len(group.members) == 1]:
        notes.append(f"one seed only: {', '.join(single)}. How much another seed would change is not known")
    if measured is None:
        measured = where_the_loss_is(groups, num_stories, data_if_missing, notes)
    first, *others = (group.members[0] for group in groups)
    return render(
        "evaluation/page.jinja",
        title=" and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:]),
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        verdicts=comparison.verdicts,
        notes=[without_folders(note) for note in notes],
        names=names,
        summary=html_table(comparison.candidates),
        differences=html_table(comparison.differences),
        comparisons=len(comparison.differences),
        intervals=plot_differences(comparison),
        curves=[(label, plot_by(groups, by)) for by, label in AXES.items()],
        loss_tables=[(heading, explanation, html_table(frame)) for heading, explanation, frame in measured],
        num_stories=num_stories,
        stories=samples(*(group.members[0].name for group in groups), prompts=prompts, seed=seed).iterrows(),
        seed=seed,
        settings=[("Architecture", changed_settings(names, [Run(group.members[0].name).model_config for group in groups])),
                  ("Training", changed_settings(names, [group.members[0].config for group in groups]))],
        architectures=[(f"{names[0]} and {name}, part by part", Markup(diff(first.name, other.name)._repr_html_()))
                       for name, other in zip(names[1:], others, strict=True) if other.architecture != first.architecture],
        runs=[(without_folders(training_command(Run(members[0].name).model_config, members[0].config)), runs_table(group))
              for group in groups for members in [group.members]],
        scored={"data": first.scored.data, "stories": len(first.losses), "bytes": first.losses["bytes"].sum()},
        over=set(comparison.differences.get("over", [])),
        at=comparison.at,
        command=without_folders(command or ""),
        machine=f"{platform.platform()}, {cpu_name().rpartition(':')[2].strip()}, {os.cpu_count()} cores; "
                f"Python {platform.python_version()}, "
                + ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy", "scipy", "pandas")),
    )  # fmt: skip


def without_folders(text: str) -> str:
    """Reduce paths to their last name, as pages are mailed.

    >>> without_folders("--data /home/me/stories.txt at 900 tokens/s, or ../of_mine/stories.txt")
    '--data stories.txt at 900 tokens/s, or stories.txt'
    """
    return re.sub(r"(?<![\w.:/\\])(?:[A-Za-z]:|~|\.\.?)?[/\\](?:[^\s/\\'\"]+[/\\])+", "", text)


def html_table(frame: pd.DataFrame, kind: str = "numbers") -> Markup:
    """A DataFrame as HTML, with its texts escaped; kind is the CSS class, "numbers" or "text"."""
    formatters = dict.fromkeys(("difference", "95% from", "to"), lambda value: "–" if math.isnan(value) else f"{value:+.4f}")
    formatters |= dict.fromkeys(("p", "p (corrected)"), format_p)
    with pd.option_context("display.max_colwidth", None):
        return Markup(frame.to_html(border=0, classes=kind, float_format="{:.4f}".format, formatters=formatters, na_rep="–"))


def where_the_loss_is(
    groups: list[Candidate], num_stories: int, data_if_missing: str | None, notes: list[str]
) -> list[tuple[str, str, pd.DataFrame]]:
    """Measure the loss by position and by word class, calibration and repetition, as means over the seeds.

    Parameters
    ----------
    groups : list of Candidate
        The groups of a Comparison.
    num_stories : int
        Validation stories to score.
    data_if_missing : str or None
        Data to score instead if those of a run are not available.
    notes : list of str
        Is extended by what could not be measured.

    Returns
    -------
    list of (str, str, DataFrame)
        Title, explanation and table of each section; empty if the data of no run are available.

    Examples
    --------
    >>> sections = where_the_loss_is(result.groups, 200, "auto", result.notes)  # doctest: +SKIP
    """
    stories_of, available = {}, []
    for group in groups:
        run = Run(group.members[0].name)
        data = run.data, data_if_missing, run.model_config.plugins
        try:
            if data not in stories_of:
                stories_of[data] = validation_stories(*data)
        except OSError as error:
            notes.append(f"the loss of {group.name} by position and kind of word was not measured: {error}")
            continue
        if group.members[0].losses["top1"].isna().any():
            notes.append(f"the loss of {group.name} by position and kind of word was not measured: it gives no probabilities of "
                         "the next token")  # fmt: skip
            continue
        source, stories = stories_of[data]
        if (source := label(Run(group.members[0].name), source, stories)).endswith(NOT_ITS_OWN):
            notes.append(f"the loss of {group.name} by position and kind of word is measured on {source}")
        available += [(group.name, member, stories[:num_stories]) for member in group.members]
    if not available:
        return []
    output = sys.stdout if in_notebook() else sys.stderr
    measured = defaultdict(list)
    for name, member, stories in tqdm(available, "where the loss is", unit="run", file=output):
        measured[name].append(measures_of(member, stories))
    by_position, by_class, manner = (
        {name: pd.concat([run[kind] for run in runs], axis=1).mean(axis=1) for name, runs in measured.items()}
        for kind in range(3)
    )
    if len({group.members[0].scored.tokenizer for group in groups}) > 1:
        notes.append("losses by position are in nats per token, which do not compare between tokenizers")
    positions = pd.DataFrame(by_position)
    positions = positions.loc[sorted(positions.index, key=lambda octave: int(octave.split()[0]))]
    classes = pd.DataFrame(by_class).fillna(0.0)  # a class without words adds nothing
    classes = classes.sort_values(classes.columns[0], ascending=False)
    classes.loc["all"] = classes.sum()
    return [
        ("By position", "Nats per token, by the position of the token in its story.", positions),
        ("By kind of word", f"What each kind adds to the {BITS} of these stories.", classes),
        ("Calibration and repetition", "The calibration error is 0 if 70% of the tokens with a probability of 70% are right. "
         f"Repetition is measured on {NUM_SAMPLES} unprompted stories per seed: the share of 4-word groups that occurred "
         "before in the same story, and distinct groups of 1, 2 and 3 words as a share of all.", pd.DataFrame(manner)),
    ]  # fmt: skip


def measures_of(member: Member, stories: list[str]) -> tuple[pd.Series, pd.Series, pd.Series]:
    """Measure a run: its loss by position, its bits per byte by word class, its calibration and repetition."""
    model, tokenizer = load_model(member.name)
    scores = token_scores(model, tokenizer, stories)
    classes = loss_by_word_class(scores, tokenizer, stories)
    num_bytes = sum(count_bytes(tokenizer, stories, tokenizer.encode_batch(stories)))
    bits = classes["loss"] * classes["tokens"] / num_bytes / math.log(2)
    samples = generate(model, tokenizer, [""] * NUM_SAMPLES)
    manner = {"calibration error": calibration(scores)[0], "4 words repeated": repetition(samples)}
    manner |= {f"distinct-{n}": distinct(samples, n) for n in (1, 2, 3)}
    return loss_by_position(scores)["loss"], bits, pd.Series(manner)


def changed_settings(names: list[str], configs: list) -> Markup | None:
    """The fields in which the configs differ, apart from seeds; None if they do not."""
    rows = {field.name: [without_folders(format_field(config, field.name)) for config in configs] for field in fields(configs[0])}
    rows = {name: row for name, row in rows.items() if len(set(row)) > 1 and name not in ("seed", "data_seed")}
    return html_table(pd.DataFrame.from_dict(rows, orient="index", columns=names), "text") if rows else None


def runs_table(group: Candidate) -> Markup:
    rows = {}
    for member, bits in zip(group.members, group.values, strict=True):
        last = member.log.iloc[-1]
        rows[member.name] = {
            "seed": member.config.seed, BITS: marked(bits, member.scored.is_bound), "steps": f"{last['step']:,.0f}",
            "minutes": f"{last['seconds'] / 60:.1f}",
            "tokens/s": f"{member.log['tokens_per_second'].median():,.0f}", "threads": member.config.threads,
        }  # fmt: skip
    return html_table(pd.DataFrame.from_dict(rows, orient="index"))


def plot_by(groups: list[Candidate], by: str) -> Markup:
    members = {group.name: tuple(member.name for member in group.members) for group in groups}
    with new_axes((5, 3.4)) as axes:
        plot_curves(*members, by=by, axes=axes, members=members)
        return inline_svg(axes.figure, by, f"{alt_text(axes.figure)}; a band is the 95% interval of the mean over seeds")


def plot_differences(comparison: Comparison) -> Markup:
    """Plot each difference with its 95% interval."""
    rows = comparison.differences
    if rows.empty:
        return Markup("")
    with new_axes((5, 0.8 + 0.5 * len(rows))) as axes:
        heights = np.arange(len(rows))[::-1]
        axes.errorbar(rows["difference"], heights, xerr=(rows["to"] - rows["95% from"]) / 2, fmt="o", capsize=3)
        for height, name in zip(heights, rows.index, strict=True):
            axes.annotate(name, (0, height), (4, 9), xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=8)
        axes.vlines(np.zeros(len(rows)), heights - 0.25, heights + 0.12, color="grey", linewidth=1)
        axes.set(yticks=[], ylim=(-0.5, len(rows) - 0.2), xlabel=f"difference in {BITS}: left of 0 is better")
        axes.spines[["left", "right", "top"]].set_visible(False)
        return inline_svg(axes.figure, "differences", "differences with their intervals")


@contextmanager
def new_axes(size: tuple[float, float]):
    """Matplotlib axes in the style of the page; the figure is closed afterwards."""
    import matplotlib.pyplot as plt

    with plt.style.context([STYLE, PLOT_STYLE]):
        figure, axes = plt.subplots(figsize=size)
        try:
            yield axes
        finally:
            plt.close(figure)


def inline_svg(figure, name: str, label: str) -> Markup:
    """A figure as SVG in the text color of the page; name makes its ids unique there."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue().replace(INK, "currentColor")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
