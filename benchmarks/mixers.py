"""Measure how time and memory of every token-mixing block scale with sequence length, and its time per FLOP.

    python benchmarks/mixers.py
    python benchmarks/mixers.py --layers "Attn(window=64)" BlockAttn --lengths 512 1024 2048

A step is a forward and backward pass through one block on random inputs. The number of tokens per step is the same at every
length T (longer rows, fewer of them), so a block that is linear in T takes constant time and memory. Each measurement runs in a
separate process.

Time per FLOP is relative to Attn at T 256, measured in alternation: 1.5 takes 50% longer for the same work. FLOPs are those of
metrics/cost.py. Growth is the exponent of T: 1 + the slope of log time (or log memory) per step over log T, on the longer half.

B batch, T time, D model dim.
"""

import inspect
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from script import Row, in_new_process, quartiles, report, run_script
from train_speed import CPU

import fast
from config import ModelConfig, init_parameters
from metrics.cost import cost_of
from model import rope_table
from modules.contract import layers_to_try
from modules.registry import all_blocks, build_branch
from training.machine import peak_memory_mb

SHAPE = ModelConfig(dim=128, num_layers=1, num_heads=4, num_kv_heads=2)
COMPARED_AT = 256  # tokens
VOCAB_SIZE = 1024
WINDOWED = (  # in addition to each block with its default options: a window makes attention linear
    "Attn(window=128)", "GatedAttn(window=128)", "AlibiAttn(window=128)", "DiffAttn(window=128)", "LatentAttn(window=128)",
    "SinkAttn(window=128)", "SinkAttn(window=128, keep=4)",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    layers: tuple[str, ...] = ()  # layer strings to measure; by default every registered block that mixes tokens
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)  # T
    tokens: int = 8192  # per step
    fast: bool = False  # use the C++ kernels of fast/, not PyTorch alone
    plugins: tuple[str, ...] = ()  # modules whose blocks are registered too
    rounds: int = 9  # rounds in which a block and Attn alternate
    seconds: float = 1.0  # measurement time of a block at each length, and in each round
    short: bool = False  # quick look: three lengths, a quarter of the tokens, three short rounds
    save: str | None = None  # write the raw results to benchmarks/results/SAVE.json


def main(arguments: Arguments):
    if arguments.short:
        arguments = replace(arguments, lengths=arguments.lengths[:3], tokens=arguments.tokens // 4, rounds=3, seconds=0.1)
    if arguments.tokens < max(arguments.lengths) or len(arguments.lengths) < 2:
        raise ValueError(f"lengths={arguments.lengths}: give at least two, none of more than tokens={arguments.tokens}")
    report(tables, measure_all(arguments), arguments.save)


def measure_all(arguments: Arguments) -> dict:
    config = replace(SHAPE, plugins=arguments.plugins)
    results = {}
    for layer in tqdm(arguments.layers or in_new_process(every_mixer, config), leave=False, disable=None):
        costs = [
            in_new_process(measure, layer, config, T, arguments.tokens, arguments.seconds, arguments.fast)
            for T in arguments.lengths
        ]
        ratios = in_new_process(compare, layer, config, arguments.tokens, arguments.rounds, arguments.seconds, arguments.fast)
        seconds, megabytes = zip(*costs, strict=True)
        results[layer] = {"seconds": seconds, "megabytes": megabytes, "time_per_flop": ratios}
    shape = f"dim {config.dim}, {config.num_heads} heads, {config.num_kv_heads} kv heads, {arguments.tokens} tokens a step"
    return {"shape": shape, "fast": arguments.fast, "lengths": arguments.lengths, "results": results}


def tables(raw: dict) -> dict[str, list[Row]]:
    rows = []
    for layer, of in raw["results"].items():
        row = {"": layer}
        for T, seconds, megabytes in zip(raw["lengths"], of["seconds"], of["megabytes"], strict=True):
            row |= {f"T {T}": f"{1e3 * seconds:.1f}", f"T {T}: MB": f"{megabytes:.0f}"}
        row |= {f"growth of {cost}": f"{growth(raw['lengths'], of[unit]):.2f}"
                for cost, unit in (("time", "seconds"), ("memory", "megabytes"))}  # fmt: skip
        column = f"time per FLOP, times Attn at T {COMPARED_AT}"
        rows.append(row | (quartiles(column, of["time_per_flop"], ".2f") if of["time_per_flop"] else {column: "no FLOPs"}))
    kernels = "our kernels" if raw["fast"] else "PyTorch alone"
    return {f"{raw['shape']}, {kernels}; at each length: ms per step; MB that it takes": rows}


def every_mixer(config: ModelConfig) -> list[str]:
    """Layer strings for every token mixer (its forward takes a cache), with a companion block if it cannot run alone."""
    layers = []
    for name, block in all_blocks(config).items():
        if "cache" in inspect.signature(block.forward).parameters and "layer" not in init_parameters(block):
            tried = layers_to_try(name, block)
            alone = any("->" not in layer for layer in tried)
            layers += [name if alone else tried[0], *(layer for layer in WINDOWED if layer.partition("(")[0] == name)]
    return layers


def growth(lengths: tuple[int, ...], per_step: tuple[float, ...]) -> float:
    """Fit the exponent of T of a cost, given per step of a fixed number of tokens, on the longer half of lengths."""
    half = min(len(lengths) // 2, len(lengths) - 2)
    floor = [max(value, 1e-9) for value in per_step[half:]]
    return 1 + np.polyfit(np.log(lengths[half:]), np.log(floor), 1)[0]


def measure(
    layer: str, config: ModelConfig, T: int, tokens: int, seconds: float, with_kernels: bool
) -> tuple[float, float]:
    """Measure seconds and additional megabytes per step; call in a new process."""
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
    """Ratio of a layer's time per FLOP to Attn's, for each round; empty if the layer has no FLOPs."""
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
        if number >= 0:  # the first round is a warm-up
            ratios.append(taken[layer] / taken["Attn"])
    return ratios


def flops(layer: str, config: ModelConfig) -> float:
    """FLOPs per token of a layer string at T = COMPARED_AT."""
    cost = cost_of(replace(config, layers=layer), COMPARED_AT)
    return sum(part.flops for part in cost.parts if part.place.startswith("layers."))


def training_step(layer: str, config: ModelConfig, T: int, tokens: int, with_kernels: bool) -> Callable[[], float]:
    """Make a function that times a forward and backward pass of a layer string, with a memory of T tokens."""
    config = replace(config, layers=layer, max_seq_len=T)
    torch.manual_seed(0)
    branch = build_branch(layer, config, VOCAB_SIZE)
    fast.use(branch, kernels=with_kernels)
    B, D = tokens // T, config.dim
    x, memory, d_y = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D), torch.randn(B, T, D)
    inputs = {"tokens": torch.randint(VOCAB_SIZE, (B, T)), "memory": memory, "story_start": None, "window": None}
    inputs["rope"] = tuple(angles[None] for angles in rope_table(T, config.block_values()["head_dim"], config.rope_theta))

    def step() -> float:
        began, shared = time.perf_counter(), {"losses": defaultdict(float)}
        y = branch(x, shared=shared, **inputs)
        losses = shared["losses"].values()
        torch.autograd.backward([y, *losses], [d_y, *(None for _ in losses)])
        return time.perf_counter() - began

    return step


if __name__ == "__main__":
    run_script(main, Arguments, __doc__)
