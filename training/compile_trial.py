"""Try torch.compile in a subprocess before a run: is it faster, right, and worth its time?"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from config import ModelConfig, TrainConfig, from_json, to_json
from model import GPT
from modules.registry import build_model
from runs.execution import ExecutionPlan
from training.configure import configure_for_training
from training.machine import check_compiler
from training.plan import apply_plan, difference, make_step, seconds_per_token

COMPILE_TAKES = 30  # seconds, at least, on a CPU
COMPILE_SHARE = 0.04  # of a run that a trial of torch.compile may take
COMPILE_MFU_LIMIT = 0.5  # above this share of the machine's matmul peak torch.compile cannot help much


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
            [sys.executable, "-m", "training.compile_trial"],
            input=json.dumps(request), capture_output=True, text=True, timeout=limit,
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
    model = build_model(from_json(ModelConfig, request["model"]), request["vocab_size"], config.tokenizer).to(device)
    configure_for_training(model, config)
    plain = copy.deepcopy(model)
    apply_plan(plan, model, config)
    make_step(model, config, plan.micro_batch_size, device)(plan.dtype)  # compiles
    gains = [seconds_per_token(plain, config, eager, device) / seconds_per_token(model, config, plan, device) for _ in range(3)]
    mismatch = difference(plain, config, plan, device)
    print(json.dumps({"plan": asdict(plan), "gain": median(gains), "wrong": mismatch}))


if __name__ == "__main__":
    run_compile_trial()
