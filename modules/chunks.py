"""Common to blocks whose state is a matrix: chunks of a sequence, their masks, and the states between them.

B batch, H heads, T time, n chunks of C tokens each, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.operators import once_differentiable


def chunk_masks(n: int, C: int, story_start: Tensor | None, device) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """True where two tokens belong to the same story, for n chunks of C tokens; None where all do.

    within (C, C) or (B, 1, n, C, C): a token and the tokens of its chunk up to itself. to_start (B, 1, n, C, 1): a token and the
    last one before its chunk. to_end (B, 1, n, C, 1): a token and the last one of its chunk. story_start (B, T) is where the
    story of each token starts, None: one story.
    """
    within = torch.ones(C, C, dtype=torch.bool, device=device).tril()
    if story_start is None:
        return within, None, None
    positions = torch.arange(n * C, device=device).view(n, C)
    starts = F.pad(story_start, (0, n * C - story_start.shape[1])).view(-1, 1, n, C)
    within = within & (positions[:, None] >= starts[..., None])
    return within, (starts < positions[:, :1])[..., None], (positions >= starts[..., -1:])[..., None]


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is True, else 0; a mask of None is True everywhere."""
    return x if mask is None else x * mask


class ChunkRecurrence(torch.autograd.Function):
    """The states S_{i+1} = decay_i S_i + added_i before each chunk (B, n, K, V), and the one after the last (B, K, V).

    added (B, n, K, V), state (B, K, V) is S_0. decay (B, n, K, K) is a matrix where `by_matrix`, else elementwise and broadcast.
    The backward pass takes one operation a chunk, as the forward pass does.
    """

    @staticmethod
    def forward(ctx, decay, added, state, by_matrix):
        step, states = torch.baddbmm if by_matrix else torch.addcmul, [state]
        for factor, update in zip(decay.unbind(1), added.unbind(1), strict=True):
            states.append(step(update, factor, states[-1]))
        starts = torch.stack(states[:-1], dim=1)
        ctx.save_for_backward(decay, starts)
        ctx.by_matrix = by_matrix
        return starts, states[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_starts, d_state):
        (decay, starts), step, d_states = ctx.saved_tensors, torch.baddbmm if ctx.by_matrix else torch.addcmul, [d_state]
        transposed = decay.mT if ctx.by_matrix else decay
        for factor, d_start in zip(reversed(transposed.unbind(1)), reversed(d_starts.unbind(1)), strict=True):
            d_states.append(step(d_start, factor, d_states[-1]))
        d_added = torch.stack(d_states[-2::-1], dim=1)
        d_decay = d_added @ starts.mT if ctx.by_matrix else (d_added * starts).sum_to_size(decay.shape)
        return d_decay, d_added, d_states[-1], None
