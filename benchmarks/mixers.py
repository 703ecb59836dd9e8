"""How time and memory of every block that mixes tokens grow with the length, and how fast each is for what it computes.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --layers "Attn(window=64)" BlockAttn --lengths 512 1024 2048

A step is forward and backward through a block alone, on made-up numbers. There are as many tokens in it at every length T, in
fewer rows the longer they are, so that a block whose time and memory are linear in T takes as much of both at every length. Each
number comes from a process of its own.

Time per FLOP is compared with Attn at T 256, step by step in turns: 1.5 takes half as long again for as much work. FLOPs are
those of cost.py. Growth is the power of T: 1 + the slope of log time (or log memory) per step over log T, over the longer half.

B batch, T time, D model dim.
"""

import inspect
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import HERE, describe_machine, in_new_process, quartiles, run_script, save_page, show, table
from train_speed import CPU

import fast
from config import ModelConfig
from metrics.cost import cost_of
from model import rope_table
from modules.contract import layers_to_try
from modules.registry import all_blocks, build_branch
from training.machine import peak_memory_mb

SHAPE = ModelConfig(dim=128, num_layers=1, num_heads=4, num_kv_heads=2)
COMPARED_AT = 256  # tokens
VOCAB_SIZE = 1024
WINDOWED = (  # beside each block as it is without options: what makes a quadratic one linear
    "Attn(window=128)", "GatedAttn(window=128)", "AlibiAttn(window=128)", "DiffAttn(window=128)", "LatentAttn(window=128)",
    "SinkAttn(window=128)", "SinkAttn(window=128, keep=4)",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    layers: tuple[str, ...] = ()  # layer strings to measure; by default every block of the menu that mixes tokens
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # T
    tokens: int = 8192  # of a step
    fast: bool = False  # with the C++ kernels of fast/, or by PyTorch alone
    plugins: tuple[str, ...] = ()  # modules whose blocks join the menu
    rounds: int = 9  # how often a block and Attn take turns
    seconds: float = 1.0  # how long a block is measured at each length, and a turn is
    short: bool = False  # a glance: three lengths, a quarter of the tokens, three short rounds
    save: bool = False  # write the table to benchmarks/mixers.md


def main(arguments: Arguments):
    if arguments.short:
        arguments = replace(arguments, lengths=arguments.lengths[:3], tokens=arguments.tokens // 4, rounds=3, seconds=0.1)
    if arguments.tokens < max(arguments.lengths) or len(arguments.lengths) < 2:
        raise ValueError(f"lengths={arguments.lengths}: give at least two, none of more than tokens={arguments.tokens}")
    lines = measure_all(arguments)
    if arguments.save:
        save_page(HERE / "mixers.md", lines)


def measure_all(arguments: Arguments) -> list[str]:
    """The table, printed block by block and returned."""
    config = replace(SHAPE, plugins=arguments.plugins)
    layers = arguments.layers or in_new_process(every_mixer, config)
    lengths = [f"T {T}" for T in arguments.lengths]
    head = ["", *lengths, "growth of time", "growth of memory", f"time per FLOP, times Attn at T {COMPARED_AT}"]
    shape = f"dim {config.dim}, {config.num_heads} heads, {config.num_kv_heads} kv heads, {arguments.tokens} tokens a step"
    how = f"fast={arguments.fast}; each length: ms per step, MB that it takes"
    lines = show([describe_machine(), "", f"{shape}, {how}", "", *table(head, [])])
    for layer in layers:
        costs = [
            in_new_process(measure, layer, config, T, arguments.tokens, arguments.seconds, arguments.fast)
            for T in arguments.lengths
        ]
        ratios = in_new_process(compare, layer, config, arguments.tokens, arguments.rounds, arguments.seconds, arguments.fast)
        times, memories = zip(*costs, strict=True)
        cells = [f"{1e3 * seconds:,.1f}, {megabytes:,.0f}" for seconds, megabytes in costs]
        growths = [f"{growth(arguments.lengths, values):.2f}" for values in (times, memories)]
        lines += show(table(head, [[layer, *cells, *growths, quartiles(ratios, ".2f") if ratios else "no FLOPs"]])[2:])
    return lines


def every_mixer(config: ModelConfig) -> list[str]:
    """Layer strings for every block that asks for a cache, as those do that mix tokens; in company where none is tried alone."""
    layers = []
    for name, block in all_blocks(config).items():
        if "cache" in inspect.signature(block.forward).parameters:
            tried = layers_to_try(name, block)
            alone = any("->" not in layer for layer in tried)
            layers += [name if alone else tried[0], *(layer for layer in WINDOWED if layer.partition("(")[0] == name)]
    return layers


def growth(lengths: tuple[int, ...], per_step: tuple[float, ...]) -> float:
    """The power of T that a cost grows by, whose values per step of as many tokens are given; over the longer half of lengths."""
    half = min(len(lengths) // 2, len(lengths) - 2)
    floor = [max(value, 1e-9) for value in per_step[half:]]
    return 1 + np.polyfit(np.log(lengths[half:]), np.log(floor), 1)[0]


def measure(
    layer: str, config: ModelConfig, T: int, tokens: int, seconds: float, with_kernels: bool
) -> tuple[float, float]:
    """Seconds per step, and the additional megabytes it takes; to be called in a new process."""
    step = training_step(layer, config, T, tokens, with_kernels)
    before = peak_memory_mb(CPU)
    step()
    memory = peak_memory_mb(CPU) - before
    times = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(step())
    return float(np.median(times)), memory


def compare(
    layer: str, config: ModelConfig, tokens: int, rounds: int, seconds: float, with_kernels: bool
) -> list[float]:
    """Time per FLOP of a layer over that of Attn, in each round; nothing for a layer whose work is not counted in FLOPs."""
    work = {name: flops(name, config) for name in (layer, "Attn")}
    if not work[layer]:
        return []
    steps = {name: training_step(name, config, COMPARED_AT, max(tokens, COMPARED_AT), with_kernels) for name in (layer, "Attn")}
    ratios = []
    for number in range(-1, rounds):
        taken = {}
        for name, step in steps.items():
            times = [step()]
            while number >= 0 and sum(times) < seconds:
                times.append(step())
            taken[name] = np.median(times) / work[name]
        if number >= 0:  # the first round is to warm up
            ratios.append(taken[layer] / taken["Attn"])
    return ratios


def flops(layer: str, config: ModelConfig) -> float:
    """Of the blocks of a layer string, per token, where T is COMPARED_AT."""
    cost = cost_of(replace(config, layers=layer), COMPARED_AT)
    return sum(part.flops for part in cost.parts if part.place.startswith("layers."))


def training_step(layer: str, config: ModelConfig, T: int, tokens: int, with_kernels: bool) -> Callable[[], float]:
    """Make a function that runs a layer string forward and backward, with a memory of T tokens, and returns the seconds."""
    config = replace(config, layers=layer, max_seq_len=T)
    torch.manual_seed(0)
    branch = build_branch(layer, config, VOCAB_SIZE)
    fast.use(branch, kernels=with_kernels)
    B, D = tokens // T, config.dim
    x, memory, d_y = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D), torch.randn(B, T, D)
    inputs = {"tokens": torch.randint(VOCAB_SIZE, (B, T)), "memory": memory, "story_start": None, "window": None}
    inputs["rope"] = tuple(angles[None] for angles in rope_table(T, config.block_values()["head_dim"], config.rope_theta))

    def step() -> float:
        began, shared = time.perf_counter(), {}
        y = branch(x, shared=shared, **inputs)
        torch.autograd.backward([y, *shared.get("losses", [])], [d_y, *(None for _ in shared.get("losses", []))])
        return time.perf_counter() - began

    return step


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
