"""What gradient checkpointing must not change."""

import copy

import torch

from config import TrainConfig
from model import GPT, IGNORE
from training.configure import configure_for_training


def check_gradient_checkpointing(model: GPT, tokens: torch.Tensor):
    """The loss and its gradients are the same with and without it, dropout included.  tokens (B, T)"""
    results = []
    for is_on in (False, True):
        trial = copy.deepcopy(model)
        configure_for_training(trial, TrainConfig(gradient_checkpointing=is_on))
        torch.manual_seed(1)
        loss = trial(tokens, tokens.where(tokens > 3, IGNORE))[1]
        loss.backward()
        results.append([loss.detach(), *(weight.grad for weight in trial.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(plain, checkpointed)
