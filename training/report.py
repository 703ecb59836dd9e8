"""Reports of runs: loss curves, tables, samples, and the README.md of a run folder."""

import io
import math
from dataclasses import replace

from tqdm import tqdm

from config import TrainConfig
from data.sources import portable_name
from inference import generate, load_model
from metrics.cost import cost_of, model_cost, num_parameters
from metrics.plots import add_legend, in_style, line_colour
from metrics.scores import evaluate
from metrics.story_losses import data_of, label, read_losses, save_losses, validation_stories
from metrics.world_floor import Floor, floor_of, world_floor
from metrics.world_grades import is_world
from metrics.world_report import draw_floors, lines_of_the_world, plot_grades
from runs.command_line import command
from runs.folder import Run
from runs.tables import BOUND, at_most, marked
from training.checkpoint import LOSS
from training.stories import Stories

PROMPTS = ("Once upon a time", "One day, Lily", "Tim was")
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds", "flops": "training FLOPs"}


@in_style
def plot_losses(*names: str, by: str = "step", axes=None):
    """Plot training loss (thin) and validation loss (thick) of runs, in nats per token.

    Losses only compare between runs with the same data and tokenizer; the title warns of different data. On storyworld a dashed
    line shows the exact entropy, the lowest loss that a model can reach. The y range leaves out the steep start.

    Parameters
    ----------
    *names : str
        Runs in trained_models/.
    by : {"step", "tokens", "seconds", "flops"}, default "step"
        The x axis.
    axes : matplotlib.axes.Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    ValueError
        For an unknown `by`.
    FileNotFoundError
        For a run that does not exist.

    Examples
    --------
    >>> axes = plot_losses("my_run", "another", by="tokens")  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    if by not in AXES:
        raise ValueError(f"by={by!r}: it must be one of {', '.join(AXES)}")
    axes = axes or plt.subplots()[1]
    validation_sets, logs = set(), {}
    for name in names:
        saved = Run(name).load("model.pth", {"data", "validation_fingerprint"})
        validation_sets.add(saved["validation_fingerprint"])
        logs[f"{BOUND * Run(name).is_bound}{name} on {saved['data']}"] = log_with_flops(name)
    draw_losses(axes, logs, by, [world_floor(name) for name in names])
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    warning = ". Different data: do not compare!" if len(validation_sets) > 1 else ""
    axes.set_title(f"training (thin) and validation (thick){warning}")
    return axes


def draw_losses(axes, logs: dict, by: str, floors: list[Floor | None]):
    """Draw the losses of logs, which are DataFrames by title, and the entropies of their worlds."""
    import pandas as pd

    for number, (title, log) in enumerate(logs.items()):
        scored = log.dropna(subset="validation_loss")
        colour = line_colour(number)
        axes.plot(log[by], log["train_loss"], color=colour, linewidth=0.6, alpha=0.6)
        axes.plot(scored[by], scored["validation_loss"], color=colour, marker=".", label=title)
    draw_floors(axes, floors)
    axes.set(xlabel=AXES[by], ylabel="loss (nats per token)")
    # clip the steep start, which is higher than all that follows the first tenth of a run
    late = pd.concat(log.loc[log[by] >= 0.1 * log[by].max(), ["train_loss", "validation_loss"]] for log in logs.values())
    lowest = min([late.min().min(), *(floor.nats_per_token for floor in floors if floor is not None)])
    room = 0.05 * (late.max().max() - lowest) or 0.05
    if len(late):  # no row was logged yet
        axes.set_ylim(lowest - room, late.max().max() + room)
    add_legend(axes)


def log_with_flops(name: str):
    """Read log_data.csv as a pandas DataFrame; for old runs compute the column flops from their tokens."""
    log = Run(name).log()
    if "flops" not in log or log["flops"].isna().any():
        log["flops"] = log["tokens"] * cost_of(name).training_flops
    return log


def table(
    *names: str, top_k: tuple[int, ...] = (1, 5, 10), num_stories: int | None = None, data_if_missing: str | None = None
):
    """Tabulate size, cost and validation scores of runs.

    Parameters
    ----------
    *names : str
        Runs in trained_models/.
    top_k : tuple of int, default (1, 5, 10)
        Also report how often the true next token is among the k most likely.
    num_stories : int, optional
        Score only this many validation stories of each run's data; all by default.
    data_if_missing : str, optional
        Data to score a run on if its own are not available; this is printed, and marked in the column data.

    Returns
    -------
    pandas.DataFrame
        A row per run: data, parameters, FLOPs, minutes, loss, bits per byte, top-k accuracy; for storyworld also the exact
        entropy of the stories and the excess over it, in bits per byte.

    Raises
    ------
    OSError
        If a run does not exist, or its data are not available and data_if_missing is None.

    Examples
    --------
    >>> table("my_run", "another", num_stories=100)[["parameters", "bits per byte"]]  # doctest: +SKIP
    """
    import pandas as pd

    rows, validation = {}, {}
    for name in names:
        model, tokenizer = load_model(name)
        log = log_with_flops(name)
        source = Run(name).data, data_if_missing, model.config.plugins
        if source not in validation:
            validation[source] = validation_stories(*source)
        data, stories = validation[source]
        data = label(Run(name), data, stories)
        score = evaluate(model, tokenizer, stories[:num_stories], top_k=top_k)
        rows[name] = {
            "data": data,
            "stories": len(score.story_nats),
            "parameters": num_parameters(model),
            "without embeddings": num_parameters(model, embeddings=False),
            "FLOPs per token": model_cost(model).flops,
            "training FLOPs": log["flops"].max(),
            "minutes": log["seconds"].max() / 60,
            "loss": marked(score.loss, score.is_bound),
            "bits per byte": marked(score.bits_per_byte, score.is_bound),
            **{f"top-{k}": share for k, share in score.top_k.items()},
        }
        if is_world(data) and (floor := floor_of(stories[:num_stories], tokenizer, data)):
            excess = marked(score.bits_per_byte - floor.bits_per_byte, score.is_bound)
            rows[name] |= {"entropy": floor.bits_per_byte, "excess": excess}
    return pd.DataFrame.from_dict(rows, orient="index")


def samples(*names: str, prompts: tuple[str, ...] = PROMPTS, seed: int = 0):
    """Generate a story with each run from each prompt.

    Parameters
    ----------
    *names : str
        Runs in trained_models/.
    prompts : tuple of str, default PROMPTS
        Beginnings of stories.
    seed : int, default 0
        Seed of the random draws.

    Returns
    -------
    pandas.DataFrame
        A column per run, a row per prompt.

    Raises
    ------
    FileNotFoundError
        For a run that does not exist.

    Examples
    --------
    >>> samples("my_run", prompts=("Once upon a time",)).loc["Once upon a time", "my_run"]  # doctest: +SKIP
    """
    import pandas as pd

    stories = {}
    for name in names:
        model, tokenizer = load_model(name)
        stories[name] = generate(model, tokenizer, list(prompts), seed=seed)
    return pd.DataFrame(stories, index=list(prompts))


def write_report(name: str) -> Stories:
    """Write README.md, loss.png and the losses by story into the folder of a run.

    Parameters
    ----------
    name : str
        The run.

    Returns
    -------
    Stories
        The three samples in the README.

    Raises
    ------
    ValueError
        If the run was stopped before its first evaluation.
    FileNotFoundError
        If the run does not exist.

    Examples
    --------
    >>> print(write_report("my_run"))  # doctest: +SKIP
    """
    import matplotlib.pyplot as plt

    run = Run(name)
    if run.log()["validation_loss"].isna().all():
        raise ValueError(f"the run {name!r} was stopped before it was evaluated: go on with it by resume, and report then")
    save_losses(name)
    model, tokenizer = load_model(name)
    samples = generate(model, tokenizer, [""] * 3)  # an empty prompt suits any data
    stories = Stories({f"Story {number}": story for number, story in enumerate(samples, start=1)})
    axes = plot_losses(name)
    run.save_figure("loss.png", axes.figure)
    plt.close(axes.figure)  # otherwise a notebook shows it
    log, config = run.log(), run.train_config
    last, best = log.iloc[-1], log.loc[log["validation_loss"].idxmin()]
    saved = run.load("model.pth", {"validation_stories", "continued_from"})
    losses, scored = read_losses(name)
    nats, bound = losses["nats"].sum(), BOUND * scored.is_bound
    loss = nats / losses["tokens"].sum()
    numbers = [
        f"- {num_parameters(model):,} parameters, {num_parameters(model, embeddings=False):,} without embeddings",
        f"- trained on {data_of(losses, scored)} with {config.tokenizer}: {int(last.step):,} steps, {int(last.tokens):,} tokens, "
        f"{time_spent(run)}",
        f"- {bound}{nats / math.log(2) / losses['bytes'].sum():.4f} bits per byte, loss {bound}{loss:.4f} nats per token, "
        f"perplexity {bound}{math.exp(loss):.2f}, on all {len(losses):,} validation stories",
        f"- best at step {int(best.step):,}: {bound}{best.bits_per_byte:.4f} bits per byte, loss "
        f"{bound}{best.validation_loss:.4f} nats per token, perplexity {bound}{best.perplexity:.2f}, on the first "
        f"{saved['validation_stories']} of them",
    ]
    if scored.is_bound:
        numbers.append(f"- {bound.strip()} marks upper bounds: the model may be better, but gives no exact losses")
    if scored.audit is not None:
        numbers.append(f"- {describe_audit(scored.audit)}")
    if other := {name.removeprefix(LOSS): last[name] for name in log if name.startswith(LOSS)}:
        numbers.append(f"- other losses in the last row of the log: {', '.join(f'{n} {v:.4g}' for n, v in other.items())}")
    numbers += [f"- {line}" for line in lines_of_the_world(name)]
    if dead := dead_experts(name):
        numbers.append(f"- {dead}")
    pictures = "![loss curve](loss.png)"
    if config.grade_stories:
        run.save_figure("grades.png", plot_grades(name))
        pictures += "\n\n![samples that the world accepts, by loss](grades.png)"
    values = {"name": name, "numbers": "\n".join(numbers), "pictures": pictures, "stories": stories.as_markdown()}
    if strip := film_strip(name).as_markdown():
        values["stories"] += f"\n\nWhat it wrote while it learned, from the most likely tokens:\n\n{strip}"
    portable = replace(config, data=portable_name(config.data))
    values["command"] = command(run.model_config, portable, continued_from=saved["continued_from"])
    run.save_text("README.md", README.format(**values))
    return stories


def describe_audit(problems: list[str]) -> str:
    """One line on the audit of a model or tokenizer of a plugin."""
    return f"the audit failed: {'; '.join(problems)}" if problems else "the audit of its scores found no problem"


def film_strip(name: str) -> Stories:
    """Stories that a run wrote while it learned, at up to five evaluations; more of them early, when it learns fast."""
    import numpy as np
    import pandas as pd

    if not (Run(name).folder / "samples.csv").exists():  # an old run
        return Stories({})
    samples = pd.read_csv(io.BytesIO(Run(name).read("samples.csv")), keep_default_na=False)
    moments = np.unique(np.geomspace(1, len(samples), min(5, len(samples))).round().astype(int)) - 1
    is_bound = Run(name).is_bound
    headings = [f"Step {row.step:,}: {at_most(row.bits_per_byte, is_bound, '.3f')} bits per byte" for row in samples.itertuples()]
    return Stories({headings[moment]: samples["story"][moment] for moment in moments}, longest=300)


def time_left(record, config: TrainConfig) -> str:
    """How long training goes on after a Record, as 04:10."""
    done = min(1.0, config.progress(record.step, record.seconds))
    return tqdm.format_interval(record.seconds * (1 - done) / done)


def time_spent(run: Run) -> str:
    """What a run spent its time on, from its log."""
    last = run.log().iloc[-1]
    if run.seconds_include_overhead():
        return f"{last.seconds / 60:.1f} minutes, compiling and evaluating included"
    training, overhead = last.seconds / 60, last.overhead_seconds / 60
    return f"{training:.1f} minutes of training, {overhead:.1f} minutes of preparing, compiling, evaluating, saving and drawing"


def dead_experts(name: str) -> str | None:
    """One line on experts that received no tokens at the end of a run; None if there are none."""
    import pandas as pd

    if not (Run(name).folder / "blocks.csv").exists():
        return None
    reports = pd.read_csv(io.BytesIO(Run(name).read("blocks.csv")))
    last = reports[(reports["step"] == reports["step"].max()) & (reports["name"] == "dead_experts") & (reports["value"] > 0)]
    if last.empty:
        return None
    counts = ", ".join(f"{int(number)} in {path}" for path, number in zip(last["block"], last["value"], strict=True))
    return f"dead experts, which no token chose since the evaluation before: {counts}. A higher balance_loss or bias_rate helps"


README = """# {name}

{numbers}

{pictures}

Three samples, at temperature 0.8:

{stories}

Train it again: `{command}`. Let it write: `python inference.py {name} "Once upon a time"`.
"""
