"""Train a model: one loop, visible from top to bottom, that yields a record a step.

    python train.py --preset 0.5m_short_and_thick --train.max_minutes 10 --name my_run
    python train.py --name my_run --resume
    python train.py --continue_from my_run --train.lr_max 1e-3
    python train.py --preset 1m --name my_group --seeds 3
    python train.py --preset 2m --name my_idea --seeds_until_decided my_group

B batch, T time, V vocabulary.
"""

import os
import sys

if __name__ == "__main__":  # before torch is imported, so that --help and typos return immediately
    from runs.command_line import parse_or_exit

    ARGUMENTS = parse_or_exit(sys.argv[1:])
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # limit OpenMP spinning: busy-waiting threads starve other processes
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds, so that progress bars do not fill a file

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from config import ModelConfig, TrainConfig
from data.cache import say
from model import IGNORE
from modules.registry import accepted_kwargs
from runs.command_line import Arguments
from runs.folder import Run, default_name
from runs.tables import at_most
from runs.terminal import errors_in_one_line
from training.checkpoint import Record, is_trained
from training.losses import loss_terms
from training.machine import is_out_of_memory, peak_memory_mb
from training.optim import step_optimizers
from training.plan import apply_plan
from training.report import dead_experts, time_left, time_spent, write_report
from training.schedules import expected_steps, growing_batch_size, growing_window, scheduled_learning_rate
from training.seeds import end_with_parent, train_group, train_until_decided
from training.setup import prepare, signals_finish_the_step
from training.stories import one_line

LOG_EVERY = 10  # steps in a row of log_data.csv


def train(
    model_config: ModelConfig, train_config: TrainConfig, name: str, *, resume: bool = False, continue_from: str | None = None,
    group: str | None = None,
) -> Iterator[Record]:
    """Train a model into trained_models/NAME; a generator that yields a Record after every step.

    It may be left at any step, by `break`, Ctrl-C, SIGTERM or SIGHUP: the state is saved then, and resume=True goes on bit for
    bit. A generator that has a name, `records = train(...)`, is not left by `break`: records.close() saves and ends it.

    Parameters
    ----------
    model_config, train_config : ModelConfig, TrainConfig
        The architecture, and how it is trained.
    name : str
        The run; its folder must be new, unless it is resumed.
    resume : bool, default False
        Go on with a run that was stopped.
    continue_from : str, optional
        A finished run whose best weights to start from.
    group : str, optional
        The group of runs with other seeds that this one belongs to.

    Yields
    ------
    Record
        Step, losses, learning rate, speed; validation scores after every eval_every steps.

    Raises
    ------
    ValueError, OSError
        With the cure, before the first step.
    FloatingPointError
        If the loss is no longer finite; what was saved before stays.

    Examples
    --------
    >>> for record in train(ModelConfig(), TrainConfig(max_steps=100), "my_run"):  # doctest: +SKIP
    ...     print(record.step, record.train_loss)
    """
    training = prepare(model_config, train_config, name, resume, continue_from, group)
    model, data, optimizers, plan, clock = training.model, training.data, training.optimizers, training.plan, training.clock
    data_seed = train_config.seed if train_config.data_seed is None else train_config.data_seed
    finished = False

    with training.held, signals_finish_the_step() as stop_requested, clock.stopped_while_compiling():
        apply_plan(plan, model, train_config)
        if training.average is not None:
            apply_plan(replace(plan, compile=False), training.average.module, train_config)
        while not finished and not stop_requested.is_set():
            seconds_before = clock.start()  # up to clock.stop() is training, all else is overhead

            # set the learning rate, batch size and attention window of this step
            num_steps = expected_steps(training.step, seconds_before, train_config)
            learning_rate = scheduled_learning_rate(training.step, num_steps, train_config, training.schedule)
            for param_group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
                param_group["lr"] = learning_rate * param_group["lr_scale"]
            progress = train_config.progress(training.step, seconds_before)
            batch_size = growing_batch_size(progress, train_config)
            window = growing_window(progress, train_config, model_config.max_seq_len)

            # gather the batch
            batch = data.batch(training.rows, batch_size, data_seed)  # inputs, targets, story_ids: (B, T); memory
            training.rows += batch_size
            num_targets = (batch.targets != IGNORE).sum().item()

            # forward and backward, a micro-batch at a time; weighted, their losses add up to the mean over the batch
            losses = Counter()  # by name; "next_token" is the cross-entropy
            for rows in torch.arange(batch_size).split(plan.micro_batch_size):
                parts = (None if part is None else part[rows].to(training.device) for part in batch)
                inputs, targets, story_ids, memory = parts
                num_scored = (targets != IGNORE).sum()
                if num_scored == 0:
                    continue
                options = {"story_ids": story_ids if train_config.mask_stories else None, "window": window, "memory": memory}
                with torch.autocast(training.device.type, torch.bfloat16, enabled=plan.dtype == "bfloat16"):
                    _, loss = model(inputs, targets, **accepted_kwargs(model, **options))
                share = num_scored / num_targets
                (loss * share).backward()
                losses.update({name: (term * share).item() for name, term in loss_terms(model, loss).items()})

            # clip and step, between the before_step and after_step of blocks
            gradient_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train_config.grad_clip or math.inf).item()
            if not math.isfinite(losses.total() + gradient_norm):
                raise training.not_finite(training.step + 1)
            step_optimizers(model, optimizers)
            if training.average is not None:
                training.average.lr_fraction = learning_rate / train_config.lr_max
                training.average.update_parameters(model)
            clock.stop()

            # log, evaluate and save
            training.step, training.tokens = training.step + 1, training.tokens + num_targets
            training.tokens_read += data.num_read(batch)
            finished = train_config.progress(training.step, clock.training) >= 1
            record = Record(
                training.step, training.tokens, clock.training, losses.pop("next_token"), None, None, None, learning_rate,
                gradient_norm, losses=dict(losses) or None,
                tokens_per_second=num_targets / (clock.training - seconds_before), peak_memory_mb=peak_memory_mb(training.device),
                flops=training.flops_per_token * training.tokens_read, overhead_seconds=clock.overhead,
            )  # fmt: skip
            if finished or training.step % train_config.eval_every == 0:
                record = training.evaluated(record)
            training.log_record(record, LOG_EVERY)
            if finished or training.step % train_config.checkpoint_every == 0:
                training.save()
            if finished and training.step < 50:
                say(f"only {training.step} steps, too few to learn much: raise --train.max_minutes or --train.max_steps")
            try:
                yield record
            except GeneratorExit:
                training.save()
                raise
        if not finished:  # the signal may have come while the last record was looked at
            training.save()


def shown_path(path: Path) -> Path:
    """The path relative to the current directory, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(arguments: Arguments):
    """Train from the command line: one run, or one for each of several seeds."""
    end_with_parent()
    python = shown_path(Path(sys.executable)) if sys.prefix != sys.base_prefix else "python"
    name = arguments.name or default_name(arguments.continue_from or arguments.preset)
    if arguments.seeds_until_decided or arguments.seeds > 1:
        train_seeds = train_until_decided if arguments.seeds_until_decided else train_group
        train_seeds(replace(arguments, name=name), lambda one: train_one(one, python), python)
    else:
        train_one(replace(arguments, name=name), python)


def train_one(arguments: Arguments, python: Path | str) -> bool:
    """Train with a progress bar, print three stories and the next commands. False if it was stopped before its end."""
    name, config, run = arguments.name, arguments.train, Run(arguments.name)
    if arguments.resume and is_trained(run) and not run.is_reported:
        say(f"the run {name} was killed after its last step: writing its report")
        return report_in_terminal(name, python)
    options = {"resume": arguments.resume, "continue_from": arguments.continue_from, "group": arguments.group}
    bar, record, score = None, None, ""
    for record in train(arguments.model, config, name, **options):
        if bar is None:  # only now, after the lines that preparing prints
            bar = tqdm(total=1.0, miniters=0, bar_format="{percentage:3.0f}%|{bar}| {desc}")
        if record.bits_per_byte is not None:
            score = f", {at_most(record.bits_per_byte, record.is_bound, '.3f')} bits/byte"
            say(one_line(f"step {record.step:,}{score}", record.story))
        line = f"{time_left(record, config)} of training left, step {record.step:,}, loss {record.train_loss:.3f}{score}"
        line += f", {record.tokens_per_second:,.0f} tokens/s"
        bar.set_description_str(line, refresh=bar.n == 0)  # the first at once, others as often as a bar may
        bar.update(min(1.0, config.progress(record.step, record.seconds)) - bar.n)
    if bar is not None:
        bar.close()
    if record is None or config.progress(record.step, record.seconds) < 1:
        steps = f"after {record.step:,} steps" if record else "before the next step"
        print(f"stopped {steps} and saved. To go on:\n  {python} train.py --name {name} --resume")
        return False
    if config.max_steps and record.step < config.max_steps:
        print(f"the {config.max_minutes:g} minutes were over after {record.step:,} of {config.max_steps:,} steps")
    say("writing the report: scoring all validation stories, and three samples")
    return report_in_terminal(name, python)


def report_in_terminal(name: str, python: Path | str) -> bool:
    """Write the report of a run; print its three stories, its score and the next commands. Returns True."""
    run = Run(name)
    print(f"\n{write_report(name)}")
    last = run.log().iloc[-1]
    if dead := dead_experts(name):
        print(f"\n{dead}")
    print(f"""
{at_most(last.bits_per_byte, run.is_bound, ".3f")} bits per byte after {int(last.step):,} steps: {time_spent(run)}
Loss curve:           {shown_path(run.folder / "loss.png")}
More stories:         {python} inference.py {name} "Once upon a time"
Compare with others:  {python} -m evaluation compare {name} ANOTHER, or open model_evaluation.ipynb""")
    return True


if __name__ == "__main__":
    with errors_in_one_line():
        try:
            main(ARGUMENTS)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0].split("]")[-1].strip()
            cure = "Make room, or train a smaller model; what was saved goes on with --resume"
            raise MemoryError(f"out of memory ({reason}). {cure}") from error
