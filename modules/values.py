"""Value residuals and value embeddings.

B batch, T time, D model dim.
"""

import torch
from torch import nn

from model import Attention
from modules.embeddings import weighted_sum


class ValueAttention(Attention):
    """Attention with a value residual, a value embedding, or both.  (B, T, D) -> (B, T, D)

    residual: a v + b v_1 with the values v_1 of the first such layer; the learned a and b start at 1/2 (Zhou et al. 2024, arXiv
    2410.17897). embedding: v plus an embedding of the token that starts at zero (Jordan et al. 2024, modded-nanogpt); the table
    costs memory, but hardly any time.
    """

    weighted_sum = staticmethod(weighted_sum)

    def __init__(
        self, dim: int, num_kv_heads: int, head_dim: int, vocab_size: int, residual: bool = True, embedding: bool = False,
        **attention,
    ):  # fmt: skip
        super().__init__(dim, num_kv_heads=num_kv_heads, head_dim=head_dim, **attention)
        self.share = nn.Parameter(torch.tensor([0.5, 0.5])) if residual else None
        self.table = nn.Embedding(vocab_size, num_kv_heads * head_dim) if embedding else None
        if embedding:
            nn.init.zeros_(self.table.weight)

    def forward(self, x, *, tokens, shared, rope=None, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        if self.table is not None:
            v = v + self.table(tokens).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.share is not None:
            first_v = shared.setdefault("values", v)  # (B, num_kv_heads, T, head_dim)
            v = self.weighted_sum(v, first_v, self.share)
        y = self.attend(q, k, v, story_start, window, cache)
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"ValueAttn": ValueAttention}
