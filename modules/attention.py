"""Attention variants: own RoPE, gates, ALiBi, sinks, differential, bidirectional.

All take the options of the base model's attention, too.

B batch, T time, S time including cached tokens, D model dim, H query heads, G key/value heads, K head dim.
"""

import math
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Attention, RMSNorm, append_to_cache, causal_mask, linear, masked_attention
from modules.flops import mean_visible
from modules.rope import RopeTable
from modules.scores import attention_scores, average, narrowest
from modules.windows import attend_blocks, attend_spans, block_plan, span_mask


class RotaryAttention(Attention):
    """Attention with its own RoPE, if the model has positions="rope".  (B, T, D) -> (B, T, D)

    rope_theta is the base of its wavelengths: Gemma 3 uses 10,000 in windows and 1,000,000 without (arXiv 2503.19786, section
    2). rope_share is the share of channels that are rotated, as in GPT-J and GPT-NeoX (Black et al. 2022, arXiv 2204.06745,
    section 2.1.1), 0 for none (in every fourth layer of Yang et al. 2025, arXiv 2501.18795): channel k is paired with channel
    k + head_dim / 2, for all k below rope_share head_dim / 2, and rotates by rope_theta^(-2 k / (rope_share head_dim)) a token.
    rope_scaling, such as {"type": "linear", "factor": 8}, fits a trained model to longer contexts: see modules/rope.py.
    """

    examples = (
        "RopeAttn(rope_theta=100.0)",
        "RopeAttn(rope_share=0.5, window=5)",
        "RopeAttn(rope_share=0.0)",
        "RopeAttn(rope_scaling={'type': 'linear', 'factor': 8})",
    )

    def __init__(
        self, dim: int, head_dim: int, max_seq_len: int, positions: str = "rope", rope_theta: float = 10_000.0,
        rope_share: float = 1.0, rope_scaling: dict | None = None, **attention,
    ):  # fmt: skip
        super().__init__(dim, head_dim=head_dim, **attention)
        if not 0 <= rope_share <= 1:
            raise ValueError(f"rope_share={rope_share}: give the share of channels that are rotated, from 0 to 1")
        own = positions == "rope"
        self.rope_table = RopeTable(max_seq_len, head_dim, rope_theta, rope_share, rope_scaling) if own else None

    def forward(self, x, *, story_start=None, window=None, cache=None):
        rope = self.next_rope(x.shape[1], cache)
        return super().forward(x, rope=rope, story_start=story_start, window=window, cache=cache)

    def next_rope(self, T, cache):
        return None if self.rope_table is None else self.rope_table.next(T, cache)


class GatedAttention(RotaryAttention):
    """Attention with a sigmoid output gate, before the output projection.  (B, T, D) -> (B, T, D)

    gate="channel" has a gate for each channel of each head, as Qwen3-Next, "head" one for each head (Qiu et al. 2025, arXiv
    2505.06708, section 2.2, position G1).
    """

    examples = ("GatedAttn", "GatedAttn(gate='head', qk_norm=True, rope_share=0.25)")

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, linear_bias: bool = False, gate: Literal["channel", "head"] = "channel",
        **attention,
    ):  # fmt: skip
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, linear_bias=linear_bias, **attention)
        self.w_gate = linear(dim, num_heads * (head_dim if gate == "channel" else 1), bias=linear_bias)

    def forward(self, x, *, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, self.next_rope(T, cache))
        y = self.attend(q, k, v, story_start, window, cache).transpose(1, 2)  # (B, T, num_heads, head_dim)
        gate = self.w_gate(x).sigmoid().view(B, T, self.num_heads, -1)
        return self.w_out((gate * y).reshape(B, T, -1))  # (B, T, D)


class AlibiAttention(Attention):
    """Attention with linear biases: each head subtracts its own slope times the distance from the scores.  (B, T, D) -> (B, T, D)

    Press et al. 2021, arXiv 2108.12409, section 3. It uses no other positions: RoPE is left out, and positions="none" fits. The
    biases are added to every score, also to those that are masked, so it takes more time and memory than Attn.
    """

    examples = ("AlibiAttn", "AlibiAttn(window=5, num_heads=6)")

    def __init__(self, dim: int, num_heads: int, **attention):
        super().__init__(dim, num_heads=num_heads, **attention)
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)

    def forward(self, x, *, story_start=None, window=None, cache=None):
        return super().forward(x, story_start=story_start, window=window, cache=cache)

    def attend(self, q, k, v, story_start, window, cache):
        if cache is not None:
            k, v = append_to_cache(cache, k, v, self.window)
        T, S = q.shape[2], k.shape[2]
        window = narrowest(self.window, window)
        if window is None or window >= S:
            return self.with_biases(q, k, v, causal_mask(T, S, story_start, device=q.device))
        return attend_spans(self.with_biases, q, k, v, ((0, window - 1),), story_start)

    def with_biases(self, q, k, v, mask):
        """Attention restricted to mask (..., T, S), with a bias of minus slope times distance.  (B, H, T, K)"""
        T, S = q.shape[2], k.shape[2]
        positions = torch.arange(S, device=q.device)
        biases = self.slopes[:, None, None] * (positions - positions[S - T :, None])  # (num_heads, T, S)
        biases = biases.type_as(q).masked_fill(~mask, -math.inf)
        return masked_attention(q, k, v, biases, self.soft_cap, self.dropout if self.training else 0.0)


def alibi_slopes(num_heads: int) -> Tensor:
    """2^(-8 / n), 2^(-16 / n), ..., 2^-8 for n heads, a power of 2; else those of the next lower power, and then every other one
    of twice that power (Press et al. 2021, section 3).  (num_heads)"""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1))
    between = 2.0 ** (-4 / power * torch.arange(1, 2 * power, 2))
    return torch.cat([slopes, between])[:num_heads]


def attention_with_sinks(q, k, v, sinks, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    """causal_attention of model.py with one more score for each head, sinks (H), which has no value.  (B, H, T, K)"""
    weigh = partial(masked_attention_with_sinks, sinks=sinks, soft_cap=soft_cap, dropout=dropout)
    T, S = q.shape[2], k.shape[2]
    if window is None or window >= S:
        return weigh(q, k, v, causal_mask(T, S, story_start, device=q.device))
    return attend_spans(weigh, q, k, v, ((0, window - 1),), story_start)


def masked_attention_with_sinks(q, k, v, mask, sinks, soft_cap=None, dropout=0.0) -> Tensor:
    """Attention restricted to mask (..., T, S), with the scores of sinks (H) in the softmax.  (B, H, T, K)"""
    B, H, T, K = q.shape
    if soft_cap is not None:
        scores = attention_scores(q, k, soft_cap).masked_fill(~mask, -math.inf)
        return average(F.dropout(softmax_with_sinks(scores, sinks), dropout), v)
    # PyTorch's fused attention knows no sinks: one more key, of zeros and a 1 in one more channel, in which each query has the
    # score of its head's sink.
    G, S = k.shape[1:3]
    q = torch.cat([q, (sinks * K**0.5).type_as(q)[:, None, None].expand(B, H, T, 1)], dim=-1)
    sink = F.one_hot(torch.tensor(K, device=q.device), K + 1).type_as(k)
    k = torch.cat([sink.expand(B, G, 1, K + 1), F.pad(k, (0, 1))], dim=2)  # (B, G, 1 + S, K + 1)
    v, mask = F.pad(v, (0, 1, 1, 0)), F.pad(mask, (1, 0), value=True)  # v: (B, G, 1 + S, K + 1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=K**-0.5, enable_gqa=True)[..., :K]


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over the keys and a sink (H) for each head, without the weight of the sink.  (B, H, T, S) -> the same"""
    if sinks is None:
        return scores.softmax(dim=-1)
    sinks = sinks[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]


class SinkAttention(RotaryAttention):
    """Attention with sinks, which take the weight that a token has no use for.  (B, T, D) -> (B, T, D)

    learned: each head has a score that takes part in every softmax but has no value, so the weights of the keys need not sum
    to 1. As in gpt-oss (2025, arXiv 2508.10925, section 2.2); it starts at 0, the softmax off by one of Xiao et al. 2023, arXiv
    2309.17453, section 3.3. keep: the first tokens of the story, this many, stay visible beside the window, as sinks that the
    model has made itself (StreamingLLM, the same paper, section 3.2). Positions are those in the text, not in the cache.

    The kept tokens need a mask, and long sequences are computed in blocks, since each query may have other ones: per FLOP that
    takes longer than Attn.
    """

    examples = ("SinkAttn", "SinkAttn(keep=2, window=5)", "SinkAttn(learned=False, keep=3, window=7)", "SinkAttn(window=5)")
    attention_with_sinks = staticmethod(attention_with_sinks)

    def __init__(self, dim: int, num_heads: int, window: int | None = None, learned: bool = True, keep: int = 0, **attention):
        super().__init__(dim, num_heads=num_heads, window=window, **attention)
        if keep < 0:
            raise ValueError(f"keep={keep}: give the number of first tokens that stay visible, or 0 for none")
        if keep and window is None:
            raise ValueError(f"keep={keep}: without a window every token stays visible. Give a window, or keep=0")
        if not keep and not learned:
            raise ValueError("learned=False: then there is no sink. Give keep=4 and a window, or take Attn")
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if learned else None
        self.keep = keep

    def attend(self, q, k, v, story_start, window, cache):
        if cache is not None:
            k, v = self.append_to_cache(cache, k, v)
        S, window = k.shape[2], narrowest(self.window, window)
        dropout = self.dropout if self.training else 0.0
        if self.keep and window < S:
            return self.with_kept(q, k, v, story_start, window, dropout)
        if self.sinks is None:
            return self.causal_attention(q, k, v, story_start, window, self.soft_cap, dropout)
        return self.attention_with_sinks(q, k, v, self.sinks, story_start, window, self.soft_cap, dropout)

    def append_to_cache(self, cache, k, v):
        """Append keys and values; the cache keeps those of the first `keep` tokens and of the window."""
        k, v = (torch.cat([cache[name], x], dim=2) if name in cache else x for name, x in (("k", k), ("v", v)))
        S = k.shape[2]
        if self.window is None or S < self.keep + self.window:
            cache["k"], cache["v"] = k, v
        else:
            recent = S - self.window + 1
            cache["k"], cache["v"] = (torch.cat([x[:, :, : self.keep], x[:, :, recent:]], dim=2) for x in (k, v))
        return k, v

    def with_kept(self, q, k, v, story_start, window, dropout):
        """Attention to the window and to the first `keep` tokens of the story.  (B, H, T, K)"""
        T, S = q.shape[2], k.shape[2]
        spans = ((0, window - 1),)
        L, back = block_plan(spans)
        if T == S and T > 4 * L * len(back):  # below that, the fused version with a mask is faster
            return self.with_kept_in_blocks(q, k, v, story_start, window, dropout)
        near, visible = span_mask(T, S, spans, story_start, q.device), causal_mask(T, S, story_start, device=q.device)
        start = 0 if story_start is None else story_start[:, None, :, None]
        mask = near | (visible & (torch.arange(S, device=q.device) < start + self.keep))
        if self.sinks is None:
            return masked_attention(q, k, v, mask, self.soft_cap, dropout)
        return masked_attention_with_sinks(q, k, v, mask, self.sinks, self.soft_cap, dropout)

    def with_kept_in_blocks(self, q, k, v, story_start, window, dropout):
        """The same, linear in T: the scores of the kept tokens travel with the queries through the blocks of the window."""
        B, H, T, K = q.shape
        G, times = k.shape[1], torch.arange(T, device=q.device)
        start = torch.zeros_like(times).expand(B, T) if story_start is None else story_start
        positions = start[..., None] + torch.arange(self.keep, device=q.device)  # (B, T, self.keep)
        is_outside = positions <= times[:, None] - window  # (B, T, self.keep), of the window
        index = positions.clamp(max=T - 1).long().view(B, 1, -1, 1).expand(B, G, -1, K)
        kept_k, kept_v = (x.gather(2, index).view(B, G, T, self.keep, K) for x in (k, v))
        kept = torch.einsum("bghtk,bgtjk->bghtj", q.reshape(B, G, -1, T, K), kept_k * K**-0.5)
        kept = kept if self.soft_cap is None else self.soft_cap * torch.tanh(kept / self.soft_cap)
        kept = kept.reshape(B, H, T, -1).masked_fill(~is_outside[:, None], -math.inf)

        def weigh(q_and_kept, k, v, mask):
            q, kept = q_and_kept.split([K, self.keep], dim=-1)
            scores = attention_scores(q, k, self.soft_cap).masked_fill(~mask, -math.inf)
            weights = F.dropout(softmax_with_sinks(torch.cat([scores, kept], dim=-1), self.sinks), dropout)
            return torch.cat([average(weights[..., : -self.keep], v), weights[..., -self.keep :]], dim=-1)

        y = attend_blocks(weigh, torch.cat([q, kept], dim=-1), k, v, ((0, window - 1),), story_start)
        y, weights = y.split([K, self.keep], dim=-1)
        of_kept = torch.einsum("bghtj,bgtjk->bghtk", weights.reshape(B, G, -1, T, self.keep), kept_v)
        return y + of_kept.reshape(B, H, T, K)

    def visible_per_token(self, T):
        visible = mean_visible(T, self.window)
        if not self.keep or self.window >= T:
            return visible
        outside = sum(min(self.keep, t - self.window) for t in range(self.window + 1, min(T, self.window + self.keep) + 1))
        return visible + (outside + self.keep * max(0, T - self.window - self.keep)) / T


class DifferentialAttention(RotaryAttention):
    """Differential attention: the difference of two softmaxes, which cancels common noise.  (B, T, D) -> (B, T, D)

    Ye et al. 2024, arXiv 2410.05258, equations 1 to 3: heads h and h + num_heads / 2 are a pair that shares the values of both;
    its output is normalised, and the second softmax is weighted by lambda, which is learned and starts at lambda_init. The paper
    uses 0.8 - 0.6 exp(-0.3 l) in layer l, counted from 0: the layers of a tuple may have different values. 0.8 for all was as
    good (table 6). The scores are computed twice, once for each half of the values.
    """

    examples = ("DiffAttn", "DiffAttn(lambda_init=0.2, window=5)")

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, norm_eps: float = 1e-5, lambda_init: float = 0.8,
        **attention,
    ):  # fmt: skip
        super().__init__(dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, norm_eps=norm_eps, **attention)
        if num_kv_heads % 2:
            raise ValueError(f"num_kv_heads={num_kv_heads}: two heads make a pair, so give an even number")
        if not 0 < lambda_init < 1:
            raise ValueError(f"lambda_init={lambda_init}: give a number between 0 and 1, such as 0.8")
        self.lambda_init = lambda_init
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.randn(head_dim) * 0.1))
        self.norm = RMSNorm(2 * head_dim, norm_eps=norm_eps)

    def forward(self, x, *, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, self.next_rope(T, cache))
        if cache is not None:
            k, v = append_to_cache(cache, k, v, self.window)
        window, dropout = narrowest(self.window, window), self.dropout if self.training else 0.0
        halves = [half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1)]  # the pair shares the values of both
        halves = [self.causal_attention(q, k, half, story_start, window, self.soft_cap, dropout) for half in halves]
        one, other = torch.cat(halves, dim=-1).chunk(2, dim=1)  # (B, num_heads // 2, T, 2 * head_dim)
        weight = (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp() + self.lambda_init
        y = self.norm(one - weight * other) * (1 - self.lambda_init)
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def visible_per_token(self, T):
        """Twice, once for each softmax."""
        return 2 * mean_visible(T, self.window)


class FullAttention(Attention):
    """Bidirectional attention: a token sees its whole story, also what comes after it.  (B, T, D) -> (B, T, D)

    For models that do not write from left to right, as in BERT (Devlin et al. 2018, arXiv 1810.04805, section 3). window: how
    many tokens are visible to either side, the token itself included.
    """

    causal = False
    examples = ("FullAttn", "FullAttn(window=5)", "FullAttn(attention_soft_cap=30.0)")

    def forward(self, x, *, rope=None, story_start=None, window=None):
        return super().forward(x, rope=rope, story_start=story_start, window=window)

    def attend(self, q, k, v, story_start, window, cache):
        B, H, T, K = q.shape
        window = narrowest(self.window, window)
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device)
        if window is not None:
            mask = mask.tril(window - 1).triu(1 - window)
        if story_start is not None:
            mask = mask & (story_start[:, :, None] == story_start[:, None])[:, None]  # (B, 1, T, T)
        return masked_attention(q, k, v, mask, self.soft_cap, self.dropout if self.training else 0.0)

    def visible_per_token(self, T):
        """Those of a window to the left and to the right, the token itself counted once."""
        return 2 * mean_visible(T, self.window) - 1


BLOCKS = {
    "RopeAttn": RotaryAttention, "GatedAttn": GatedAttention, "AlibiAttn": AlibiAttention, "SinkAttn": SinkAttention,
    "DiffAttn": DifferentialAttention, "FullAttn": FullAttention,
}  # fmt: skip
