"""Execution plans: apply one; measure its speed, its memory, and how far its numbers are from the plain model's.

B batch, T time, V vocabulary.
"""

import copy
import time
from dataclasses import replace

import torch
from torch import Tensor, nn

import fast
from config import TrainConfig
from metrics.scores import MAX_LOGITS as EVALUATION_LOGITS
from model import GPT
from modules.registry import accepted_kwargs
from runs.execution import ExecutionPlan
from training.configure import CheckpointedLayer
from training.machine import keep_freed_memory

MEASURE_SECONDS = 0.2  # for one plan, after a warm-up step
STORY_TOKENS = 200  # length of the random stories, about that of TinyStories


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


def make_step(model: GPT, config: TrainConfig, rows: int, device: torch.device):
    """Make a function that runs one forward and backward pass over `rows` sequences of random tokens."""
    T = model.config.max_seq_len
    tokens = torch.randint(model.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    stories = (torch.arange(T, device=device) // STORY_TOKENS).expand(rows, T) if config.mask_stories else None

    def step(dtype: str) -> float:
        with torch.random.fork_rng(devices=[]), torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            torch.default_generator.manual_seed(0)  # a model that skips layers at random skips the same ones in every step
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
        torch.manual_seed(0)  # for a model that draws random numbers
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
