"""Train a model: one loop, visible from top to bottom, that yields a record a step.

    python train.py --preset 0.5m_short_and_thick --train.max_minutes 10 --name my_run
    python train.py --name my_run --resume
    python train.py --continue_from my_run --train.lr_max 1e-3
    python train.py --preset 1m --name my_group --seeds 3

B batch, T time, V vocabulary.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, so that --help and slips of the pen are answered at once
    from runs.command_line import parse_or_exit

    ARGUMENTS = parse_or_exit(sys.argv[1:])
    # Threads that wait for each other shall not do so busily for long: where another process takes a core, that costs most of it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; a file is not to fill with progress bars

import itertools
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from config import ModelConfig, TrainConfig
from data.dataset import load_data, story_ids
from metrics.cost import model_cost
from metrics.world_grades import check_tokenizer
from model import IGNORE
from modules.contract import try_out
from modules.registry import build_model, make_ready, needs_of
from runs.code import code_digests
from runs.command_line import Arguments
from runs.folder import Run, default_name
from tokenizer import load_tokenizer
from training import autotune as probe
from training.checkpoint import Record, Training
from training.machine import available_memory, choose_device, is_out_of_memory, peak_memory_mb
from training.optim import average_of_weights, build_optimizers, growing_batch_size, growing_window, scheduled_learning_rate
from training.report import dead_experts, write_report
from training.seeds import train_group

LOG_EVERY = 10  # steps that a row of log_data.csv stands for


def train(
    model_config: ModelConfig, train_config: TrainConfig, name: str, *, resume: bool = False, continue_from: str | None = None,
    group: str | None = None,
) -> Iterator[Record]:
    """Train a model into trained_models/NAME; a generator that yields a Record after every step.

    It may be left at any step, by `break` or Ctrl-C: the state is saved then, and resume=True goes on bit for bit.
    continue_from names a run whose best weights to begin with, group the runs with other seeds that it belongs to. Raises
    ValueError or OSError with the cure for what cannot be, FloatingPointError where the loss is no longer finite; what was
    saved before stays.
    """
    training = prepare(model_config, train_config, name, resume, continue_from, group)
    model, tokenizer, data, optimizers = training.model, training.tokenizer, training.data, training.optimizers
    device = next(model.parameters()).device
    began = time.perf_counter() - training.seconds
    weights = list(model.parameters())
    use_bfloat16 = training.choices.dtype == "bfloat16"
    data_seed = train_config.seed if train_config.data_seed is None else train_config.data_seed
    finished = False

    with ctrl_c_finishes_the_step() as stop_asked:
        probe.apply(training.choices, model)
        if training.average is not None:
            probe.apply(replace(training.choices, compile=False), training.average.module)
        while not finished and not stop_asked.is_set():
            step_began = time.perf_counter()
            num_steps = expected_steps(training.step, training.seconds, train_config)
            learning_rate = scheduled_learning_rate(training.step, num_steps, train_config)
            for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                group["lr"] = learning_rate * group["lr_scale"]

            done = train_config.progress(training.step, training.seconds)
            batch_size = growing_batch_size(done, train_config)
            window = growing_window(done, train_config, model_config.max_seq_len)
            batch = data.batch(training.rows, batch_size, data_seed)  # (B, T + 1)
            training.rows += batch_size
            stories = story_ids(batch, tokenizer.bos_id, tokenizer.eos_id)  # (B, T + 1)
            no_target = (batch[:, 1:] == tokenizer.pad_id) | (stories[:, 1:] != stories[:, :-1])  # nothing tells the next story
            targets = batch[:, 1:].masked_fill(no_target, IGNORE)  # (B, T)
            num_targets = (targets != IGNORE).sum().item()
            train_loss = 0.0
            for rows in torch.arange(batch_size).split(training.choices.micro_batch_size):
                inputs, wanted = batch[rows, :-1].to(device), targets[rows].to(device)
                ids = stories[rows, :-1].to(device) if train_config.mask_stories else None
                with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16):
                    _, loss = model(inputs, wanted, **needs_of(model, story_ids=ids, window=window))
                loss = loss * ((wanted != IGNORE).sum() / num_targets)  # so that micro-batches add up to the batch's mean
                loss.backward()
                train_loss += loss.item()

            gradient_norm = torch.nn.utils.clip_grad_norm_(weights, train_config.grad_clip or math.inf).item()
            if not math.isfinite(train_loss + gradient_norm):
                raise training.not_finite(training.step + 1)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if training.average is not None:
                training.average.pace = learning_rate / train_config.lr_max
                training.average.update_parameters(model)

            now = time.perf_counter()
            training.step, training.tokens, training.seconds = training.step + 1, training.tokens + num_targets, now - began
            finished = train_config.progress(training.step, training.seconds) >= 1
            record = Record(
                training.step, training.tokens, training.seconds, train_loss, None, None, None, learning_rate, gradient_norm,
                tokens_per_second=num_targets / (now - step_began), peak_memory_mb=peak_memory_mb(device),
                flops=training.flops_per_token * training.tokens,
            )  # fmt: skip
            if finished or training.step % train_config.eval_every == 0:
                score = training.evaluate()
                record = replace(
                    record, validation_loss=score.loss, perplexity=score.perplexity, bits_per_byte=score.bits_per_byte,
                    grades=training.grade(),
                )  # fmt: skip
                training.seconds = time.perf_counter() - began
            training.note(record, LOG_EVERY)
            if finished or training.step % train_config.checkpoint_every == 0:
                training.save()
            try:
                yield record
            except GeneratorExit:
                training.save()
                raise
        if not finished:  # Ctrl-C may have come while the last record was looked at
            training.save()


def prepare(
    model_config: ModelConfig, train_config: TrainConfig, name: str, resume: bool, continue_from: str | None, group: str | None
) -> Training:
    """All that a training needs before its first step, with its run folder: a new one, or the one to resume."""
    run = Run(name)
    if not resume:
        run.check_is_new()
    elif train_config.data == "auto":  # what that came to is written in the run folder
        train_config = replace(train_config, data=run.train_config.data)
    if resume and (model_config, train_config) != (run.model_config, run.train_config):
        raise ValueError(f"the run {name!r} can only be resumed with the configs in its folder. To change them: continue_from")
    torch.manual_seed(train_config.seed)
    tokenizer = load_tokenizer(train_config.tokenizer)
    if train_config.grade_stories:
        check_tokenizer(tokenizer)
    device = choose_device(train_config.device)
    model = build_within_memory(model_config, tokenizer.vocab_size, device)
    make_ready(model, train_config)
    if not resume:
        try_out(model)
    data = load_data(
        train_config.data, tokenizer, model_config.max_seq_len,
        packing=train_config.packing, max_stories=train_config.max_stories,
    )  # fmt: skip
    optimizers = build_optimizers(model, train_config)
    validation = data.validation[: train_config.eval_stories]
    average = average_of_weights(model, train_config.weight_averaging) if train_config.weight_averaging else None
    training = Training(run, model, optimizers, tokenizer, data, validation, train_config.grade_stories, average)
    training.flops_per_token, training.code = model_cost(model).training_flops, code_digests(model_config.plugins)
    if resume:
        training.restore()
        training.choices = probe.as_before(training.choices, model, train_config, device)
        if train_config.progress(training.step, training.seconds) >= 1:
            raise ValueError(
                f"the run {name!r} is finished after {training.step:,} steps. To train it further: --continue_from {name}"
            )
        return training
    if continue_from is not None:
        training.start_from(continue_from)
    began = time.perf_counter()
    training.choices = probe.choose(model, train_config, device)
    training.seconds = time.perf_counter() - began
    if train_config.data == "auto":
        train_config = replace(train_config, data=data.name)
    run.create(model_config, train_config, group)
    try:
        training.save()
    except BaseException:  # a full disk or Ctrl-C: a folder without a checkpoint could be neither resumed nor made again
        shutil.rmtree(run.folder)
        raise
    return training


def build_within_memory(config: ModelConfig, vocab_size: int, device: torch.device) -> torch.nn.Module:
    """The model on its device. Raises MemoryError where not even its weights fit."""
    try:
        return build_model(config, vocab_size).to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        free = available_memory(device) / 2**20
        raise MemoryError(f"this model's weights do not fit into the {free:,.0f} MB that are free: take a smaller one") from error


def expected_steps(step: int, seconds: float, config: TrainConfig) -> float:
    """How many steps the budget holds, judged by the pace so far. With max_steps alone it is max_steps, up to rounding."""
    pace = config.progress(step, seconds)
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


def shown_path(path: Path) -> Path:
    """The path as one would type it from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(arguments: Arguments):
    """Train from the command line: one run, or one for each of several seeds."""
    python = shown_path(Path(sys.executable)) if sys.prefix != sys.base_prefix else "python"
    name = arguments.name or default_name(arguments.continue_from or arguments.preset)
    if arguments.seeds > 1:
        train_group(replace(arguments, name=name), lambda one: train_one(one, python), python)
    else:
        train_one(replace(arguments, name=name), python)


def train_one(arguments: Arguments, python: Path | str) -> bool:
    """Train with a progress bar, then tell three stories and say what to do next. False where it was stopped before its end."""
    name, config = arguments.name, arguments.train
    run = Run(name)
    options = {"resume": arguments.resume, "continue_from": arguments.continue_from, "group": arguments.group}
    bar, seen = None, ""
    for record in train(arguments.model, config, name, **options):
        if bar is None:  # only now, so that what is said before stands on lines of its own
            bar = tqdm(total=1.0, miniters=0, bar_format="{percentage:3.0f}%|{bar}| {desc}")
        if record.bits_per_byte is not None:
            seen = f", {record.bits_per_byte:.3f} bits/byte"
        done = min(1.0, config.progress(record.step, record.seconds))
        left = tqdm.format_interval(record.seconds * (1 - done) / done)
        pace = f"{record.tokens_per_second:,.0f} tokens/s"
        told = f"{left} left, step {record.step:,}, loss {record.train_loss:.3f}{seen}, {pace}"
        bar.set_description_str(told, refresh=bar.n == 0)  # the first at once, others as often as a bar may
        bar.update(done - bar.n)
    bar.close()
    if config.progress(record.step, record.seconds) < 1:
        print(f"stopped after {record.step:,} steps and saved. To go on:\n  {python} train.py --name {name} --resume")
        return False
    if config.max_steps and record.step < config.max_steps:
        print(f"the {config.max_minutes:g} minutes were over after {record.step:,} of {config.max_steps:,} steps")
    for story in write_report(name):
        print(f"\n{story}")
    if dead := dead_experts(name):
        print(f"\n{dead}")
    print(f"""
{record.bits_per_byte:.3f} bits per byte after {record.step:,} steps. Loss curve: {shown_path(run.folder / "loss.png")}
More stories:         {python} inference.py {name} "Once upon a time"
Compare with others:  {python} -m evaluation compare {name} ANOTHER, or open model_evaluation.ipynb""")
    return True


if __name__ == "__main__":
    try:
        main(ARGUMENTS)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:  # ImportError: a missing plugin
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0].split("]")[-1].strip()
        sys.exit(f"error: out of memory ({reason}). Make room, or train a smaller model; what was saved goes on with --resume")
    except KeyboardInterrupt:  # before the first step, or for a second time
        sys.exit(130)  # the shell's own code for Ctrl-C
