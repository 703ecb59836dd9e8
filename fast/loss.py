"""The loss of a language model without the logits of all tokens at once.

N tokens, D model dim, V vocabulary.
"""

import torch
from torch import Tensor

from fast import ops as kernels

IGNORE = -100  # a target that the loss leaves out, such as padding; cross_entropy's own default


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, soft_cap: float | None, chunk: int, backend: str = "auto"
) -> Tensor:
    """The mean cross-entropy of logits = soft_cap(hidden @ weight.T), in nats; hidden (..., D), weight (V, D), targets (...).

    Only the logits of `chunk` tokens exist at a time, which fit into the cache of the processor; their gradient is worked
    out at once, so that they need not be kept or computed again. backend="kernel" is our own C++, where that fits.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    return ChunkedCrossEntropy.apply(hidden, weight, targets, soft_cap, chunk, backend)


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, soft_cap, chunk, backend):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        by_kernel = kernels.fit(backend, hidden)
        total = torch.zeros((), device=device)
        num_targets = (targets != IGNORE).sum()
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        with torch.autocast(device, enabled=False):
            weight = weight.to(dtype)
            for rows in torch.arange(len(hidden)).split(chunk):
                rows = slice(rows[0], rows[-1] + 1)
                x = hidden[rows].to(dtype)
                logits = x @ weight.T  # (chunk, V)
                if by_kernel:
                    total += kernels.cross_entropy_(logits, targets[rows], soft_cap)
                else:
                    logits = logits.float()
                    total += cross_entropy_(logits, targets[rows], soft_cap)
                grad = logits.to(dtype)  # (chunk, V), what cross_entropy made of the logits
                grad_hidden[rows] = grad @ weight
                grad_weight += grad.T @ x
        ctx.save_for_backward(grad_hidden, grad_weight, num_targets)
        return total / num_targets

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight, num_targets = ctx.saved_tensors
        scale = grad_loss / num_targets
        return grad_hidden * scale, grad_weight * scale, None, None, None, None


def cross_entropy_(logits: Tensor, targets: Tensor, soft_cap: float | None) -> Tensor:
    """The summed loss of soft_cap(logits); the logits become its gradient: softmax - onehot.  logits (N, V), targets (N) → ()"""
    targets = targets[:, None]
    scored = targets != IGNORE
    targets = targets.where(scored, 0)
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(soft_cap)
    highest = logits.amax(dim=1, keepdim=True)
    right = logits.gather(1, targets)
    grad = logits.sub_(highest).exp_()
    normaliser = grad.sum(dim=1, keepdim=True)
    grad.mul_(scored / normaliser).scatter_add_(1, targets, -scored.float())
    if soft_cap is not None:
        grad.mul_(slope)
    return ((normaliser.log() + highest - right) * scored).sum()
