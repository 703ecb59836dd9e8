"""Training and generation of presets by sequence length: time and memory of a step, profile, tokens/s of generation.

    python benchmarks/preset_speed.py
    python benchmarks/preset_speed.py --threads 1 --presets 1m mamba_like --lengths 512 1024

A step is forward, backward and AdamW on the same number of random tokens at every length T, in micro-batches of about 2,048
tokens or of one row. The presets take turns in rounds, each in its own process; times are multiples of the first preset's in the
same round. Growth is the exponent of T for time and memory of a row, over the longer half of the lengths: 1 is linear, 2
quadratic.

The profile of one step shows the share of each kind of operation, at the shortest and at the longest T. A view only costs its
call; time outside of operations is Python, torch's bookkeeping and the overhead of the profiler. Generation is token by token,
one story at a time, after a prefix of the given length.

T time.
"""

import itertools
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no log lines of torch's profiler
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mixers import growth
from script import Row, in_new_process, new_process, quartiles, report, run_script
from train_speed import UNDER_WAY, Variant, take_turn, warm_up

from config import TrainConfig
from fast import build
from model import Cache
from modules.registry import build_model
from runs.execution import ExecutionPlan
from runs.presets import Preset, preset

RECURRENT = (
    "mamba_like", "mamba2_like", "griffin_like", "megalodon_like", "gated_deltanet_like", "mamba2_hybrid_like", "qwen3.5_like",
)  # fmt: skip
KINDS = {  # prefixes of the names of operations in a profile
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linalg_solve", "aten::triangular_solve"),
    "attention": ("basegpt::attention", "aten::scaled_dot_product", "aten::_scaled_dot_product", "Attention"),
    "scan": ("basegpt::scan", "basegpt::selective_scan", "Scan", "SelectiveScan"),
    "optimizer": ("Optimizer.", "aten::_fused_adam"),
    "calls": ("autograd::engine",),
}
VIEWS = {  # operations that do not touch the data of a tensor
    "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "expand", "t", "transpose", "permute", "unsqueeze",
    "squeeze", "select", "slice", "split", "unbind", "unflatten", "flatten", "detach", "alias", "empty", "empty_like",
    "empty_strided", "new_empty", "lift_fresh",
}  # fmt: skip
REST = "elementwise and copies"  # memory-bound
WHOLE = ("attention", "scan", "optimizer")  # kinds that include all operations inside
MICRO_BATCH = 2048  # tokens per forward pass, at least one row
READ_AT_ONCE = 256  # tokens of the prefix per forward pass
WRITTEN = 48  # tokens generated after each prefix


@dataclass(frozen=True)
class Arguments:
    presets: tuple[str, ...] = ("1m", *RECURRENT)  # the others are compared with the first
    lengths: tuple[int, ...] = (256, 2048, 4096, 8192)  # T
    tokens: int = 8192  # per step
    places: tuple[int, ...] = (16, 500, 4000)  # lengths of the prefixes for generation, increasing
    threads: int | None = None  # of the CPU; None is torch's default
    vocab_size: int = 1024
    rounds: int = 5  # turns of each preset
    seconds: float = 1.0  # per turn, at least one step
    short: bool = False  # quick check: two presets, two lengths, three short rounds
    save: str | None = None  # write the raw results to benchmarks/results/SAVE.json


def main(arguments: Arguments):
    if arguments.short:
        arguments = replace(
            arguments, presets=arguments.presets[:2], lengths=arguments.lengths[:2], tokens=1024, places=arguments.places[:2],
            rounds=3, seconds=0.3,
        )  # fmt: skip
    check(arguments)
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    chosen = {name: preset(name) for name in arguments.presets}
    speeds, megabytes, shares = measure_steps(chosen, arguments)
    raw = {
        "tokens": arguments.tokens, "vocab_size": arguments.vocab_size, "lengths": arguments.lengths, "tokens_per_second": speeds,
        "megabytes": megabytes, "shares": shares, "prefixes": arguments.places,
        "written_per_second": {
            name: in_new_process(writing_speeds, made, arguments.places, arguments.vocab_size, torch.get_num_threads())
            for name, made in chosen.items()
        },
    }  # fmt: skip
    report(tables, raw, arguments.save)


def check(arguments: Arguments):
    """Raise ValueError for invalid arguments."""
    lengths, places = arguments.lengths, arguments.places
    if list(lengths) != sorted(set(lengths)) or arguments.tokens < max(lengths):
        raise ValueError(f"lengths={lengths}: give increasing lengths of at most tokens={arguments.tokens}")
    if any(later - earlier < WRITTEN for earlier, later in itertools.pairwise((-WRITTEN, *places))):
        raise ValueError(f"places={places}: give increasing numbers, at least {WRITTEN} apart, the tokens generated at each")
    if arguments.threads is not None and arguments.threads < 1:
        raise ValueError(f"threads={arguments.threads}: give a whole number of at least 1")


def measure_steps(chosen: dict[str, Preset], arguments: Arguments) -> tuple[dict, dict, dict]:
    """Tokens/s by preset, length and round; megabytes by preset and length; shares of time by preset at the extreme lengths."""
    speeds, megabytes, shares = {name: [] for name in chosen}, {name: [] for name in chosen}, {}
    for T in tqdm(arguments.lengths, leave=False, disable=None):
        with ExitStack() as stack:
            processes = {name: stack.enter_context(new_process()) for name in chosen}
            for name, process in processes.items():
                megabytes[name].append(process.submit(warm_up, variant_of(chosen[name], T, arguments)).result()[1])
                speeds[name].append([])
            for _, (name, process) in itertools.product(range(arguments.rounds), processes.items()):
                speeds[name][-1].append(process.submit(take_turn, arguments.seconds).result())
            if T in (arguments.lengths[0], arguments.lengths[-1]):
                shares |= {f"{name}, T {T}": process.submit(shares_of_time).result() for name, process in processes.items()}
    return speeds, megabytes, shares


def tables(raw: dict) -> dict[str, list[Row]]:
    """Tables of training steps, of their shares of time, and of generation."""
    speeds, shares = raw["tokens_per_second"], raw["shares"]
    first, *_ = speeds
    steps = []
    for i, T in enumerate(raw["lengths"]):
        row = {"": f"T {T}"}
        for name in speeds:
            row |= quartiles(name, np.divide(speeds[first][i], speeds[name][i]), ".2f")
            row |= {f"{name}: tokens/s": f"{np.median(speeds[name][i]):.0f}", f"{name}: MB": f"{raw['megabytes'][name][i]:.0f}"}
        steps.append(row)
    kinds = [*KINDS, REST]
    profiles = [
        {"": name} | {f"{kind}, %": f"{100 * of[kind]:.0f}" for kind in kinds} | {"most": max(kinds, key=of.__getitem__)}
        for name, of in shares.items()
    ]
    written = [
        {"": f"after {prefix:,} tokens"} | {name: f"{of[i]:.0f}" for name, of in raw["written_per_second"].items()}
        for i, prefix in enumerate(raw["prefixes"])
    ]
    step = f"A training step of {raw['tokens']} tokens, vocabulary {raw['vocab_size']}"
    steps += growth_rows(raw["lengths"], {name: np.median(of, axis=1) for name, of in speeds.items()}, raw["megabytes"])
    return {
        f"{step}: time in multiples of {first}'s, with quartiles; tokens/s; MB": steps,
        "Share of a step's time": profiles,
        "Tokens/s of generation": written,
    }


def growth_rows(lengths: Sequence[int], paces: dict[str, Sequence], memories: dict[str, Sequence]) -> list[Row]:
    """Growth of time, and of memory once a micro-batch is one row; no rows for too few lengths."""
    rows = []
    if len(lengths) > 1:
        rows.append({"": "growth of time"} | {name: f"{growth(lengths, 1 / np.array(of)):.2f}" for name, of in paces.items()})
    alone = np.array(lengths) >= MICRO_BATCH
    if alone.sum() > 1:
        longer = np.array(lengths)[alone]
        grown = {name: growth(tuple(longer), np.array(of)[alone] / longer) for name, of in memories.items()}
        rows.append({"": "growth of memory"} | {name: f"{power:.2f}" for name, power in grown.items()})
    return rows


def shares_of_time() -> dict[str, float]:
    """Profile a step of the variant of this process: share of time by kind of operation."""
    ((_, step),) = UNDER_WAY
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        began = time.perf_counter()
        step()
        seconds = time.perf_counter() - began
    shares = dict.fromkeys([*KINDS, REST], 0.0)
    for event in profile.events():
        shares[kind_of(event)] += 1e-6 * event.self_cpu_time_total / seconds
    shares["calls"] += max(0.0, 1 - sum(shares.values()))
    return shares


def kind_of(event) -> str:
    """Kind of an operation in a profile, or of an operation that contains it."""
    found = own_kind(event.name)
    while event.cpu_parent is not None:
        event = event.cpu_parent
        outer = own_kind(event.name)
        if outer in WHOLE or (found == REST and outer == "matrix products"):
            found = outer
    return found


def own_kind(name: str) -> str:
    if name.removeprefix("aten::") in VIEWS:
        return "calls"
    return next((kind for kind, beginnings in KINDS.items() if name.startswith(beginnings)), REST)


def variant_of(made: Preset, T: int, arguments: Arguments) -> Variant:
    rows = arguments.tokens // T
    model = replace(made.model, max_seq_len=T)
    train = TrainConfig(batch_size=rows, mask_stories=False)
    micro_batch = next(size for size in range(min(rows, max(1, MICRO_BATCH // T)), 0, -1) if rows % size == 0)
    has_compiler = build.fingerprint() != "none"
    plan = ExecutionPlan("float32", has_compiler, micro_batch, torch.get_num_threads(), compile=False)
    return Variant("ours", plan, Preset(model, train), arguments.vocab_size)


@torch.no_grad()
def writing_speeds(made: Preset, places: tuple[int, ...], vocab_size: int, threads: int) -> list[float]:
    """Tokens per second of generation after each prefix. Runs in its own process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build_model(replace(made.model, max_seq_len=places[-1] + WRITTEN), vocab_size).eval()
    cache, length, speeds = Cache(), 0, []
    for place in places:
        for size in [READ_AT_ONCE] * ((place - length) // READ_AT_ONCE) + [(place - length) % READ_AT_ONCE]:
            model(torch.randint(vocab_size, (1, size)), cache=cache)
        times = []
        for token in torch.randint(vocab_size, (WRITTEN, 1, 1)):
            began = time.perf_counter()
            model(token, cache=cache)
            times.append(time.perf_counter() - began)
        speeds.append(1 / float(np.median(times)))
        length = place + WRITTEN
    return speeds


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
