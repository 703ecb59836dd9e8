"""Mamba: a state space whose step size, input and output each token chooses for itself (Gu and Dao 2023, arXiv 2312.00752).

B batch, T time, D model dim, W inner channels (expand x D), N numbers of state for each of them, R rank of the step sizes.

    here       paper     what it is
    u          x         what goes into the state space, behind the short convolution (B, T, W)
    step       Δ         step size (B, T, W): how much time passes, so how much is forgotten and how much is taken in (3.5.2)
    rates      A         how fast each number of the state fades, below 0 (W, N); learned as log_rates, log(-A)
    write      B         what a token writes into the state of every channel (B, T, N)
    read       C         what it reads from there (B, T, N)
    skip       D         how much of u goes past the state (W)
    state      h         (B, N, W), so that the long axis is the last
    decay      Ā         exp(Δ A), what is left of the state after a step (equation 4)
    update     B̄ x       Δ B x, what comes in: the first order of equation 4, as in the published models
    w_select             the matrices s_B, s_C and the first of s_Δ side by side, w_step the second of s_Δ (section 3.6)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import activate
from modules.chunks import check_sizes
from modules.convolution import ShortConv
from modules.scan import check_rows, recurrence
from tools import LoggingModule

FIRST_STEPS = (0.001, 0.1)  # the step sizes that a model starts with, uniform in their logarithms (section 3.6)
ROWS = 4  # of a batch that are in a piece of in_pieces


def selective_scan(u, step, rates, write, read, story_start, chunk) -> Tensor:
    """The outputs of the state space (section 3.3).  u and step (B, T, W), rates (W, N), write and read (B, T, N) -> (B, T, W)

    The state is empty where a story starts; story_start (B, T) or None.
    """
    is_start = None if story_start is None else story_start == torch.arange(u.shape[1], device=u.device)
    return in_pieces(u, step, rates, write, read, is_start, None, chunk)[0]


class Mamba(LoggingModule):
    """The Mamba block: gate, short convolution and selective state space (arXiv 2312.00752, section 3.4).  (B, T, D) -> (B, T, D)

    It takes the place of attention and MLP: "Norm->Mamba->+" is a whole layer. The width inside is expand x D, a channel has
    state_dim numbers of state, step sizes come from step_rank numbers of each token (None is D / 16, rounded up), and
    conv_width is how many tokens the convolution sees. Sequences are read in pieces of `chunk` tokens, so that the states of one
    piece alone are in memory at a time; the result does not depend on it. A window is nothing to a recurrence: it reaches
    back to the beginning of the story. Its states are N times as many numbers as the tokens have, and every one of them
    is read and written several times: a model of it trains 3 times as slowly as one of Attn, unless our kernel can be had.
    """

    activate, selective_scan = staticmethod(activate), staticmethod(selective_scan)
    examples = ("Mamba", "Norm->Mamba(state_dim=3, expand=3, conv_width=1, step_rank=1, chunk=13, linear_bias=True)->+")

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        expand: int = 2,
        conv_width: int = 4,
        step_rank: int | None = None,
        chunk: int = 16,
        linear_bias: bool = False,
    ):
        super().__init__()
        check_sizes(state_dim=state_dim, expand=expand, conv_width=conv_width, step_rank=step_rank, chunk=chunk)
        width = expand * dim
        self.width, self.state_dim, self.chunk = width, state_dim, chunk
        self.step_rank = math.ceil(dim / 16) if step_rank is None else step_rank
        self.w_gate = projection(dim, width, linear_bias)
        self.w_in = projection(dim, width, linear_bias)
        self.conv = first_convolution(width, conv_width)
        self.w_select = nn.Linear(width, self.step_rank + 2 * state_dim, bias=False)
        self.w_step = nn.Linear(self.step_rank, width)
        nn.init.uniform_(self.w_step.weight, -(self.step_rank**-0.5), self.step_rank**-0.5)
        self.w_step.bias = nn.Parameter(first_step_biases(width))
        # A = -1, -2, ..., -N in every channel (S4D-Real, section 3.6). One long row, as weight decay pulls on matrices alone.
        self.log_rates = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(width))
        self.skip = nn.Parameter(torch.ones(width))
        self.w_out = projection(width, dim, linear_bias)

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        state = None if cache is None else cache.get("state")
        if state is not None:
            check_rows(state, B)
        u = self.conv(self.w_in(x), story_start=story_start, cache=None if cache is None else cache.setdefault("conv", {}))
        u = self.activate("SiLU", u)  # (B, T, width)
        step, write, read = self.select(u)
        with torch.autocast(x.device.type, enabled=False):
            rates = -self.log_rates.float().exp().view(-1, self.state_dim)  # (width, state_dim)
            u, step, write, read = u.float(), step.float(), write.float(), read.float()
            if cache is None:
                y = self.selective_scan(u, step, rates, write, read, story_start, self.chunk)
            elif T == 1:
                y, state = step_by_step(u, step, rates, write, read, state)
            else:
                y, state = in_pieces(u, step, rates, write, read, None, state, self.chunk)
            y = torch.addcmul(y, u, self.skip)
        if cache is not None:
            cache["state"] = state
        return self.w_out(self.activate("SiLU", self.w_gate(x), y))

    def select(self, u):
        """Step sizes (B, T, W), what to write and what to read (B, T, N): the selection, algorithm 2."""
        N = self.state_dim
        rank, write, read = self.w_select(u).split([self.step_rank, N, N], dim=-1)
        return F.softplus(self.w_step(rank).float()), write, read

    def flops_per_token(self, T: int) -> float:
        """Matrices and convolution; for each number of state the exponent of its decay, what comes in, the next state and what
        is read from it; and for each channel its step times u, and the skip.
        """
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        return 2.0 * (matrices + self.conv.weight.numel() + self.skip.numel()) + self.skip.numel() + 6 * self.log_rates.numel()


def step_by_step(u, step, rates, write, read, state=None):
    """The recurrence as the paper writes it (equation 2, discretised by equation 4).  y (B, T, W) and the last state (B, N, W)"""
    decay, update = discretise(u, step, rates, write)
    states = recurrence(decay, update, state)
    return read_out(states, read), states[:, -1]


def in_pieces(u, step, rates, write, read, is_start, state, chunk):
    """The same recurrence, a few rows and tokens at a time, while their states are in the processor's cache.

    is_start (B, T) is True where a story starts; None is nowhere. Returns y (B, T, W) and the last state (B, N, W).
    """
    if state is None:
        state = u.new_zeros(u.shape[0], rates.shape[1], u.shape[2])
    return InPieces.apply(u, step, rates, write, read, is_start, state, chunk)


class InPieces(torch.autograd.Function):
    """The states in front of each piece are kept, those inside computed again for the gradients (section 3.3.2)."""

    @staticmethod
    def forward(ctx, u, step, rates, write, read, is_start, state, chunk):
        y, last, kept = torch.ops.basegpt.scan_in_pieces(u, step, rates, write, read, is_start, state, chunk)
        ctx.save_for_backward(u, step, rates, write, read, is_start, kept)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_last):
        *others, d_state = torch.ops.basegpt.scan_in_pieces_backward(*ctx.saved_tensors, d_y, d_last, ctx.chunk)
        return *others, None, d_state if ctx.needs_input_grad[6] else None, None


def pieces_forward(u, step, rates, write, read, is_start, state, chunk):
    B, T, W = u.shape
    y, last, kept = empty_pieces(u, step, rates, write, read, is_start, state, chunk)
    rates = rates.T.contiguous()
    for rows in spans(B, ROWS):
        tokens = time_first(step[rows], step[rows] * u[rows], write[rows], is_start[rows] if is_start is not None else None)
        state_now, reading = state[rows], read[rows].transpose(0, 1)
        for number, times in enumerate(spans(T, chunk)):
            kept[number, rows] = state_now
            _, states = unroll(*(part if part is None else part[times] for part in tokens), rates, state_now)
            y[rows, times] = read_out(states[1:], reading[times]).transpose(0, 1)
            state_now = states[-1]
        last[rows] = state_now
    return y, last, kept


def pieces_backward(u, step, rates, write, read, is_start, kept, d_y, d_last, chunk):
    (B, T, W), N = u.shape, rates.shape[1]
    d_u, d_step, d_write, d_read, d_state = (torch.empty_like(x) for x in (u, step, write, read, d_last))
    rates = rates.T.contiguous()  # (N, W)
    d_rates = rates.new_zeros(N, W)
    for rows in spans(B, ROWS):
        flow = d_last[rows].clone()  # the gradient of the state behind a piece
        tokens = time_first(step[rows], step[rows] * u[rows], write[rows], is_start[rows] if is_start is not None else None)
        read_d_y = time_first(read[rows], d_y[rows])
        for number, times in reversed(list(enumerate(spans(T, chunk)))):
            steps, inputs, writing, new = (part if part is None else part[times] for part in tokens)
            reading, d_out = (part[times] for part in read_d_y)
            C, R, _ = steps.shape
            decay, states = unroll(steps, inputs, writing, new, rates, kept[number, rows])
            d_read[rows, times] = (states[1:] @ d_out[..., None]).squeeze(-1).transpose(0, 1)
            d_states = reading[..., None] * d_out[:, :, None]  # (C, R, N, W)
            gradients, decays = d_states.unbind(), decay.unbind()
            gradients[-1].add_(flow)
            for t in reversed(range(len(gradients) - 1)):
                gradients[t].addcmul_(decays[t + 1], gradients[t + 1])
            flow = decays[0] * gradients[0]
            d_write[rows, times] = (d_states @ inputs[..., None]).squeeze(-1).transpose(0, 1)
            d_inputs = read_out(d_states, writing)  # (C, R, W)
            d_exponent = decay.mul_(states[:-1]).mul_(d_states)  # of exp(step x rates)
            d_u[rows, times] = (d_inputs * steps).transpose(0, 1)
            by_rates = torch.mul(d_exponent, rates, out=d_states).sum(dim=2)
            d_step[rows, times] = by_rates.transpose(0, 1).addcmul_(d_inputs.transpose(0, 1), u[rows, times])
            d_rates += d_exponent.mul_(steps[:, :, None]).sum(dim=(0, 1))
        d_state[rows] = flow
    return d_u, d_step, d_rates.T.contiguous(), d_write, d_read, d_state


def unroll(step, inputs, write, is_start, rates, state):
    """Decays (C, B, N, W) and states (C + 1, B, N, W) of C tokens, the state in front of them first.

    step and inputs = step u (C, B, W), write (C, B, N), is_start (C, B) or None, rates (N, W), state (B, N, W)
    """
    C, B, W = step.shape
    N = len(rates)
    decay = (step[:, :, None] * rates).exp_()  # (C, B, N, W)
    if is_start is not None:
        decay[is_start] = 0.0
    states = decay.new_empty(C + 1, B, N, W)
    states[0] = state
    torch.mul(inputs[:, :, None], write[..., None], out=states[1:])
    before, *others = states.unbind()
    for after, left in zip(others, decay.unbind(), strict=True):
        before = after.addcmul_(left, before)
    return decay, states


def spans(length: int, size: int) -> list[slice]:
    """One behind the other, as long as the size but for the last."""
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def time_first(*tensors: Tensor | None) -> list[Tensor | None]:
    """(B, T, ...) -> (T, B, ...)"""
    return [x if x is None else x.transpose(0, 1).contiguous() for x in tensors]


def empty_pieces(u, step, rates, write, read, is_start, state, chunk):
    """y (B, T, W), the last state, and those in front of each piece (pieces, B, N, W)."""
    return torch.empty_like(u), torch.empty_like(state), u.new_empty(math.ceil(u.shape[1] / chunk), *state.shape)


def empty_pieces_gradients(u, step, rates, write, read, is_start, kept, d_y, d_last, chunk):
    return [torch.empty_like(x) for x in (u, step, rates, write, read, d_last)]


def discretise(u: Tensor, step: Tensor, rates: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and update of every number of the state.  (B, T, W), (B, T, W), (W, N), (B, T, N) -> twice (B, T, N, W)"""
    return torch.exp(step[:, :, None] * rates.T.contiguous()), (step * u)[:, :, None] * write[..., None]


def read_out(states: Tensor, read: Tensor) -> Tensor:
    """(B, T, N, W), (B, T, N) -> (B, T, W)"""
    return (read[:, :, None] @ states).squeeze(2)


def projection(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """A matrix with torch's own first weights, as in the published models, and a bias that starts at zero."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def first_convolution(channels: int, width: int) -> ShortConv:
    """A convolution that starts as torch's own do: all its weights, the skip's 1 included, evenly from -1 / sqrt(width) on.

    Its bias starts at zero.
    """
    conv = ShortConv(channels, width, bias=True)
    nn.init.uniform_(conv.weight, -(width**-0.5), width**-0.5)
    with torch.no_grad():
        conv.weight[0] -= 1
    return conv


def first_step_biases(count: int) -> Tensor:
    """What softplus makes FIRST_STEPS of."""
    steps = torch.empty(count).uniform_(*(math.log(step) for step in FIRST_STEPS)).exp()
    return steps + torch.log(-torch.expm1(-steps))


PIECES = "Tensor u, Tensor step, Tensor rates, Tensor write, Tensor read, Tensor? is_start"
LIBRARY = torch.library.Library("basegpt", "FRAGMENT")  # so that torch.compile takes a scan as one operation
LIBRARY.define(f"scan_in_pieces({PIECES}, Tensor state, int chunk) -> (Tensor, Tensor, Tensor)")
LIBRARY.define(f"scan_in_pieces_backward({PIECES}, Tensor kept, Tensor d_y, Tensor d_last, int chunk) -> "
               "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")  # fmt: skip
LIBRARY.impl("scan_in_pieces", pieces_forward, "CompositeExplicitAutograd")
LIBRARY.impl("scan_in_pieces_backward", pieces_backward, "CompositeExplicitAutograd")
torch.library.register_fake("basegpt::scan_in_pieces", empty_pieces, lib=LIBRARY)
torch.library.register_fake("basegpt::scan_in_pieces_backward", empty_pieces_gradients, lib=LIBRARY)

BLOCKS = {"Mamba": Mamba}
