"""Block-sparse attention: masks made of spans of distances, computed in blocks, linear in sequence length.

B batch, H query heads, G key/value heads, T time (the queries), S time including cached tokens, K head dim, L tokens in a block,
N blocks in a row. A span (nearest, farthest) is the keys that stand nearest to farthest tokens before a query: ((0, window - 1),)
is a sliding window.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model import causal_attention, causal_mask, masked_attention
from modules.scan import cut

SHORTEST_BLOCK = 32  # tokens; the products of shorter ones cost more to call than to compute

Spans = tuple[tuple[int, int], ...]
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def span_mask(T: int, S: int, spans: Spans, story_start: Tensor | None = None, device=None) -> Tensor:
    """True where one of the last T of S tokens sees a key: one in the spans, of its own story.  (T, S) or (B, 1, T, S)"""
    positions = torch.arange(S, device=device)
    return causal_mask(T, S, story_start, device=device) & in_any(positions[S - T :, None] - positions, spans)


def in_any(distance: Tensor, spans: Spans) -> Tensor:
    """True where a distance is in one of the spans.  Any shape -> the same"""
    inside = torch.zeros_like(distance, dtype=torch.bool)
    for nearest, farthest in spans:
        inside = inside | ((distance >= nearest) & (distance <= farthest))
    return inside


def windowed(spans: Spans, window: int | None) -> Spans:
    """The spans, cut to the last `window` tokens."""
    if window is None:
        return spans
    return tuple((nearest, min(farthest, window - 1)) for nearest, farthest in spans if nearest < window)


def attend_spans(weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, spans: Spans, story_start: Tensor | None = None) -> Tensor:
    """Attention to the keys in the spans, in time and memory linear in T.  (B, H, T, K)

    q (B, H, T, K), k and v (B, G, S, K): the queries are the last T of S tokens. story_start (B, T) as in causal_mask.
    weigh(q, k, v, mask): attention restricted to mask, which all heads share.
    """
    T, S = q.shape[2], k.shape[2]
    L, back = block_plan(spans)
    if T <= L * len(back):  # as much work, and no copies
        return weigh(q, k, v, span_mask(T, S, spans, story_start, q.device))
    return attend_blocks(weigh, q, k, v, spans, story_start)


def windowed_attention(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    """causal_attention of model.py, linear in T where there is a window."""
    if window is None or window >= k.shape[2]:
        return causal_attention(q, k, v, story_start, window, soft_cap, dropout)
    weigh = partial(masked_attention, soft_cap=soft_cap, dropout=dropout)
    return attend_spans(weigh, q, k, v, ((0, window - 1),), story_start)


def block_plan(spans: Spans) -> tuple[int, list[int]]:
    """Block size, and which key blocks each query block reads, as offsets (0 is its own).

    Shorter blocks fit the spans closer, but there are more of them: a quarter of a span each.
    """
    L = max(SHORTEST_BLOCK, *(math.ceil((farthest - nearest + 1) / 4) for nearest, farthest in spans))
    back = {
        offset
        for nearest, farthest in spans
        for offset in range(max(0, math.ceil((nearest + 1) / L) - 1), (farthest + L - 1) // L + 1)
    }
    return L, sorted(back)


def attend_blocks(weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, spans: Spans, story_start: Tensor | None = None) -> Tensor:
    """attend_spans in blocks at any length; the blocks of a row go through `weigh` as rows of a larger batch."""
    B, H, T, K = q.shape
    L, back = block_plan(spans)
    past, farthest = k.shape[2] - T, back[-1]
    assert story_start is None or past == 0
    k, v = (x[:, :, max(0, past - farthest * L) :] for x in (k, v))
    past = k.shape[2] - T
    queries = cut(q.transpose(1, 2), L)  # (B, N, L, H, K)
    N = queries.shape[1]
    front = 0, 0, 0, 0, farthest * L - past, 0  # zeros before the first key
    k, v = (cut(F.pad(x.transpose(1, 2), front), L) for x in (k, v))  # k: (B, farthest + N, L, G, K)
    k, v = (torch.cat([x[:, farthest - far : farthest - far + N] for far in reversed(back)], dim=2) for x in (k, v))

    times = torch.arange(N * L, device=q.device).view(N, L, 1)
    key_times = torch.cat([times - far * L for far in reversed(back)], dim=1).transpose(1, 2)  # (N, 1, len(back) * L)
    mask = in_any(times - key_times, spans) & (key_times >= -past)  # (N, L, len(back) * L)
    if story_start is not None:
        mask = mask & (key_times >= F.pad(story_start, (0, N * L - T)).view(B, N, L, 1))
    mask = mask.expand(B, N, L, -1)

    queries, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (queries, k, v))  # queries: (B * N, H, L, K)
    y = weigh(queries, k, v, mask.flatten(0, 1)[:, None])
    return y.transpose(1, 2).reshape(B, N * L, H, -1)[:, :T].transpose(1, 2)
