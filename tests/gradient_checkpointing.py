"""What computing a layer again on the way back must not change."""

import torch

from model import GPT, IGNORE


def check_gradient_checkpointing(model: GPT, tokens: torch.Tensor):
    """Loss and gradients are the same with it and without, drawn with the same random numbers.  tokens (B, T)"""
    found = []
    for model.checkpoint_layers in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(tokens, tokens.where(tokens > 3, IGNORE))[1]
        loss.backward()
        found.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)
