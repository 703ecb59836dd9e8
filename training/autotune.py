"""How this machine trains a model fastest: number format, attention, rows at a time, threads and compile, by measurement.

A few seconds of training steps on made-up tokens tell. What they told is kept in the cache folder, one file for each
machine, architecture and batch size. Whatever is chosen, by measurement or by the config, is compared with the plain way first.

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

from config import ModelConfig, TrainConfig, divisors, from_json, to_json
from data.cache import default_cache_dir, say
from fast import ops as kernels
from metrics.scores import MAX_LOGITS as EVALUATION_LOGITS
from model import GPT
from modules.registry import build_model, make_ready, needs_of
from training.machine import available_memory, check_compiler, cpu_name, is_out_of_memory, keep_freed_memory

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
        sizes = micro_batch_sizes(model, config, device)
        if "eager" not in known:
            first = first_guess(model, config, sizes)
            seconds = seconds_per_token(model, config, first, device)
            run = expected_seconds(seconds, model, config)
            if config.compile is True and run < COMPILE_TAKES:
                say(f"compile=True: compiling alone may take longer than this run, about {run:.0f} s. auto leaves it out then")
            if run < SHORT_RUN:
                return checked(replace(first, compile=config.compile is True), model, config, device)
            known = measure(model, config, device, first, sizes)
        elif device.type == "cpu" and config.threads == "auto":  # which changes with what else the machine is doing
            known |= fastest_threads(model, config, Choices(**known["eager"]), device)
        if compile_is_worth_trying(known, model, config, device):
            known["compiled"] = measure_compiled(model, config, known, trial_seconds(known, model, config), device)
        chosen = within(sizes, decide(known, model, config))
        if config.compile is True:
            chosen = checked(chosen, model, config, device)
    if not known["notes"] or kernels.fingerprint() == "none":  # a compiler that failed, on a full disk perhaps, may do tomorrow
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(known), encoding="utf-8")
        os.replace(partial, path)
    return chosen


def as_before(choices: Choices, model: GPT, config: TrainConfig, device: torch.device) -> Choices:
    """What a run that is resumed began with; where this machine does not have it any more, the nearest, and a line that says so.

    Raises MemoryError where nothing fits into memory.
    """
    if choices.attention == "kernel" and model.config.attention == "auto":
        try:
            kernels.build()
        except kernels.BuildError as error:
            choices = replace(choices, attention="sdpa")
            say(f"going on with torch's attention, so not to the last bit as without a break: {error}")
    with undisturbed():
        return within(micro_batch_sizes(copy.deepcopy(model), config, device), choices)


def within(sizes: list[int], choices: Choices) -> Choices:
    """The choices, with fewer rows at a time where memory has become scarcer than when they were made."""
    rows = choices.micro_batch_size
    if rows <= sizes[0]:
        return choices
    say(f"{sizes[0]} rows at a time instead of {rows}, as there is less memory than when that was measured")
    return replace(choices, micro_batch_size=sizes[0])


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
    machine = [torch.__version__, device.type, name, most_threads(), kernels.fingerprint(), os.environ.get("CXX")]
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


def first_guess(model: GPT, config: TrainConfig, sizes: list[int]) -> Choices:
    """What does well on most machines, with the most rows at a time that fit into memory, up to 8."""
    return Choices(
        dtype="float32" if config.dtype == "auto" else config.dtype,
        attention="sdpa" if model.config.attention == "auto" else model.config.attention,
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


def measure(model: GPT, config: TrainConfig, device: torch.device, best: Choices, sizes: list[int]) -> dict[str, Any]:
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
    if device.type == "cpu":
        sizes = [size for size in sizes if size * model.config.max_seq_len in MICRO_BATCH_TOKENS]
    best = fastest([best, *(replace(best, micro_batch_size=size) for size in sizes)])
    best = fastest([checked(best, model, config, device)])
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


def checked(choices: Choices, model: GPT, config: TrainConfig, device: torch.device) -> Choices:
    """The choices if they compute what the plain way does; else without compile, or the plain way, and a warning.

    Raises ValueError where torch.compile fails.
    """
    try:
        wrong = difference(model, config, choices, device)
    except RuntimeError as error:
        if not choices.compile or is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"compile=True: torch.compile fails here ({reason}). Leave it off, or mend the compiler") from error
    if not wrong:
        return choices
    plain = replace(choices, attention="plain", dtype="float32")
    instead = replace(choices, compile=False) if choices.compile else plain
    say(f"{choices}: gives other numbers than the plain way ({wrong}), so it is not taken. Please report it")
    return checked(instead, model, config, device) if choices.compile else instead


def difference(model: GPT, config: TrainConfig, choices: Choices, device: torch.device) -> str:
    """How logits, loss and gradients differ from the plain way on a CPU in float32, or nothing where that is within rounding.

    What is compiled is compared at the size that is trained, so that it is not compiled twice, and with the same attention.
    """
    rows, T = 2, min(model.config.max_seq_len, 2 * STORY_TOKENS)
    plain_attention = "plain"
    if choices.compile:
        rows, T, plain_attention = choices.micro_batch_size, model.config.max_seq_len, choices.attention
    tokens = torch.randint(model.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(1))
    stories = (torch.arange(T) // (T // 2)).expand(rows, T) if config.mask_stories else None

    def run(trial: GPT, dtype: str, attention: str, loss_chunk: int | None) -> dict[str, Tensor]:
        trial.load_state_dict(model.state_dict())
        with torch.no_grad():
            for weight in trial.parameters():  # so that nothing is zero, and each block has a say
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
                weight.add_(noise.to(weight.device), alpha=0.02)
        trial.loss_chunk = loss_chunk
        for block in with_backend(trial):
            block.backend = attention
        trial.zero_grad()
        place = next(trial.parameters()).device
        inputs, ids = tokens.to(place), None if stories is None else stories.to(place)
        with torch.autocast(place.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            logits, loss = trial(inputs[:, :-1], inputs[:, 1:], **needs_of(trial, story_ids=ids))
        loss.backward()
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in trial.parameters()]
        found = {"the loss": loss, "gradients": torch.cat([gradient.flatten() for gradient in gradients])}
        if logits is not None:
            found = {"logits": logits} | found
        return {name: tensor.detach().flatten().float().cpu() for name, tensor in found.items()}

    reference = run(without_dropout(copy.deepcopy(model)).train().to("cpu"), "float32", plain_attention, None)
    trial = without_dropout(copy.deepcopy(model)).train()
    if choices.compile:
        compile_parts(trial)
    for loss_chunk in dict.fromkeys((None, config.loss_chunk)):
        for name, mine in run(trial, choices.dtype, choices.attention, loss_chunk).items():
            off = ((mine - reference[name]).norm() / reference[name].norm()).item()
            if not off < (1e-3 if choices.dtype == "float32" else 0.1):
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
    if operations / known["seconds_per_token"] > BUSY * peak:
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
        "eager": known["eager"], "choices": known["eager"] | {"compile": True, "dtype": dtype}, "device": str(device),
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
    choices, eager = Choices(**question["choices"]), Choices(**question["eager"])
    device = torch.device(question["device"])
    model = build_model(from_json(ModelConfig, question["model"]), question["vocab_size"]).to(device)
    make_ready(model, config)
    as_it_is = copy.deepcopy(model)
    apply(choices, model)
    steps_of(model, config, choices.micro_batch_size, device)(choices.dtype)  # compiles
    gains = [
        seconds_per_token(as_it_is, config, eager, device) / seconds_per_token(model, config, choices, device) for _ in range(3)
    ]
    wrong = difference(as_it_is, config, choices, device)
    print(json.dumps({"choices": asdict(choices), "gain": median(gains), "wrong": wrong}))


def decide(known: dict, model: GPT, config: TrainConfig) -> Choices:
    """Compile or not, by what is known and by how long the run is. Says so."""
    eager, compiled = Choices(**known["eager"]), known.get("compiled", {})
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
            chosen, speed = Choices(**compiled["choices"]), speed * gain
        else:
            reasons[-1] += ", does not pay"
    say(f"this machine: {chosen}, about {speed:,.0f} tokens/s" + (f" ({'; '.join(reasons)})" if reasons else ""))
    return chosen


if __name__ == "__main__":
    answer_question()
