"""Attention with more to its positions, its softmax or its output than the base model's has. All take its options, too.

B batch, T time, S time with what the cache remembers in front, D model dim, K head dim.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import Attention, linear, rope_table, soft_cap
from modules.norms import RMSNorm
from modules.windows import attend_blocks, blocks_needed, visible


class RopeTable(nn.Module):
    """The angles of a block that has a RoPE of its own, and where in them the next tokens stand.

    Of head_dim / 2 pairs of channels, as `apply_rope` takes them, the first share is turned as by RoPE, and the others by 0.
    """

    def __init__(self, max_seq_len: int, head_dim: int, rope_theta: float, share: float = 1.0):
        super().__init__()
        turned = round(share * head_dim / 2)
        cos, sin = rope_table(max_seq_len, 2 * turned, rope_theta)
        still = head_dim // 2 - turned
        self.register_buffer("cos", F.pad(cos, (0, still), value=1.0), persistent=False)
        self.register_buffer("sin", F.pad(sin, (0, still), value=0.0), persistent=False)

    def next(self, T: int, cache: dict | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next T tokens, each (1, T, head_dim / 2); the cache counts those that were read."""
        start = 0 if cache is None else cache.get("num_tokens", 0)
        if cache is not None:
            cache["num_tokens"] = start + T
        return self.cos[None, start : start + T], self.sin[None, start : start + T]


class RotaryAttention(Attention):
    """Attention with a RoPE of its own, where the model has RoPE.  (B, T, D) → (B, T, D)

    rope_theta is the base of its wavelengths: Gemma 3 takes 10,000 in windows and 1,000,000 without (arXiv 2503.19786, section
    2). rope_share is the share of channels that are turned, as in GPT-J and GPT-NeoX (Black et al. 2022, arXiv 2204.06745,
    section 2.1.1), 0 for none (Yang et al. 2025, arXiv 2501.18795, take that in every fourth layer): channel k turns with
    channel k + head_dim / 2, for all k below rope_share head_dim / 2, by rope_theta^(-2 k / (rope_share head_dim)) a token.
    """

    examples = ("RopeAttn(rope_theta=100.0)", "RopeAttn(rope_share=0.5, window=5)", "RopeAttn(rope_share=0.0)")

    def __init__(
        self, dim: int, head_dim: int, max_seq_len: int, positions: str = "rope", rope_theta: float = 10_000.0,
        rope_share: float = 1.0, **attention,
    ):  # fmt: skip
        super().__init__(dim, head_dim=head_dim, **attention)
        if not 0 <= rope_share <= 1:
            raise ValueError(f"rope_share={rope_share}: give the share of channels that are turned, from 0 to 1")
        self.rope_table = RopeTable(max_seq_len, head_dim, rope_theta, rope_share) if positions == "rope" else None

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, rope=self.next_rope(x.shape[1], cache), cache=cache)

    def next_rope(self, T, cache):
        return None if self.rope_table is None else self.rope_table.next(T, cache)


class GatedAttention(RotaryAttention):
    """Attention whose output is multiplied by a sigmoid of the input, before the last matrix.  (B, T, D) → (B, T, D)

    gate="channel" is a gate for each channel of each head, "head" one for each head (Qiu et al. 2025, arXiv 2505.06708, section
    2.2, position G1). With "channel" it is that of Qwen3-Next.
    """

    examples = ("GatedAttn", "GatedAttn(gate='head', qk_norm=True, rope_share=0.25)")

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, linear_bias: bool = False, gate: Literal["channel", "head"] = "channel",
        **attention,
    ):  # fmt: skip
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, linear_bias=linear_bias, **attention)
        self.w_gate = linear(dim, num_heads * (head_dim if gate == "channel" else 1), bias=linear_bias)

    def forward(self, x, *, first=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, self.next_rope(T, cache))
        mixed = self.mix(q, k, v, first, cache).transpose(1, 2)  # (B, T, num_heads, head_dim)
        gate = self.w_gate(x).sigmoid().view(B, T, self.num_heads, -1)
        return self.w_out((gate * mixed).reshape(B, T, -1))  # (B, T, D)


class AlibiAttention(Attention):
    """Attention with linear biases: a score falls with the distance, in each head by a slope of its own.  (B, T, D) → (B, T, D)

    Press et al. 2021, arXiv 2108.12409, section 3. It takes no other positions: RoPE is left out, and positions="none" fits.
    The biases are those of a mask, which torch's kernel adds to every score, and ours does not know: so it takes more time and
    memory than Attn, which leaves out what no token sees.
    """

    examples = ("AlibiAttn", "AlibiAttn(window=5, num_heads=6)")

    def __init__(self, dim: int, num_heads: int, **attention):
        super().__init__(dim, num_heads=num_heads, **attention)
        self.register_buffer("slopes", alibi_slopes(num_heads), persistent=False)

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, cache=cache)

    def fits_kernel(self, T, S):
        return False

    def weigh(self, q, k, v, mask):
        T, S = q.shape[2], k.shape[2]
        mask = visible(T, S, device=q.device) if mask is None else mask
        if self.backend == "plain" or self.soft_cap is not None:
            return self.attend(q, k, v, mask)
        biases = self.biases(T, S).type_as(q).masked_fill(~mask, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, biases, self.dropout if self.training else 0.0, enable_gqa=True)

    def softmax(self, scores):
        return (scores + self.biases(*scores.shape[-2:])).softmax(dim=-1)

    def biases(self, T, S):
        """Minus slope times distance; the queries are the last T of S tokens.  (num_heads, T, S)"""
        places = torch.arange(S, device=self.slopes.device)
        return self.slopes[:, None, None] * (places - places[S - T :, None])


def alibi_slopes(num_heads: int) -> Tensor:
    """2^(-8 / n), 2^(-16 / n), ..., 2^-8 for n heads, a power of 2; else those of the next lower power, and then every other one
    of twice that power (Press et al. 2021, section 3).  (num_heads)"""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8 / power * torch.arange(1, power + 1))
    between = 2.0 ** (-4 / power * torch.arange(1, 2 * power, 2))
    return torch.cat([slopes, between])[:num_heads]


class SinkAttention(RotaryAttention):
    """Attention with sinks, which take the weight that a token has no use for.  (B, T, D) → (B, T, D)

    learned: each head has a number that stands among the scores of every query, and has no value, so that the weights of the
    keys need not sum to 1. As in gpt-oss (2025, arXiv 2508.10925, section 2.2); it begins at 0, the softmax off by one of Xiao
    et al. 2023, arXiv 2309.17453, section 3.3. keep: with a window, so many tokens from the first on that a token may look at
    stay visible beside it, as sinks that the model has made itself (StreamingLLM, the same paper, section 3.2). Positions are
    those in the text, not in the cache.

    Torch's kernel knows no sinks: here one more key and one more channel stand for them, and no causal half is left out. Kept
    tokens take a mask, and in long sequences they are written out in blocks, since each query may have others of its own:
    per FLOP that takes longer than Attn. Our own kernel is for learned sinks alone.
    """

    examples = ("SinkAttn", "SinkAttn(keep=2, window=5)", "SinkAttn(learned=False, keep=3, window=7)", "SinkAttn(window=5)")

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

    def remember(self, k, v, cache):
        k, v = (torch.cat([cache[name], x], dim=2) if name in cache else x for name, x in (("k", k), ("v", v)))
        S = k.shape[2]
        if self.window is None or S < self.keep + self.window:
            cache["k"], cache["v"] = k, v
        else:
            recent = S - self.window + 1
            cache["k"], cache["v"] = (torch.cat([x[:, :, : self.keep], x[:, :, recent:]], dim=2) for x in (k, v))
        return k, v

    def blend(self, q, k, v, first, window):
        T, S = q.shape[2], k.shape[2]
        if not self.keep or S <= window:
            return super().blend(q, k, v, first, window)
        spans = ((0, window - 1),)
        L, back = blocks_needed(spans)
        if T == S and T > 4 * L * len(back):  # below that, the mask's fused kernel is faster
            return self.with_kept(q, k, v, first, window)
        near, all_before = visible(T, S, first, q.device, spans), visible(T, S, first, q.device)
        begins = 0 if first is None else first[:, None, :, None]
        return self.weigh(q, k, v, near | (all_before & (torch.arange(S, device=q.device) < begins + self.keep)))

    def with_kept(self, q, k, v, first, window):
        """The same in blocks, linear in T: the scores of the kept tokens go along with the queries, their weights come back."""
        B, H, T, K = q.shape
        G, times = k.shape[1], torch.arange(T, device=q.device)
        begins = torch.zeros_like(times).expand(B, T) if first is None else first
        places = begins[..., None] + torch.arange(self.keep, device=q.device)  # (B, T, self.keep)
        outside = places <= times[:, None] - window  # (B, T, self.keep), of the window
        index = places.clamp(max=T - 1).long().view(B, 1, -1, 1).expand(B, G, -1, K)
        kept_k, kept_v = (x.gather(2, index).view(B, G, T, self.keep, K) for x in (k, v))
        kept = torch.einsum("bghtk,bgtjk->bghtj", q.reshape(B, G, -1, T, K), kept_k * self.head_dim**-0.5)
        kept = soft_cap(kept, self.soft_cap).reshape(B, H, T, -1).masked_fill(~outside[:, None], -math.inf)

        def weigh(q_and_kept, k, v, mask):
            q, kept = q_and_kept.split([K, self.keep], dim=-1)
            weights = self.softmax(torch.cat([self.scores(q, k, mask), kept], dim=-1))
            weights = F.dropout(weights, self.dropout, self.training)
            return torch.cat([self.average(weights[..., : -self.keep], v), weights[..., -self.keep :]], dim=-1)

        mixed = attend_blocks(weigh, torch.cat([q, kept], dim=-1), k, v, ((0, window - 1),), first)
        mixed, weights = mixed.split([K, self.keep], dim=-1)
        of_kept = torch.einsum("bghtj,bgtjk->bghtk", weights.reshape(B, G, -1, T, self.keep), kept_v)
        return mixed + of_kept.reshape(B, H, T, K)

    def softmax(self, scores):
        if self.sinks is None:
            return super().softmax(scores)
        sinks = self.sinks[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]

    def weigh(self, q, k, v, mask):
        if self.sinks is None or self.backend == "plain" or self.soft_cap is not None:
            return super().weigh(q, k, v, mask)
        B, H, T, K = q.shape
        G, S = k.shape[1:3]
        mask = visible(T, S, device=q.device) if mask is None else mask
        # One more key, of zeros and a 1 in one more channel, where each head's queries have the score that it is to get.
        scores = (self.sinks * self.head_dim**0.5).type_as(q)
        q = torch.cat([q, scores[:, None, None].expand(B, H, T, 1)], dim=-1)
        sink = F.one_hot(torch.tensor(K, device=q.device), K + 1).type_as(k)
        k = torch.cat([sink.expand(B, G, 1, K + 1), F.pad(k, (0, 1))], dim=2)  # (B, G, 1 + S, K + 1)
        v, mask = F.pad(v, (0, 1, 1, 0)), F.pad(mask, (1, 0), value=True)  # v: (B, G, 1 + S, K + 1)
        dropout, scale = self.dropout if self.training else 0.0, self.head_dim**-0.5
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, enable_gqa=True)[..., :K]

    def fits_kernel(self, T, S):
        return not self.keep and super().fits_kernel(T, S)

    def by_kernel(self, q, k, v, first):
        first = None if first is None else first.to(torch.int32).contiguous()
        return KernelWithSinks.apply(q.float(), k.float(), v.float(), first, self.sinks).to(q.dtype)

    def seen_per_token(self, T):
        if not self.keep or self.window >= T:
            return super().seen_per_token(T)
        outside = sum(min(self.keep, t - self.window) for t in range(self.window + 1, min(T, self.window + self.keep) + 1))
        return super().seen_per_token(T) + (outside + self.keep * max(0, T - self.window - self.keep)) / T


class KernelWithSinks(torch.autograd.Function):
    """Our kernel's attention with a sink's score for each head, (H): the sink is one more part of what the weights sum up to.

    The kernel keeps the logarithms of these sums, in base 2, and its gradients are right for whatever they are.
    """

    @staticmethod
    def forward(ctx, q, k, v, first, sinks):
        out, sums = torch.ops.basegpt.attention(q, k, v, first)  # sums: (B, H, T)
        sinks = sinks.float()[:, None] / math.log(2)
        with_sinks = torch.logaddexp2(sums, sinks)
        out = out * torch.exp2(sums - with_sinks)[..., None]
        ctx.save_for_backward(q, k, v, first, out, with_sinks, torch.exp2(sinks - with_sinks))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *saved, of_sinks = ctx.saved_tensors
        d_sinks = -(of_sinks * (d_out * saved[4]).sum(dim=-1)).sum(dim=(0, 2))
        return *torch.ops.basegpt.attention_backward(d_out, *saved), None, d_sinks


class DifferentialAttention(RotaryAttention):
    """Attention whose weights are the difference of two softmaxes, so that noise in both is lost.  (B, T, D) → (B, T, D)

    Ye et al. 2024, arXiv 2410.05258, equations 1 to 3: heads h and h + num_heads / 2 make a pair, that shares the values of
    both; what it gives is normalised, and the second softmax counts lambda, which is learned and begins at lambda_init. The
    paper takes 0.8 - 0.6 exp(-0.3 l) in layer l from 0 on: layers of a tuple may each say their own. 0.8 for all was as good
    (table 6). Each of the two halves of the values needs a pass through the fused kernels, so the scores are made twice.
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

    def forward(self, x, *, first=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, self.next_rope(T, cache))
        if cache is not None:
            k, v = self.remember(k, v, cache)
        halves = [half.repeat(1, 2, 1, 1) for half in v.chunk(2, dim=1)]
        mixed = torch.cat([self.blend(q, k, half, first, self.window) for half in halves], dim=-1)
        one, other = mixed.chunk(2, dim=1)  # (B, num_heads // 2, T, 2 * head_dim)
        mixed = self.norm(one - self.share_of_other() * other) * (1 - self.lambda_init)
        return self.w_out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def share_of_other(self):
        """The paper's lambda."""
        return (self.lambda_q1 @ self.lambda_k1).exp() - (self.lambda_q2 @ self.lambda_k2).exp() + self.lambda_init

    def flops_per_token(self, T):
        return super().flops_per_token(T) + 4 * self.num_heads * self.head_dim * self.seen_per_token(T)


BLOCKS = {
    "RopeAttn": RotaryAttention,
    "GatedAttn": GatedAttention,
    "AlibiAttn": AlibiAttention,
    "SinkAttn": SinkAttention,
    "DiffAttn": DifferentialAttention,
}
