"""Mamba: a state space model whose step size, input and output depend on the token (Gu and Dao 2023, arXiv 2312.00752).

B batch, T time, D model dim, W inner channels (expand x D), N numbers of state for each channel, R rank of the step sizes.

    here       paper     meaning
    u          x         input of the state space, after the short convolution (B, T, W)
    step       Δ         step size (B, T, W): the larger, the more is forgotten and the more is taken in (section 3.5.2)
    rates      A         decay rate of each number of the state, below 0 (W, N); learned as log_rates, log(-A)
    write      B         input weights of the state, the same for all channels (B, T, N)
    read       C         output weights of the state, the same for all channels (B, T, N)
    skip       D         weight of u in the output (W)
    state      h         (B, N, W), so that the long axis is the last
    decay      Ā         exp(Δ A): the factor of the state in one step (equation 4)
    update     B̄ x       Δ B x: what is added to it, to first order in Δ, as in the published models
    w_select             the matrices s_B, s_C and the first of s_Δ side by side; w_step is the second of s_Δ (section 3.6)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import activate
from modules.checks import check_sizes
from modules.convolution import ShortConv
from modules.flops import linear_flops
from modules.operators import define_operator, once_differentiable
from modules.scan import cached_state, recurrence
from tools import LoggingModule

INITIAL_STEPS = (0.001, 0.1)  # the range of the initial step sizes, evenly in their logarithms (section 3.6)
ROWS = 4  # rows of the batch that in_pieces takes at once


def selective_scan(u, step, rates, write, read, story_start, chunk) -> Tensor:
    """Outputs of the state space (section 3.3).  u and step (B, T, W), rates (W, N), write and read (B, T, N) -> (B, T, W)

    The state is empty where a story starts; story_start (B, T) or None.
    """
    is_start = None if story_start is None else story_start == torch.arange(u.shape[1], device=u.device)
    return in_pieces(u, step, rates, write, read, is_start, None, chunk)[0]


class Mamba(LoggingModule):
    """The Mamba block: gate, short convolution and selective state space (arXiv 2312.00752, section 3.4).  (B, T, D) -> (B, T, D)

    It takes the place of attention and MLP: "Norm->Mamba->+" is a whole layer. The inner width is expand x D, and each channel
    has state_dim numbers of state. Step sizes come from step_rank numbers of a token (None is D / 16, rounded up). The
    convolution is over conv_width tokens. Sequences are read in pieces of `chunk` tokens, to hold the states of only one piece
    in memory; the result does not depend on it. A window has no effect: the state covers the whole story. The states are N times
    as large as the inputs and are read and written several times: without our kernel it takes 3 times as long as Attn per FLOP.
    """

    activate, selective_scan = staticmethod(activate), staticmethod(selective_scan)
    examples = ("Mamba", "Norm->Mamba(state_dim=3, expand=3, conv_width=1, step_rank=1, chunk=13, linear_bias=True)->+")

    def __init__(
        self, dim: int, state_dim: int = 16, expand: int = 2, conv_width: int = 4, step_rank: int | None = None, chunk: int = 16,
        linear_bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        check_sizes(state_dim=state_dim, expand=expand, conv_width=conv_width, step_rank=step_rank, chunk=chunk)
        width = expand * dim
        self.width, self.state_dim, self.chunk = width, state_dim, chunk
        self.step_rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.w_gate = default_linear(dim, width, linear_bias)
        self.w_in = default_linear(dim, width, linear_bias)
        self.conv = default_conv(width, conv_width)
        self.w_select = nn.Linear(width, self.step_rank + 2 * state_dim, bias=False)
        self.w_step = nn.Linear(self.step_rank, width)
        nn.init.uniform_(self.w_step.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        self.w_step.bias = nn.Parameter(initial_step_biases(width))
        # A = -1, -2, ..., -N in every channel (S4D-Real, section 3.6). One long row, since weight decay applies to matrices.
        self.log_rates = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(width))
        self.skip = nn.Parameter(torch.ones(width))
        self.w_out = default_linear(width, dim, linear_bias)

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        N, state = self.state_dim, cached_state(cache, x)
        conv_cache = None if cache is None else cache.setdefault("conv", {})
        u = self.conv(self.w_in(x), story_start=story_start, cache=conv_cache)
        u = self.activate("SiLU", u)  # (B, T, width)
        rank, write, read = self.w_select(u).split([self.step_rank, N, N], dim=-1)  # the selection, algorithm 2
        step = F.softplus(self.w_step(rank).float())  # (B, T, width)
        with torch.autocast(x.device.type, enabled=False):
            rates = -self.log_rates.float().exp().view(-1, N)  # (width, N)
            u, write, read = u.float(), write.float(), read.float()
            if cache is None:
                y = self.selective_scan(u, step, rates, write, read, story_start, self.chunk)
            elif T == 1:
                y, cache["state"] = step_by_step(u, step, rates, write, read, state)
            else:
                y, cache["state"] = in_pieces(u, step, rates, write, read, None, state, self.chunk)
            y = torch.addcmul(y, u, self.skip)
        return self.w_out(self.activate("SiLU", self.w_gate(x), y))

    def flops_per_token(self, T: int) -> float:
        """Matrices and convolution; for each number of the state its exponent, update, next value and share of the output; for
        each channel its step times u, and the skip.
        """
        return linear_flops(self) + self.conv.flops_per_token(T) + 3 * self.skip.numel() + 6 * self.log_rates.numel()


def step_by_step(u, step, rates, write, read, state=None):
    """The recurrence as in the paper (equation 2, discretised by equation 4).  y (B, T, W) and the last state (B, N, W)

    decay, update and states are (B, T, N, W).
    """
    decay = torch.exp(step[:, :, None] * rates.T.contiguous())
    update = (step * u)[:, :, None] * write[..., None]
    states = recurrence(decay, update, state)
    return read_out(states, read), states[:, -1]


def read_out(states: Tensor, read: Tensor) -> Tensor:
    """(B, T, N, W), (B, T, N) -> (B, T, W)"""
    return (read[:, :, None] @ states).squeeze(2)


def in_pieces(u, step, rates, write, read, is_start, state, chunk):
    """The same recurrence, a few rows and tokens at a time, so that their states stay in the processor's cache.

    is_start (B, T) is True where a story starts, None: nowhere. Returns y (B, T, W) and the last state (B, N, W).
    """
    if state is None:
        state = u.new_zeros(u.shape[0], rates.shape[1], u.shape[2])
    return InPieces.apply(u, step, rates, write, read, is_start, state, chunk)


class InPieces(torch.autograd.Function):
    """Saves the state before each piece; the backward pass recomputes those inside (section 3.3.2)."""

    @staticmethod
    def forward(ctx, u, step, rates, write, read, is_start, state, chunk):
        y, last, starts = torch.ops.basegpt.scan_in_pieces(u, step, rates, write, read, is_start, state, chunk)
        ctx.save_for_backward(u, step, rates, write, read, is_start, starts)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last):
        *gradients, d_state = torch.ops.basegpt.scan_in_pieces_backward(*ctx.saved_tensors, d_y, d_last, ctx.chunk)
        return *gradients, None, d_state if ctx.needs_input_grad[6] else None, None


def pieces_forward(u, step, rates, write, read, is_start, state, chunk):
    y, last, starts = empty_pieces(u, step, rates, write, read, is_start, state, chunk)
    rates, inputs = rates.T.contiguous(), step * u
    for rows in slices(len(u), ROWS):
        now = state[rows]
        for number, times, steps, added, writes, reads, resets in pieces(rows, chunk, step, inputs, write, read, is_start):
            starts[number, rows] = now
            _, states = unroll(steps, added, writes, resets, rates, now)
            y[rows, times] = read_out(states[1:], reads).transpose(0, 1)
            now = states[-1]
        last[rows] = now
    return y, last, starts


def pieces_backward(u, step, rates, write, read, is_start, starts, d_y, d_last, chunk):
    """Gradients of u, step, rates, write, read and state. In a piece of C tokens of R rows, d_states is (C, R, N, W)."""
    d_u, d_step, d_write, d_read, d_state = (torch.empty_like(x) for x in (u, step, write, read, d_last))
    rates, inputs = rates.T.contiguous(), step * u
    d_rates = torch.zeros_like(rates)
    for rows in slices(len(u), ROWS):
        d_next = d_last[rows]  # the gradient of the state after a piece
        tensors = pieces(rows, chunk, step, inputs, write, read, is_start, d_y)
        for number, times, steps, added, writes, reads, resets, d_out in reversed(tensors):
            decay, states = unroll(steps, added, writes, resets, rates, starts[number, rows])
            d_read[rows, times] = (states[1:] @ d_out[..., None]).squeeze(-1).transpose(0, 1)
            d_states = reads[..., None] * d_out[:, :, None]
            gradients, decays = d_states.unbind(), decay.unbind()
            gradients[-1].add_(d_next)
            for t in reversed(range(len(gradients) - 1)):
                gradients[t].addcmul_(decays[t + 1], gradients[t + 1])
            d_next = decays[0] * gradients[0]
            d_write[rows, times] = (d_states @ added[..., None]).squeeze(-1).transpose(0, 1)
            d_added = read_out(d_states, writes)
            d_exponent = decay.mul_(states[:-1]).mul_(d_states)  # of exp(step * rates)
            d_u[rows, times] = (d_added * steps).transpose(0, 1)
            d_steps = torch.mul(d_exponent, rates, out=d_states).sum(dim=2)  # through the exponents
            d_step[rows, times] = d_steps.transpose(0, 1).addcmul_(d_added.transpose(0, 1), u[rows, times])
            d_rates += d_exponent.mul_(steps[:, :, None]).sum(dim=(0, 1))
        d_state[rows] = d_next
    return d_u, d_step, d_rates.T.contiguous(), d_write, d_read, d_state


def unroll(step, added, write, is_start, rates, state):
    """Decays (C, R, N, W) of C tokens of R rows, and states (C + 1, R, N, W), the one before them first.

    step and added = step u (C, R, W), write (C, R, N), is_start (C, R) or None, rates (N, W), state (R, N, W)
    """
    decay = (step[:, :, None] * rates).exp_()
    if is_start is not None:
        decay[is_start] = 0.0
    states = decay.new_empty(len(step) + 1, *state.shape)
    states[0] = state
    torch.mul(added[:, :, None], write[..., None], out=states[1:])
    last, *updates = states.unbind()
    for update, factor in zip(updates, decay.unbind(), strict=True):
        last = update.addcmul_(factor, last)
    return decay, states


def pieces(rows: slice, chunk: int, *tensors: Tensor | None) -> list[tuple]:
    """The number, times and parts of the tensors (B, T, ...) for each piece of some rows; parts are (times, rows, ...)."""
    time_first = [x if x is None else x[rows].transpose(0, 1).contiguous() for x in tensors]
    times = slices(len(time_first[0]), chunk)
    return [(number, piece, *(x if x is None else x[piece] for x in time_first)) for number, piece in enumerate(times)]


def slices(length: int, size: int) -> list[slice]:
    """Consecutive slices of that size; the last may be shorter."""
    return [slice(start, start + size) for start in range(0, length, size)]


def empty_pieces(u, step, rates, write, read, is_start, state, chunk):
    """y (B, T, W), the last state, and the states before each piece (pieces, B, N, W)."""
    return torch.empty_like(u), torch.empty_like(state), u.new_empty(math.ceil(u.shape[1] / chunk), *state.shape)


def empty_pieces_gradients(u, step, rates, write, read, is_start, starts, d_y, d_last, chunk):
    return [torch.empty_like(x) for x in (u, step, rates, write, read, d_last)]


INPUTS = "Tensor u, Tensor step, Tensor rates, Tensor write, Tensor read, Tensor? is_start"
define_operator(f"scan_in_pieces({INPUTS}, Tensor state, int chunk) -> (Tensor, Tensor, Tensor)", pieces_forward, empty_pieces)
define_operator(
    f"scan_in_pieces_backward({INPUTS}, Tensor starts, Tensor d_y, Tensor d_last, int chunk)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", pieces_backward, empty_pieces_gradients,
)  # fmt: skip


def default_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """nn.Linear with PyTorch's own initial weights, as in the published models, and a bias that starts at zero."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def default_conv(channels: int, width: int) -> ShortConv:
    """ShortConv with a zero bias and PyTorch's own initial weights: uniform from -1 / sqrt(width), the 1 of the skip included."""
    conv = ShortConv(channels, width, bias=True)
    nn.init.uniform_(conv.weight, -(width**-0.5), width**-0.5)
    with torch.no_grad():
        conv.weight[0] -= 1
    return conv


def initial_step_biases(count: int) -> Tensor:
    """Biases that softplus maps to INITIAL_STEPS."""
    steps = torch.empty(count).uniform_(*(math.log(step) for step in INITIAL_STEPS)).exp()
    return steps + torch.log(-torch.expm1(-steps))


BLOCKS = {"Mamba": Mamba}
