"""Which tokens see which; and attention cut into blocks, which spends time and memory on what is seen alone.

B batch, H query heads, G key/value heads, T time (the queries), S time with what the cache remembers in front, K head dim,
L tokens of a block, N blocks of a row. A span (least, most) is the tokens that stand least to most tokens before another:
with a window, ((0, window - 1),) is what it sees.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST_BLOCK = 32  # tokens; the products of shorter ones cost more to call than to compute

Spans = tuple[tuple[int, int], ...]
Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visible(T: int, S: int, first: Tensor | None = None, device=None, spans: Spans | None = None) -> Tensor:
    """(T, S), True where one of the T last tokens of S may look: at itself and all before it, or only at those in the spans.

    With first (B, T), the first token that each one may look at: (B, 1, T, S).
    """
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if spans is not None:
        places = torch.arange(S, device=device)
        seen = seen & in_any(places[S - T :, None] - places, spans)
    return seen if first is None else seen & (torch.arange(S, device=device) >= first[..., None])[:, None]


def in_any(before: Tensor, spans: Spans) -> Tensor:
    """True for each distance that is in one of the spans.  Any shape → the same"""
    seen = torch.zeros_like(before, dtype=torch.bool)
    for least, most in spans:
        seen = seen | ((before >= least) & (before <= most))
    return seen


def mean_seen(T: int, window: int | None = None) -> float:
    """How many tokens one of T sees on average, itself included: all before it, or the last `window` of these."""
    window = T if window is None else min(window, T)
    return window - window * (window - 1) / (2 * T)


def attend_spans(weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, spans: Spans, first: Tensor | None = None) -> Tensor:
    """Attention of each token to those in the spans before it, in time and memory linear in T.  (B, H, T, K)

    q (B, H, T, K), k and v (B, G, S, K): the queries are the last T of S tokens. first (B, T) as in `visible`.
    weigh(q, k, v, mask) is the attention as far as a mask, which the queries of all heads share, is True.
    """
    T, S = q.shape[2], k.shape[2]
    L, back = blocks_needed(spans)
    if T <= L * len(back):  # as much work, and no copies
        return weigh(q, k, v, visible(T, S, first, q.device, spans))
    return attend_blocks(weigh, q, k, v, spans, first)


def blocks_needed(spans: Spans) -> tuple[int, list[int]]:
    """How many tokens a block shall have, and how many blocks back those are that hold what a block of queries sees, 0 its own.

    Shorter blocks fit the spans closer, but there are more of them: a quarter of a span each.
    """
    L = max(SHORTEST_BLOCK, *(math.ceil((most - least + 1) / 4) for least, most in spans))
    back = {far for least, most in spans for far in range(max(0, math.ceil((least + 1) / L) - 1), (most + L - 1) // L + 1)}
    return L, sorted(back)


def attend_blocks(weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, spans: Spans, first: Tensor | None = None) -> Tensor:
    """As `attend_spans`, always in blocks: those of a row go through `weigh` side by side, as rows of a batch of their own."""
    B, H, T, K = q.shape
    L, back = blocks_needed(spans)
    past, farthest = k.shape[2] - T, back[-1]
    assert first is None or past == 0
    k, v = (x[:, :, max(0, past - farthest * L) :] for x in (k, v))
    past = k.shape[2] - T
    queries = cut(q, L)  # (B, N, L, H, K)
    N = queries.shape[1]
    k, v = (cut(x, L, farthest * L - past) for x in (k, v))  # k: (B, farthest + N, L, G, K)
    k, v = (torch.cat([x[:, farthest - far : farthest - far + N] for far in reversed(back)], dim=2) for x in (k, v))

    times = torch.arange(N * L, device=q.device).view(N, L, 1)
    key_times = torch.cat([times - far * L for far in reversed(back)], dim=1).transpose(1, 2)  # (N, 1, len(back) * L)
    seen = in_any(times - key_times, spans) & (key_times >= -past)  # (N, L, len(back) * L)
    if first is not None:
        seen = seen & (key_times >= F.pad(first, (0, N * L - T)).view(B, N, L, 1))
    seen = seen.expand(B, N, L, -1)

    queries, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (queries, k, v))  # queries: (B * N, H, L, K)
    mixed = weigh(queries, k, v, seen.flatten(0, 1)[:, None])
    return mixed.transpose(1, 2).reshape(B, N * L, H, -1)[:, :T].transpose(1, 2)


def cut(x: Tensor, block: int, front: int = 0) -> Tensor:
    """(B, heads, T, K) → (B, blocks, block, heads, K), with so many zeros in front, and behind what fills the last block."""
    x = x.transpose(1, 2)
    behind = -(front + x.shape[1]) % block
    if front or behind:
        x = F.pad(x, (0, 0, 0, 0, front, behind))
    return x.unflatten(1, (-1, block))
