"""The linear recurrence h_t = a_t h_{t-1} + b_t of each channel: step by step, and as a chunked scan.

B batch, T time, C chunks of a row, L steps of a chunk. Any axes may follow time, the same for a, b and h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.checks import check_rows
from modules.operators import define_operator, once_differentiable


def recurrence(decay: Tensor, update: Tensor, state: Tensor | None = None) -> Tensor:
    """Every h_t = decay_t h_{t-1} + update_t, one after the other.  decay and update (B, T, ...) -> (B, T, ...)

    state (B, ...) is h before the first step, None is zero. All may be complex.
    """
    states = []
    for a, b in zip(decay.unbind(dim=1), update.unbind(dim=1), strict=True):
        state = b if state is None else a * state + b
        states.append(state)
    return torch.stack(states, dim=1)


def scan(decay: Tensor, update: Tensor, state: Tensor | None = None) -> Tensor:
    """The recurrence in about 4 sqrt(T) operations instead of T, in time and memory linear in T.

    The row is cut into chunks, and an operation takes the same step of all chunks. A first pass starts each chunk from 0, for
    what it adds to the state and how much the state decays in it. This gives the states between the chunks, from which a
    second pass computes all steps. A decay of 0 resets the state.
    """
    assert decay.shape == update.shape and (state is None or state.shape == update[:, 0].shape)
    if decay.shape[1] == 1:
        return recurrence(decay, update, state)
    return Scan.apply(decay, update, state)


class Scan(torch.autograd.Function):
    """The gradient of a scan is a scan in reverse."""

    @staticmethod
    def forward(ctx, decay, update, state):
        states = torch.ops.basegpt.scan(decay, update, state)
        ctx.save_for_backward(decay, state, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states):
        decay, state, states = ctx.saved_tensors
        d_update, d_state = torch.ops.basegpt.scan_backward(decay.conj().resolve_conj(), d_states)
        start = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
        d_decay = d_update * torch.cat([start, states[:, :-1]], dim=1).conj()
        return d_decay, d_update, None if state is None else d_state


def scan_forward(decay: Tensor, update: Tensor, state: Tensor | None) -> Tensor:
    T = decay.shape[1]
    L = chunk_length(T)
    a, b = cut(decay, L).contiguous(), cut(update, L).contiguous()  # (B, C, L, ...)
    starts = torch.zeros_like(b[:, :, 0])  # the state before each chunk
    if state is not None:
        starts[:, 0] = state
    ends, total_decay = b[:, :, 0].clone(), a[:, :, 0].clone()  # of each chunk, if it starts from 0
    for step in range(1, L):
        torch.addcmul(b[:, :, step], a[:, :, step], ends, out=ends)
        total_decay.mul_(a[:, :, step])
    for chunk in range(1, a.shape[1]):
        torch.addcmul(ends[:, chunk - 1], total_decay[:, chunk - 1], starts[:, chunk - 1], out=starts[:, chunk])
    states, last = torch.empty_like(b), starts
    for step in range(L):
        last = torch.addcmul(b[:, :, step], a[:, :, step], last, out=states[:, :, step])
    return states.flatten(1, 2)[:, :T].contiguous()


def scan_backward(decay: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of update (B, T, ...) and state (B, ...); decay is the conjugate of the forward pass's.

    Step t passes on decay_t times its whole gradient: its own and that of all later steps.
    """
    T = decay.shape[1]
    L = chunk_length(T)
    a, d_h = cut(decay, L).contiguous(), cut(d_states, L).contiguous()  # (B, C, L, ...)
    passed = torch.zeros_like(d_h[:, :, 0])  # the gradient that reaches each chunk from later ones
    own, total_decay = torch.zeros_like(passed), torch.ones_like(passed)  # what a chunk itself passes to the one before
    for step in reversed(range(L)):
        own.add_(d_h[:, :, step]).mul_(a[:, :, step])
        total_decay.mul_(a[:, :, step])
    for chunk in reversed(range(a.shape[1] - 1)):
        torch.addcmul(own[:, chunk + 1], total_decay[:, chunk + 1], passed[:, chunk + 1], out=passed[:, chunk])
    d_update = torch.empty_like(d_h)
    for step in reversed(range(L)):
        torch.add(d_h[:, :, step], passed, out=d_update[:, :, step])
        torch.mul(a[:, :, step], d_update[:, :, step], out=passed)
    return d_update.flatten(1, 2)[:, :T].contiguous(), passed[:, 0].clone()


def chunk_length(T: int) -> int:
    """About sqrt(T / 2), for about 4 sqrt(T) operations: 3 for each step of a chunk, and 1 for each chunk."""
    return 2 ** round(math.log2(max(2, T) / 2) / 2)


def cut(x: Tensor, length: int, dim: int = 1) -> Tensor:
    """Cut an axis into chunks of that length, the last one filled up with zeros.  (B, T, ...) -> (B, C, L, ...)"""
    padding = -x.shape[dim] % length
    if padding:
        x = F.pad(x, (0, 0) * (x.dim() - dim - 1) + (0, padding))
    return x.unflatten(dim, (-1, length))


def cached_state(cache: dict | None, x: Tensor, *shape: int) -> Tensor | None:
    """The state in the cache, or without one zeros of that shape, or None. Raises ValueError for another batch size than x's."""
    if not cache:
        return torch.zeros(shape, device=x.device) if shape else None
    check_rows(cache["state"], len(x))
    return cache["state"]


define_operator("scan(Tensor decay, Tensor update, Tensor? state) -> Tensor", scan_forward,
                lambda decay, update, state: torch.empty_like(update))  # fmt: skip
define_operator("scan_backward(Tensor decay, Tensor d_states) -> (Tensor, Tensor)", scan_backward,
                lambda decay, d_states: (torch.empty_like(d_states), torch.empty_like(d_states[:, 0])))  # fmt: skip
