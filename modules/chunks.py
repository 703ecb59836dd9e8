"""What blocks whose state is a matrix have in common: a sequence in chunks, the stories in it, and the state in the cache.

B batch, H heads, T time, n chunks of C tokens each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from modules.scan import check_rows


class Sight(NamedTuple):
    """Which tokens share a story, chunk by chunk; all are True where they do."""

    within: Tensor  # (C, C) or (B, 1, n, C, C): a token and those of its chunk up to itself
    before: Tensor | None  # (B, 1, n, C, 1): a token and what came before its chunk; None is always
    behind: Tensor | None  # (B, 1, n, C, 1): a token and the last one of its chunk; None is always


def sight(n: int, C: int, starts: Tensor | None, device: torch.device) -> Sight:
    """Of tokens in n chunks of C. starts (B, T) is where the story of each token begins, None is the first of all."""
    within = torch.ones(C, C, dtype=torch.bool, device=device).tril()
    if starts is None:
        return Sight(within, None, None)
    places = torch.arange(n * C, device=device).view(n, C)
    starts = F.pad(starts, (0, n * C - starts.shape[1])).view(-1, 1, n, C)
    return Sight(
        within=within & (places[:, None] >= starts[..., None]),
        before=(starts < places[:, :1])[..., None],
        behind=(places >= starts[..., -1:])[..., None],
    )


def masked(x: Tensor, seen: Tensor | None) -> Tensor:
    """x where it is seen, else 0; None is everywhere."""
    return x if seen is None else x * seen


def in_chunks(x: Tensor, n: int, C: int) -> Tensor:
    """(B, H, T, ...) → (B, H, n, C, ...), with zeros behind the last token."""
    behind = n * C - x.shape[2]
    if behind:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, behind))
    return x.unflatten(2, (n, C))


class FromChunkToChunk(torch.autograd.Function):
    """The states S_0, S_1 = kept_0 S_0 + added_0, … in front of each chunk (B, n, K, V), and the one behind all (B, K, V).

    added (B, n, K, V), state (B, K, V) is S_0. kept (B, n, K, K) is a matrix where `by_matrix`, else the factor of each number,
    with axes of 1 where they share it. The way back takes one operation a chunk, as the way there.
    """

    @staticmethod
    def forward(ctx, kept, added, state, by_matrix):
        step, states = torch.baddbmm if by_matrix else torch.addcmul, [state]
        for keep, add in zip(kept.unbind(1), added.unbind(1), strict=True):
            states.append(step(add, keep, states[-1]))
        before = torch.stack(states[:-1], dim=1)
        ctx.save_for_backward(kept, before)
        ctx.by_matrix = by_matrix
        return before, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_before, d_state):
        (kept, before), step, d_states = ctx.saved_tensors, torch.baddbmm if ctx.by_matrix else torch.addcmul, [d_state]
        back = kept.mT if ctx.by_matrix else kept
        for keep, d_read in zip(reversed(back.unbind(1)), reversed(d_before.unbind(1)), strict=True):
            d_states.append(step(d_read, keep, d_states[-1]))
        d_added = torch.stack(d_states[-2::-1], dim=1)
        d_kept = d_added @ before.mT if ctx.by_matrix else (d_added * before).sum_to_size(kept.shape)
        return d_kept, d_added, d_states[-1], None


def remembered(cache: dict | None, shape: tuple[int, ...], x: Tensor) -> Tensor:
    """The state that the cache holds, or zeros, in float32. Raises ValueError for that of another batch size."""
    if not cache:
        return torch.zeros(shape, device=x.device)
    check_rows(cache["state"], len(x))
    return cache["state"]


def check_sizes(**sizes: int | None):
    """Raises ValueError for an option that is not at least 1; None is left to the block."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: give a whole number of at least 1")
