"""How presets train and write as stories get longer: time and memory of a step, and tokens a second of writing.

    python benchmarks/preset_speed.py
    python benchmarks/preset_speed.py --presets 1m mamba_like --lengths 512 1024

A step is forward, backward and AdamW on as many made-up tokens at every length T, in fewer rows the longer they are. The presets
take turns in rounds, each in a process of its own, and the times are told as a multiple of the first one's in the same round.
Writing is one token after the other, one story at a time, behind so many tokens that the model has read before.

T time.
"""

import itertools
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from train_speed import (
    HERE,
    Variant,
    describe_machine,
    in_new_process,
    new_process,
    quartiles,
    save_page,
    show,
    table,
    take_turn,
    warm_up,
)

import kernels
from config import TrainConfig
from menu import build_model
from model import Cache
from presets import Preset, preset
from probe import Choices

RECURRENT = (
    "mamba_like", "mamba2_like", "griffin_like", "megalodon_like", "gated_deltanet_like", "mamba2_hybrid_like", "qwen3.5_like",
)  # fmt: skip
MICRO_BATCH = 2048  # tokens that go through the model at once, or a single row
READ_AT_ONCE = 256  # tokens, before the writing begins
WRITTEN = 48  # tokens at each place


@dataclass(frozen=True)
class Arguments:
    presets: tuple[str, ...] = ("1m", *RECURRENT)  # the others are compared with the first
    lengths: tuple[int, ...] = (256, 1024, 2048, 8192)  # T
    tokens: int = 8192  # of a step
    places: tuple[int, ...] = (16, 500, 4000)  # how many tokens a story has when the writing is timed
    vocab_size: int = 1024
    rounds: int = 5  # how often the presets take turns
    seconds: float = 2.0  # how long a turn is
    short: bool = False  # a glance: two presets, two lengths, three short rounds
    save: bool = False  # write the tables to benchmarks/preset_speed.md


def main(arguments: Arguments):
    if arguments.short:
        arguments = replace(
            arguments, presets=arguments.presets[:2], lengths=arguments.lengths[:2], tokens=1024, places=arguments.places[:2],
            rounds=3, seconds=0.3,
        )  # fmt: skip
    if arguments.tokens < max(arguments.lengths):
        raise ValueError(f"lengths={arguments.lengths}: give none of more than tokens={arguments.tokens}")
    chosen = {name: preset(name) for name in arguments.presets}
    lines = show([describe_machine(), f"{arguments.tokens} tokens a step, vocabulary {arguments.vocab_size}", ""])
    lines += training_table(chosen, arguments) + show([""]) + writing_table(chosen, arguments)
    if arguments.save:
        save_page(HERE / "preset_speed.md", lines)


def training_table(chosen: dict[str, Preset], arguments: Arguments) -> list[str]:
    """A row for each length, printed as it grows and returned."""
    first, *_ = chosen
    lines = show(table([f"time of a step, times {first}; MB", *chosen], []))
    for T in arguments.lengths:
        variants = {name: variant_of(made, T, arguments) for name, made in chosen.items()}
        with ExitStack() as stack:
            processes = {name: stack.enter_context(new_process()) for name in variants}
            memory = {name: processes[name].submit(warm_up, variant).result()[1] for name, variant in variants.items()}
            speeds = {name: [] for name in variants}
            for _, (name, process) in itertools.product(range(arguments.rounds), processes.items()):
                speeds[name].append(process.submit(take_turn, arguments.seconds).result())
        cells = [f"{quartiles(np.divide(speeds[first], speeds[name]), '.2f')}; {memory[name]:,.0f}" for name in chosen]
        cells[0] = f"{np.median(speeds[first]):,.0f} tokens/s; {memory[first]:,.0f}"
        lines += show(table(["", *chosen], [[f"T {T}", *cells]])[2:])
    return lines


def variant_of(made: Preset, T: int, arguments: Arguments) -> Variant:
    rows = arguments.tokens // T
    model = replace(made.model, max_seq_len=T)
    train = TrainConfig(batch_size=rows, mask_stories=False)
    micro_batch = next(size for size in range(min(rows, max(1, MICRO_BATCH // T)), 0, -1) if rows % size == 0)
    choices = Choices("float32", fastest_attention(), micro_batch, torch.get_num_threads(), compile=False)
    return Variant("ours", choices, Preset(model, train), arguments.vocab_size)


def fastest_attention() -> str:
    try:
        kernels.build()
    except kernels.BuildError:
        return "sdpa"
    return "kernel"


def writing_table(chosen: dict[str, Preset], arguments: Arguments) -> list[str]:
    lines = show(table(["tokens/s of writing", *chosen], []))
    for place in arguments.places:
        speeds = [in_new_process(writing_speed, made, place, arguments.vocab_size) for made in chosen.values()]
        lines += show(table(["", *chosen], [[f"behind {place:,} tokens", *(f"{speed:,.0f}" for speed in speeds)]])[2:])
    return lines


@torch.no_grad()
def writing_speed(made: Preset, place: int, vocab_size: int) -> float:
    """Tokens per second, one after the other, behind so many. For a process of its own."""
    torch.manual_seed(0)
    model = build_model(replace(made.model, max_seq_len=place + WRITTEN), vocab_size).eval()
    tokens = torch.randint(vocab_size, (1, place + WRITTEN))
    cache = Cache()
    for read in tokens[:, :place].split(READ_AT_ONCE, dim=1):
        model(read, cache=cache)
    times = []
    for token in tokens[:, place:].split(1, dim=1):
        began = time.perf_counter()
        model(token, cache=cache)
        times.append(time.perf_counter() - began)
    return 1 / float(np.median(times))


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments, use_underscores=True, description=__doc__))
    except (ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
