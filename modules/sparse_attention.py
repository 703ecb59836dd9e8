"""Attention to some of the tokens before, chosen by their place, in time and memory linear in the length.

B batch, T time, S time with what the cache remembers in front, H query heads, K head dim, R tokens of a stride.
"""

import torch
import torch.nn.functional as F

from modules.attention import RotaryAttention
from modules.windows import attend_spans, cut, mean_seen, visible


class StridedAttention(RotaryAttention):
    """One half of the heads looks at what is near, the other at every stride-th token before.  (B, T, D) → (B, T, D)

    The strided pattern of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509, section 4.3) on heads side by side
    (section 5.1). The first heads see the last `window` tokens, by default as many as the stride. The others see the token
    itself and those stride, 2 stride, ... before it, `count` in all, None for all there are (then time grows as T² / stride).
    Tokens that stand a multiple of the stride apart are a sequence of their own, in which the others see a window.
    """

    examples = ("StridedAttn", "StridedAttn(stride=3, count=4)", "StridedAttn(stride=2, count=None, window=7, num_kv_heads=1)")

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, window: int | None = None, stride: int = 16,
        count: int | None = 16, **attention,
    ):  # fmt: skip
        for option, value in {"stride": stride, "count": count}.items():
            if value is not None and value < 1:
                raise ValueError(f"{option}={value}: give a whole number of at least 1")
        if num_heads % 2 or (num_kv_heads > 1 and num_kv_heads % 2):
            raise ValueError(f"num_heads={num_heads}, num_kv_heads={num_kv_heads}: half of them see what is near: give even ones")
        window = stride if window is None else window
        super().__init__(dim, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, **attention)
        self.stride, self.count = stride, count

    def remember(self, k, v, cache):
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        seen = None if self.count is None else max(self.window - 1, (self.count - 1) * self.stride)  # before the next token
        outside = 0 if seen is None else max(0, k.shape[2] - seen)
        cache["k"], cache["v"] = k[:, :, outside:], v[:, :, outside:]
        return k, v

    def blend(self, q, k, v, first, window):
        near_q, far_q = q.chunk(2, dim=1)
        (near_k, far_k), (near_v, far_v) = (x.chunk(2, dim=1) if x.shape[1] > 1 else (x, x) for x in (k, v))
        near = super().blend(near_q, near_k, near_v, first, window)
        return torch.cat([near, self.blend_strided(far_q, far_k, far_v, first)], dim=1)

    def blend_strided(self, q, k, v, first):
        """(B, H, T, K) → the same"""
        B, H, T, K = q.shape
        S = k.shape[2]
        if S > T:
            return self.weigh(q, k, v, self.strides(T, S, q.device))
        R = self.stride
        q, k, v = (cut(x, R).permute(0, 2, 3, 1, 4).flatten(0, 1) for x in (q, k, v))  # q: (B * R, H, T / R, K), T rounded up
        if first is not None:  # the place in its own sequence of the first token that is not before
            places = F.pad(first, (0, -T % R)).view(B, -1, R)
            first = ((places - torch.arange(R, device=q.device)).clamp(min=0) + R - 1) // R
            first = first.transpose(1, 2).flatten(0, 1)
        mixed = super().blend(q, k, v, first, self.count)
        return mixed.unflatten(0, (B, R)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :T]

    def strides(self, T, S, device):
        """(T, S), True where one of the last T tokens of S sees another of its stride."""
        before = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
        seen = visible(T, S, device=device) & (before % self.stride == 0)
        return seen if self.count is None else seen & (before < self.count * self.stride)

    def seen_per_token(self, T):
        """The mean of both halves."""
        whole, rest = divmod(T, self.stride)  # `rest` of the sequences have whole + 1 tokens
        lengths = {whole + 1: rest, whole: self.stride - rest if whole else 0}
        far = sum(length * how_many * mean_seen(length, self.count) for length, how_many in lengths.items() if how_many) / T
        return (mean_seen(T, self.window) + far) / 2


class BlockAttention(RotaryAttention):
    """Attention to blocks of tokens: the one that ends with the token itself, and chosen ones before.  (B, T, D) → (B, T, D)

    back says which, in blocks: (1,) is the one before, which makes a window of two blocks, and (1, 2, 4, 8) reaches far for the
    work of four (Li et al. 2019, arXiv 1907.00235, section 4.2). As the patterns of Qiu et al. 2019, arXiv 1911.02972, section
    3, but blocks are counted from each token, not from the beginning of the row, so that stories in a row look as when alone.
    Our own kernel is for what is contiguous, so torch's does this, and up to half of the scores that it makes are hidden: per
    FLOP that takes longer than Attn.
    """

    examples = ("BlockAttn(block=5, back=(3,))", "BlockAttn(block=8, back=(1, 2, 5))", "BlockAttn")

    def __init__(self, dim: int, window: int | None = None, block: int = 32, back: tuple[int, ...] = (2, 4), **attention):
        if block < 1:
            raise ValueError(f"block={block}: give a number of tokens of at least 1")
        if not back or min(back) < 1 or len(set(back)) < len(back):
            raise ValueError(f"back={back}: give how many blocks back others are, each once and at least 1, such as (1, 2)")
        if window is not None:
            raise ValueError(f"window={window}: BlockAttn sees blocks. Set block and back, or take Attn")
        super().__init__(dim, **attention)
        self.spans = tuple((far * block, (far + 1) * block - 1) for far in (0, *sorted(back)))

    def remember(self, k, v, cache):
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        outside = max(0, k.shape[2] - self.spans[-1][1])
        cache["k"], cache["v"] = k[:, :, outside:], v[:, :, outside:]
        return k, v

    def blend(self, q, k, v, first, window):
        return attend_spans(self.weigh, q, k, v, self.spans, first)

    def seen_per_token(self, T):
        sums = [(T - least) * mean_seen(T - least, most - least + 1) for least, most in self.spans if least < T]
        return sum(sums) / T


BLOCKS = {"StridedAttn": StridedAttention, "BlockAttn": BlockAttention}
