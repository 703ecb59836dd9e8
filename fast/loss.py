"""Chunked cross-entropy: the loss of a language model without materialising all logits.

N tokens, D model dim, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import IGNORE
from modules.operators import once_differentiable


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None, chunk: int, in_place_loss: Callable
) -> Tensor:
    """Mean cross-entropy in nats of logits = soft_cap(hidden @ weight.T).  hidden (..., D), weight (V, D), targets (...) -> ()

    Only the logits of `chunk` tokens exist at a time, and fit into the processor's cache. The forward pass also computes their
    gradient, so they are neither saved nor recomputed. in_place_loss is cross_entropy_ or a faster version of it.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, soft_cap, chunk, in_place_loss)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients of hidden and weight are summed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, soft_cap, chunk, in_place_loss):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        total = torch.zeros((), device=device)
        num_targets = (targets != IGNORE).sum()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        with torch.autocast(device, enabled=False):
            weight = weight.to(dtype)
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                x = hidden[rows].to(dtype)
                logits = x @ weight.T  # (chunk, V)
                loss, grad = in_place_loss(logits, targets[rows], soft_cap)  # grad: (chunk, V)
                total += loss
                grad = grad.to(dtype)
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, num_targets)
        return total / num_targets

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, num_targets = ctx.saved_tensors
        scale = grad_loss / num_targets.clamp(min=1)  # without targets the loss is NaN, and all gradients are 0
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


def cross_entropy_(logits: Tensor, targets: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Summed loss of soft_cap(logits), and its gradient (N, V) in place of the logits.  logits (N, V), targets (N)"""
    check_targets(targets, logits.shape[1])
    logits, is_scored = logits.float(), targets[:, None] != IGNORE
    targets = targets[:, None].where(is_scored, 0)
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(soft_cap)
    largest = logits.amax(dim=1, keepdim=True)
    target_logits = logits.gather(1, targets)
    grad = logits.sub_(largest).exp_()  # becomes softmax - one-hot
    normaliser = grad.sum(dim=1, keepdim=True)
    grad.mul_(is_scored / normaliser).scatter_add_(1, targets, -is_scored.float())
    if soft_cap is not None:
        grad.mul_(slope)
    return (normaliser.log() + largest - target_logits).where(is_scored, 0).sum(), grad


def check_targets(targets: Tensor, vocab_size: int):
    """Raise for targets that are no int64, or outside of the vocabulary, as F.cross_entropy does; a GPU checks them itself."""
    if targets.dtype != torch.int64:
        raise RuntimeError(f"targets are of {targets.dtype}: give torch.int64")
    if targets.device.type == "cpu":
        is_wrong = (targets != IGNORE) & ((targets < 0) | (targets >= vocab_size))
        if is_wrong.any():
            raise IndexError(f"Target {targets[is_wrong][0]} is out of bounds.")
