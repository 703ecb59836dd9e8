"""Attention written out, for blocks that change a step of it: scores, weighted sums, windows.

B batch, H query heads, G key/value heads, T time (the queries), S time including cached tokens, K head dim.
"""

import torch
from torch import Tensor


def attention_scores(q: Tensor, k: Tensor, soft_cap: float | None = None, scale: float | None = None) -> Tensor:
    """scale q k, soft-capped; scale is by default 1 / sqrt(K).  q (B, H, T, K), k (B, G, S, K) -> (B, H, T, S)"""
    B, H, T, K = q.shape
    scores = (q.reshape(B, k.shape[1], -1, K) * (scale or K**-0.5)) @ k.mT  # one matmul for all heads that share a key head
    scores = scores.view(B, H, T, -1)
    return scores if soft_cap is None else soft_cap * torch.tanh(scores / soft_cap)  # Gemma 2, arXiv 2408.00118, section 2


def average(weights: Tensor, v: Tensor) -> Tensor:
    """Weighted sums of the values.  weights (B, H, T, S), v (B, G, S, K) -> (B, H, T, K)"""
    B, H, T, S = weights.shape
    return (weights.reshape(B, v.shape[1], -1, S) @ v).view(B, H, T, -1)


def narrowest(one: int | None, other: int | None) -> int | None:
    """The narrower of two windows; None sees all earlier tokens."""
    return other if one is None else one if other is None else min(one, other)
