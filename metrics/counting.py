"""Count the FLOPs and cache bytes of the parts of a model by running it.  B batch, T time."""

from collections import Counter
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fast
from model import Attention, Cache
from modules.flops import attention_flops
from modules.registry import takes


@contextmanager
def as_torch_does_it(model: nn.Module):
    """Run a model in eval mode with plain formulas, which torch's FLOP counter sees, instead of fused kernels."""
    was_training = model.training
    fuses_recurrence, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        with fast.undone(model), sdpa_kernel(SDPBackend.MATH):
            yield model.eval()
    finally:
        torch.backends.mkldnn.enabled = fuses_recurrence
        model.train(was_training)


def count_flops(model: nn.Module, parts: list[nn.Module], tokens: Tensor, kwargs: dict[str, Tensor]) -> dict[nn.Module, float]:
    """FLOPs of each part for tokens (B, T), without its inner parts, by its own count or else by torch's."""
    flops = dict.fromkeys(parts, 0.0)
    stack = []  # for each call in progress: FLOPs counted before it, and those of its inner parts

    def before(module, inputs):
        stack.append([counter.get_total_flops(), 0])

    def after(module, inputs, output):
        start, inner = stack.pop()
        total = counter.get_total_flops() - start
        if hasattr(module, "flops_per_token") or isinstance(module, Attention):
            B, T = inputs[0].shape[:2]
            per_token = module.flops_per_token if hasattr(module, "flops_per_token") else partial(attention_flops, module)
            flops[module] += B * T * per_token(T)
        else:
            flops[module] += total - inner
        if stack:
            stack[-1][1] += total

    hooks = [hook for part in parts for hook in (part.register_forward_pre_hook(before), part.register_forward_hook(after))]
    try:
        with FlopCounterMode(display=False) as counter:
            model(tokens, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def cache_bytes(model: nn.Module, tokens: Tensor, kwargs: dict[str, Tensor]) -> tuple[Counter, Counter]:
    """Cache bytes by block after half of the tokens (B, T) and after all; those of no block count for the model."""
    cache, sizes = Cache(), [Counter(), Counter()]
    if not takes(model, "cache"):
        return sizes[0], sizes[1]
    half = tokens.shape[1] // 2
    for piece in (tokens[:, :half], tokens[:, half:]):
        if piece.shape[1]:
            model(piece, cache=cache, **kwargs)
            visited: set[int] = set()
            sizes.append(Counter())
            for place, state in cache.blocks.items():  # a block, or a block and its turn
                sizes[-1][place[0] if isinstance(place, tuple) else place] += num_bytes(state, visited)
            sizes[-1][model] += num_bytes(vars(cache), visited)
    return sizes[-2], sizes[-1]


def num_bytes(value, visited: set[int]) -> int:
    """Bytes of all tensors in a nested value that were not visited before."""
    if isinstance(value, Tensor):
        is_new = id(value) not in visited
        visited.add(id(value))
        return value.numel() * value.element_size() * is_new
    if isinstance(value, dict):
        return sum(num_bytes(item, visited) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(num_bytes(item, visited) for item in value)
    return num_bytes(vars(value), visited) if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else 0
