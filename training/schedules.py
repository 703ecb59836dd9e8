"""Schedules: learning rate, batch size and attention window in the course of a run."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from numbers import Real

from config import ModelConfig, TrainConfig
from modules.explain import explain
from modules.registry import find_with_options

Schedule = Callable[[float], float]  # the share of the run that is done -> the height of the learning rate


def linear(done: float) -> float:
    return 1 - done


def cosine(done: float) -> float:
    return (1 + math.cos(math.pi * done)) / 2


def wsd(done: float, decay: float = 0.2) -> float:
    """Warm-up, stable, decay: a linear fall in the last share `decay` (Hu et al. 2024, arXiv 2404.06395, section 4.1)."""
    if not 0 < decay <= 1:
        raise ValueError(f"decay={decay}: give a number above 0, up to 1")
    return min(1.0, (1 - done) / decay)


def constant(done: float) -> float:
    return 1.0


# From `done`, which is 0 after the warm-up and 1 at the end, to a height: 1 is lr_max, 0 is lr_min. More arguments are options.
SCHEDULES: dict[str, Schedule] = {"linear": linear, "cosine": cosine, "wsd": wsd, "constant": constant}


def build_schedule(config: TrainConfig, model_config: ModelConfig) -> Schedule:
    """The schedule that config.schedule names, of ours or of a plugin. Raises ValueError unless all its heights are in [0, 1]."""
    function, options = find_with_options("SCHEDULES", config.schedule, SCHEDULES, model_config, supplied=1)
    schedule = partial(function, **options)
    for done in (step / 1000 for step in range(1001)):
        try:
            height = schedule(done)
        except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
            raise ValueError(f"schedule={config.schedule!r} fails at {done:g} of the run: {explain(error)}") from error
        if not isinstance(height, Real) or not 0 <= height <= 1:
            cure = "give a number from 0, which is lr_min, to 1, which is lr_max"
            raise ValueError(f"schedule={config.schedule!r} returns {height!r} at {done:g} of the run: {cure}")
    return schedule


def scheduled_learning_rate(step: int, num_steps: float, config: TrainConfig, schedule: Schedule) -> float:
    """Learning rate of a step (counted from 0) out of num_steps: warm-up, schedule with restarts, final steps at lr_min."""
    warmup = min(config.warmup_steps, num_steps / 2) if config.max_minutes else config.warmup_steps  # minutes may hold few steps
    if step < warmup:
        return config.lr_init + (config.lr_max - config.lr_init) * min(1.0, (step + 1) / warmup)
    if config.final_flat_steps and step >= num_steps - config.final_flat_steps:
        return config.lr_min
    done = (step - warmup) / (num_steps - config.final_flat_steps - warmup)

    lengths = [config.restart_mult**cycle for cycle in range(config.num_restarts + 1)]
    ends = [end / sum(lengths) for end in itertools.accumulate(lengths)]
    cycle = next((cycle for cycle, end in enumerate(ends) if done < end), config.num_restarts)
    start = ends[cycle - 1] if cycle else 0.0
    done = min(1.0, (done - start) / (ends[cycle] - start))
    return config.lr_min + (config.lr_max - config.lr_min) * float(schedule(done))


def expected_steps(step: int, seconds: float, config: TrainConfig) -> float:
    """Estimate the total number of steps from the progress so far; with max_steps alone it is max_steps, up to rounding."""
    progress = config.progress(step, seconds)
    return step / progress if progress else config.max_steps or math.inf


def growing_batch_size(done: float, config: TrainConfig) -> int:
    """Batch size after a fraction `done` of the run: doubled at equal intervals from batch_size_start, batch_size from 0.5 on.

    Small batches make the fastest progress early, larger ones reach a lower loss in the end.
    """
    start = config.batch_size_start or config.batch_size
    doublings = math.ceil(math.log2(config.batch_size / start))
    return min(config.batch_size, start * 2 ** int(2 * done * doublings))


def growing_window(done: float, config: TrainConfig, max_seq_len: int) -> int | None:
    """Attention window after a fraction `done` of the run: grows linearly from window_start, None (unlimited) from 0.5 on."""
    if config.window_start is None or done >= 0.5:
        return None
    return config.window_start + int((max_seq_len - config.window_start) * 2 * done)
