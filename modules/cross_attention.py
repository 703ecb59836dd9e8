"""Cross-attention to a memory, such as the output of an encoder.

B batch, T time, M tokens of memory, D model dim.
"""

import torch

from model import Norm, RMSNorm, linear, masked_attention
from modules.flops import linear_flops
from tools import LoggingModule


class CrossAttention(LoggingModule):
    """Attention of every token to the whole memory, without a mask.  (B, T, D) -> (B, T, D)

    Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3. The memory (B, M, memory_dim) is that of a DATA plugin, see
    data/plugin.py; memory_dim is by default that of the model. Without a memory it adds nothing. With a cache, keys and values
    are computed only once.
    """

    examples = ("CrossAttn", "Norm->Attn->+->Norm->CrossAttn(num_kv_heads=1, qk_norm=True)->+")

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, memory_dim: int | None = None,
        linear_bias: bool = False, qk_norm: bool = False, norm: type[Norm] = RMSNorm, norm_eps: float = 1e-5,
        attention_soft_cap: float | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        if memory_dim is not None and memory_dim < 1:
            raise ValueError(f"memory_dim={memory_dim}: give the width of the memory, or None for that of the model")
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.soft_cap, self.dropout = attention_soft_cap, dropout
        self.memory_dim = memory_dim or dim
        self.w_q = linear(dim, num_heads * head_dim, bias=linear_bias)
        self.w_k = linear(self.memory_dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_v = linear(self.memory_dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_out = linear(num_heads * head_dim, dim, bias=linear_bias)
        self.q_norm = norm(head_dim, norm_eps=norm_eps) if qk_norm else None
        self.k_norm = norm(head_dim, norm_eps=norm_eps) if qk_norm else None

    def forward(self, x, *, memory=None, cache=None):
        """Raises ValueError for a memory of another width or number of rows."""
        B, T, D = x.shape
        if memory is None and not cache:
            return torch.zeros_like(x)
        q = self.w_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, num_heads, T, head_dim)
        q = q if self.q_norm is None else self.q_norm(q)
        k, v = (cache["k"], cache["v"]) if cache else self.read(memory, B)
        if cache is not None:
            cache["k"], cache["v"] = k, v
        mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device)
        y = masked_attention(q, k, v, mask, self.soft_cap, self.dropout if self.training else 0.0)
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def read(self, memory, B):
        """Keys and values of the memory, each (B, num_kv_heads, M, head_dim)."""
        if memory.dim() != 3 or memory.shape[0] != B or memory.shape[2] != self.memory_dim:
            raise ValueError(f"memory {tuple(memory.shape)}: CrossAttn reads ({B}, M, {self.memory_dim}). Set its memory_dim")
        M = memory.shape[1]
        k = self.w_k(memory).view(B, M, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, M, head_dim)
        v = self.w_v(memory).view(B, M, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, M, head_dim)
        return (k if self.k_norm is None else self.k_norm(k)), v

    def flops_per_token(self, T: int) -> float:
        """Linear layers, scores and weighted sums, with a memory as long as the sequence."""
        return linear_flops(self) + 4 * self.num_heads * self.head_dim * T


BLOCKS = {"CrossAttn": CrossAttention}
