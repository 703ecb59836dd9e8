"""The Forgetting Transformer (Lin et al. 2025, arXiv 2503.02130): softmax attention with the forget gate of an LSTM.

B batch, T time (new tokens), S time including cached tokens, D model dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, append_to_cache, causal_mask


class ForgettingAttn(Attention):
    """Attention with a forget gate: the score of a key fades with every token after it.  (B, T, D) -> (B, T, D)

    Every token has a gate f = sigmoid(w x + b) for each head, and the score of query i and key j gets the sum of log f over the
    tokens after j, up to i (section 3). Distant keys fade, so no positions are needed; a gate of 1 forgets nothing.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool = False, dropout: float = 0.0
    ):  # fmt: skip
        super().__init__(dim, num_heads, num_kv_heads, head_dim, qk_norm=qk_norm, dropout=dropout)
        self.w_forget = nn.Linear(dim, num_heads)

    def forward(self, x, *, rope=None, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        log_gates = F.logsigmoid(self.w_forget(x).float()).transpose(1, 2)  # (B, num_heads, T)
        faded = log_gates.cumsum(dim=2)  # since the first token
        if cache is not None:
            if cache:
                faded = torch.cat([cache["faded"], cache["faded"][..., -1:] + faded], dim=2)
            cache["faded"] = faded
            k, v = append_to_cache(cache, k, v, window=None)
        S = k.shape[2]
        scores = faded[..., S - T :, None] - faded[..., None, :]  # (B, num_heads, T, S)
        mask = causal_mask(T, S, story_start, window, x.device)
        scores = scores.masked_fill(~mask, -math.inf).type_as(q)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, scores, dropout, enable_gqa=True)
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"ForgettingAttn": ForgettingAttn}
