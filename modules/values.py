"""Attention with more to its values than the layer below says.

B batch, T time, D model dim.
"""

import torch
from torch import nn

from fast import ops as kernels
from model import Attention


class ValueAttention(Attention):
    """Attention that adds to the values what the first layer or the token itself has to say.  (B, T, D) → (B, T, D)

    residual: a v + b v_1 with the values v_1 of the first such layer; the learned numbers a and b begin at 1/2 (Zhou et al.
    2024, arXiv 2410.17897). embedding: v + a vector that is looked up for each token, at first zero (Jordan et al. 2024,
    modded-nanogpt); a table costs memory, but hardly any time.
    """

    def __init__(
        self, dim: int, num_kv_heads: int, head_dim: int, vocab_size: int, residual: bool = True, embedding: bool = False,
        **attention,
    ):  # fmt: skip
        super().__init__(dim, num_kv_heads=num_kv_heads, head_dim=head_dim, **attention)
        self.share = nn.Parameter(torch.tensor([0.5, 0.5])) if residual else None
        self.table = nn.Embedding(vocab_size, num_kv_heads * head_dim) if embedding else None
        if embedding:
            nn.init.zeros_(self.table.weight)

    def forward(self, x, *, tokens, shared, first=None, rope=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        if self.table is not None:
            v = v + self.table(tokens).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.share is not None:
            first_v = shared.setdefault("values", v)  # (B, num_kv_heads, T, head_dim)
            if kernels.fit(self.backend, v):
                v = kernels.weighted_sum(v, first_v, self.share)
            else:
                v = self.share[0] * v + self.share[1] * first_v
        mixed = self.mix(q, k, v, first, cache)
        return self.w_out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"ValueAttn": ValueAttention}
