"""Train a model: one loop, visible from top to bottom, that yields a record a step.

    python train.py --preset 0.5m_short_and_thick --train.max_minutes 10 --name my_run
    python train.py --name my_run --resume
    python train.py --continue_from my_run --train.lr_max 1e-3

B batch, T time, V vocabulary.
"""

import argparse
import ast
import itertools
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from statistics import fmean

import torch
from tqdm import tqdm

from config import Layers, ModelConfig, Preset, TrainConfig, preset
from data import load_data, story_ids
from evaluation import evaluate
from machine import choose_device, choose_dtype, compiled, peak_memory_mb
from model import GPT, IGNORE
from optim import build_optimizers, scheduled_learning_rate
from report import write_report
from runs import Run, default_name, load_model, load_weights
from tokenizer import load_tokenizer

LOG_EVERY = 10  # steps that a row of log_data.csv stands for


@dataclass(frozen=True)
class Record:
    """What one step yields. A row of log_data.csv is the same, with train_loss and tokens_per_second over its steps."""

    step: int  # steps done
    tokens: int  # tokens predicted so far
    seconds: float  # since the first step began, evaluations and compilation included
    train_loss: float  # nats per token
    validation_loss: float | None  # nats per token; None between evaluations, as the next two
    perplexity: float | None  # exp(validation_loss)
    bits_per_byte: float | None  # of the validation stories
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float  # without evaluations
    peak_memory_mb: float  # resident memory of the process so far; of the GPU on CUDA


def train(
    model_config: ModelConfig, train_config: TrainConfig, name: str, *, resume: bool = False, continue_from: str | None = None
) -> Iterator[Record]:
    """Train a model into trained_models/NAME; a generator that yields a Record after every step.

    It may be left at any step, by `break` or Ctrl-C: the state is saved then, and resume=True goes on bit for bit.
    continue_from names a run whose best weights to begin with. Raises ValueError or OSError with the cure for what cannot
    be, FloatingPointError where the loss is no longer finite; what was saved before stays.
    """
    run = Run(name)
    checkpoint = run.load("checkpoint.pth", {"model", "optimizers", "step"}) if resume else {}
    if not resume:
        run.check_is_new()
    device, dtype = choose_device(train_config.device), choose_dtype(train_config)
    torch.manual_seed(train_config.seed)
    tokenizer = load_tokenizer(train_config.tokenizer)
    model = GPT(model_config, tokenizer.vocab_size).to(device)
    data = load_data(
        train_config.data, tokenizer, model_config.max_seq_len,
        packing=train_config.packing, max_stories=train_config.max_stories,
    )  # fmt: skip
    optimizers = build_optimizers(model, train_config)
    forward = compiled(model, device) if train_config.compile else model
    step, tokens, seconds, best_loss, unlogged, log = 0, 0, 0.0, math.inf, [], []
    validation = data.validation[: train_config.eval_stories]

    if continue_from is not None:
        start_from(model, tokenizer, continue_from)
    if resume:
        if checkpoint["data"] != data.fingerprint:
            raise ValueError(f"the data of the run {name!r} have changed since it was trained: restore them, or train anew")
        step, tokens, seconds = checkpoint["step"], checkpoint["tokens"], checkpoint["seconds"]
        best_loss, unlogged = checkpoint["best_loss"], [Record(**values) for values in checkpoint["unlogged"]]
        log = [row for row in run.log_rows() if int(row["step"]) <= step]
        load_weights(model, checkpoint["model"], "checkpoint.pth", name)
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(checkpoint["random_state"])
        if is_finished(step, seconds, train_config):
            raise ValueError(f"the run {name!r} is finished after {step:,} steps. To train it further: --continue_from {name}")
    else:
        if train_config.data == "auto":
            train_config = replace(train_config, data=data.name)
        run.create(model_config, train_config)

    def save_model():
        identity = {"vocab_size": tokenizer.vocab_size, "tokenizer_fingerprint": tokenizer.fingerprint, "data": data.name}
        run.save("model.pth", {"model": model.state_dict(), "step": step, "loss": best_loss, **identity})

    def not_finite(step: int) -> FloatingPointError:
        return FloatingPointError(
            f"the loss is no longer finite at step {step:,}, with a learning rate of {learning_rate:.2g}. Lower "
            f"--train.lr_max, or raise --train.warmup_steps. The last checkpoint of {name!r} is as it was"
        )

    def save_checkpoint():
        if not math.isfinite(evaluate(model, tokenizer, validation[:8]).loss):  # or a broken model would replace a good one
            raise not_finite(step)
        if math.isinf(best_loss):
            save_model()
        run.save_log(log, [field.name for field in fields(Record)])
        state = {"step": step, "tokens": tokens, "seconds": seconds, "best_loss": best_loss, "data": data.fingerprint}
        run.save("checkpoint.pth", {
            "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random_state": torch.get_rng_state(), "unlogged": [asdict(record) for record in unlogged], **state,
        })  # fmt: skip

    micro_batch_size = train_config.micro_batch_size or train_config.batch_size
    began = time.perf_counter() - seconds
    finished = False

    with ctrl_c_finishes_the_step() as stop_asked:
        while not finished and not stop_asked.is_set():
            step_began = time.perf_counter()
            learning_rate = scheduled_learning_rate(step, expected_steps(step, seconds, train_config), train_config)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = learning_rate

            batch = data.batch(step, train_config.batch_size, train_config.seed)  # (B, T + 1)
            stories = story_ids(batch, tokenizer.bos_id, tokenizer.eos_id)  # (B, T + 1)
            no_target = (batch[:, 1:] == tokenizer.pad_id) | (stories[:, 1:] != stories[:, :-1])  # nothing tells the next story
            targets = batch[:, 1:].masked_fill(no_target, IGNORE)  # (B, T)
            num_targets = (targets != IGNORE).sum().item()
            train_loss = 0.0
            for rows in torch.arange(train_config.batch_size).split(micro_batch_size):
                inputs, wanted = batch[rows, :-1].to(device), targets[rows].to(device)
                ids = stories[rows, :-1].to(device) if train_config.mask_stories else None
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    _, loss = forward(inputs, wanted, story_ids=ids)
                loss = loss * ((wanted != IGNORE).sum() / num_targets)  # so that micro-batches add up to the batch's mean
                loss.backward()
                train_loss += loss.item()

            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_config.grad_clip or math.inf).item()
            if not math.isfinite(train_loss + gradient_norm):
                raise not_finite(step + 1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

            step, tokens = step + 1, tokens + num_targets
            now = time.perf_counter()
            seconds = now - began
            finished = is_finished(step, seconds, train_config)
            record = Record(
                step, tokens, seconds, train_loss, None, None, None, learning_rate, gradient_norm,
                tokens_per_second=num_targets / (now - step_began), peak_memory_mb=peak_memory_mb(device),
            )  # fmt: skip
            if finished or step % train_config.eval_every == 0:
                score = evaluate(model, tokenizer, validation)
                record = replace(
                    record, validation_loss=score.loss, perplexity=score.perplexity, bits_per_byte=score.bits_per_byte
                )
                if score.loss < best_loss:
                    best_loss = score.loss
                    save_model()
                seconds = time.perf_counter() - began
            unlogged.append(record)
            if record.validation_loss is not None or step % LOG_EVERY == 0:
                log.append(log_row(unlogged))
                unlogged = []
            if finished or stop_asked.is_set() or step % train_config.checkpoint_every == 0:
                save_checkpoint()
            try:
                yield record
            except GeneratorExit:
                save_checkpoint()
                raise
        if not finished:  # Ctrl-C may have come while the last record was looked at
            save_checkpoint()


def start_from(model: GPT, tokenizer, name: str):
    """Load the best weights of another run. Raises ValueError where its tokenizer or its shapes are others."""
    old_model, old_tokenizer = load_model(name)
    if old_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"the run {name!r} was trained with another tokenizer: give --train.tokenizer {old_tokenizer.name}")
    if old_model.config != model.config:
        raise ValueError(f"the run {name!r} has another architecture: leave the --model options and --preset out")
    model.load_state_dict(old_model.state_dict())


def log_row(records: list[Record]) -> dict:
    """One row for the steps since the last: the last record, with mean training loss and pace."""
    tokens = sum(record.tokens_per_second for record in records)
    loss = fmean(record.train_loss for record in records)
    return asdict(replace(records[-1], train_loss=loss, tokens_per_second=tokens / len(records)))


def is_finished(step: int, seconds: float, config: TrainConfig) -> bool:
    return progress(step, seconds, config) >= 1


def progress(step: int, seconds: float, config: TrainConfig) -> float:
    """The share of the budget that is used up, in steps or in minutes, whichever is nearer its end."""
    steps = step / config.max_steps if config.max_steps else 0.0
    minutes = seconds / 60 / config.max_minutes if config.max_minutes else 0.0
    return max(steps, minutes)


def expected_steps(step: int, seconds: float, config: TrainConfig) -> float:
    """How many steps the budget holds, judged by the pace so far. With max_steps alone that is exact."""
    pace = progress(step, seconds, config)
    return step / pace if pace else config.max_steps or math.inf


@contextmanager
def ctrl_c_finishes_the_step():
    """Gives an event that the first Ctrl-C sets; a second one interrupts at once."""
    stop_asked = threading.Event()

    def ask(signal_number, frame):
        stop_asked.set()
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread alone
        yield stop_asked
        return
    previous = signal.signal(signal.SIGINT, ask)
    try:
        yield stop_asked
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass(frozen=True)
class Arguments:
    preset: str = "0.5m_short_and_thick"  # a named architecture; the options below change it
    name: str | None = None  # of the run folder in trained_models/; by default the preset and the time
    resume: bool = False  # go on with the run called --name where it was stopped
    continue_from: str | None = None  # begin with the best weights of this run
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def read_layers(text: str) -> Layers:
    """A layer string as it is; a list or a tuple of them as Python writes it. Raises ValueError where that cannot be read."""
    if text[:1] not in ("[", "("):
        return text
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"layers={text!r} cannot be read ({error.msg}): write lists and tuples as in Python") from error


def parse(words: list[str]) -> Arguments:
    """The command line as Arguments. The preset, or the run to go on with, gives the values of all that is not named."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def layers(info):
        if info.type != Layers:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="STR", is_instance=lambda value: isinstance(value, str | list | tuple),
            instance_from_str=lambda texts: read_layers(texts[0]),
            str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--name")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--continue_from", "--continue-from")
    early, _ = first.parse_known_args(words)
    chosen = preset(early.preset or Arguments.preset)
    if early.preset and (early.resume or early.continue_from):
        raise ValueError("--resume and --continue_from keep the architecture of the run: leave --preset out")
    if early.resume and early.name is None:
        raise ValueError("--resume needs the name of the run to go on with: add --name")
    if early.resume:
        chosen = Preset(Run(early.name).model_config, Run(early.name).train_config)
    elif early.continue_from:
        old = Run(early.continue_from)
        chosen = Preset(old.model_config, TrainConfig(tokenizer=old.train_config.tokenizer))
    arguments = tyro.cli(
        Arguments, args=words, default=Arguments(model=chosen.model, train=chosen.train), use_underscores=True,
        registry=registry, description="Train a tiny language model.",
    )  # fmt: skip
    if early.resume and (arguments.model, arguments.train) != chosen:
        raise ValueError("--resume goes on with the options of the run: leave the others out, or use --continue_from")
    return arguments


def main():
    """Train from the command line with a progress bar, then tell three stories and say what to do next."""
    arguments = parse(sys.argv[1:])
    name = arguments.name or default_name(arguments.continue_from or arguments.preset)
    run, config = Run(name), arguments.train
    bar = tqdm(total=1.0, bar_format="{percentage:3.0f}%|{bar}| {elapsed} done, {remaining} left{postfix}", leave=True)
    seen = ""
    for record in train(arguments.model, config, name, resume=arguments.resume, continue_from=arguments.continue_from):
        if record.bits_per_byte is not None:
            seen = f", {record.bits_per_byte:.3f} bits/byte"
        bar.n = min(1.0, progress(record.step, record.seconds, config))
        bar.set_postfix_str(f"step {record.step:,}, loss {record.train_loss:.3f}{seen}, {record.tokens_per_second:,.0f} tokens/s")
    bar.close()
    if not is_finished(record.step, record.seconds, config):
        print(f"stopped after {record.step:,} steps and saved. To go on:\n  python train.py --name {name} --resume")
        return
    for story in write_report(name):
        print(f"\n{story}")
    print(f"""
{record.bits_per_byte:.3f} bits per byte after {record.step:,} steps. Loss curve: {os.path.relpath(run.folder / "loss.png")}
More stories:         python inference.py {name} "Once upon a time"
Compare with others:  open model_evaluation.ipynb""")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError) as error:  # ImportError: a plugin that is not there
        sys.exit(f"error: {error}")
