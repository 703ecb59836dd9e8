"""What train.ipynb shows: the presets, and a live plot of runs in training."""

import re
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields

from config import ModelConfig, layer_steps
from data.cache import in_notebook_words
from metrics.cost import num_parameters
from metrics.plots import in_style, show_figure
from metrics.world_floor import world_floor
from modules.registry import build_model
from runs.folder import Run, run_names
from runs.presets import PRESETS
from runs.tables import at_most
from runs.terminal import FAILURES
from tokenizer import load_tokenizer
from training.checkpoint import Record
from training.report import draw_losses, time_left
from training.stories import Stories

ORDINARY = {  # fields of ModelConfig that make nothing special
    "dim", "num_layers", "layers", "mlp_dim", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "norm_eps", "plugins",
}  # fmt: skip


class NotebookError(Exception):
    """An error that a notebook shows as one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # which IPython calls
        return [f"error: {in_notebook_words(str(self))}"]


class LivePlot:
    """Plot the losses of runs in a notebook while they train, and the latest story under it.

    Parameters
    ----------
    seconds_between : float, default 5.0
        Minimum time between two updates of the plot.

    Examples
    --------
    >>> last = LivePlot().follow("my_run", train(model_config, train_config, "my_run"))  # doctest: +SKIP
    """

    def __init__(self, seconds_between: float = 5.0):
        self.seconds_between, self.drawn_at = seconds_between, 0.0
        self.logs: dict[str, list[dict]] = {}  # of each run, by label
        self.floors, self.story, self.displayed = [], None, set()

    def follow(self, name: str, records: Iterator[Record], label: str | None = None) -> Record:
        """Train a run to its end, or until the kernel is interrupted, and plot it.

        Parameters
        ----------
        name : str
            The run.
        records : iterator of Record
            What `train` returns for it.
        label : str, optional
            What to call the run in the plot; by default its name.

        Returns
        -------
        Record
            The last one.

        Raises
        ------
        NotebookError
            For the errors of `train`, and if it is interrupted before the first step.
        """
        self.name, self.label, record = name, label or name, None
        print(f"{self.label}: reading the stories and measuring this machine …")
        try:
            with closing(records):  # saves, if an error comes from here
                for record in records:
                    self.add(record)
        except FAILURES as error:
            raise NotebookError(error) from error
        except KeyboardInterrupt:  # before the first step, or for a second time
            record = None
        if record is None:
            raise NotebookError("stopped. What has been saved goes on with resume = True")
        self.draw(record)
        if Run(name).train_config.progress(record.step, record.seconds) < 1:
            print(f"stopped after step {record.step:,} and saved; run the cell with resume = True to go on")
        return record

    def add(self, record: Record):
        """Add the Record of a step, and draw if the last time was some seconds ago."""
        if self.label not in self.logs:
            log = Run(self.name).log()  # the steps before this one, if the run is resumed
            self.logs[self.label] = log[log["step"] < record.step].to_dict("records")
            self.floors.append(world_floor(self.name))
            self.data, self.drawn_at = Run(self.name).load("model.pth", {"data"})["data"], time.monotonic()
        self.logs[self.label].append(vars(record))
        if record.story is not None:
            self.story = Stories({f"{self.label} after {record.step:,} steps": record.story})
        if time.monotonic() - self.drawn_at > self.seconds_between:
            self.draw(record)

    @in_style
    def draw(self, record: Record):
        """Draw all runs, with the state of the one that trains as title."""
        import matplotlib.pyplot as plt
        import pandas as pd
        from IPython.display import display

        figure, axes = plt.subplots()
        config = Run(self.name).train_config
        logs = {label: pd.DataFrame(log) for label, log in self.logs.items()}
        draw_losses(axes, logs, "step", self.floors)
        scores = logs[self.label]["bits_per_byte"].dropna()
        facts = [f"{at_most(score, Run(self.name).is_bound, '.3f')} bits per byte" for score in scores[-1:]]
        finished = config.progress(record.step, record.seconds) >= 1
        facts.append("finished" if finished else f"{time_left(record, config)} of training left")
        axes.set_title(f"{self.data}: {', '.join(facts)}, {record.tokens_per_second:,.0f} tokens/s")
        for key, show, content in (("plot", show_figure, figure), ("story", display, self.story)):
            if content is not None:
                show(content, display_id=f"{key}-{id(self)}", update=key in self.displayed)
                self.displayed.add(key)
        self.drawn_at = time.monotonic()


def latest_run(preset: str) -> str:
    """The latest run of a preset that has a name by default. Raises NotebookError if there is none."""
    names = [name for name in run_names("checkpoint.pth") if re.fullmatch(rf"{re.escape(preset)}_[\d_-]+", name)]
    if not names:
        raise NotebookError(f"there is no run of {preset} to go on with: set resume = False, or name")
    return max(names)


def preset_table():
    """List the presets, with their sizes and what is special about each, as a table that unfolds in a notebook."""
    import pandas as pd
    from IPython.display import HTML

    rows = {}
    for name, (model, train) in PRESETS.items():
        size = num_parameters(build_model(model, load_tokenizer(train.tokenizer).vocab_size, train.tokenizer))
        heads = f"{model.num_heads} / {model.num_kv_heads}"
        rows[name] = [f"{size:,}", model.dim, model.num_layers, heads, what_is_special(model)]
    columns = ["parameters", "dim", "layers", "heads / kv heads", "what is special"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns).to_html(border=0, justify="left")
    return HTML(f"<details><summary>All {len(rows)} presets</summary>{table}</details>")


def what_is_special(config: ModelConfig) -> str:
    """Name the blocks that the base model does not have, and the settings other than sizes that differ from it."""
    blocks = [name for layer in config.layer_strings for name, _ in layer_steps(layer) if name not in "+|"]
    new = [name for name in dict.fromkeys(blocks) if name not in ("Norm", "Attn", "MLP")]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in ORDINARY and value != field.default:
            number = f"{value:.4g}" if isinstance(value, float) else value
            new.append(f"{'' if value else 'no '}{field.name}" if isinstance(value, bool) else f"{field.name} {number}")
    return ", ".join(new)
