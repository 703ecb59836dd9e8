"""Which tokens see which; and attention cut into blocks, which spends time and memory on what is seen alone.

B batch, H query heads, G key/value heads, T time (the queries), S time with what the cache remembers in front, K head dim,
L tokens of a block, N blocks of a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SHORTEST_BLOCK = 32  # tokens; the products of shorter ones cost more to call than to compute

Weigh = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def visible(T: int, S: int, first: Tensor | None = None, device=None, window: int | None = None) -> Tensor:
    """(T, S), True where one of the T last tokens of S may look: at itself and all before it, or the last `window` of these.

    With first (B, T), the first token that each one may look at: (B, 1, T, S).
    """
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if window is not None:
        seen = seen.triu(S - T - window + 1)
    return seen if first is None else seen & (torch.arange(S, device=device) >= first[..., None])[:, None]


def mean_seen(T: int, window: int | None = None) -> float:
    """How many tokens one of T sees on average, itself included: all before it, or the last `window` of these."""
    window = T if window is None else min(window, T)
    return window - window * (window - 1) / (2 * T)


def windowed(weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, window: int, first: Tensor | None = None) -> Tensor:
    """Attention of each token to itself and the window - 1 before it, in time and memory linear in T.  (B, H, T, K)

    q (B, H, T, K), k and v (B, G, S, K): the queries are the last T of S tokens. first (B, T) as in `visible`.
    weigh(q, k, v, mask) is the attention as far as a mask, which the queries of all heads share, is True.
    """
    T, S, block = q.shape[2], k.shape[2], max(window, SHORTEST_BLOCK)
    if T <= 2 * block:
        return weigh(q, k, v, visible(T, S, first, q.device, window))
    return in_blocks(weigh, q, k, v, block, (1,), window, first)


def in_blocks(
    weigh: Weigh, q: Tensor, k: Tensor, v: Tensor, block: int, back: tuple[int, ...], window: int | None = None,
    first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of each token to its own block of tokens, and to those so many blocks back, as far as causal and the window.

    back=(1,) is the block before, (1, 4) that and the fourth before. The blocks of a row go through `weigh` side by side, as
    rows of a batch of their own. The arguments are those of `windowed`, and what is remembered fits into the blocks back.
    """
    B, H, T, K = q.shape
    L, past, farthest = block, k.shape[2] - T, max(back)
    assert past <= farthest * L and (first is None or past == 0)
    queries = cut(q, L)  # (B, N, L, H, K)
    N = queries.shape[1]
    behind = [*sorted(back, reverse=True), 0]
    k, v = (cut(x, L, farthest * L - past) for x in (k, v))  # k: (B, farthest + N, L, G, K)
    k, v = (torch.cat([x[:, farthest - far : farthest - far + N] for far in behind], dim=2) for x in (k, v))

    times = torch.arange(N * L, device=q.device).view(N, L, 1)
    key_times = torch.cat([times - far * L for far in behind], dim=1).transpose(1, 2)  # (N, 1, len(behind) * L)
    seen = (key_times <= times) & (key_times >= -past)  # (N, L, len(behind) * L)
    if window is not None:
        seen = seen & (key_times > times - window)
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
