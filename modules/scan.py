"""The linear recurrence h_t = a_t h_{t-1} + b_t of each channel by itself: step by step, and many steps side by side.

B batch, T time, C chunks of a row, L steps of a chunk. Behind time there may be any axes, the same for a, b and h.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """The same in about 4 sqrt(T) operations instead of T, in time and memory linear in T, with a gradient.

    The row is cut into chunks, and one operation takes the same step of all chunks. First each chunk begins with 0, which
    tells what it adds to a state that passes through it, and by how much that decays. Then follows where each chunk really
    begins, chunk by chunk, and all steps are taken once more from there. A decay of 0 begins anew.
    """
    assert decay.shape == update.shape and (state is None or state.shape == update[:, 0].shape)
    if decay.shape[1] == 1:
        return recurrence(decay, update, state)
    return Scan.apply(decay, update, state)


class Scan(torch.autograd.Function):
    """The gradient of a scan is a scan from the end to the beginning."""

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
        before = torch.zeros_like(states[:, :1]) if state is None else state[:, None]
        d_decay = d_update * torch.cat([before, states[:, :-1]], dim=1).conj()
        return d_decay, d_update, None if state is None else d_state


def run_forward(decay: Tensor, update: Tensor, state: Tensor | None) -> Tensor:
    T = decay.shape[1]
    L = chunk_length(T)
    a, b = cut(decay, L), cut(update, L)  # (B, C, L, ...)
    C = a.shape[1]
    begin = torch.zeros_like(b[:, :, 0])  # what each chunk begins with
    if state is not None:
        begin[:, 0] = state
    if C > 1:
        end, total = b[:, :, 0].clone(), a[:, :, 0].clone()
        for step in range(1, L):
            torch.addcmul(b[:, :, step], a[:, :, step], end, out=end)
            total.mul_(a[:, :, step])
        for chunk in range(1, C):
            torch.addcmul(end[:, chunk - 1], total[:, chunk - 1], begin[:, chunk - 1], out=begin[:, chunk])
    states, last = torch.empty_like(b), begin
    for step in range(L):
        last = torch.addcmul(b[:, :, step], a[:, :, step], last, out=states[:, :, step])
    return states.flatten(1, 2)[:, :T].contiguous()


def run_backward(decay: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor]:
    """With the conjugate of the decay: the gradients of update (B, T, ...) and state (B, ...).

    What flows back from step t to the one before is decay_t times all that has come to t: its own gradient and later ones'.
    """
    T = decay.shape[1]
    L = chunk_length(T)
    a, g = cut(decay, L), cut(d_states, L)  # (B, C, L, ...)
    C = a.shape[1]
    flow = torch.zeros_like(g[:, :, 0])  # what comes to each chunk from those behind it
    if C > 1:
        own, total = torch.zeros_like(flow), torch.ones_like(flow)
        for step in reversed(range(L)):
            own.add_(g[:, :, step]).mul_(a[:, :, step])
            total.mul_(a[:, :, step])
        for chunk in reversed(range(C - 1)):
            torch.addcmul(own[:, chunk + 1], total[:, chunk + 1], flow[:, chunk + 1], out=flow[:, chunk])
    d_update = torch.empty_like(g)
    for step in reversed(range(L)):
        torch.add(g[:, :, step], flow, out=d_update[:, :, step])
        torch.mul(a[:, :, step], d_update[:, :, step], out=flow)
    return d_update.flatten(1, 2)[:, :T].contiguous(), flow[:, 0].clone()


def chunk_length(T: int) -> int:
    """About sqrt(T / 2), so that there are about 4 sqrt(T) operations: 3 for each step of a chunk, and 1 for each chunk."""
    return 2 ** round(math.log2(max(2, T) / 2) / 2)


def cut(x: Tensor, L: int) -> Tensor:
    """(B, T, ...) -> (B, C, L, ...), with zeros behind what fills the last chunk."""
    behind = -x.shape[1] % L
    if behind:
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, behind))
    return x.contiguous().unflatten(1, (-1, L))


def check_rows(state: Tensor, B: int):
    """Raises ValueError where a state from a cache is not of B rows."""
    if state.shape[0] != B:
        raise ValueError(f"the cache holds a state of {state.shape[0]} rows, but x has {B}: go on with these, or begin with {{}}")


LIBRARY = torch.library.Library("basegpt", "FRAGMENT")  # so that torch.compile takes a scan as one operation
LIBRARY.define("scan(Tensor decay, Tensor update, Tensor? state) -> Tensor")
LIBRARY.define("scan_backward(Tensor decay, Tensor d_states) -> (Tensor, Tensor)")
LIBRARY.impl("scan", run_forward, "CompositeExplicitAutograd")
LIBRARY.impl("scan_backward", run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("basegpt::scan", lambda decay, update, state: torch.empty_like(update), lib=LIBRARY)
torch.library.register_fake(
    "basegpt::scan_backward", lambda decay, d_states: (torch.empty_like(d_states), torch.empty_like(d_states[:, 0])), lib=LIBRARY
)
