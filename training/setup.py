"""Set up a training run: model, data, optimizers, run folder; Ctrl-C."""

import shutil
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace

import torch

from config import ModelConfig, TrainConfig
from metrics.cost import model_cost
from metrics.world_grades import check_tokenizer
from modules.data_plugins import attach_memory, load_training_data
from modules.model_contract import try_out
from modules.registry import build_model
from runs.code import code_digests
from runs.folder import Run
from tokenizer import Tokenizer, load_tokenizer
from training.autotune import choose_plan, resumed_plan
from training.checkpoint import Training
from training.configure import configure_for_training
from training.machine import available_memory, choose_device, is_out_of_memory
from training.optim import average_of_weights, build_optimizers
from training.schedules import build_schedule
from training.stopwatch import Stopwatch
from training.trials import try_loss, try_optimizers


def prepare(
    model_config: ModelConfig, train_config: TrainConfig, name: str, resume: bool, continue_from: str | None, group: str | None
) -> Training:
    """Build everything for the first step, and create the run folder or restore it to resume.

    Raises ValueError or OSError with the cure, MemoryError if the model does not fit.
    """
    clock, run = Stopwatch(), Run(name)
    if not resume:
        run.check_is_new()
    elif train_config.data == "auto":  # the run folder records what "auto" resolved to
        train_config = replace(train_config, data=run.train_config.data)
    if resume and (model_config, train_config) != (run.model_config, run.train_config):
        raise ValueError(f"the run {name!r} can only be resumed with the configs in its folder. To change them: continue_from")
    torch.manual_seed(train_config.seed)
    tokenizer = load_tokenizer(train_config.tokenizer)
    if train_config.grade_stories:
        check_tokenizer(tokenizer)
    device = choose_device(train_config.device)
    model = build_within_memory(model_config, tokenizer, device)
    configure_for_training(model, train_config)
    optimizers, schedule = build_optimizers(model, train_config), build_schedule(train_config, model_config)
    if not resume:
        try_out(model)
        try_optimizers(model, train_config)
        try_loss(model, train_config)
    data = load_training_data(train_config, model_config, tokenizer)
    attach_memory(model, data)
    validation = data.validation[: train_config.eval_stories]
    average = average_of_weights(model, train_config.ema_decay) if train_config.ema_decay else None
    training = Training(run, model, optimizers, tokenizer, data, validation, train_config.grade_stories, average, clock=clock)
    training.schedule, training.flops_per_token = schedule, model_cost(model).training_flops
    training.code = code_digests(model_config.plugins)
    if resume:
        training.restore()
        training.plan = resumed_plan(training.plan, model, train_config, device)
        if train_config.progress(training.step, training.clock.training) >= 1:
            raise ValueError(
                f"the run {name!r} is finished after {training.step:,} steps. To train it further: --continue_from {name}"
            )
        training.record_execution()
        return training
    if continue_from is not None:
        training.start_from(continue_from)
    training.plan = choose_plan(model, train_config, device)
    if train_config.data == "auto":
        train_config = replace(train_config, data=data.name)
    run.create(model_config, train_config, group)
    try:
        training.record_execution()
        training.save()
    except BaseException:  # a full disk or Ctrl-C: a folder without a checkpoint would block both resuming and restarting
        shutil.rmtree(run.folder)
        raise
    return training


def build_within_memory(config: ModelConfig, tokenizer: Tokenizer, device: torch.device) -> torch.nn.Module:
    """Build the model on its device. Raises MemoryError if not even its weights fit."""
    try:
        return build_model(config, tokenizer.vocab_size, tokenizer).to(device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        free = available_memory(device) / 2**20
        raise MemoryError(f"this model's weights do not fit into the {free:,.0f} MB that are free: take a smaller one") from error


@contextmanager
def ctrl_c_finishes_the_step():
    """Yield an event that the first Ctrl-C sets; the second one interrupts immediately."""
    stop_requested = threading.Event()

    def request_stop(signal_number, frame):
        stop_requested.set()
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield stop_requested
        return
    previous = signal.signal(signal.SIGINT, request_stop)
    try:
        yield stop_requested
    finally:
        signal.signal(signal.SIGINT, previous)
