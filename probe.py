"""How this machine trains a model fastest: number format, attention, rows at a time, threads and compile, by measurement.

A few seconds of training steps on made-up tokens tell. What they told is kept in the cache folder, one file for each
machine, architecture and batch size. Whatever is chosen is compared with the plain way first.

B batch, T time, V vocabulary.
"""

import copy
import hashlib
import json
import math
import os
import platform
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

import kernels
from config import ModelConfig, TrainConfig, divisors, from_json, to_json
from data import default_cache_dir
from evaluation import MAX_LOGITS as EVALUATION_LOGITS
from machine import available_memory, check_compiler, keep_freed_memory
from menu import build_model, make_ready, needs_of
from model import GPT
from sources import say

MEASURE_SECONDS = 0.2  # for one way of doing it, after a step to warm up
MICRO_BATCH_TOKENS = range(512, 4096 + 1)  # where a CPU's fastest is: fewer do not fill the cores, more do not fit the caches
SHORT_RUN = 20  # seconds: a run that is over by then is not worth the measuring
COMPILE_TAKES = 30  # seconds, at least, on a CPU
COMPILE_SHARE = 0.04  # of a run that trying out torch.compile may take
BUSY = 0.5  # of the peak of matrix products: a step that gets more cannot gain much by compile
STORY_TOKENS = 200  # the made-up stories are as long as those of TinyStories


@dataclass(frozen=True)
class Choices:
    """How a machine trains a model."""

    dtype: str  # of matrix products: float32 or bfloat16
    attention: str  # kernel, sdpa or plain
    micro_batch_size: int  # sequences that go through the model at once
    threads: int  # of the CPU
    compile: bool  # each layer by torch.compile

    def __str__(self):
        attention = {"kernel": "our attention kernel", "sdpa": "torch's attention", "plain": "attention written out"}
        return (
            f"{self.dtype}, {attention[self.attention]}, {self.micro_batch_size} rows at a time, "
            f"{self.threads} thread{'s' * (self.threads > 1)}, {'compiled' if self.compile else 'not compiled'}"
        )


def choose(model: GPT, config: TrainConfig, device: torch.device) -> Choices:
    """The fastest way to train this model that fits into memory; what the configs prescribe is kept.

    Says in one line what it chose and why. Raises MemoryError where nothing fits, ValueError for a prescribed way that is not
    to be had here.
    """
    if config.compile is True:
        check_compiler(device)
    if model.config.attention == "kernel":
        kernels.build()
    path = default_cache_dir() / f"probe-{key(model, config, device)}.json"
    known = remembered(path)
    model = copy.deepcopy(model)
    with undisturbed():
        if "eager" not in known:
            first = first_guess(model, config, device)
            seconds = seconds_per_token(model, config, first, device)
            run = expected_seconds(seconds, model, config)
            if config.compile is True and run < COMPILE_TAKES:
                say(f"compile=True: compiling alone may take longer than this run, about {run:.0f} s. auto leaves it out then")
            if run < SHORT_RUN:
                return replace(first, compile=config.compile is True)
            known = measure(model, config, device, first)
        elif device.type == "cpu" and config.threads == "auto":  # which changes with what else the machine is doing
            known |= fastest_threads(model, config, Choices(**known["eager"]), device)
        if "compiled" not in known and compile_is_worth_trying(known, model, config, device):
            known["compiled"] = measure_compiled(model, config, known, trial_seconds(known, model, config))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known), encoding="utf-8")
    os.replace(partial, path)
    return decide(known, model, config)


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
                                                       "dtype", "micro_batch_size", "threads")]  # fmt: skip
    machine = [torch.__version__, device.type, name, most_threads(), kernels.fingerprint()]
    what = json.dumps([machine, to_json(model.config), model.vocab_size, prescribed])
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else f"{platform.processor()} {platform.machine()}"


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


def with_backend(model: GPT) -> list:
    return [block for block in model.modules() if hasattr(block, "backend")]


def apply(choices: Choices, model: GPT):
    """Train the model in this way from now on."""
    torch.set_num_threads(choices.threads)
    keep_freed_memory()
    for block in with_backend(model):
        block.backend = choices.attention
    if choices.compile:
        compile_parts(model)


def compile_parts(model: nn.Module):
    """The layers of GPT one by one, as all that are alike share what is compiled; another model as a whole."""
    for part in model.layers if isinstance(model, GPT) else [model]:
        part.compile(dynamic=False)


def first_guess(model: GPT, config: TrainConfig, device: torch.device) -> Choices:
    """What does well on most machines, with the most rows at a time that fit into memory, up to 8.

    Raises MemoryError where nothing fits.
    """
    sizes = micro_batch_sizes(model, config, device)
    return Choices(
        dtype="float32" if config.dtype == "auto" else config.dtype,
        attention="sdpa" if model.config.attention == "auto" else model.config.attention,
        micro_batch_size=next((size for size in sizes if size <= 8), sizes[-1]),
        threads=most_threads() if config.threads == "auto" else config.threads, compile=False,
    )  # fmt: skip


def micro_batch_sizes(model: GPT, config: TrainConfig, device: torch.device) -> list[int]:
    """The rows that may go through the model at once, from many to few."""
    sizes = [config.micro_batch_size or config.batch_size]
    if config.micro_batch_size == "auto":
        sizes = list(reversed(divisors(config.batch_size)))
    weights, row = memory_needed(model, config, device)
    free = available_memory(device)
    fitting = [size for size in sizes if weights + row * size < free]
    if not fitting:
        raise MemoryError(
            f"training this model needs about {(weights + row * sizes[-1]) / 2**20:,.0f} MB, but only {free / 2**20:,.0f} MB "
            "are free: take a smaller model, a smaller --model.max_seq_len, or --train.gradient_checkpointing"
        )
    return fitting


def measure(model: GPT, config: TrainConfig, device: torch.device, best: Choices) -> dict[str, Any]:
    """The fastest way without compile, found one choice after the other, and all that was timed on the way."""
    timed: dict[Choices, float] = {}

    def fastest(candidates: list[Choices]) -> Choices:
        for choices in candidates:
            if choices not in timed:
                timed[choices] = seconds_per_token(model, config, choices, device)
        return min(candidates, key=timed.__getitem__)

    notes = []
    if device.type == "cpu" and config.threads == "auto":
        best = Choices(**fastest_threads(model, config, best, device)["eager"])
    if device.type == "cpu" and model.config.attention == "auto":
        try:
            kernels.build()
            best = fastest([replace(best, attention=attention) for attention in ("sdpa", "kernel")])
        except kernels.BuildError as error:
            notes.append(str(error))
    peaks = matmul_peaks(device)
    if config.dtype == "auto" and peaks["bfloat16"] > peaks["float32"]:
        best = fastest([replace(best, dtype=dtype) for dtype in ("float32", "bfloat16")])
    sizes = micro_batch_sizes(model, config, device)
    if device.type == "cpu":
        sizes = [size for size in sizes if size * model.config.max_seq_len in MICRO_BATCH_TOKENS]
    best = fastest([best, *(replace(best, micro_batch_size=size) for size in sizes)])
    if wrong := difference(model, best, device):
        plain = replace(best, attention="plain", dtype="float32")
        say(f"{best} gives other numbers than the plain way ({wrong}), so that is taken instead. Please report it")
        best, timed[plain] = plain, seconds_per_token(model, config, plain, device)
    return {
        "eager": asdict(best), "seconds_per_token": timed[best], "notes": notes, "peaks": peaks,
        "timed": [[asdict(choices), seconds] for choices, seconds in timed.items()],
    }  # fmt: skip


def fastest_threads(model: GPT, config: TrainConfig, choices: Choices, device: torch.device) -> dict[str, Any]:
    """As many threads as torch takes by itself, or half of them, which is more where another process keeps a core busy."""
    timed = {}
    for threads in {most_threads(), max(1, most_threads() // 2)}:
        way = replace(choices, threads=threads)
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
            _, loss = model(tokens[:, :-1], tokens[:, 1:], **needs_of(model, story_ids=stories))
        loss.backward()
        return loss.item()  # waits for the device

    return step


def seconds_per_token(model: GPT, config: TrainConfig, choices: Choices, device: torch.device) -> float:
    """The best of a few micro-batches forward and back; of a single one, where that takes long enough to be told apart."""
    apply(replace(choices, compile=False), model)
    step = steps_of(model, config, choices.micro_batch_size, device)
    times, until = [], time.perf_counter() + 1.5 * MEASURE_SECONDS
    while not times or (len(times) < 3 and time.perf_counter() < until):
        began = time.perf_counter()
        step(choices.dtype)
        times.append(time.perf_counter() - began)
    return min(times) / (choices.micro_batch_size * model.config.max_seq_len)


def memory_needed(model: GPT, config: TrainConfig, device: torch.device) -> tuple[float, float]:
    """Bytes: of weights, gradients, two moments of each, and evaluations; of what a row keeps on its way, and half more."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        steps_of(model, config, 1, device)("float32")
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return 4 * weights + 4 * EVALUATION_LOGITS, 1.5 * sum(kept.values())


def difference(model: GPT, choices: Choices, device: torch.device) -> str:
    """How logits and gradients differ from the plain way in float32, or nothing where that is within rounding."""
    trial = copy.deepcopy(model)
    with torch.no_grad():
        for weight in trial.parameters():  # so that nothing is zero, and each block has a say
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).to(device), alpha=0.02)
    T = min(model.config.max_seq_len, 2 * STORY_TOKENS)
    tokens = torch.randint(model.vocab_size, (2, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    stories = (torch.arange(T, device=device) // (T // 2)).expand(2, T)
    trial.eval()

    def run(way: Choices) -> tuple[Tensor, Tensor]:
        for block in with_backend(trial):
            block.backend = way.attention
        trial.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=way.dtype == "bfloat16"):
            logits, loss = trial(tokens[:, :-1], tokens[:, 1:], **needs_of(trial, story_ids=stories))
        loss.backward()
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trial.parameters()]
        gradients = [gradient.flatten() for gradient in gradients]
        return logits.detach().flatten(), torch.cat(gradients)

    if choices.compile:
        compile_parts(trial)
    ours = run(choices)
    with torch.compiler.set_stance("force_eager"):
        plain = run(replace(choices, attention="plain", dtype="float32"))
    for name, mine, reference in zip(("logits", "gradients"), ours, plain, strict=True):
        off = ((mine - reference).norm() / reference.norm()).item()
        if not off < (1e-3 if choices.dtype == "float32" else 0.1):
            return f"{name} are off by {off:.1%}"
    return ""


def expected_seconds(seconds_per_token: float, model: GPT, config: TrainConfig) -> float:
    """How long the run will take without compile."""
    tokens = (config.max_steps or math.inf) * config.batch_size * model.config.max_seq_len
    return min(tokens * seconds_per_token, 60 * (config.max_minutes or math.inf))


def trial_seconds(known: dict, model: GPT, config: TrainConfig) -> float:
    return COMPILE_SHARE * expected_seconds(known["seconds_per_token"], model, config)


def compile_is_worth_trying(known: dict, model: GPT, config: TrainConfig, device: torch.device) -> bool:
    """Is there time for it, and does the machine have much more to give than matrix products get now?"""
    if config.compile != "auto" or trial_seconds(known, model, config) < COMPILE_TAKES:
        return False
    operations = 6 * sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    peak = max(known["peaks"].values()) if config.dtype == "auto" else known["peaks"][config.dtype]
    if operations / known["seconds_per_token"] > BUSY * peak:
        return False
    try:
        check_compiler(device)
    except ValueError:
        return False
    return True


def measure_compiled(model: GPT, config: TrainConfig, known: dict, limit: float) -> dict[str, Any]:
    """The same with torch.compile, tried in a process of its own that is given up after so many seconds."""
    dtype = max(known["peaks"], key=known["peaks"].get) if config.dtype == "auto" else config.dtype
    question = {
        "model": to_json(model.config), "train": to_json(config), "vocab_size": model.vocab_size,
        "eager": known["eager"], "choices": known["eager"] | {"compile": True, "dtype": dtype},
    }  # fmt: skip
    began = time.perf_counter()
    try:
        answer = subprocess.run(
            [sys.executable, __file__], input=json.dumps(question), capture_output=True, text=True, timeout=limit,
            cwd=os.getcwd(), env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"compile was given up after {limit:.0f} s"}
    if answer.returncode:
        return {"failed": f"compile failed: {(answer.stderr.strip().splitlines() or ['no message'])[-1]}"}
    found = json.loads(answer.stdout.splitlines()[-1])
    pace = known["seconds_per_token"] / found["gain"]
    return found | {"seconds_per_token": pace, "compile_seconds": time.perf_counter() - began}


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
    choices, eager = Choices(**question["choices"]), Choices(**question["eager"])
    model = build_model(from_json(ModelConfig, question["model"]), question["vocab_size"])
    make_ready(model, config)
    device, as_it_is = torch.device("cpu"), copy.deepcopy(model)
    apply(choices, model)
    steps_of(model, config, choices.micro_batch_size, device)(choices.dtype)  # compiles
    gains = [
        seconds_per_token(as_it_is, config, eager, device) / seconds_per_token(model, config, choices, device) for _ in range(3)
    ]
    print(json.dumps({"choices": asdict(choices), "gain": median(gains), "wrong": difference(model, choices, device)}))


def decide(known: dict, model: GPT, config: TrainConfig) -> Choices:
    """Compile or not, by what is known and by how long the run is. Says so."""
    eager, compiled = Choices(**known["eager"]), known.get("compiled", {})
    speed = 1 / known["seconds_per_token"]
    reason = "; ".join(known["notes"])
    if config.compile is True:
        chosen = replace(eager, compile=True)
    elif "choices" not in compiled:
        chosen, reason = eager, "; ".join(known["notes"] + ([compiled["failed"]] if "failed" in compiled else []))
    else:
        run, lost = expected_seconds(known["seconds_per_token"], model, config), compiled["compile_seconds"]
        pays = not compiled["wrong"] and (run - lost) / compiled["seconds_per_token"] > run * speed
        chosen = Choices(**compiled["choices"]) if pays else eager
        gain = known["seconds_per_token"] / compiled["seconds_per_token"]
        reason = f"compile, {lost:.0f} s, for {gain:.2f} times the speed" + ", does not pay" * (not pays)
        speed = speed * gain if pays else speed
    say(f"this machine: {chosen}, about {speed:,.0f} tokens/s" + (f" ({reason})" if reason else ""))
    return chosen


if __name__ == "__main__":
    answer_question()
