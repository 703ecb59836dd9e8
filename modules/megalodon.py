"""Megalodon: attention within chunks, and a moving average that reaches beyond them (arXiv 2404.08801).

B batch, T time, S time including cached tokens, D model dim, H heads, K head dim, V value dim of a head.

    here                 paper (section 3.3)    meaning
    normed               X                      the input, timestep-normalised (section 3.2)
    averaged             X'                     its complex exponential moving average (section 3.1), normalised again
    direction            Z' = Z / |Z|           source of queries and keys, a vector of length 1 for each head
    q_gain, k_gain       κ                      their gain for each channel
    q_bias, k_bias       μ                      their shift for each channel
    w_z, w_v, w_gate     W_z, W_v, W_γ          matrices, with their biases
    gate                 γ                      multiplies the attention's output
    w_out                W_h and U_h            the matrices of X' and of the gated attention, side by side as one

The two-hop residual (section 3.4) belongs to the layer, not to the block, so it is in the layer string:

    SkipOut->Megalodon->SkipIn(learned=False)->Norm->MLP->+

which is x + MLP(Norm(x + Megalodon(x))).
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, activate, apply_rope, causal_attention, linear
from modules.checks import check_rows, check_sizes
from modules.flops import linear_flops
from modules.moving_average import CEMA, TimestepNorm
from modules.scores import narrowest
from tools import LoggingModule


class Megalodon(LoggingModule):
    """Timestep norm, CEMA, and normalised gated attention within chunks (arXiv 2404.08801).  (B, T, D) -> (B, T, D)

    A token sees the earlier tokens of its chunk; chunks are counted from the start of the story. value_dim is the width of all
    values together (None is 2 D), state_dim is that of CEMA, groups those of the timestep norm, which makes a norm before the
    block unnecessary. The RMSNorm after CEMA is that of the authors' code (github.com/XuezheMax/megalodon). CEMA makes it slow:
    per FLOP it takes about twice as long as Attn.
    """

    examples = (
        "Megalodon(chunk=16)",
        "Norm->Megalodon(chunk=7, value_dim=40, state_dim=3, groups=2)->+",
        "SkipOut->Megalodon->SkipIn(learned=False)->Norm->MLP->+",
    )
    causal_attention, apply_rope, activate = staticmethod(causal_attention), staticmethod(apply_rope), staticmethod(activate)

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, chunk: int = 64, value_dim: int | None = None, state_dim: int = 16,
        groups: int = 4, norm_eps: float = 1e-5, attention_soft_cap: float | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        check_sizes(chunk=chunk, value_dim=value_dim)
        value_dim = 2 * dim if value_dim is None else value_dim
        if value_dim % num_heads:
            raise ValueError(f"value_dim={value_dim}: num_heads={num_heads} must divide it")
        self.num_heads, self.head_dim, self.chunk, self.value_dim = num_heads, head_dim, chunk, value_dim
        self.soft_cap, self.dropout = attention_soft_cap, dropout
        self.timestep_norm = TimestepNorm(dim, groups, norm_eps)
        self.cema = CEMA(dim, state_dim)
        self.norm = RMSNorm(dim, norm_eps=norm_eps)
        self.w_z = linear(dim, num_heads * head_dim, bias=True)
        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(num_heads * head_dim)) for _ in "qk")
        self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(num_heads * head_dim)) for _ in "qk")
        self.w_v = linear(dim, value_dim, bias=True)
        self.w_gate = linear(dim, value_dim, bias=True)
        self.w_out = linear(dim + value_dim, dim, bias=True)

    def forward(self, x, *, rope=None, story_start=None, window=None, cache=None):
        """The cache keeps the states of the norm and the moving average, and the keys and values of the last chunk."""
        B, T, D = x.shape
        norm_cache, average_cache = (None if cache is None else cache.setdefault(name, {}) for name in ("norm", "average"))
        normed = self.timestep_norm(x, story_start=story_start, cache=norm_cache)
        averaged = self.norm(self.cema(normed, story_start=story_start, cache=average_cache))  # (B, T, D)
        q, k = self.queries_and_keys(averaged, rope)
        v = F.silu(self.w_v(normed)).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, num_heads, T, value_dim // num_heads)
        y = self.attend_chunks(q, k, v, story_start, window) if cache is None else self.attend_cached(q, k, v, cache)
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, value_dim)
        gated = self.activate("SiLU", self.w_gate(averaged), y)
        return self.w_out(torch.cat([averaged.type_as(gated), gated], dim=-1))  # (B, T, D)

    def queries_and_keys(self, averaged, rope):
        """Both from one vector of length 1 for each head, so that scores need no scale.  2 x (B, num_heads, T, head_dim)"""
        B, T, D = averaged.shape
        z = self.w_z(averaged).view(B, T, self.num_heads, self.head_dim)
        direction = F.normalize(z.float(), dim=-1, eps=1e-6).view(B, T, -1)
        scale = self.head_dim**0.5  # which softmax attention divides by
        q = direction * (scale * self.q_gain) + scale * self.q_bias
        k = direction * self.k_gain + self.k_bias
        q, k = (x.type_as(z).view(B, T, self.num_heads, -1).transpose(1, 2) for x in (q, k))
        if rope is not None:
            q, k = self.apply_rope(q, rope), self.apply_rope(k, rope)
        return q, k

    def attend_chunks(self, q, k, v, story_start, window):
        """Attention within chunks; the first token starts one.  (B, num_heads, T, value_dim // num_heads)"""
        B, _, T, _ = q.shape
        dropout = self.dropout if self.training else 0.0
        if T <= self.chunk:
            return self.causal_attention(q, k, v, story_start, window, self.soft_cap, dropout)
        positions = torch.arange(T, device=q.device)
        in_story = positions if story_start is None else positions - story_start
        chunk_start = (positions - in_story % self.chunk).expand(B, T)  # of the chunk that each token is in
        return self.causal_attention(q, k, v, chunk_start, narrowest(self.chunk, window), self.soft_cap, dropout)

    def attend_cached(self, q, k, v, cache):
        """attend_chunks after the cached tokens of the last chunk, which the first of the new tokens complete."""
        past, T = 0, q.shape[2]
        if "k" in cache:
            check_rows(cache["k"], len(q))
            past = cache["k"].shape[2]
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        start = (past + T - 1) // self.chunk * self.chunk  # of the last chunk
        cache["k"], cache["v"] = k[:, :, start:], v[:, :, start:]
        num_old, parts = min(T, -past % self.chunk), []  # new tokens that belong to the cached chunk
        if num_old:
            end, dropout = past + num_old, self.dropout if self.training else 0.0
            q_old, k_old, v_old = q[:, :, :num_old], k[:, :, :end], v[:, :, :end]
            parts.append(self.causal_attention(q_old, k_old, v_old, None, None, self.soft_cap, dropout))
        if num_old < T:
            parts.append(self.attend_chunks(q[:, :, num_old:], k[:, :, past + num_old :], v[:, :, past + num_old :], None, None))
        return torch.cat(parts, dim=2)

    def flops_per_token(self, T: int) -> float:
        """Matrices, CEMA, and attention within whole chunks and the last, shorter one."""
        chunks, last = divmod(T, self.chunk)
        visible = (chunks * self.chunk * (self.chunk + 1) + last * (last + 1)) / (2 * T)
        attention = 2 * (self.num_heads * self.head_dim + self.value_dim) * visible
        return linear_flops(self) + attention + self.cema.flops_per_token(T)


BLOCKS = {"Megalodon": Megalodon}
