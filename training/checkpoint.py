"""A training under way: where it stands, and how it is saved and taken up again.

Weights, optimizers, random numbers and a handful of counts are all that is needed to go on bit for bit, because
the batches are a pure function of the step.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean

import torch
from torch.optim.swa_utils import AveragedModel

from data.dataset import Data, fingerprint
from inference import load_model, load_weights
from metrics.scores import Evaluation, evaluate
from metrics.world_grades import COLUMNS as GRADES
from metrics.world_grades import grade_model
from model import GPT
from runs.folder import Run
from tokenizer import Tokenizer
from training.autotune import ExecutionPlan


@dataclass(frozen=True)
class Record:
    """What one step yields. A row of log_data.csv is the same, with train_loss and tokens_per_second over its steps."""

    step: int  # steps done
    tokens: int  # tokens predicted so far
    seconds: float  # of training so far, with the probe of the machine, compilation and evaluations
    train_loss: float  # nats per token
    validation_loss: float | None  # nats per token; None between evaluations, as the next two
    perplexity: float | None  # exp(validation_loss)
    bits_per_byte: float | None  # of the validation stories
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float  # without evaluations
    peak_memory_mb: float  # resident memory of the process so far; of the GPU on CUDA
    flops: float | None = None  # spent on these tokens so far, forward and backward; None in checkpoints older than this
    grades: dict[str, float] | None = None  # shares of samples, each a column of the log; None where the world grades none


@dataclass
class Training:
    """All that changes while a model trains, and the files it is kept in."""

    run: Run
    model: GPT
    optimizers: list[torch.optim.Optimizer]
    tokenizer: Tokenizer
    data: Data
    validation: list[str]  # the stories that every evaluation scores
    grade_stories: int = 0  # samples that the world grades at every evaluation
    average: AveragedModel | None = None  # of the weights, where it is to be scored and kept instead of the last ones
    code: dict[str, str] = field(default_factory=dict)  # a digest of every file that has a say in the numbers
    plan: ExecutionPlan | None = None  # how this machine trains the model
    flops_per_token: float = 0.0  # forward and backward, of a sequence as long as the context
    continued_from: str | None = None  # the run whose weights it began with
    rows: int = 0  # of the stream of rows that are read, those of the earlier run too
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    unlogged: list[Record] = field(default_factory=list)  # of the steps since the last row of the log
    log: list[dict] = field(default_factory=list)
    block_log: list[dict] = field(default_factory=list)  # what blocks reported of themselves at every evaluation

    def start_from(self, name: str):
        """Begin with the best weights of another run. Raises ValueError where its tokenizer or its architecture is another."""
        model, tokenizer = load_model(name)
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError(f"the run {name!r} was trained with another tokenizer: give --train.tokenizer {tokenizer.name}")
        if model.config != self.model.config:
            raise ValueError(f"the run {name!r} has another architecture: leave the --model options and --preset out")
        self.model.load_state_dict(model.state_dict())
        self.continued_from, self.rows = name, Run(name).load("model.pth", {"rows_read"})["rows_read"]
        if self.average is not None:
            self.average.module.load_state_dict(model.state_dict())

    @property
    def best_model(self) -> GPT:
        """The model to score and to keep: with averaged weights, where they are averaged."""
        return self.model if self.average is None else self.average.module

    def evaluate(self) -> Evaluation:
        """Score the validation stories, and keep the weights in model.pth if they are the best so far."""
        score = self.score(self.best_model, self.validation)
        if score.loss < self.best_loss:
            self.best_loss = score.loss
            self.save_model()
        return score

    def score(self, model: GPT, stories: list[str]) -> Evaluation:
        with torch.compiler.set_stance("force_eager"):  # else every length of a story would be compiled
            return evaluate(model, self.tokenizer, stories)

    def evaluated(self, record: Record) -> Record:
        """The record with the scores of an evaluation, which keeps the weights if they are the best so far."""
        score = self.evaluate()
        return replace(
            record, validation_loss=score.loss, perplexity=score.perplexity, bits_per_byte=score.bits_per_byte,
            grades=self.grade(),
        )  # fmt: skip

    def grade(self) -> dict[str, float] | None:
        """What the world says of samples of the model; None where it is not asked. The same seeds every time."""
        if not self.grade_stories:
            return None
        with torch.compiler.set_stance("force_eager"):
            return grade_model(self.best_model, self.tokenizer, self.grade_stories).columns

    def log_record(self, record: Record, log_every: int):
        """Keep a record for the log, which has a row for every log_every steps and for every evaluation."""
        self.unlogged.append(record)
        if record.validation_loss is not None or record.step % log_every == 0:
            loss = fmean(record.train_loss for record in self.unlogged)
            pace = fmean(record.tokens_per_second for record in self.unlogged)
            row = asdict(replace(record, train_loss=loss, tokens_per_second=pace))
            self.log.append(row | (row.pop("grades") or {}))
            self.unlogged = []
        if record.validation_loss is not None:
            for place, block in self.reporting_blocks.items():
                reported = {"step": record.step, "block": place}
                self.block_log += [reported | {"name": name, "value": value} for name, value in block.report().items()]

    @property
    def reporting_blocks(self) -> dict[str, torch.nn.Module]:
        """Those that have something to say of themselves, by their place in the model."""
        return {place: block for place, block in self.model.named_modules() if hasattr(block, "report")}

    @property
    def log_columns(self) -> list[str]:
        own = [field.name for field in fields(Record) if field.name != "grades"]
        return own + list(GRADES) * (self.grade_stories > 0)

    def save_model(self):
        """Write model.pth: the weights, and the tokenizer and the data that they belong to."""
        self.run.save("model.pth", {
            "model": self.best_model.state_dict(), "step": self.step, "loss": self.best_loss,
            "vocab_size": self.tokenizer.vocab_size, "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "data": self.data.name, "data_fingerprint": self.data.fingerprint, "rows_read": self.rows, "code": self.code,
            "validation_stories": len(self.validation), "validation_fingerprint": fingerprint(self.validation),
            "continued_from": self.continued_from,
        })  # fmt: skip

    def save(self):
        """Write checkpoint.pth and the logs. Raises FloatingPointError for a broken model, which would replace a good one."""
        if not math.isfinite(self.score(self.model, self.validation[:8]).loss):
            raise self.not_finite(self.step)
        if math.isinf(self.best_loss):
            self.save_model()
        self.run.save_log(self.log, self.log_columns)
        if self.block_log:
            self.run.save_log(self.block_log, ["step", "block", "name", "value"], "blocks.csv")
        self.run.save("checkpoint.pth", {
            "model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step, "tokens": self.tokens, "seconds": self.seconds, "best_loss": self.best_loss,
            "unlogged": [asdict(record) for record in self.unlogged], "data": self.data.fingerprint,
            "average": self.average and self.average.state_dict(), "plan": self.plan and asdict(self.plan),
            "continued_from": self.continued_from, "rows": self.rows, "random_state": random_state(), "block_log": self.block_log,
            "counts": {place: dict(block.named_buffers()) for place, block in self.reporting_blocks.items()},
        })  # fmt: skip

    def restore(self):
        """Take up what `save` wrote. Raises ValueError where it is damaged, or the data are no longer the same."""
        saved = self.run.load("checkpoint.pth", {"model", "optimizers", "step", "random_state"})
        if saved["data"] != self.data.fingerprint:
            raise ValueError(f"the data of the run {self.run.name!r} have changed since: restore them, or train anew")
        load_weights(self.model, saved["model"], "checkpoint.pth", self.run.name)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.tokens, self.seconds, self.best_loss = (saved[key] for key in ("step", "tokens", "seconds", "best_loss"))
        self.continued_from, self.rows, self.plan = saved["continued_from"], saved["rows"], saved_plan(saved)
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.unlogged = [Record(**values) for values in saved["unlogged"]]
        self.log = [row for row in self.run.log_rows() if int(row["step"]) <= self.step]
        self.block_log = saved.get("block_log", [])  # which older checkpoints do not have
        for place, block in self.reporting_blocks.items():  # what they have counted since the last evaluation is in no state dict
            for name, counted in saved.get("counts", {}).get(place, {}).items():
                block.get_buffer(name).copy_(counted)
        set_random_state(saved["random_state"])

    def not_finite(self, step: int) -> FloatingPointError:
        learning_rate = self.optimizers[0].param_groups[0]["lr"]
        problem = f"the loss is no longer finite at step {step:,}, with a learning rate of {learning_rate:.2g}"
        self.run.save_text("diverged.txt", f"{problem}\n")
        return FloatingPointError(
            f"{problem}. Lower --train.lr_max, or raise --train.warmup_steps. "
            f"The last checkpoint of {self.run.name!r} is as it was"
        )


def saved_plan(saved: dict) -> ExecutionPlan:
    """The plan of a checkpoint; older ones call it choices, and its kernels an attention."""
    if "plan" in saved:
        return ExecutionPlan(**saved["plan"])
    choices = dict(saved["choices"])
    return ExecutionPlan(fast=choices.pop("attention") == "kernel", **choices)


def random_state() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """The state of torch's random numbers on every device there is."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor | list[torch.Tensor]]):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
