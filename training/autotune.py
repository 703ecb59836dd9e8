"""Autotuning: find the fastest number format, kernels, micro-batch, number of threads and compile setting by measurement.

A few seconds of training steps on made-up tokens decide. The result is cached, one file for each machine, architecture and batch
size. Whatever is chosen, by measurement or by the config, is compared with the plain model first.

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

MEASURE_SECONDS = 0.2  # for one plan, after a step to warm up
MICRO_BATCH_TOKENS = range(512, 4096 + 1)  # where a CPU's fastest is: fewer do not fill the cores, more do not fit the caches
SHORT_RUN = 20  # seconds: a shorter run is not worth the measuring
COMPILE_TAKES = 30  # seconds, at least, on a CPU
COMPILE_SHARE = 0.04  # of a run that trying torch.compile may take
COMPILE_LIMIT = 0.5  # share of the machine's matmul peak above which torch.compile cannot help much
STORY_TOKENS = 200  # the made-up stories are as long as those of TinyStories


@dataclass(frozen=True)
class ExecutionPlan:
    """How a machine trains a model."""

    dtype: str  # of matrix products: float32 or bfloat16
    fast: bool  # with the C++ kernels of fast/
    micro_batch_size: int  # sequences that go through the model at once
    threads: int  # of the CPU
    compile: bool  # each layer by torch.compile

    def __str__(self):
        kernels = "our C++ kernels" if self.fast else "PyTorch alone"
        return (
            f"{self.dtype}, {kernels}, {self.micro_batch_size} rows at a time, "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {'compiled' if self.compile else 'not compiled'}"
        )


def choose_plan(model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """Find the fastest plan that fits into memory; what the config prescribes is kept.

    Prints one line with the plan and the reasons. Raises MemoryError if nothing fits, ValueError for a prescribed choice that is
    not available here.
    """
    if config.compile is True:
        check_compiler(device)
    if config.fast is True and device.type == "cpu":
        build.build()
    path = default_cache_dir() / f"plan-{key(model, config, device)}.json"
    known = remembered(path)
    model = copy.deepcopy(model)
    with undisturbed():
        sizes = micro_batch_sizes(model, config, device)
        if "eager" not in known:
            first = first_guess(config, sizes, device)
            seconds = seconds_per_token(model, config, first, device)
            run = expected_seconds(seconds, model, config)
            if config.compile is True and run < COMPILE_TAKES:
                say(f"compile=True: compiling alone may take longer than this run, about {run:.0f} s. auto leaves it out then")
            if run < SHORT_RUN:
                return checked(replace(first, compile=config.compile is True), model, config, device)
            known = measure(model, config, device, first, sizes)
        elif device.type == "cpu" and config.threads == "auto":  # which changes with what else the machine is doing
            known |= fastest_threads(model, config, ExecutionPlan(**known["eager"]), device)
        if compile_is_worth_trying(known, model, config, device):
            known["compiled"] = measure_compiled(model, config, known, trial_seconds(known, model, config), device)
        plan = within(sizes, decide(known, model, config))
        if config.compile is True:
            plan = checked(plan, model, config, device)
    if not known["notes"] or build.fingerprint() == "none":  # a compiler that failed, on a full disk perhaps, may do tomorrow
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known), encoding="utf-8")
        os.replace(partial, path)
    return plan


def resumed_plan(plan: ExecutionPlan, model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """The plan of a run that is resumed; if this machine no longer supports it, the nearest one, and a line that says so.

    Raises MemoryError if nothing fits into memory.
    """
    if plan.fast and config.fast == "auto":
        try:
            build.build()
        except build.BuildError as error:
            plan = replace(plan, fast=False)
            say(f"going on without the C++ kernels, so not to the last bit as without a break: {error}")
    with undisturbed():
        return within(micro_batch_sizes(copy.deepcopy(model), config, device), plan)


def within(sizes: list[int], plan: ExecutionPlan) -> ExecutionPlan:
    """The plan, with fewer rows at a time where memory has become scarcer than when they were made."""
    rows = plan.micro_batch_size
    if rows <= sizes[0]:
        return plan
    say(f"{sizes[0]} rows at a time instead of {rows}, as there is less memory than when that was measured")
    return replace(plan, micro_batch_size=sizes[0])


def remembered(path: Path) -> dict[str, Any]:
    """What was measured before; nothing where that is not there or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def key(model: GPT, config: TrainConfig, device: torch.device) -> str:
    """Equal for what is measured alike."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    prescribed = [getattr(config, field) for field in ("batch_size", "mask_stories", "loss_chunk", "gradient_checkpointing",
                                                       "dtype", "micro_batch_size", "threads", "fast")]  # fmt: skip
    machine = [torch.__version__, device.type, name, most_threads(), build.fingerprint(), os.environ.get("CXX")]
    what = json.dumps([machine, to_json(model.config), model.vocab_size, prescribed])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


@cache
def most_threads() -> int:
    """What torch takes by itself: the cores, or $OMP_NUM_THREADS. Asked for once, as a training changes it."""
    return torch.get_num_threads()


@contextmanager
def undisturbed():
    """Leaves random numbers and the number of threads as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def apply_plan(plan: ExecutionPlan, model: GPT, config: TrainConfig):
    """Train the model by this plan from now on."""
    torch.set_num_threads(plan.threads)
    keep_freed_memory()
    fast.use(model, plan.fast, config.loss_chunk)
    if plan.compile:
        compile_parts(model)


def compile_parts(model: nn.Module):
    """Compile the layers of GPT one by one, as equal ones share the compiled code; another model as a whole."""
    for part in model.layers if isinstance(model, GPT) else [model]:
        parts = part.branches if type(part) is CheckpointedLayer else [part]  # recomputed as a whole, from outside
        for compiled in parts:
            compiled.compile(dynamic=False)


def first_guess(config: TrainConfig, sizes: list[int], device: torch.device) -> ExecutionPlan:
    """A plan that does well on most machines, with as many rows at a time as fit into memory, up to 8."""
    return ExecutionPlan(
        dtype="float32" if config.dtype == "auto" else config.dtype,
        fast=config.fast is True and device.type == "cpu",
        micro_batch_size=next((size for size in sizes if size <= 8), sizes[-1]),
        threads=most_threads() if config.threads == "auto" else config.threads, compile=False,
    )  # fmt: skip


def micro_batch_sizes(model: GPT, config: TrainConfig, device: torch.device) -> list[int]:
    """The rows that may go through the model at once, from many to few. Raises MemoryError where not even the fewest fit."""
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
    """The fastest way without compile, found one choice after the other, and all that was timed on the way."""
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
    best = fastest([checked(best, model, config, device)])
    return {
        "eager": asdict(best), "seconds_per_token": timed[best], "notes": notes, "peaks": peaks,
        "timed": [[asdict(plan), seconds] for plan, seconds in timed.items()],
    }  # fmt: skip


def fastest_threads(model: GPT, config: TrainConfig, plan: ExecutionPlan, device: torch.device) -> dict[str, Any]:
    """As many threads as torch takes by itself, or half of them, which is more where another process keeps a core busy."""
    timed = {}
    for threads in {most_threads(), max(1, most_threads() // 2)}:
        way = replace(plan, threads=threads)
        timed[way] = seconds_per_token(model, config, way, device)
    best = min(timed, key=timed.__getitem__)
    return {"eager": asdict(best), "seconds_per_token": timed[best]}


def steps_of(model: GPT, config: TrainConfig, rows: int, device: torch.device):
    """A function that goes through the model forward and back once, on made-up tokens of so many rows."""
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
    """The best of a few micro-batches forward and back; of a single one, where that takes long enough to be told apart."""
    apply_plan(replace(plan, compile=False), model, config)
    step = steps_of(model, config, plan.micro_batch_size, device)
    times, until = [], time.perf_counter() + 1.5 * MEASURE_SECONDS
    while not times or (len(times) < 3 and time.perf_counter() < until):
        began = time.perf_counter()
        step(plan.dtype)
        times.append(time.perf_counter() - began)
    return min(times) / (plan.micro_batch_size * model.config.max_seq_len)


def memory_needed(model: GPT, config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Bytes: of weights, gradients, two moments of each, and evaluations; of what a row keeps on its way, and half more."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    fast.use(model, kernels=False, loss_chunk=config.loss_chunk)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        steps_of(model, config, 1, device)("float32")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return 4 * weights + 4 * EVALUATION_LOGITS, 1.5 * sum(kept.values())


def checked(plan: ExecutionPlan, model: GPT, config: TrainConfig, device: torch.device) -> ExecutionPlan:
    """The plan if it gives the numbers of the plain model; else one without compile, or the plain one, and a warning.

    Raises ValueError if torch.compile fails.
    """
    try:
        wrong = difference(model, config, plan, device)
    except RuntimeError as error:
        if not plan.compile or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile=True: torch.compile fails here ({reason}). Leave it off, or mend the compiler") from error
    if not wrong:
        return plan
    plain = replace(plan, fast=False, dtype="float32")
    instead = replace(plan, compile=False) if plan.compile else plain
    outcome = "so it is not used" if instead != plan else "but there is no plainer plan"
    say(f"{plan}: gives other numbers than the plain model ({wrong}), {outcome}. Please report it")
    return checked(instead, model, config, device) if plan.compile else instead


def difference(model: GPT, config: TrainConfig, plan: ExecutionPlan, device: torch.device) -> str:
    """How logits, loss and gradients differ from the plain model in float32 on a CPU; "" if within rounding.

    A compiled model is compared at the size that is trained, so that it is not compiled twice, with the same kernels.
    """
    rows, T = 2, min(model.config.max_seq_len, 2 * STORY_TOKENS)
    if plan.compile:
        rows, T = plan.micro_batch_size, model.config.max_seq_len
    tokens = torch.randint(model.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    stories = (torch.arange(T) // (T // 2)).expand(rows, T) if config.mask_stories else None

    def run(trial: GPT, dtype: str) -> dict[str, Tensor]:
        trial.load_state_dict(model.state_dict())
        with torch.no_grad():
            for weight in trial.parameters():  # so that nothing is zero, and every block matters
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
        for name, mine in run(trial, plan.dtype).items():
            off = ((mine - reference[name]).norm() / reference[name].norm()).item()
            if not off < (1e-3 if plan.dtype == "float32" else 0.1):
                return f"{name} are off by {off:.1%}" if name != "the loss" else f"{name} is off by {off:.1%}"
    return ""


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def expected_seconds(seconds_per_token: float, model: GPT, config: TrainConfig) -> float:
    """How long the run will take without compile."""
    tokens = (config.max_steps or math.inf) * config.batch_size * model.config.max_seq_len
    return min(tokens * seconds_per_token, 60 * (config.max_minutes or math.inf))


def trial_seconds(known: dict, model: GPT, config: TrainConfig) -> float:
    return COMPILE_SHARE * expected_seconds(known["seconds_per_token"], model, config)


def compile_is_worth_trying(known: dict, model: GPT, config: TrainConfig, device: torch.device) -> bool:
    """Is there time for it, more than there was before, and does the machine have much more to give than products get now?"""
    limit, tried = trial_seconds(known, model, config), known.get("compiled", {})
    if config.compile != "auto" or limit < COMPILE_TAKES or "gain" in tried or limit < 1.5 * tried.get("limit", 0.0):
        return False
    operations = 6 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    peak = max(known["peaks"].values()) if config.dtype == "auto" else known["peaks"][config.dtype]
    if operations / known["seconds_per_token"] > COMPILE_LIMIT * peak:
        return False
    try:
        check_compiler(device)
    except ValueError:
        return False
    return True


def measure_compiled(model: GPT, config: TrainConfig, known: dict, limit: float, device: torch.device) -> dict[str, Any]:
    """The same with torch.compile, tried in a process of its own that is given up after so many seconds."""
    dtype = max(known["peaks"], key=known["peaks"].get) if config.dtype == "auto" else config.dtype
    question = {
        "model": to_json(model.config), "train": to_json(config), "vocab_size": model.vocab_size,
        "eager": known["eager"], "plan": known["eager"] | {"compile": True, "dtype": dtype}, "device": str(device),
    }  # fmt: skip
    began = time.perf_counter()
    try:
        answer = subprocess.run(
            [sys.executable, "-m", "training.autotune"], input=json.dumps(question), capture_output=True, text=True,
            timeout=limit,
            cwd=os.getcwd(), env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"compile was given up after {limit:.0f} s", "limit": limit}
    if answer.returncode:
        return {"failed": f"compile failed: {(answer.stderr.strip().splitlines() or ['no message'])[-1]}"}
    return json.loads(answer.stdout.splitlines()[-1]) | {"compile_seconds": time.perf_counter() - began}


def matmul_peaks(device: torch.device, sizes: tuple[int, ...] = (1024,), seconds: float = 0.05) -> dict[str, float]:
    """Operations a second of the fastest square matrix product, by number format, each size tried for so long."""
    peaks = {"float32": 0.0, "bfloat16": 0.0}
    for dtype in peaks:
        for size in sizes:
            matrix = torch.randn(size, size, device=device).to(getattr(torch, dtype))
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                began = time.perf_counter()
                (matrix @ matrix)[0, 0].item()  # waits for the device
                peaks[dtype] = max(peaks[dtype], 2 * size**3 / (time.perf_counter() - began))
    return peaks


def answer_question():
    """What the process of its own does: compile, take turns with what is not compiled, compare."""
    question = json.loads(sys.stdin.read())
    config = from_json(TrainConfig, question["train"])
    plan, eager = ExecutionPlan(**question["plan"]), ExecutionPlan(**question["eager"])
    device = torch.device(question["device"])
    model = build_model(from_json(ModelConfig, question["model"]), question["vocab_size"]).to(device)
    configure_for_training(model, config)
    as_it_is = copy.deepcopy(model)
    apply_plan(plan, model, config)
    steps_of(model, config, plan.micro_batch_size, device)(plan.dtype)  # compiles
    gains = [
        seconds_per_token(as_it_is, config, eager, device) / seconds_per_token(model, config, plan, device) for _ in range(3)
    ]
    wrong = difference(as_it_is, config, plan, device)
    print(json.dumps({"plan": asdict(plan), "gain": median(gains), "wrong": wrong}))


def decide(known: dict, model: GPT, config: TrainConfig) -> ExecutionPlan:
    """Compile or not, by what is known and by how long the run is. Says so."""
    eager, compiled = ExecutionPlan(**known["eager"]), known.get("compiled", {})
    chosen, speed, reasons = eager, 1 / known["seconds_per_token"], list(known["notes"])
    if config.compile is True:
        chosen = replace(eager, compile=True)
    elif config.compile == "auto" and "failed" in compiled:
        reasons.append(compiled["failed"])
    elif config.compile == "auto" and compiled.get("wrong"):
        reasons.append(f"compiled it gives other numbers, {compiled['wrong']}. Please report it")
    elif config.compile == "auto" and compiled:
        run, lost, gain = expected_seconds(1 / speed, model, config), compiled["compile_seconds"], compiled["gain"]
        reasons.append(f"compile, {lost:.0f} s, for {gain:.2f} times the speed")
        if (run - lost) * gain > run:
            chosen, speed = ExecutionPlan(**compiled["plan"]), speed * gain
        else:
            reasons[-1] += ", does not pay"
    say(f"this machine: {chosen}, about {speed:,.0f} tokens/s" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return chosen


if __name__ == "__main__":
    answer_question()
