"""Autotuning: find the fastest number format, kernels, micro-batch, number of threads and compile setting by measurement.

A few seconds of training steps on random tokens decide. The result is cached, one file per machine, architecture and batch size.
Every plan, measured or prescribed by the config, is first compared with the plain model.

B batch, T time, V vocabulary.
"""

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fast
from config import ModelConfig, TrainConfig, divisors, from_json, to_json
from data.cache import default_cache_dir, say
from fast import build
from metrics.scores import MAX_LOGITS as EVALUATION_LOGITS
from model import GPT
from modules.registry import accepted_kwargs, build_model
from training.configure import CheckpointedLayer, configure_for_training
from training.machine import available_memory, check_compiler, cpu_name, is_out_of_memory, keep_freed_memory

MEASURE_SECONDS = 0.2  # for one plan, after a warm-up step
MICRO_BATCH_TOKENS = range(512, 4096 + 1)  # fewer do not fill a CPU's cores, more do not fit its caches
SHORT_RUN = 20  # seconds: autotuning does not pay for shorter runs
COMPILE_TAKES = 30  # seconds, at least, on a CPU
COMPILE_SHARE = 0.04  # of a run that a trial of torch.compile may take
COMPILE_MFU_LIMIT = 0.5  # above this share of the machine's matmul peak torch.compile cannot help much
STORY_TOKENS = 200  # length of the random stories, about that of TinyStories


@dataclass(frozen=True)
class ExecutionPlan:
    """How this machine trains a model."""

    dtype: str  # of matrix products: float32 or bfloat16
    fast: bool  # use the C++ kernels of fast/
    micro_batch_size: int  # sequences per forward pass
    threads: int  # of the CPU
    compile: bool  # torch.compile each layer

    def __str__(self):
        kernels = "our C++ kernels" if self.fast else "PyTorch alone"
        return (
            f"{self.dtype}, {kernels}, {self.micro_batch_size} rows at a time, "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {'compiled' if self.compile else 'not compiled'}"
        )


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
            measured = measure(model, config, device, guess, sizes)
        elif device.type == "cpu" and config.threads == "auto":  # the best number depends on what else the machine is doing
            measured |= fastest_threads(model, config, ExecutionPlan(**measured["eager"]), device)
        if compile_is_worth_trying(measured, model, config, device):
            measured["compiled"] = measure_compiled(model, config, measured, trial_seconds(measured, model, config), device)
        plan = fit_memory(decide(measured, model, config), sizes)
        if config.compile is True:
            plan = verified(plan, model, config, device)
    if not measured["notes"] or build.fingerprint() == "none":  # a failed build, perhaps on a full disk, is tried again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(measured), encoding="utf-8")
        os.replace(partial, path)
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
    say(f"{sizes[0]} rows at a time instead of {rows}, because less memory is free than before")
    return replace(plan, micro_batch_size=sizes[0])


def read_measurements(path: Path) -> dict[str, Any]:
    """Read the cached measurements; empty if missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def cache_key(model: GPT, config: TrainConfig, device: torch.device) -> str:
    """Hash everything that the measurements depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    prescribed = [getattr(config, field) for field in ("batch_size", "mask_stories", "loss_chunk", "gradient_checkpointing",
                                                       "dtype", "micro_batch_size", "threads", "fast")]  # fmt: skip
    machine = [torch.__version__, device.type, name, most_threads(), build.fingerprint(), os.environ.get("CXX")]
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


def apply_plan(plan: ExecutionPlan, model: GPT, config: TrainConfig):
    """Set up the model and the process to train by this plan."""
    torch.set_num_threads(plan.threads)
    keep_freed_memory()
    fast.use(model, plan.fast, config.loss_chunk)
    if plan.compile:
        compile_parts(model)


def compile_parts(model: nn.Module):
    """Compile GPT layer by layer, since equal layers share compiled code; compile any other model as a whole."""
    for layer in model.layers if isinstance(model, GPT) else [model]:
        for part in layer.branches if type(layer) is CheckpointedLayer else [layer]:  # checkpointing stays outside
            part.compile(dynamic=False)


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


def make_step(model: GPT, config: TrainConfig, rows: int, device: torch.device):
    """Make a function that runs one forward and backward pass over `rows` sequences of random tokens."""
    T = model.config.max_seq_len
    tokens = torch.randint(model.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    stories = (torch.arange(T, device=device) // STORY_TOKENS).expand(rows, T) if config.mask_stories else None

    def step(dtype: str) -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            _, loss = model(tokens[:, :-1], tokens[:, 1:], **accepted_kwargs(model, story_ids=stories))
        loss.backward()
        return loss.item()  # waits for the device

    return step


def seconds_per_token(model: GPT, config: TrainConfig, plan: ExecutionPlan, device: torch.device) -> float:
    """Time forward and backward passes of a micro-batch: the best of up to three."""
    apply_plan(replace(plan, compile=False), model, config)
    step = make_step(model, config, plan.micro_batch_size, device)
    times, deadline = [], time.perf_counter() + 1.5 * MEASURE_SECONDS
    while not times or (len(times) < 3 and time.perf_counter() < deadline):
        began = time.perf_counter()
        step(plan.dtype)
        times.append(time.perf_counter() - began)
    return min(times) / (plan.micro_batch_size * model.config.max_seq_len)


def memory_needed(model: GPT, config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Bytes needed: fixed (weights, gradients, AdamW moments, evaluation logits), and per sequence (activations, times 1.5)."""
    activations: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        activations[storage.data_ptr()] = storage.nbytes()
        return tensor

    fast.use(model, kernels=False, loss_chunk=config.loss_chunk)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        make_step(model, config, 1, device)("float32")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return 4 * weights + 4 * EVALUATION_LOGITS, 1.5 * sum(activations.values())


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
    say(f"{plan}: gives other numbers than the plain model ({mismatch}), {outcome}. Please report it")
    return verified(simpler, model, config, device) if plan.compile else simpler


def difference(model: GPT, config: TrainConfig, plan: ExecutionPlan, device: torch.device) -> str:
    """Compare logits, loss and gradients with the plain model in float32 on a CPU; return "" if they agree within rounding.

    A compiled model is compared at its training shapes, to compile only once, and with a model that has the same kernels.
    """
    rows, T = 2, min(model.config.max_seq_len, 2 * STORY_TOKENS)
    if plan.compile:
        rows, T = plan.micro_batch_size, model.config.max_seq_len
    tokens = torch.randint(model.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    stories = (torch.arange(T) // (T // 2)).expand(rows, T) if config.mask_stories else None

    def run(trial: GPT, dtype: str) -> dict[str, Tensor]:
        trial.load_state_dict(model.state_dict())
        with torch.no_grad():
            for weight in trial.parameters():  # no weight may be zero, so that every block contributes
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
                weight.add_(noise.to(weight.device), alpha=0.02)
        trial.zero_grad()
        device = next(trial.parameters()).device
        inputs, ids = tokens.to(device), None if stories is None else stories.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, loss = trial(inputs[:, :-1], inputs[:, 1:], **accepted_kwargs(trial, story_ids=ids))
        loss.backward()
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trial.parameters()]
        results = {"the loss": loss, "gradients": torch.cat([gradient.flatten() for gradient in gradients])}
        if logits is not None:
            results = {"logits": logits} | results
        return {name: tensor.detach().flatten().float().cpu() for name, tensor in results.items()}

    plain = without_dropout(copy.deepcopy(model)).train().to("cpu")
    fast.use(plain, plan.fast) if plan.compile else fast.undo(plain)
    reference = run(plain, "float32")
    trial = without_dropout(copy.deepcopy(model)).train()
    for loss_chunk in dict.fromkeys((None, config.loss_chunk)):
        fast.use(trial, plan.fast, loss_chunk)
        if plan.compile and loss_chunk is None:
            compile_parts(trial)
        for name, tensor in run(trial, plan.dtype).items():
            error = ((tensor - reference[name]).norm() / reference[name].norm()).item()
            if not error < (1e-3 if plan.dtype == "float32" else 0.1):
                return f"{name} {'is' if name == 'the loss' else 'are'} off by {error:.1%}"
    return ""


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def expected_seconds(seconds_per_token: float, model: GPT, config: TrainConfig) -> float:
    """Duration of the run without compile."""
    tokens = (config.max_steps or math.inf) * config.batch_size * model.config.max_seq_len
    return min(tokens * seconds_per_token, 60 * (config.max_minutes or math.inf))


def trial_seconds(measured: dict, model: GPT, config: TrainConfig) -> float:
    """Time limit of a trial of torch.compile."""
    return COMPILE_SHARE * expected_seconds(measured["seconds_per_token"], model, config)


def compile_is_worth_trying(measured: dict, model: GPT, config: TrainConfig, device: torch.device) -> bool:
    """Whether the run is long enough for a trial, the last trial had a lower limit, and utilization leaves room for a gain."""
    limit, trial = trial_seconds(measured, model, config), measured.get("compiled", {})
    if config.compile != "auto" or limit < COMPILE_TAKES or "gain" in trial or limit < 1.5 * trial.get("limit", 0.0):
        return False
    flops = 6 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    peak = max(measured["peaks"].values()) if config.dtype == "auto" else measured["peaks"][config.dtype]
    if flops / measured["seconds_per_token"] > COMPILE_MFU_LIMIT * peak:
        return False
    try:
        check_compiler(device)
    except ValueError:
        return False
    return True


def measure_compiled(model: GPT, config: TrainConfig, measured: dict, limit: float, device: torch.device) -> dict[str, Any]:
    """Try torch.compile in a subprocess, which can neither hang nor crash the training; give up after `limit` seconds."""
    dtype = max(measured["peaks"], key=measured["peaks"].get) if config.dtype == "auto" else config.dtype
    request = {
        "model": to_json(model.config), "train": to_json(config), "vocab_size": model.vocab_size, "device": str(device),
        "eager": measured["eager"], "plan": measured["eager"] | {"compile": True, "dtype": dtype},
    }  # fmt: skip
    began = time.perf_counter()
    try:
        process = subprocess.run(
            [sys.executable, "-m", "training.autotune"], input=json.dumps(request), capture_output=True, text=True, timeout=limit,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"compile was given up after {limit:.0f} s", "limit": limit}
    if process.returncode:
        return {"failed": f"compile failed: {(process.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(process.stdout.splitlines()[-1]) | {"compile_seconds": time.perf_counter() - began}


def run_compile_trial():
    """The subprocess of measure_compiled: compile, time compiled and eager steps in turns, compare their results."""
    request = json.loads(sys.stdin.read())
    config = from_json(TrainConfig, request["train"])
    plan, eager = ExecutionPlan(**request["plan"]), ExecutionPlan(**request["eager"])
    device = torch.device(request["device"])
    model = build_model(from_json(ModelConfig, request["model"]), request["vocab_size"]).to(device)
    configure_for_training(model, config)
    plain = copy.deepcopy(model)
    apply_plan(plan, model, config)
    make_step(model, config, plan.micro_batch_size, device)(plan.dtype)  # compiles
    gains = [seconds_per_token(plain, config, eager, device) / seconds_per_token(model, config, plan, device) for _ in range(3)]
    mismatch = difference(plain, config, plan, device)
    print(json.dumps({"plan": asdict(plan), "gain": median(gains), "wrong": mismatch}))


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
        reasons.append(f"compiled it gives other numbers, {compiled['wrong']}. Please report it")
    elif config.compile == "auto" and compiled:
        run, cost, gain = expected_seconds(1 / speed, model, config), compiled["compile_seconds"], compiled["gain"]
        reasons.append(f"compile, {cost:.0f} s, for {gain:.2f} times the speed")
        if (run - cost) * gain > run:
            plan, speed = ExecutionPlan(**compiled["plan"]), speed * gain
        else:
            reasons[-1] += ", does not pay"
    say(f"this machine: {plan}, about {speed:,.0f} tokens/s" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return plan


if __name__ == "__main__":
    run_compile_trial()
