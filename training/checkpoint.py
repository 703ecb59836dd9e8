"""Training state: saving and resuming.

Weights, optimizers, random states and a few counters suffice to resume bit for bit, because a batch is a pure function of its
position in the stream of rows.
"""

import itertools
import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean

import torch
from torch.optim.swa_utils import AveragedModel

from data.dataset import Data, fingerprint
from inference import generate, load_model, load_weights
from metrics.scores import Evaluation, evaluate, gives_bound
from metrics.world_grades import COLUMNS as GRADES
from metrics.world_grades import grade_model
from model import GPT
from modules.randomness import random_state, set_random_state
from runs.execution import ExecutionPlan, Stage
from runs.folder import Run
from tokenizer import Tokenizer
from training.machine import describe_machine
from training.schedules import Schedule, linear
from training.stopwatch import Stopwatch

STORY_TOKENS = 200  # of the story at every evaluation
LOSS = "loss_"  # how the columns of log_data.csv with other losses than that of the next token start
NOT_LOGGED = ("losses", "grades", "is_bound", "story")  # fields of a Record that are no columns of log_data.csv
SAMPLES = ("step", "tokens", "bits_per_byte", "story")  # columns of samples.csv


@dataclass(frozen=True)
class Record:
    """The metrics of one step. A row of log_data.csv has the means of losses and tokens_per_second over its steps."""

    step: int  # steps done
    tokens: int  # tokens predicted so far
    seconds: float  # of training so far: forward, backward, optimizer and data
    train_loss: float  # nats per token: cross-entropy, whatever else is minimised; for a model without `losses`, its whole loss
    validation_loss: float | None  # nats per token; like the next two None between evaluations
    perplexity: float | None  # exp(validation_loss)
    bits_per_byte: float | None  # of the validation stories
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float  # of training time
    peak_memory_mb: float  # resident memory of the process so far; of the GPU on CUDA
    flops: float | None = None  # of training so far, forward and backward; None in old checkpoints
    overhead_seconds: float | None = None  # all other time so far: compiling, evaluating, saving …; None in old checkpoints
    losses: dict[str, float] | None = None  # other losses by name, each a column loss_NAME of the log; None if there are none
    grades: dict[str, float] | None = None  # storyworld grades, a column of the log each; None if no samples are graded
    is_bound: bool = False  # the validation scores are upper bounds
    story: str | None = None  # what the model writes, a row of samples.csv; like the losses None between evaluations


@dataclass
class Training:
    """The state of a training run, and its run folder."""

    run: Run
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    tokenizer: Tokenizer
    data: Data
    validation: list[str]  # the stories that every evaluation scores
    grade_stories: int = 0  # samples that storyworld grades at every evaluation
    average: AveragedModel | None = None  # weight EMA; if there is one, it is evaluated and saved as the model
    code: dict[str, str] = field(default_factory=dict)  # digest of every file that affects the numbers
    plan: ExecutionPlan | None = None  # how this machine trains the model
    schedule: Schedule = linear  # the height of the learning rate in the course of the run
    flops_per_token: float = 0.0  # forward and backward, at the full context length
    continued_from: str | None = None  # the run whose weights this one started from
    rows: int = 0  # rows of the stream consumed so far, including those of continued_from
    step: int = 0
    tokens: int = 0
    tokens_read: int = 0  # that FLOPs are counted for: the same, but for own data that predict few of their tokens
    clock: Stopwatch = field(default_factory=Stopwatch)
    best_loss: float = math.inf
    unlogged: list[Record] = field(default_factory=list)  # steps since the last row of the log
    log: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)  # the story of every evaluation
    block_log: list[dict] = field(default_factory=list)  # what the report() of each block returned at every evaluation
    held: ExitStack = field(default_factory=ExitStack)  # what is released when training stops, such as the lock of the run

    def start_from(self, name: str):
        """Start from the best weights of another run. Raises ValueError if its tokenizer or architecture differs."""
        model, tokenizer = load_model(name)
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(f"the run {name!r} was trained with another tokenizer: give --train.tokenizer {tokenizer.name}")
        if replace(model.config, plugins=self.model.config.plugins) != self.model.config:  # a plugin may be for training alone
            raise ValueError(f"the run {name!r} has another architecture: leave the --model options and --preset out")
        self.model.load_state_dict(model.state_dict())
        self.continued_from, self.rows = name, Run(name).load("model.pth", {"rows_read"})["rows_read"]
        if self.average is not None:
            self.average.module.load_state_dict(model.state_dict())

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def best_model(self) -> GPT:
        """The model to evaluate and save: the weight EMA if there is one."""
        return self.model if self.average is None else self.average.module

    def score(self, model: GPT, stories: list[str]) -> Evaluation:
        with torch.compiler.set_stance("force_eager"):  # otherwise every story length would be compiled
            return evaluate(model, self.tokenizer, stories)

    def evaluated(self, record: Record) -> Record:
        """Score the validation stories, write a story, save model.pth if the weights are the best, and add all to the record."""
        score = self.score(self.best_model, self.validation)
        if score.loss < self.best_loss:
            self.best_loss = score.loss
            self.save_model()
        scores = {"validation_loss": score.loss, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
        grades = self.grade() if self.grade_stories else None
        scores |= {"is_bound": score.is_bound, "story": self.write_story(), "overhead_seconds": self.clock.overhead}
        record = replace(record, **scores, grades=grades)
        self.samples.append({column: getattr(record, column) for column in SAMPLES})
        return record

    def write_story(self) -> str:
        """Write a story with the most likely tokens, from its first one on. The random state stays as it is."""
        most = min(STORY_TOKENS, self.model.config.max_seq_len)
        with torch.compiler.set_stance("force_eager"):
            return generate(self.best_model, self.tokenizer, "", temperature=0, max_new_tokens=most)

    def grade(self) -> dict[str, float]:
        """Grade samples of the model, drawn with the same seeds every time."""
        with torch.compiler.set_stance("force_eager"):
            return grade_model(self.best_model, self.tokenizer, self.grade_stories).columns

    def log_record(self, record: Record, log_every: int):
        """Log a record; the log has a row for every log_every steps and for every evaluation."""
        self.unlogged.append(record)
        if record.validation_loss is not None or record.step % log_every == 0:
            loss = fmean(record.train_loss for record in self.unlogged)
            speed = fmean(record.tokens_per_second for record in self.unlogged)
            row = asdict(replace(record, train_loss=loss, tokens_per_second=speed)) | (record.grades or {}) | self.mean_losses()
            self.log.append({name: value for name, value in row.items() if name not in NOT_LOGGED})
            self.unlogged = []
        if record.validation_loss is not None:
            for path, block in self.reporting_blocks.items():
                row = {"step": record.step, "block": path}
                self.block_log += [row | {"name": name, "value": value} for name, value in block.report().items()]

    def mean_losses(self) -> dict[str, float]:
        """The means of the other losses over the unlogged steps, by column; a loss that a step lacks counts as 0."""
        losses = [record.losses or {} for record in self.unlogged]
        names = dict.fromkeys(itertools.chain(*losses))
        return {f"{LOSS}{name}": fmean(each.get(name, 0.0) for each in losses) for name in names}

    @property
    def reporting_blocks(self) -> dict[str, torch.nn.Module]:
        """The blocks with a report() method, by their path in the model."""
        return {path: block for path, block in self.model.named_modules() if hasattr(block, "report")}

    @property
    def log_columns(self) -> list[str]:
        columns = [field.name for field in fields(Record) if field.name not in NOT_LOGGED]
        losses = [column for column in dict.fromkeys(itertools.chain(*self.log)) if column.startswith(LOSS)]
        return columns + list(GRADES) * (self.grade_stories > 0) + losses

    def save_model(self):
        """Write model.pth: the weights, and which tokenizer and data they belong to."""
        self.run.save("model.pth", {
            "model": self.best_model.state_dict(), "step": self.step, "loss": self.best_loss, "is_bound": gives_bound(self.model),
            "vocab_size": self.tokenizer.vocab_size, "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "data": self.data.name, "data_fingerprint": self.data.fingerprint, "training_stories": self.data.num_stories,
            "rows_read": self.rows, "code": self.code,
            "validation_stories": len(self.validation), "validation_fingerprint": fingerprint(self.validation),
            "continued_from": self.continued_from,
        })  # fmt: skip

    def save(self):
        """Write checkpoint.pth and the logs. Raises FloatingPointError instead of overwriting them if the loss is not finite."""
        if not math.isfinite(self.score(self.model, self.validation[:8]).loss):
            raise self.not_finite(self.step)
        self.run.save_log(self.log, self.log_columns)
        if self.samples:
            self.run.save_log(self.samples, list(SAMPLES), "samples.csv")
        if self.block_log:
            self.run.save_log(self.block_log, ["step", "block", "name", "value"], "blocks.csv")
        self.run.save("checkpoint.pth", {
            "model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "tokens": self.tokens, "tokens_read": self.tokens_read,
            "seconds": self.clock.training, "overhead_seconds": self.clock.overhead,
            "best_loss": self.best_loss,
            "unlogged": [asdict(record) for record in self.unlogged], "data": self.data.fingerprint,
            "average": self.average and self.average.state_dict(),
            "continued_from": self.continued_from, "rows": self.rows, "random_state": random_state(), "samples": self.samples,
            "block_log": self.block_log,
            "counts": {path: dict(block.named_buffers()) for path, block in self.reporting_blocks.items()},
        })  # fmt: skip
        if math.isinf(self.best_loss):  # after the checkpoint: a folder without one holds nothing that was trained
            self.save_model()

    def record_execution(self):
        """Write the plan and the machine to execution.json."""
        self.run.add_stage(Stage(self.step, self.plan, describe_machine(self.device)))

    def restore(self):
        """Restore what `save` wrote, and the plan. Raises ValueError if it is damaged or the data have changed."""
        saved = self.run.load("checkpoint.pth", {"model", "optimizers", "step", "random_state"})
        if saved["data"] != self.data.fingerprint:
            raise ValueError(f"the data of the run {self.run.name!r} have changed since: restore them, or train from scratch")
        load_weights(self.model, saved["model"], "checkpoint.pth", self.run.name)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.tokens, self.best_loss = saved["step"], saved["tokens"], saved["best_loss"]
        self.tokens_read = saved.get("tokens_read", self.tokens)  # missing in old checkpoints
        self.clock.restore(saved["seconds"], saved.get("overhead_seconds", math.nan))  # old checkpoints count all as training
        self.continued_from, self.rows = saved["continued_from"], saved["rows"]
        stages = [stage for stage in self.run.stages if stage.from_step < self.step] or self.run.stages[:1]
        self.plan = stages[-1].plan if stages else saved_plan(saved)
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.unlogged = [Record(**values) for values in saved["unlogged"]]
        self.log = [row for row in self.run.log_rows() if int(row["step"]) <= self.step]
        self.samples, self.block_log = saved.get("samples", []), saved.get("block_log", [])  # missing in old checkpoints
        for path, block in self.reporting_blocks.items():  # their counts since the last evaluation are in no state dict
            for name, counts in saved.get("counts", {}).get(path, {}).items():
                block.get_buffer(name).copy_(counts)
        set_random_state(saved["random_state"])

    def not_finite(self, step: int) -> FloatingPointError:
        learning_rate = self.optimizers[0].param_groups[0]["lr"]
        problem = f"the loss is no longer finite at step {step:,}, with a learning rate of {learning_rate:.2g}"
        self.run.save_text("diverged.txt", f"{problem}\n")
        return FloatingPointError(
            f"{problem}. Lower --train.lr_max, or raise --train.warmup_steps. "
            f"The last checkpoint of {self.run.name!r} is unchanged"
        )


def is_trained(run: Run) -> bool:
    """Whether the last checkpoint of a run is that of its last step."""
    if not (run.folder / "checkpoint.pth").exists():  # of a shipped run
        return not run.was_stopped()
    saved = run.load("checkpoint.pth", {"step", "seconds"})
    return run.train_config.progress(saved["step"], saved["seconds"]) >= 1


def saved_plan(saved: dict) -> ExecutionPlan:
    """Read the plan of an old checkpoint; the oldest have "choices", with an "attention" in place of "fast"."""
    if "plan" in saved:
        return ExecutionPlan(**saved["plan"])
    choices = dict(saved["choices"])
    return ExecutionPlan(fast=choices.pop("attention") == "kernel", **choices)
