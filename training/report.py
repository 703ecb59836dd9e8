"""What is shown of a run and what is written about it: curves, tables, samples, the README.md in its folder."""

import time

from inference import generate, load_model
from metrics.cost import cost_of, model_cost, num_parameters
from metrics.scores import evaluate
from metrics.story_losses import keep_losses, validation_stories
from metrics.world_floor import floor_of, world_floor
from metrics.world_grades import is_world
from metrics.world_report import draw_floors, lines_of_the_world, plot_grades
from runs.command_line import command
from runs.folder import Run

PROMPTS = ("Once upon a time", "One day, Lily", "Tim was")
AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds", "flops": "training FLOPs"}
SCORES = {"loss": "validation_loss", "bits per byte": "bits_per_byte"}


def plot_losses(*names: str, by: str = "step", axes=None):
    """Training loss (thin) and validation loss (thick) of runs, in nats per token, by step, tokens, seconds or flops.

    On storyworld a dashed line is its exact entropy, which no model can pass for long.
    Returns the matplotlib axes. The legend names the data, and the title says so where they differ, as losses do not compare
    then; runs of other tokenizers are better compared in bits per byte.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    check_axis(by)
    axes = axes or plt.subplots(figsize=(8, 4), layout="constrained")[1]
    scored_on = set()
    for number, name in enumerate(names):
        saved, log = Run(name).load("model.pth", {"data", "validation_fingerprint"}), log_with_flops(name)
        scored_on.add(saved["validation_fingerprint"])
        measured = log.dropna(subset="validation_loss")
        axes.plot(log[by], log["train_loss"], color=f"C{number}", linewidth=0.6, alpha=0.6)
        axes.plot(measured[by], measured["validation_loss"], color=f"C{number}", marker=".", label=f"{name} on {saved['data']}")
    draw_floors(axes, map(world_floor, names))
    warning = ". Different data: do not compare!" if len(scored_on) > 1 else ""
    axes.set(xlabel=AXES[by], ylabel="loss (nats per token)", title=f"training (thin) and validation (thick){warning}")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend()
    return axes


def check_axis(by: str):
    if by not in AXES:
        raise ValueError(f"by={by!r}: it must be one of {', '.join(AXES)}")


def log_with_flops(name: str):
    """log_data.csv as a pandas DataFrame. Where a run is older than the column flops, it is worked out from its tokens."""
    log = Run(name).log()
    if "flops" not in log or log["flops"].isna().any():
        log["flops"] = log["tokens"] * cost_of(name).training_flops
    return log


def at_equal(*names: str, by: str = "flops", budget: float | None = None):
    """A pandas DataFrame with a row for each run: its validation scores when it had spent as much as the others.

    The budget is in steps, tokens, seconds or flops; by default it is what the shortest run has spent. A score between two
    evaluations is on the line between them, and NaN where a run has none on both sides. Runs on different data do not compare.
    """
    import numpy as np
    import pandas as pd

    check_axis(by)
    logs = {name: log_with_flops(name).dropna(subset="validation_loss") for name in names}
    for name, log in logs.items():
        if log.empty:
            raise ValueError(f"the run {name!r} was stopped before it was evaluated: go on with it by resume, and compare then")
    budget = min(log[by].max() for log in logs.values()) if budget is None else budget
    rows = {}
    for name, log in logs.items():
        rows[name] = {
            "data": Run(name).load("model.pth", {"data"})["data"],
            "parameters": cost_of(name).parameters,
            AXES[by]: budget,
            **{label: np.interp(budget, log[by], log[score], left=np.nan, right=np.nan) for label, score in SCORES.items()},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


class LivePlot:
    """The losses of a run while it trains, for a notebook: `plot.add(record)` after every step draws now and then."""

    def __init__(self, name: str, seconds_between: float = 2.0):
        import matplotlib.pyplot as plt
        from IPython.display import display

        self.name, self.seconds_between, self.drawn_at, self.records = name, seconds_between, 0.0, []
        self.figure, self.axes = plt.subplots(figsize=(8, 4), layout="constrained")
        plt.close(self.figure)  # or the notebook would show it a second time
        self.display = display(self.figure, display_id=True)

    def add(self, record):
        if not self.records:
            self.data, self.floor = Run(self.name).load("model.pth", {"data"})["data"], world_floor(self.name)
        self.records.append(record)
        if time.monotonic() - self.drawn_at > self.seconds_between or record.validation_loss is not None:
            self.drawn_at = time.monotonic()
            self.draw()

    def draw(self):
        measured = [record for record in self.records if record.validation_loss is not None]
        self.axes.clear()
        self.axes.plot([r.step for r in self.records], [r.train_loss for r in self.records], linewidth=0.6, label="training")
        self.axes.plot([r.step for r in measured], [r.validation_loss for r in measured], marker=".", label="validation")
        draw_floors(self.axes, [self.floor])
        last = self.records[-1]
        self.axes.set(xlabel="steps", ylabel="loss (nats per token)")
        pace = f"{last.tokens_per_second:,.0f} tokens/s"
        self.axes.set_title(f"{self.data}: {last.seconds:.0f} s, {pace}, learning rate {last.learning_rate:.2g}")
        self.axes.grid(alpha=0.3)
        self.axes.legend()
        self.display.update(self.figure)


def table(
    *names: str, top_k: tuple[int, ...] = (1, 5, 10), num_stories: int | None = None, data_if_missing: str | None = None
):
    """A pandas DataFrame with a row for each run: data, parameters, FLOPs, minutes, bits per byte and top-k accuracy.

    Where runs were trained on storyworld, also the excess of their bits per byte over the exact entropy of these stories.

    Every model is scored on the whole validation set of the data it was trained on, or on its first num_stories. Top-k
    accuracy is the share of tokens that were among the k most likely, given the true text before them. Where a run's data
    are not here it is scored on data_if_missing, which is printed and stands in its row; without that OSError is raised.
    """
    import pandas as pd

    rows, found = {}, {}
    for name in names:
        model, tokenizer = load_model(name)
        log = log_with_flops(name)
        wanted = Run(name).train_config.data
        if wanted not in found:
            found[wanted] = validation_stories(wanted, data_if_missing)
        data, stories = found[wanted]
        score = evaluate(model, tokenizer, stories[:num_stories], top_k=top_k)
        rows[name] = {
            "data": data,
            "stories": len(score.story_nats),
            "parameters": num_parameters(model),
            "without embeddings": num_parameters(model, embeddings=False),
            "FLOPs per token": model_cost(model).flops,
            "training FLOPs": log["flops"].max(),
            "minutes": log["seconds"].max() / 60,
            "loss": score.loss,
            "bits per byte": score.bits_per_byte,
            **{f"top-{k}": share for k, share in score.top_k.items()},
        }
        if is_world(data) and (floor := floor_of(stories[:num_stories], tokenizer)):
            rows[name] |= {"entropy": floor.bits_per_byte, "excess": score.bits_per_byte - floor.bits_per_byte}
    return pd.DataFrame.from_dict(rows, orient="index")


def samples(*names: str, prompts: tuple[str, ...] = PROMPTS, seed: int = 0):
    """A pandas DataFrame with a column for each run and a row for each prompt: what the model makes of it."""
    import pandas as pd

    stories = {}
    for name in names:
        model, tokenizer = load_model(name)
        stories[name] = generate(model, tokenizer, list(prompts), seed=seed)
    return pd.DataFrame(stories, index=list(prompts))


def wrapped(frame):
    """A DataFrame of texts for a notebook: whole, wrapped, from the left and from the top."""
    text = {"text-align": "left", "vertical-align": "top", "white-space": "pre-wrap", "max-width": "40em"}
    headings = [{"selector": "th", "props": list((text | {"max-width": "10em"}).items())}]
    return frame.style.set_properties(**text).set_table_styles(headings).set_uuid("wrapped")


def write_report(name: str) -> list[str]:
    """Write README.md, loss.png and the losses by story into a run's folder, and return the three stories that the README shows.

    Raises ValueError for a run that was stopped before its validation stories were scored for the first time.
    """
    import matplotlib.pyplot as plt

    run = Run(name)
    if run.log()["validation_loss"].isna().all():
        raise ValueError(f"the run {name!r} was stopped before it was evaluated: go on with it by resume, and report then")
    keep_losses(name)
    model, tokenizer = load_model(name)
    stories = generate(model, tokenizer, [""] * 3)  # from their first word, as whatever data it was begins
    axes = plot_losses(name)
    run.save_figure("loss.png", axes.figure)
    plt.close(axes.figure)  # or a notebook would show it
    log, config = run.log(), run.train_config
    last, best = log.iloc[-1], log.loc[log["validation_loss"].idxmin()]
    saved = run.load("model.pth", {"data", "validation_stories", "continued_from"})
    numbers = [
        f"- {num_parameters(model):,} parameters, {num_parameters(model, embeddings=False):,} without embeddings",
        f"- trained on {saved['data']} with {config.tokenizer}: {int(last.step):,} steps, {int(last.tokens):,} tokens, "
        f"{last.seconds / 60:.1f} minutes",
        f"- best at step {int(best.step):,}: {best.bits_per_byte:.4f} bits per byte, loss {best.validation_loss:.4f} nats per "
        f"token, perplexity {best.perplexity:.2f}, on {saved['validation_stories']} validation stories",
    ]
    numbers += [f"- {line}" for line in lines_of_the_world(name)]
    if dead := dead_experts(name):
        numbers.append(f"- {dead}")
    pictures = "![loss curve](loss.png)"
    if config.grade_stories:
        run.save_figure("grades.png", plot_grades(name))
        pictures += "\n\n![samples that the world accepts, by loss](grades.png)"
    told = "\n\n".join("> " + story.replace("\n", "\n>\n> ") for story in stories)
    again = command(run.model_config, config, continued_from=saved["continued_from"])
    filled = {"name": name, "numbers": "\n".join(numbers), "pictures": pictures, "stories": told, "command": again}
    run.save_text("README.md", README.format(**filled))
    return stories


def dead_experts(name: str) -> str | None:
    """One line on the experts of a run that were not used any more in the end; None where there are none."""
    import pandas as pd

    if not (Run(name).folder / "blocks.csv").exists():
        return None
    reports = pd.read_csv(Run(name).path("blocks.csv"))
    last = reports[(reports["step"] == reports["step"].max()) & (reports["name"] == "dead_experts") & (reports["value"] > 0)]
    if last.empty:
        return None
    places = ", ".join(f"{int(number)} in {place}" for place, number in zip(last["block"], last["value"], strict=True))
    return f"dead experts, which no token chose since the evaluation before: {places}. A higher balance_loss or bias_rate helps"


README = """# {name}

{numbers}

{pictures}

Three samples, at temperature 0.8:

{stories}

Train it again: `{command}`. Let it write: `python inference.py {name} "Once upon a time"`.
"""
