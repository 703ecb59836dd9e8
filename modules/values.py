"""Attention whose values remember those of the first layer.

B batch, T time, D model dim.
"""

import torch
from torch import nn

from model import Attention


class ValueResidual(Attention):
    """Attention that mixes the values of the first such layer into its own: a v + b v_1 (Zhou et al. 2024, arXiv 2410.17897).

    The learned numbers a and b begin at 1/2.  (B, T, D) → (B, T, D)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        linear_bias: bool = False,
        qk_norm: bool = False,
        norm: str = "RMSNorm",
        norm_eps: float = 1e-5,
        attention: str = "auto",
        attention_soft_cap: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__(
            dim, num_heads, num_kv_heads, head_dim, linear_bias, qk_norm, norm, norm_eps, attention, attention_soft_cap, dropout
        )
        self.share = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x, *, shared, mask=None, first=None, rope=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        first_v = shared.setdefault("values", v)  # (B, num_kv_heads, T, head_dim)
        v = self.share[0] * v + self.share[1] * first_v
        mixed = self.mix(q, k, v, mask, first, cache)
        return self.w_out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"ValueAttn": ValueResidual}
