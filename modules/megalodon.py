"""Megalodon: attention within chunks of tokens, and what goes beyond them by a moving average (arXiv 2404.08801).

B batch, T time, S time with what the cache remembers in front, D model dim, H heads, K head dim, V value dim of a head.

    here                 paper (section 3.3)    what it is
    normed               X                      the input, timestep-normalised (section 3.2)
    averaged             X'                     its complex exponential moving average (section 3.1), normalised once more
    direction            Z' = Z / |Z|           what queries and keys are made of, in each head a vector of length 1
    q_gain, k_gain       κ                      their gain for each channel
    q_bias, k_bias       μ                      their shift for each channel
    w_z, w_v, w_gate     W_z, W_v, W_γ          matrices, with their biases
    gate                 γ                      what the attention is multiplied by
    w_out                W_h and U_h            the matrices that X' and the gated attention go through, side by side as one

The two-hop residual (section 3.4) is of the layer, not of the block, so it stands in the layer string:

    SkipOut->Megalodon->SkipIn(learned=False)->Norm->MLP->+

adds x to what Megalodon makes of it for the MLP to read, and then, with +, x to what the MLP has made of that.
"""

import torch
import torch.nn.functional as F
from torch import nn

from fast import ops as kernels
from model import SoftmaxAttention, apply_rope, linear
from modules.chunks import check_sizes
from modules.moving_average import CEMA, TimestepNorm
from modules.norms import RMSNorm
from modules.scan import check_rows, story_starts


class Megalodon(SoftmaxAttention):
    """Normalised, gated attention within chunks, behind timestep norm and CEMA (arXiv 2404.08801).  (B, T, D) → (B, T, D)

    A token sees those of its chunk that are not behind it; chunks are counted from the beginning of the story. value_dim is the
    width of all values together, by default 2 D, state_dim the complex numbers that CEMA keeps for each channel, and groups
    those of the timestep norm. As it has that norm, it needs none before it. The RMSNorm behind CEMA is that of the authors'
    code (github.com/XuezheMax/megalodon). CEMA makes it slow for what it computes: per FLOP about twice as long as Attn.
    """

    examples = (
        "Megalodon(chunk=16)",
        "Norm->Megalodon(chunk=7, value_dim=40, state_dim=3, groups=2)->+",
        "SkipOut->Megalodon->SkipIn(learned=False)->Norm->MLP->+",
    )

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, chunk: int = 64, value_dim: int | None = None, state_dim: int = 16,
        groups: int = 4, norm_eps: float = 1e-5, attention: str = "auto", attention_soft_cap: float | None = None,
        dropout: float = 0.0,
    ):  # fmt: skip
        check_sizes(chunk=chunk, value_dim=value_dim)
        value_dim = 2 * dim if value_dim is None else value_dim
        if value_dim % num_heads:
            raise ValueError(f"value_dim={value_dim}: num_heads={num_heads} must divide it")
        super().__init__(num_heads, num_heads, head_dim, chunk, attention, attention_soft_cap, dropout)
        self.value_dim = value_dim
        self.timestep_norm = TimestepNorm(dim, groups, norm_eps)
        self.cema = CEMA(dim, state_dim)
        self.norm = RMSNorm(dim, norm_eps=norm_eps)
        self.w_z = linear(dim, num_heads * head_dim, bias=True)
        self.q_gain, self.k_gain = (nn.Parameter(torch.ones(num_heads * head_dim)) for _ in "qk")
        self.q_bias, self.k_bias = (nn.Parameter(torch.zeros(num_heads * head_dim)) for _ in "qk")
        self.w_v = linear(dim, value_dim, bias=True)
        self.w_gate = linear(dim, value_dim, bias=True)
        self.w_out = linear(dim + value_dim, dim, bias=True)

    def forward(self, x, *, first=None, rope=None, cache=None):
        """first (B, T): a story begins where first[b, t] is t, and attention sees nothing before first; rope as for apply_rope.

        The cache keeps the states of norm and average, and keys and values of the last chunk.
        """
        B, T, D = x.shape
        norm_cache, average_cache = (None if cache is None else cache.setdefault(name, {}) for name in ("norm", "average"))
        normed = self.timestep_norm(x, first=first, cache=norm_cache)
        averaged = self.norm(self.cema(normed, first=first, cache=average_cache))  # (B, T, D)
        q, k = self.queries_and_keys(averaged, rope)
        v = F.silu(self.w_v(normed)).view(B, T, self.num_heads, -1).transpose(1, 2)  # (B, num_heads, T, value_dim // num_heads)
        mixed = self.read_chunks(q, k, v, first) if cache is None else self.read_on(q, k, v, cache)
        mixed = mixed.transpose(1, 2).reshape(B, T, -1)  # (B, T, value_dim)
        gated = self.activate(self.w_gate(averaged), mixed)
        return self.w_out(torch.cat([averaged.type_as(gated), gated], dim=-1))  # (B, T, D)

    def queries_and_keys(self, averaged, rope):
        """Both from one vector of length 1 for each head, so that scores need no scale.  Twice (B, num_heads, T, head_dim)"""
        B, T, D = averaged.shape
        z = self.w_z(averaged).view(B, T, self.num_heads, self.head_dim)
        direction = F.normalize(z.float(), dim=-1, eps=1e-6).view(B, T, -1)
        scale = self.head_dim**0.5  # which softmax attention divides by
        q = direction * (scale * self.q_gain) + scale * self.q_bias
        k = direction * self.k_gain + self.k_bias
        q, k = (x.type_as(z).view(B, T, self.num_heads, -1).transpose(1, 2) for x in (q, k))
        if rope is not None:
            turn = kernels.apply_rope if kernels.fit(self.backend, q) else apply_rope
            q, k = turn(q, rope), turn(k, rope)
        return q, k

    def read_chunks(self, q, k, v, first):
        """The attention of tokens whose first one begins a chunk.  (B, num_heads, T, value_dim // num_heads)"""
        B, _, T, _ = q.shape
        if T <= self.window:
            return self.blend(q, k, v, first, None)
        places = torch.arange(T, device=q.device)
        starts = 0 if first is None else story_starts(first)
        begins = (places - (places - starts) % self.window).expand(B, T)  # of the chunk that each token is in
        begins = begins if first is None else begins.maximum(first)
        return self.blend(q, k, v, begins.int(), self.window)

    def read_on(self, q, k, v, cache):
        """The same behind what the cache remembers of the last chunk, which is full after some of the tokens, or is already."""
        B, _, T, _ = q.shape
        past = 0
        if cache.get("k") is not None:
            check_rows(cache["k"], B)
            past = cache["k"].shape[2]
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        S = past + T
        left = min(T, -past % self.window)  # tokens that still go into it
        mixed = []
        if left:
            mixed.append(self.blend(q[:, :, :left], k[:, :, : past + left], v[:, :, : past + left], None, None))
        if left < T:
            mixed.append(self.read_chunks(q[:, :, left:], k[:, :, past + left :], v[:, :, past + left :], None))
        begin = (S - 1) // self.window * self.window  # of the last chunk
        cache["k"], cache["v"] = k[:, :, begin:], v[:, :, begin:]
        return torch.cat(mixed, dim=2)

    def fits_kernel(self, T, S):
        return self.value_dim == self.num_heads * self.head_dim and super().fits_kernel(T, S)

    def activate(self, gate, mixed):
        """SiLU(gate) times what was mixed.  Twice (B, T, value_dim) → the same"""
        if kernels.fit(self.backend, gate):
            return kernels.activate("SiLU", gate, mixed)
        return F.silu(gate) * mixed

    def flops_per_token(self, T):
        """Matrices, CEMA, and of the attention what is in the chunk."""
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        attention = 2 * (self.num_heads * self.head_dim + self.value_dim) * self.seen_per_token(T)
        return 2 * matrices + attention + self.cema.flops_per_token(T)

    def seen_per_token(self, T):
        """The mean over whole chunks and the rest."""
        chunks, rest = divmod(T, self.window)
        return (chunks * self.window * (self.window + 1) + rest * (rest + 1)) / (2 * T)


BLOCKS = {"Megalodon": Megalodon}
