"""Multi-head latent attention: keys and values come from a small latent vector of each token, which is all that is cached.

B batch, T time, S time including cached tokens, D model dim.

    here         paper           meaning
    latent       c^KV            the latent of keys and values
    rope_key     k^R             the rotated channels of the keys, shared by all heads
    w_kv_down    W^DKV, W^KR     from x to latent and rope_key
    w_kv_up      W^UK, W^UV      from latent to keys and values
    w_q_down     W^DQ            from x to the latent of the queries
    w_q_up       W^UQ, W^QR      from it to the queries
"""

import math

import torch
import torch.nn.functional as F

from model import Norm, RMSNorm, apply_rope, causal_attention, causal_mask, linear
from modules.checks import check_sizes
from modules.flops import linear_flops, mean_visible
from modules.rope import RopeTable
from modules.scores import attention_scores, average, narrowest
from tools import LoggingModule


class LatentAttention(LoggingModule):
    """Multi-head latent attention (DeepSeek-V2, 2024, arXiv 2405.04434, section 2.1 and appendix C).  (B, T, D) -> (B, T, D)

    A latent of kv_rank numbers (None is 2 head_dim) holds a token's keys and values for all heads. Queries and keys have
    head_dim channels without RoPE and rope_dim channels with it (None is head_dim / 2); those of the key are shared by all
    heads. v_dim is the width of a value, None is head_dim. With q_rank the queries come from a latent, too. query_scale replaces
    1 / sqrt(head_dim + rope_dim). rope_scaling fits a trained model to longer contexts: see modules/rope.py.

    The cache keeps the latent and the rotated key. Without a cache, keys and values are expanded from the latents, and
    attention is that of Attn. With one, w_kv_up is multiplied into queries and output instead, and the latents are attended to.
    """

    examples = ("LatentAttn", "LatentAttn(q_rank=12, kv_rank=10, rope_dim=6, v_dim=4, window=5, query_scale=0.5)")
    causal_attention, apply_rope = staticmethod(causal_attention), staticmethod(apply_rope)

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, max_seq_len: int, positions: str = "rope", rope_theta: float = 10_000.0,
        q_rank: int | None = None, kv_rank: int | None = None, rope_dim: int | None = None, v_dim: int | None = None,
        window: int | None = None, linear_bias: bool = False, norm: type[Norm] = RMSNorm, norm_eps: float = 1e-5,
        attention_soft_cap: float | None = None, dropout: float = 0.0, query_scale: float | None = None,
        rope_scaling: dict | None = None,
    ):  # fmt: skip
        super().__init__()
        check_sizes(q_rank=q_rank, kv_rank=kv_rank, rope_dim=rope_dim, v_dim=v_dim, window=window)
        kv_rank, v_dim = kv_rank or 2 * head_dim, v_dim or head_dim
        rope_dim = rope_dim or 2 * math.ceil(head_dim / 4)
        if rope_dim % 2:
            raise ValueError(f"rope_dim={rope_dim}: RoPE turns pairs of channels, so give an even number")
        if v_dim > head_dim + rope_dim:
            raise ValueError(f"v_dim={v_dim}: a value is no wider than a key, here head_dim + rope_dim = {head_dim + rope_dim}")
        if query_scale is not None and query_scale <= 0:
            raise ValueError(f"query_scale={query_scale}: give a positive number, or None for 1 / sqrt(head_dim + rope_dim)")
        self.num_heads, self.head_dim, self.window = num_heads, head_dim + rope_dim, window
        self.query_scale, self.soft_cap, self.dropout = query_scale, attention_soft_cap, dropout
        self.latent_head_dim, self.rope_dim, self.v_dim, self.kv_rank = head_dim, rope_dim, v_dim, kv_rank
        if q_rank is None:
            self.w_q = linear(dim, num_heads * (head_dim + rope_dim), bias=linear_bias)
        else:
            self.w_q_down = linear(dim, q_rank, bias=linear_bias)
            self.q_norm = norm(q_rank, norm_eps=norm_eps)
            self.w_q_up = linear(q_rank, num_heads * (head_dim + rope_dim))
        self.q_rank = q_rank
        self.w_kv_down = linear(dim, kv_rank + rope_dim, bias=linear_bias)
        self.kv_norm = norm(kv_rank, norm_eps=norm_eps)
        self.w_kv_up = linear(kv_rank, num_heads * (head_dim + v_dim))
        self.w_out = linear(num_heads * v_dim, dim, bias=linear_bias)
        self.rope_table = RopeTable(max_seq_len, rope_dim, rope_theta, rope_scaling=rope_scaling) if positions == "rope" else None

    def forward(self, x, *, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, latent, rope_key = self.compress(x, cache)
        if cache is not None:
            latent, rope_key = self.append_to_cache(cache, latent, rope_key)
        dropout = self.dropout if self.training else 0.0
        if latent.shape[1] > T:
            y = self.attend_latents(q, latent, rope_key, dropout)
        else:
            k, v = self.expand(latent, rope_key)
            y = self.causal_attention(q, k, v, story_start, narrowest(self.window, window), self.soft_cap, dropout)
            y = y[..., : self.v_dim]
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def compress(self, x, cache):
        """Queries (B, num_heads, T, head_dim), latents (B, T, kv_rank) and rotated keys (B, T, rope_dim)."""
        B, T, D = x.shape
        q = self.w_q(x) if self.q_rank is None else self.w_q_up(self.q_norm(self.w_q_down(x)))
        q = q.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, num_heads, T, head_dim)
        if self.query_scale is not None:  # the scores will be divided by sqrt(head_dim)
            q = q * (self.query_scale * math.sqrt(self.head_dim))
        latent, rope_key = self.w_kv_down(x).split([self.kv_rank, self.rope_dim], dim=-1)
        latent = self.kv_norm(latent)  # (B, T, kv_rank)
        if self.rope_table is not None:
            rope = self.rope_table.next(T, cache)
            plain_q, rope_q = q.split([self.latent_head_dim, self.rope_dim], dim=-1)
            q = torch.cat([plain_q, self.apply_rope(rope_q, rope)], dim=-1)  # (B, num_heads, T, head_dim)
            rope_key = self.apply_rope(rope_key[:, None], rope)[:, 0]  # (B, T, rope_dim)
        return q, latent, rope_key

    def append_to_cache(self, cache, latent, rope_key):
        """Append latents (B, S, kv_rank) and rotated keys (B, S, rope_dim); keep those that the next token can see."""
        if "latent" in cache:
            latent = torch.cat([cache["latent"], latent], dim=1)
            rope_key = torch.cat([cache["rope_key"], rope_key], dim=1)
        dropped = 0 if self.window is None else max(0, latent.shape[1] - self.window + 1)
        cache["latent"], cache["rope_key"] = latent[:, dropped:], rope_key[:, dropped:]
        return latent, rope_key

    def expand(self, latent, rope_key):
        """Keys and values, which are padded to the width of keys for fused attention.  (B, num_heads, S, head_dim)"""
        B, S, _ = latent.shape
        k_and_v = self.w_kv_up(latent).view(B, S, self.num_heads, -1).transpose(1, 2)
        k, v = k_and_v.split([self.latent_head_dim, self.v_dim], dim=-1)
        rope_key = rope_key[:, None].expand(-1, self.num_heads, -1, -1)
        k = torch.cat([k, rope_key], dim=-1)  # (B, num_heads, S, head_dim)
        return k, F.pad(v, (0, self.head_dim - self.v_dim))

    def attend_latents(self, q, latent, rope_key, dropout):
        """Attention to the latents, with w_kv_up multiplied into queries and output.  (B, num_heads, T, v_dim)"""
        B, _, T, _ = q.shape
        S = latent.shape[1]
        up = self.w_kv_up.weight.view(self.num_heads, -1, self.kv_rank)
        k_up, v_up = up.split([self.latent_head_dim, self.v_dim], dim=1)  # v_up: (num_heads, v_dim, kv_rank)
        plain_q, rope_q = q.split([self.latent_head_dim, self.rope_dim], dim=-1)
        latent_q = torch.einsum("bhtk,hkr->bhtr", plain_q, k_up)  # (B, num_heads, T, kv_rank)
        keys = torch.cat([latent, rope_key], dim=-1)[:, None]
        latent_q = torch.cat([latent_q, rope_q], dim=-1)
        scores = attention_scores(latent_q, keys, self.soft_cap, scale=self.head_dim**-0.5)  # (B, num_heads, T, S)
        scores = scores.masked_fill(~causal_mask(T, S, window=self.window, device=q.device), -math.inf)
        weights = F.dropout(scores.softmax(dim=-1), dropout)
        return torch.einsum("bhtr,hvr->bhtv", average(weights, latent[:, None]), v_up)

    def flops_per_token(self, T: int) -> float:
        """Matrices, scores and weighted sums, without a cache."""
        return linear_flops(self) + 2 * self.num_heads * (self.head_dim + self.v_dim) * mean_visible(T, self.window)


BLOCKS = {"LatentAttn": LatentAttention}
