"""What blocks whose state is a matrix have in common: a sequence in chunks, the stories in it, and the state in the cache.

B batch, H heads, T time, n chunks of C tokens each.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
