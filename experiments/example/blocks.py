"""The Forgetting Transformer (Lin et al. 2025, arXiv 2503.02130): softmax attention with the forget gate of an LSTM.

B batch, T time (the new tokens), S time with what the cache remembers in front, D model dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention
from modules.windows import visible


class ForgettingAttn(Attention):
    """Attention to what has not been forgotten since.  (B, T, D) → (B, T, D)

    Every token opens a gate f = sigmoid(w x + b) for each head, and to the score of query i and key j the logarithms of the
    gates behind j up to i are added (section 3). What is far fades, so no positions are needed; a gate of 1 forgets nothing.
    Each pair has a score of its own to add, which our kernel does not take, so this is slower than Attention.
    """

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, qk_norm: bool = False, dropout: float = 0.0
    ):  # fmt: skip
        super().__init__(dim, num_heads, num_kv_heads, head_dim, qk_norm=qk_norm, dropout=dropout)
        self.w_forget = nn.Linear(dim, num_heads)

    def forward(self, x, *, first=None, rope=None, cache=None):
        """first (B, T): the first token that each one may look at, None is the first of all; rope: what `apply_rope` takes."""
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        gates = F.logsigmoid(self.w_forget(x).float()).transpose(1, 2)  # (B, num_heads, T)
        forgotten = gates.cumsum(dim=2)  # since the first token
        if cache is not None:
            if cache:
                forgotten = torch.cat([cache["forgotten"], cache["forgotten"][..., -1:] + forgotten], dim=2)
            cache["forgotten"] = forgotten
            k, v = self.remember(k, v, cache)
        S = k.shape[2]
        between = forgotten[..., S - T :, None] - forgotten[..., None, :]  # (B, num_heads, T, S)
        between = between.masked_fill(~visible(T, S, first, x.device), -math.inf).type_as(q)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, between, dropout, enable_gqa=True)
        return self.w_out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"ForgettingAttn": ForgettingAttn}
