"""Autotuning: find the fastest number format, kernels, micro-batch, number of threads and compile setting by measurement.

A few seconds of training steps on random tokens decide. The result is cached, one file per machine, architecture and batch size.
Every plan, measured or prescribed by the config, is first compared with the plain model.
"""

import copy
import hashlib
import json
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from config import TrainConfig, divisors, to_json
from data.cache import default_cache_dir, keep, say
from fast import build
from model import GPT
from runs.execution import ExecutionPlan
from training.compile_trial import COMPILE_TAKES, compile_is_worth_trying, expected_seconds, measure_compiled, trial_seconds
from training.machine import available_memory, check_compiler, describe_machine, is_out_of_memory
from training.plan import difference, memory_needed, seconds_per_token

MICRO_BATCH_TOKENS = range(512, 4096 + 1)  # fewer do not fill a CPU's cores, more do not fit its caches
SHORT_RUN = 20  # seconds: autotuning does not pay for shorter runs


def choose_plan(model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """Find the fastest plan that fits into memory and obeys the config; print it with the reasons.

    Raises MemoryError if no plan fits, ValueError if this machine lacks what the config prescribes.
    """
    if config.compile is True:
        check_compiler(device)
    if config.fast is True and device.type == "cpu":
        build.build()
    path = default_cache_dir() / f"plan-{cache_key(model, config, device)}.json"
    measured = read_measurements(path)
    model = copy.deepcopy(model)
    with preserve_random_state_and_threads():
        sizes = micro_batch_sizes(model, config, device)
        if "eager" not in measured:
            guess = first_guess(config, sizes, device)
            run = expected_seconds(seconds_per_token(model, config, guess, device), model, config)
            if config.compile is True and run < COMPILE_TAKES:
                say(f"compile=True: compiling may take longer than this run, about {run:.0f} s. compile=auto would skip it")
            if run < SHORT_RUN:
                return verified(replace(guess, compile=config.compile is True), model, config, device)
            say("measuring how this machine trains this model fastest, once")
            measured = measure(model, config, device, guess, sizes)
        elif device.type == "cpu" and config.threads == "auto":  # the best number depends on what else the machine is doing
            measured |= fastest_threads(model, config, ExecutionPlan(**measured["eager"]), device)
        if compile_is_worth_trying(measured, model, config, device):
            say("trying torch.compile, which takes a minute or two")
            measured["compiled"] = measure_compiled(model, config, measured, trial_seconds(measured, model, config), device)
        plan = fit_memory(decide(measured, model, config), sizes)
        if config.compile is True:
            plan = verified(plan, model, config, device)
    if not measured["notes"] or build.fingerprint() == "none":  # a failed build, perhaps on a full disk, is tried again next time
        keep(path, json.dumps(measured))
    return plan


def resumed_plan(plan: ExecutionPlan, model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """The plan of a resumed run, or the nearest one that this machine still supports, which is reported.

    Raises MemoryError if no plan fits into memory.
    """
    if plan.fast and config.fast == "auto":
        try:
            build.build()
        except build.BuildError as error:
            plan = replace(plan, fast=False)
            say(f"going on without the C++ kernels, so not to the last bit as without a break: {error}")
    with preserve_random_state_and_threads():
        return fit_memory(plan, micro_batch_sizes(copy.deepcopy(model), config, device))


def fit_memory(plan: ExecutionPlan, sizes: list[int]) -> ExecutionPlan:
    """Reduce the micro-batch of an earlier plan to the largest size that fits now."""
    rows = plan.micro_batch_size
    if rows <= sizes[0]:
        return plan
    say(f"{sizes[0]} row{'s' * (sizes[0] > 1)} at a time instead of {rows}, because less memory is free than before")
    return replace(plan, micro_batch_size=sizes[0])


def read_measurements(path: Path) -> dict[str, Any]:
    """Read the cached measurements; empty if missing, damaged or not readable."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def cache_key(model: GPT, config: TrainConfig, device: torch.device) -> str:
    """Hash everything that the measurements depend on."""
    fields = ("batch_size", "mask_stories", "loss", "loss_chunk", "gradient_checkpointing", "dtype", "micro_batch_size",
              "threads", "fast")  # fmt: skip
    prescribed = [getattr(config, field) for field in fields]
    machine = [describe_machine(device), most_threads(), build.fingerprint(), os.environ.get("CXX")]
    text = json.dumps([machine, to_json(model.config), model.vocab_size, prescribed])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def most_threads() -> int:
    """torch's default number of threads: the cores, or $OMP_NUM_THREADS. Cached, because training changes it."""
    return torch.get_num_threads()


@contextmanager
def preserve_random_state_and_threads():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def first_guess(config: TrainConfig, sizes: list[int], device: torch.device) -> ExecutionPlan:
    """A plan that does well on most machines, with a micro-batch of up to 8 sequences."""
    return ExecutionPlan(
        dtype="float32" if config.dtype == "auto" else config.dtype,
        fast=config.fast is True and device.type == "cpu",
        micro_batch_size=next((size for size in sizes if size <= 8), sizes[-1]),
        threads=most_threads() if config.threads == "auto" else config.threads, compile=False,
    )  # fmt: skip


def micro_batch_sizes(model: GPT, config: TrainConfig, device: torch.device) -> list[int]:
    """Micro-batch sizes that fit into memory, largest first. Raises MemoryError if none does."""
    sizes = [config.micro_batch_size or config.batch_size]
    if config.micro_batch_size == "auto":
        sizes = list(reversed(divisors(config.batch_size)))
    weights, row = memory_needed(model, config, device)
    free = available_memory(device)
    fitting = [size for size in sizes if weights + row * size < free]
    if not fitting:
        fewer = "--train.micro_batch_size auto, " if config.micro_batch_size != "auto" else ""
        raise MemoryError(
            f"training this model needs about {(weights + row * sizes[-1]) / 2**20:,.0f} MB, but only {free / 2**20:,.0f} MB "
            f"are free: take {fewer}a smaller model, a smaller --model.max_seq_len, or --train.gradient_checkpointing"
        )
    return fitting


def measure(model: GPT, config: TrainConfig, device: torch.device, best: ExecutionPlan, sizes: list[int]) -> dict[str, Any]:
    """Find the fastest plan without compile, one option after another, starting from `best`; return it with all timings."""
    timed: dict[ExecutionPlan, float] = {}

    def fastest(candidates: list[ExecutionPlan]) -> ExecutionPlan:
        for plan in candidates:
            if plan not in timed:
                timed[plan] = seconds_per_token(model, config, plan, device)
        return min(candidates, key=timed.__getitem__)

    notes = []
    if device.type == "cpu" and config.threads == "auto":
        best = ExecutionPlan(**fastest_threads(model, config, best, device)["eager"])
    if device.type == "cpu" and config.fast == "auto":
        try:
            build.build()
            best = fastest([replace(best, fast=is_fast) for is_fast in (False, True)])
        except build.BuildError as error:
            notes.append(str(error))
    peaks = matmul_peaks(device)
    if config.dtype == "auto" and peaks["bfloat16"] > peaks["float32"]:
        best = fastest([replace(best, dtype=dtype) for dtype in ("float32", "bfloat16")])
    if device.type == "cpu":
        sizes = [size for size in sizes if size * model.config.max_seq_len in MICRO_BATCH_TOKENS]
    best = fastest([best, *(replace(best, micro_batch_size=size) for size in sizes)])
    best = fastest([verified(best, model, config, device)])
    return {
        "eager": asdict(best), "seconds_per_token": timed[best], "notes": notes, "peaks": peaks,
        "timed": [[asdict(plan), seconds] for plan, seconds in timed.items()],
    }  # fmt: skip


def fastest_threads(model: GPT, config: TrainConfig, plan: ExecutionPlan, device: torch.device) -> dict[str, Any]:
    """Compare all threads with half of them, which is faster if another process keeps a core busy."""
    plans = [replace(plan, threads=threads) for threads in {most_threads(), max(1, most_threads() // 2)}]
    timed = {plan: seconds_per_token(model, config, plan, device) for plan in plans}
    best = min(timed, key=timed.__getitem__)
    return {"eager": asdict(best), "seconds_per_token": timed[best]}


def verified(plan: ExecutionPlan, model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """The plan if it agrees with the plain model; otherwise warn and drop compile, or else fall back to the plain model.

    Raises ValueError if torch.compile fails.
    """
    try:
        mismatch = difference(model, config, plan, device)
    except RuntimeError as error:
        if not plan.compile or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile=True: torch.compile fails here ({reason}). Leave it off, or fix the compiler") from error
    if not mismatch:
        return plan
    simpler = replace(plan, compile=False) if plan.compile else replace(plan, fast=False, dtype="float32")
    outcome = "so it is not used" if simpler != plan else "but there is no simpler plan"
    cure = "check_model tries your plugins" if model.config.plugins else "Please report it"
    say(f"{plan}: gives other numbers than the plain model ({mismatch}), {outcome}. {cure}")
    return verified(simpler, model, config, device) if plan.compile else simpler


def matmul_peaks(device: torch.device, sizes: tuple[int, ...] = (1024,), seconds: float = 0.05) -> dict[str, float]:
    """FLOP/s of the fastest square matrix product, by number format; each size is tried for `seconds`."""
    peaks = {"float32": 0.0, "bfloat16": 0.0}
    for dtype in peaks:
        for size in sizes:
            matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline:
                began = time.perf_counter()
                (matrix @ matrix)[0, 0].item()  # waits for the device
                peaks[dtype] = max(peaks[dtype], 2 * size**3 / (time.perf_counter() - began))
    return peaks


def decide(measured: dict, model: GPT, config: TrainConfig) -> ExecutionPlan:
    """Decide whether to compile, from the measurements and the length of the run; print the plan."""
    plan, compiled = ExecutionPlan(**measured["eager"]), measured.get("compiled", {})
    speed, reasons = 1 / measured["seconds_per_token"], list(measured["notes"])
    if config.compile is True:
        plan = replace(plan, compile=True)
    elif config.compile == "auto" and "failed" in compiled:
        reasons.append(compiled["failed"])
    elif config.compile == "auto" and compiled.get("wrong"):
        cure = "check_model tries your plugins" if model.config.plugins else "Please report it"
        reasons.append(f"compiled it gives other numbers, {compiled['wrong']}. {cure}")
    elif config.compile == "auto" and compiled:
        run, cost, gain = expected_seconds(1 / speed, model, config), compiled["compile_seconds"], compiled["gain"]
        reasons.append(f"compile, {cost:.0f} s, for {gain:.2f} times the speed")
        if (run - cost) * gain > run:
            plan, speed = ExecutionPlan(**compiled["plan"]), speed * gain
        else:
            reasons[-1] += ", does not pay"
    say(f"this machine: {plan}, about {speed:,.0f} tokens/s" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return plan
