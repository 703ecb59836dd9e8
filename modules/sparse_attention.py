"""Sparse attention: fixed patterns of earlier tokens, in time and memory linear in the sequence length.

B batch, T time, S time including cached tokens, H query heads, K head dim, R tokens in a stride.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from model import append_to_cache, causal_mask, masked_attention
from modules.attention import RotaryAttention
from modules.checks import check_sizes
from modules.flops import mean_visible
from modules.scan import cut
from modules.scores import narrowest
from modules.windows import attend_spans, windowed


class StridedAttention(RotaryAttention):
    """Half of the heads see a window, the other half every stride-th earlier token.  (B, T, D) -> (B, T, D)

    The strided pattern of the Sparse Transformer (Child et al. 2019, arXiv 1904.10509, section 4.3), split over heads (section
    5.1). The first heads see the last `window` tokens, by default the stride. The others see the token itself and those stride,
    2 stride, ... before it, `count` in all; None is all of them (then time grows as T^2 / stride). To these heads, tokens that
    are a multiple of the stride apart form a sequence, in which they see a window.
    """

    examples = ("StridedAttn", "StridedAttn(stride=3, count=4)", "StridedAttn(stride=2, count=None, window=7, num_kv_heads=1)")

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, window: int | None = None, stride: int = 16,
        count: int | None = 16, **attention,
    ):  # fmt: skip
        check_sizes(stride=stride, count=count)
        if num_heads % 2 or (num_kv_heads > 1 and num_kv_heads % 2):
            raise ValueError(f"num_heads={num_heads}, num_kv_heads={num_kv_heads}: half of them see what is near: give even ones")
        window = stride if window is None else window
        super().__init__(dim, num_heads=num_heads, num_kv_heads=num_kv_heads, window=window, **attention)
        self.stride, self.count = stride, count

    def attend(self, q, k, v, story_start, window, cache):
        if cache is not None:
            reach = None if self.count is None else max(self.window, (self.count - 1) * self.stride + 1)
            k, v = append_to_cache(cache, k, v, reach)
        near_q, far_q = q.chunk(2, dim=1)
        (near_k, far_k), (near_v, far_v) = (x.chunk(2, dim=1) if x.shape[1] > 1 else (x, x) for x in (k, v))
        dropout = self.dropout if self.training else 0.0
        near_window = narrowest(self.window, window)
        near = self.causal_attention(near_q, near_k, near_v, story_start, near_window, self.soft_cap, dropout)
        if k.shape[2] > q.shape[2]:
            mask = self.strided_mask(q.shape[2], k.shape[2], q.device)
            far = masked_attention(far_q, far_k, far_v, mask, self.soft_cap, dropout)
        else:
            far = self.attend_strided(far_q, far_k, far_v, story_start, window, dropout)
        return torch.cat([near, far], dim=1)

    def attend_strided(self, q, k, v, story_start, window, dropout):
        """Attention to every stride-th token: windows in the sequences of tokens that are a stride apart.  (B, H, T, K)"""
        B, H, T, K = q.shape
        R = self.stride
        q, k, v = (cut(x, R, dim=2).permute(0, 3, 1, 2, 4).flatten(0, 1) for x in (q, k, v))  # q: (B * R, H, T / R, K), padded
        if story_start is not None:  # the position, in its strided sequence, of the first token of the story
            starts = F.pad(story_start, (0, -T % R)).view(B, -1, R)
            starts = ((starts - torch.arange(R, device=q.device)).clamp(min=0) + R - 1) // R
            story_start = starts.transpose(1, 2).flatten(0, 1)
        count = narrowest(self.count, None if window is None else math.ceil(window / R))
        y = self.causal_attention(q, k, v, story_start, count, self.soft_cap, dropout)
        return y.unflatten(0, (B, R)).permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, :T]

    def strided_mask(self, T, S, device):
        """(T, S), True where one of the last T of S tokens sees another of its stride."""
        distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)
        mask = causal_mask(T, S, device=device) & (distance % self.stride == 0)
        return mask if self.count is None else mask & (distance < self.count * self.stride)

    def visible_per_token(self, T):
        """The mean of both halves."""
        whole, longer = divmod(T, self.stride)  # `longer` of the sequences have whole + 1 tokens
        lengths = {whole + 1: longer, whole: self.stride - longer if whole else 0}
        far = sum(length * number * mean_visible(length, self.count) for length, number in lengths.items() if number) / T
        return (mean_visible(T, self.window) + far) / 2


class BlockAttention(RotaryAttention):
    """Block-sparse attention: to the block that ends with the token, and to some earlier blocks.  (B, T, D) -> (B, T, D)

    back lists the earlier ones, counted in blocks: (1,) is the previous block, which makes a window of two blocks; (1, 2, 4, 8)
    reaches far for the work of four (Li et al. 2019, arXiv 1907.00235, section 4.2). Like the patterns of Qiu et al. 2019, arXiv
    1911.02972, section 3, but blocks are counted back from each token, not from the start of the row, so that packed stories
    see what they would see alone. Up to half of the scores that are computed are masked: per FLOP it takes longer than Attn.
    """

    examples = ("BlockAttn(block=5, back=(3,))", "BlockAttn(block=8, back=(1, 2, 5))", "BlockAttn")

    def __init__(self, dim: int, window: int | None = None, block: int = 32, back: tuple[int, ...] = (2, 4), **attention):
        check_sizes(block=block)
        if not back or min(back) < 1 or len(set(back)) < len(back):
            raise ValueError(f"back={back}: give how many blocks back others are, each once and at least 1, such as (1, 2)")
        if window is not None:
            raise ValueError(f"window={window}: BlockAttn sees blocks. Set block and back, or take Attn")
        super().__init__(dim, **attention)
        self.spans = tuple((far * block, (far + 1) * block - 1) for far in (0, *sorted(back)))

    def attend(self, q, k, v, story_start, window, cache):
        if cache is not None:
            k, v = append_to_cache(cache, k, v, self.spans[-1][1] + 1)
        weigh = partial(masked_attention, soft_cap=self.soft_cap, dropout=self.dropout if self.training else 0.0)
        return attend_spans(weigh, q, k, v, windowed(self.spans, window), story_start)

    def visible_per_token(self, T):
        spans = [(nearest, farthest) for nearest, farthest in self.spans if nearest < T]
        return sum((T - nearest) * mean_visible(T - nearest, farthest - nearest + 1) for nearest, farthest in spans) / T


BLOCKS = {"StridedAttn": StridedAttention, "BlockAttn": BlockAttention}
