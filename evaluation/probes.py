"""What can an architecture learn to do? Train a small model on each synthetic task of probe_tasks.py.

    python -m evaluation probes 1m mamba_like                        # presets or runs: only the architecture is used
    python -m evaluation probes "Norm->Attn->+" "Norm->Mamba->+" --quick    # layer strings
    python -m evaluation probes 1m griffin_like --tasks "hop chains" --seeds 3 --save probes.png

All models are scaled to the same small width and trained from scratch with Muon on fresh sequences. Three learning rates are
tried until one solves the task; the model with the lowest final training loss is scored. All tasks take up to ten minutes per
architecture on one core, longest if they are not solved. --quick trains less, at one rate; --thorough trains wider models for 20
times the steps and takes hours. A score is the accuracy on test sequences shared by all models; chance is the accuracy of the
best guess that ignores the sequence. Its interval covers the choice of test sequences, not that of seeds: whether a task is
solved often depends on the seed, which a few seeds cannot bound, so that their lowest and highest accuracy is shown instead.
Scores are cached.

B sequences, T tokens in each, V vocabulary.
"""

import inspect
import itertools
import json
import math
import re
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

import fast
from config import Layers, ModelConfig, TrainConfig, did_you_mean
from data.cache import default_cache_dir, digest, keep
from evaluation.probe_tasks import TASKS, Compressor, Task
from metrics.cost import config_of
from metrics.plots import add_legend, in_style
from metrics.proportion import proportion_interval
from model import IGNORE
from modules.registry import build_model
from runs.code import code_digests
from runs.tables import FrameTable, show
from runs.terminal import UsageError
from training.optim import build_optimizers, step_optimizers
from training.schedules import build_schedule, scheduled_learning_rate


@dataclass(frozen=True)
class Effort:
    """Model size and training budget of a probe."""

    steps: int = 1000  # maximum per learning rate
    batch_size: int = 32  # fresh sequences per step
    test_sequences: int = 512
    lrs: tuple[float, ...] = (3e-3, 1e-3, 1e-2)  # the best counts: no rate suits all architectures
    dim: int = 64
    num_layers: int = 2  # rounded up to whole repeats of the layer pattern


QUICK = Effort(steps=400, test_sequences=256, lrs=(3e-3,))
THOROUGH = Effort(steps=20_000, batch_size=128, test_sequences=1280, dim=128)
SOLVED = 0.03  # nats per answer: stop early if the mean of the last LAST steps is lower
LAST = 25
SMALLEST_HEAD = 16  # minimum head_dim after scaling
CONTEXT = 64  # context of a layer string, about the sequence length


@dataclass(frozen=True)
class Score:
    """Accuracy of an architecture on one level of a task, over seeds."""

    architecture: str
    task: str
    level: int  # 0 if the task has only one
    shares: Tensor  # (seeds, sequences): accuracy on each test sequence; NaN if training diverged
    parameters: int
    seconds: float  # training and scoring, all seeds
    lrs: tuple[float, ...] = ()  # the best learning rate of each seed

    @property
    def name(self) -> str:
        return f"{self.task}, {self.level}" if self.level else self.task

    @property
    def accuracy(self) -> float:
        return self.shares.mean().item()

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the mean accuracy of the trained models over the choice of test sequences; NaN if one diverged."""
        if math.isnan(self.accuracy):
            return math.nan, math.nan
        return proportion_interval(self.shares.double().mean(dim=0).sum().item(), self.shares.shape[1])

    def __str__(self) -> str:
        if math.isnan(self.accuracy):
            return "diverged"
        text, means = f"{self.accuracy:.3f} [{{:.3f}}, {{:.3f}}]".format(*self.interval), self.shares.mean(dim=1)
        return text if len(means) == 1 else f"{text}, seeds {means.min():.3f} to {means.max():.3f}"


def scaled(config: ModelConfig, T: int, effort: Effort) -> ModelConfig:
    """Scale an architecture to the width and depth of the effort, and to sequences of T tokens.

    head_dim (a power of two, at least SMALLEST_HEAD) and mlp_dim scale with dim; windows and chunks in the layer string scale
    with the context. All other options are unchanged.
    """
    tile = len(config.layers) if isinstance(config.layers, tuple) else 1
    share, values = effort.dim / config.dim, config.block_values()
    head_dim = max(SMALLEST_HEAD, 2 ** round(math.log2(values["head_dim"] * share)))
    shorter = min(1.0, T / config.max_seq_len)
    return replace(
        config, dim=effort.dim, num_layers=tile * math.ceil(effort.num_layers / tile), head_dim=head_dim, dropout=0.0,
        mlp_dim=8 * max(1, round(values["mlp_dim"] * share / 8)), layers=shortened(config.layers, shorter), max_seq_len=T,
    )  # fmt: skip


def shortened(layers: Layers, share: float) -> Layers:
    """Scale all windows and chunks of the layers, to at least 2."""
    if not isinstance(layers, str):
        return type(layers)(shortened(layer, share) for layer in layers)
    return re.sub(r"\b(window|chunk)=(\d+)", lambda size: f"{size[1]}={max(2, round(int(size[2]) * share))}", layers)


def build(config: ModelConfig, task: Task, effort: Effort) -> nn.Module:
    """Build the model for a task. Raises ValueError if it is not causal or cannot be built."""
    model = build_model(scaled(config, task.T, effort), task.vocab_size)
    for block in model.modules():
        if not getattr(block, "causal", True):
            raise ValueError(f"{type(block).__name__} sees the future, where the answers stand: such a model cannot be probed")
    start_like_torch(model)
    return Compressor(model, effort.dim, task.vocab_size, task.T) if task.compressed else model


@torch.no_grad()
def start_like_torch(model: nn.Module):
    """Raise small initial weights to torch's default, a standard deviation of 1 / sqrt(3 * inputs), except output layers.

    GPT-2's 0.02 suits wide models. With it, attention in a narrow model stays uniform for a long time.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in ("w_out", "head") and part.weight.any():
            part.weight.mul_(max(1.0, (3 * part.in_features) ** -0.5 / part.weight.square().mean().sqrt().item()))


def train(model: nn.Module, task: Task, seed: int, effort: Effort, lr: float) -> float:
    """Train with Muon, warm-up and a cosine schedule. Returns the final loss, infinite if it diverged.

    The final loss is the mean of the last LAST steps, all on fresh sequences.
    """
    config = TrainConfig(
        max_steps=effort.steps, lr_max=lr, warmup_steps=effort.steps // 10, schedule="cosine", weight_decay=0.0, optimizer="Muon",
    )  # fmt: skip
    optimizers, schedule, rng = build_optimizers(model, config), build_schedule(config, ModelConfig()), task.training_rng(seed)
    losses = deque(maxlen=LAST)
    model.train()
    for step in range(effort.steps):
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = scheduled_learning_rate(step, effort.steps, config, schedule) * group["lr_scale"]
        drawn = task.training_sequences(effort.batch_size, rng)
        _, loss = model(drawn.tokens, drawn.targets)
        loss.backward()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return math.inf
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_optimizers(model, optimizers)
        if len(losses) == LAST and fmean(losses) < SOLVED:
            break
    return fmean(losses)


def best_model(config: ModelConfig, task: Task, seed: int, effort: Effort) -> tuple[nn.Module, float, float]:
    """Train with each learning rate until one solves the task. Returns the best model, its rate, and its loss.

    The best model has the lowest final training loss.
    """
    best = None
    for lr in effort.lrs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(config, task, effort)
            with fast.for_evaluation(model, num_stories=effort.steps):  # for compiling, a step counts as a story
                loss = train(model, task, seed, effort, lr)
        if best is None or loss < best[2]:
            best = model, lr, loss
        if loss < SOLVED:
            break
    return best


@torch.no_grad()
def right_answers(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Accuracy on each sequence, NaN if it has no targets.  tokens and targets (B, T) -> (B,)"""
    model.eval()
    rows = zip(tokens.split(64), targets.split(64), strict=True)
    right = torch.cat([model(inputs)[0].argmax(dim=-1) == answers for inputs, answers in rows])  # (B, T)
    return right.sum(dim=1) / (targets != IGNORE).sum(dim=1)


def probe(name: str, config: ModelConfig, task_name: str, seeds: int = 1, effort: Effort = Effort()) -> list[Score]:
    """Train and score an architecture on one task with seeds 0, 1, ...; one Score per level.

    Scores by the same code are read from the cache.
    """
    task = TASKS[task_name]
    test = task.test_sequences(effort.test_sequences)
    has_targets = (test.targets != IGNORE).any(dim=1)
    results = [score_seed(config, task, seed, effort) for seed in range(seeds)]
    shares = torch.stack([torch.tensor(result["shares"]) for result in results])  # (seeds, sequences)
    lrs, seconds = tuple(result["lr"] for result in results), sum(result["seconds"] for result in results)
    return [
        Score(name, task_name, level, shares[:, has_targets & (test.level == level)], results[0]["parameters"], seconds, lrs)
        for level in test.level.unique().tolist()
    ]


def score_seed(config: ModelConfig, task: Task, seed: int, effort: Effort) -> dict:
    """Score one seed, or read its cached score: `shares` (accuracy per sequence), `lr`, `parameters`, `seconds`."""
    code = {file: Path(__file__).with_name(file).read_text(encoding="utf-8") for file in ("probes.py", "probe_tasks.py")}
    key = [repr(config), repr(task), seed, repr(effort), code_digests(config.plugins), code, torch.__version__]
    path = default_cache_dir() / "probes" / f"{digest(json.dumps(key))}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    start, test = time.perf_counter(), task.test_sequences(effort.test_sequences)
    model, lr, loss = best_model(config, task, seed, effort)
    right = right_answers(model, test.tokens, test.targets)  # (sequences,)
    right = right if math.isfinite(loss) else torch.full_like(right, math.nan)
    parameters = sum(weight.numel() for weight in model.parameters())
    scored = {"shares": right.tolist(), "lr": lr, "parameters": parameters, "seconds": time.perf_counter() - start}
    keep(path, json.dumps(scored))
    return scored


def probes(
    *specs: str | ModelConfig, tasks: tuple[str, ...] = tuple(TASKS), seeds: int = 1, effort: Effort = Effort(),
    plugins: tuple[str, ...] = (),
) -> Iterator[list[Score]]:  # fmt: skip
    """Probe architectures task by task. Yields the Scores of one architecture on one task at a time.

    Raises ValueError before training for an unknown task or architecture, or one that cannot be built.
    """
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"no task is called {task!r}.{did_you_mean(task, TASKS)} There are: {', '.join(TASKS)}")
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: give at least 1")
    configs = {}
    for number, spec in enumerate(specs):
        name = spec if isinstance(spec, str) else f"config {number + 1}"
        if name in configs:
            raise ValueError(f"{name!r} is named twice: name each architecture once")
        configs[name], _ = config_of(spec, plugins, sizes=ModelConfig(max_seq_len=CONTEXT))
        for task in tasks:
            with torch.random.fork_rng(devices=[]):
                build(configs[name], TASKS[task], effort)
    return (probe(name, config, task, seeds, effort) for task in tasks for name, config in configs.items())


def table(scores: list[Score]):
    """Tabulate accuracy and 95% interval in a DataFrame: a row per task and level, a column per architecture."""
    import pandas as pd

    rows: dict[str, dict] = {}
    for score in scores:
        task = TASKS[score.task]
        facts = {"chance": round(task.chance, 4), "data seed": task.seed, "sequences": score.shares.shape[1]}
        rows.setdefault(score.name, facts)[score.architecture] = str(score)
    return pd.DataFrame.from_dict(rows, orient="index")


@in_style
def radar(scores: list[Score]):
    """Draw a radar chart: a polygon per architecture, a spoke per task from chance (inner circle) to all right."""
    import matplotlib.pyplot as plt

    heights: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        chance = TASKS[score.task].chance
        height = 0.0 if math.isnan(score.accuracy) else max(0.0, (score.accuracy - chance) / (1 - chance))
        heights.setdefault(score.architecture, {}).setdefault(score.task, []).append(height)
    tasks = list(dict.fromkeys(score.task for score in scores))
    angles = [2 * math.pi * number / len(tasks) for number in range(len(tasks))]
    figure, axes = plt.subplots(figsize=(7, 7), subplot_kw={"projection": "polar"})
    plt.close(figure)  # otherwise a notebook shows it twice
    for architecture, by_task in heights.items():
        spokes = [sum(by_task[task]) / len(by_task[task]) for task in tasks]  # mean over levels
        (line,) = axes.plot([*angles, angles[0]], [*spokes, spokes[0]], marker="o", label=architecture)
        axes.fill(angles, spokes, color=line.get_color(), alpha=0.12)
    axes.set_theta_offset(math.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, tasks)
    axes.tick_params(axis="x", pad=8)
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):  # keep labels outside the circle
        x = math.sin(angle)
        label.set_horizontalalignment("center" if abs(x) < 0.1 else "left" if x > 0 else "right")
    axes.set_ylim(-0.15, 1)
    circle = [2 * math.pi * part / 100 for part in range(101)]
    axes.plot(circle, [0.0] * 101, color="black", linestyle="--", label="chance")
    axes.set_yticks([0, 0.5, 1], ["chance", "half way", "all right"], color="grey", fontsize="small")
    axes.set_rlabel_position(180 / len(tasks))  # between two spokes
    axes.set_title("what each architecture learns", pad=24)
    add_legend(axes)
    return figure


def check_picture(path: Path):
    """Raise UsageError before training if matplotlib cannot write such a picture."""
    from matplotlib.backend_bases import FigureCanvasBase

    if path.suffix[1:] not in FigureCanvasBase.get_supported_filetypes():
        raise UsageError(f"--save {path}: give a file that ends in .png, .svg or .pdf")


def main(arguments):
    """Run the command `probes`. Raises ValueError, OSError or ImportError with one line."""
    from tqdm import tqdm

    effort = QUICK if arguments.quick else THOROUGH if arguments.thorough else Effort()
    steps = effort.steps if arguments.steps is None else arguments.steps
    effort = replace(effort, steps=steps, lrs=arguments.lrs or effort.lrs)
    if not all(number > 0 and math.isfinite(number) for number in (effort.steps, *effort.lrs)):
        raise UsageError(f"--steps {effort.steps} --lrs {' '.join(map(str, effort.lrs))}: give positive numbers")
    if arguments.save:
        check_picture(arguments.save)
    tasks = tuple(dict.fromkeys(arguments.tasks or TASKS))
    probed = probes(*arguments.specs, tasks=tasks, seeds=arguments.seeds, effort=effort, plugins=arguments.plugins)
    scores = []
    for levels in tqdm(probed, total=len(tasks) * len(arguments.specs), unit="probe"):
        scores += levels
        results, lrs = ", ".join(f"{score.name} {score}" for score in levels), " ".join(f"{lr:g}" for lr in levels[0].lrs)
        tqdm.write(f"{levels[0].architecture}: {results}, lr {lrs}, {levels[0].seconds:.0f} s")

    show(FrameTable(table(scores)))
    for task in tasks:
        print(f"{task}: {inspect.getdoc(TASKS[task])}")
    for name in arguments.specs:
        sizes = [score.parameters for score in scores if score.architecture == name]
        seconds = sum({score.task: score.seconds for score in scores if score.architecture == name}.values())
        print(f"{name}: {min(sizes):,} to {max(sizes):,} parameters, by the task's vocabulary; {seconds:.0f} s")
    seeds = "one seed" if arguments.seeds == 1 else f"the mean of {arguments.seeds} seeds, then the lowest and the highest"
    rates = " or ".join(f"{lr:g}" for lr in effort.lrs)
    print(f"Accuracy, {seeds}, with its 95% interval over test sequences; another seed may lie outside of it. At most "
          f"{effort.steps} steps of {effort.batch_size} sequences; of lr {rates} the one with the lowest training loss counts.")
    if arguments.save:
        radar(scores).savefig(arguments.save)
        table(scores).to_csv(arguments.save.with_suffix(".csv"), index_label="task")
        print(f"the chart is in {arguments.save}, the table in {arguments.save.with_suffix('.csv')}")
