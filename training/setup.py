"""Set up a training run: model, data, optimizers, run folder and its lock; the signals that stop it."""

import math
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType

import torch

from config import ModelConfig, TrainConfig
from data.sources import from_anywhere
from inference import load_run_tokenizer
from metrics.cost import model_cost
from metrics.world_grades import check_tokenizer
from modules.data_plugins import attach_memory, load_training_data
from modules.model_contract import try_out
from modules.registry import build_model
from runs.code import code_digests
from runs.folder import Run, group_of, run_names
from runs.lock import locked
from tokenizer import Tokenizer, load_tokenizer
from training.autotune import choose_plan, resumed_plan
from training.checkpoint import Training
from training.configure import configure_for_training
from training.machine import available_memory, choose_device, is_out_of_memory
from training.optim import average_of_weights, build_optimizers
from training.schedules import build_schedule
from training.stopwatch import Stopwatch
from training.trials import try_loss, try_optimizers

STOP_SIGNALS = [  # Ctrl-C; kill, or the notice of a cluster; a closed terminal
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
TRAINING_THREADS: list[threading.Thread] = []  # those with a training that has not ended


def prepare(*arguments) -> Training:
    """`set_up`, with nothing held if it fails: leave `training.held` when training stops."""
    with ExitStack() as held:
        training = set_up(*arguments, held)
        training.held = held.pop_all()
        return training


def set_up(
    model_config: ModelConfig, train_config: TrainConfig, name: str, resume: bool, continue_from: str | None, group: str | None,
    held: ExitStack,
) -> Training:  # fmt: skip
    """Build everything for the first step, and create the run folder or restore it to resume; lock it.

    Raises ValueError or OSError with the cure, MemoryError if the model does not fit.
    """
    held.enter_context(only_training_thread())
    clock, run = Stopwatch(), Run(name)
    if not resume:
        run.check_is_new()
    else:
        run.check_is_begun()
        held.enter_context(locked(run))
        run.remove_unfinished()
    if resume and train_config.data == "auto":  # the run folder records what "auto" resolved to
        train_config = replace(train_config, data=run.train_config.data)
    if resume and (model_config, train_config) != (run.model_config, run.train_config):
        raise ValueError(f"the run {name!r} can only be resumed with the configs in its folder. To change them: continue_from")
    torch.manual_seed(train_config.seed)
    runs = relatives(name, resume, continue_from, group)
    tokenizer, source = find_tokenizer(train_config.tokenizer, runs), find_data(train_config.data, runs)
    if train_config.grade_stories:
        check_tokenizer(tokenizer)
    device = choose_device(train_config.device)
    model = build_within_memory(model_config, tokenizer, device)
    configure_for_training(model, train_config)
    schedule = build_schedule(train_config, model_config)
    if not resume:
        try_out(model)
        try_optimizers(model, train_config)
        try_loss(model, train_config)
    optimizers = build_optimizers(model, train_config)
    data = load_training_data(replace(train_config, data=source), model_config, tokenizer)
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
            report = "" if run.is_reported else f"; write_report({name!r}) writes its report, which is missing"
            raise ValueError(
                f"the run {name!r} is finished after {training.step:,} steps{report}. To train it further: --continue_from {name}"
            )
        if math.isinf(training.best_loss):  # a kill may have come between the first checkpoint and the first weights
            training.save_model()
        training.record_execution()
        return training
    if continue_from is not None:
        training.start_from(continue_from)
    training.plan = choose_plan(model, train_config, device)
    if train_config.data == "auto":
        train_config = replace(train_config, data=data.name)
    run.check_is_new()  # another process may have trained it in the meantime
    run.make_folder()
    held.enter_context(locked(run))
    try:
        run.create(model_config, train_config, group)
        if content := getattr(tokenizer, "content", None):  # a class of a plugin may have none
            run.save_text("tokenizer.json", content)
        if (path := from_anywhere(source)) != train_config.data:
            run.save_text("data_path.txt", f"{path}\n")
        training.record_execution()
        training.save()
    except BaseException:  # a full disk or Ctrl-C: nothing was trained
        shutil.rmtree(run.folder, ignore_errors=True)
        raise
    return training


def relatives(name: str, resume: bool, continue_from: str | None, group: str | None) -> list[Run]:
    """The runs with which a run shares its tokenizer and data: itself, or the one that it continues, or those of its group."""
    if resume or continue_from:
        return [Run(name if resume else continue_from)]
    return [Run(member) for member in run_names("checkpoint.pth") if group and group_of(member) == group]


def find_tokenizer(tokenizer: str, runs: list[Run]) -> Tokenizer:
    """The tokenizer of the first run whose config names it so, as there may be another one of this name by now; or load it."""
    same = [run.name for run in runs if run.train_config.tokenizer == tokenizer]
    return load_run_tokenizer(same[0]) if same else load_tokenizer(tokenizer)


def find_data(source: str, runs: list[Run]) -> str:
    """The source by the path of the first run whose config names it so, as this may be another working directory."""
    return next((run.data for run in runs if run.train_config.data == source), source)


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
def only_training_thread() -> Iterator[None]:
    """Raise ValueError if another thread is training: the random numbers and the number of threads of torch are global."""
    thread = threading.current_thread()
    if any(other is not thread and other.is_alive() for other in TRAINING_THREADS):
        raise ValueError("another thread of this process is training: wait until it ends, or train in another process")
    TRAINING_THREADS.append(thread)
    try:
        yield
    finally:
        TRAINING_THREADS.remove(thread)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict]:
    """Handle STOP_SIGNALS; yield their handlers from before. A SIGHUP that nohup ignores is still ignored."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield {}
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ignored = [number for number, before in previous.items() if before is signal.SIG_IGN and number != signal.SIGINT]
    for number in previous.keys() - ignored:
        signal.signal(number, handler)
    try:
        yield previous
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def signals_finish_the_step() -> Iterator[threading.Event]:
    """Yield an event that the first of STOP_SIGNALS sets; then Ctrl-C interrupts immediately.

    The others do not, as a closed terminal may send several.
    """
    stop_requested = threading.Event()

    def request_stop(number, frame):
        stop_requested.set()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])

    with handled(request_stop) as previous:
        yield stop_requested
