"""How weights are moved: the optimizers, and the learning rate over a run."""

import itertools
import math

import torch

from config import TrainConfig
from model import GPT


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the hidden matrices and AdamW for the rest.

    Weight decay pulls on matrices alone: not on norms, biases and embeddings. Muon's updates are scaled to the size of
    AdamW's, so that both take the same learning rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """
    tables = {id(table.weight) for table in model.modules() if isinstance(table, torch.nn.Embedding)}
    matrices, rest = [], []
    for weight in model.parameters():
        (matrices if weight.ndim >= 2 and id(weight) not in tables else rest).append(weight)
    groups = [{"params": rest, "weight_decay": 0.0}]
    optimizers = []
    if config.optimizer == "Muon":
        hidden = [weight for weight in matrices if weight.ndim == 2 and weight is not model.head.weight]
        hidden_ids = {id(weight) for weight in hidden}
        matrices = [weight for weight in matrices if id(weight) not in hidden_ids]
        optimizers.append(torch.optim.Muon(
            hidden, lr=config.lr_max, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw",
        ))  # fmt: skip
    groups.append({"params": matrices, "weight_decay": config.weight_decay})
    optimizers.append(torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr_max, betas=config.betas, eps=config.eps, fused=True,
    ))  # fmt: skip
    return optimizers


def scheduled_learning_rate(step: int, num_steps: float, config: TrainConfig) -> float:
    """The learning rate of a step (counted from 0) of num_steps: warm-up, schedule with restarts, a flat end at lr_min."""
    if step < config.warmup_steps:
        return config.lr_init + (config.lr_max - config.lr_init) * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr_max
    if step >= num_steps - config.final_flat_steps:
        return config.lr_min
    done = (step - config.warmup_steps) / (num_steps - config.final_flat_steps - config.warmup_steps)

    lengths = [config.restart_mult**cycle for cycle in range(config.num_restarts + 1)]
    ends = [end / sum(lengths) for end in itertools.accumulate(lengths)]
    cycle = next((cycle for cycle, end in enumerate(ends) if done < end), config.num_restarts)
    begin = ends[cycle - 1] if cycle else 0.0
    done = (done - begin) / (ends[cycle] - begin)

    if config.schedule == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "linear":
        height = 1 - done
    else:
        height = min(1.0, (1 - done) / 0.2)
    return config.lr_min + (config.lr_max - config.lr_min) * height
