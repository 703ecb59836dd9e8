"""Mamba-2: a state space model of heads that decay as a whole, mostly matrix products (Dao and Gu 2024, arXiv 2405.21060).

B batch, T time, D model dim, H heads, K head dim, G groups, R heads of a group, N numbers of state for each channel of a head;
n chunks of C tokens each. The inner width is H K = expand x D.

    here             paper     meaning
    x                X         input of the state space, after the short convolution; the values, in terms of attention
    step             Δ         step size of each head: the larger, the more is forgotten and the more is taken in
    rates            A         decay rate of each head, below 0; learned as log_rates, log(-A)
    write            B         input weights of the state, shared by the heads of a group; the keys
    read             C         output weights of the state, shared by the heads of a group; the queries
    skip             D         weight of x in the output, one for each head
    state            H         (B, H, K, N)
    cum_log_decay    A_cumsum  sum of Δ A from the start of the chunk up to each token (section 6)
    decays           L         exp(cum_log_decay_t - cum_log_decay_s) Δ_s: the mask of section 3.3, times Δ
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import activate, rms_norm
from modules.checks import check_sizes
from modules.chunks import ChunkRecurrence, chunk_masks, masked
from modules.flops import linear_flops
from modules.mamba import default_conv, default_linear, initial_step_biases
from modules.operators import once_differentiable
from modules.scan import cached_state, cut
from tools import LoggingModule

INITIAL_RATES = (1.0, 16.0)  # the range of the initial rates -A, as in the published code
SMALLEST_STEP = 1e-20  # before the logarithm


class Mamba2(LoggingModule):
    """The Mamba-2 block: gate, short convolution, state space, norm (arXiv 2405.21060, section 7.1).  (B, T, D) -> (B, T, D)

    It takes the place of attention and MLP: "Norm->Mamba2->+" is a whole layer. The inner width is expand x D, in heads of
    head_dim channels, each with state_dim numbers of state. The heads of a group share input and output weights of the state;
    groups must divide the heads. The convolution is over conv_width tokens. Sequences are read in chunks of `chunk` tokens; the
    result does not depend on it. A window has no effect: the state covers the whole story. Decays, norm and gates are
    elementwise work: per FLOP it takes about 1.8 times as long as Attn.
    """

    activate, rms_norm = staticmethod(activate), staticmethod(rms_norm)
    examples = ("Mamba2", "Norm->Mamba2(state_dim=3, head_dim=4, groups=3, conv_width=1, chunk=13)->+")

    def __init__(
        self, dim: int, head_dim: int, state_dim: int = 32, expand: int = 2, groups: int = 1, conv_width: int = 4,
        chunk: int = 64, linear_bias: bool = False, norm_eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        check_sizes(state_dim=state_dim, expand=expand, groups=groups, conv_width=conv_width, chunk=chunk)
        width = expand * dim
        if width % head_dim:
            raise ValueError(f"head_dim={head_dim}: it must divide the inner width, expand * dim = {width}")
        heads = width // head_dim
        if heads % groups:
            raise ValueError(f"groups={groups}: it must divide the number of heads, expand * dim / head_dim = {heads}")
        self.width, self.num_heads, self.head_dim, self.groups, self.state_dim = width, heads, head_dim, groups, state_dim
        self.chunk, self.eps = chunk, norm_eps
        self.w_gate = default_linear(dim, width, linear_bias)
        self.w_in = default_linear(dim, width + 2 * groups * state_dim, linear_bias)
        self.w_step = nn.Linear(dim, heads)
        self.w_step.bias = nn.Parameter(initial_step_biases(heads))
        self.conv = default_conv(self.w_in.out_features, conv_width)
        self.log_rates = nn.Parameter(torch.empty(heads).uniform_(*INITIAL_RATES).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.w_out = default_linear(width, dim, linear_bias)

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        H, G, N = self.num_heads, self.groups, self.state_dim
        state = cached_state(cache, x, B, H, self.head_dim, N)
        step = F.softplus(self.w_step(x).float().transpose(1, 2).contiguous())  # (B, H, T)
        conv_cache = None if cache is None else cache.setdefault("conv", {})
        u = self.conv(self.w_in(x), story_start=story_start, cache=conv_cache)
        inner, write, read = self.activate("SiLU", u).float().split([self.width, G * N, G * N], dim=-1)
        inner = inner.view(B, T, H, self.head_dim).transpose(1, 2)  # (B, H, T, head_dim)
        write, read = (part.view(B, T, G, N).transpose(1, 2) for part in (write, read))  # write: (B, G, T, N)
        with torch.autocast(x.device.type, enabled=False):
            log_decay = -self.log_rates.float().exp()[:, None] * step  # (B, H, T)
            if cache is not None and T == 1:
                y, state = self.step_by_step(inner, step, log_decay, write, read, state)
            else:
                y, state = self.in_parallel(inner, step, log_decay, write, read, state, story_start)
        if cache is not None:
            cache["state"] = state
        gated = self.activate("SiLU", self.w_gate(x), y.transpose(1, 2).reshape(B, T, -1))  # (B, T, width)
        if G == 1:
            normed = self.rms_norm(gated, self.norm_weight.type_as(gated), self.eps)
        else:  # each group on its own (section 7.2)
            normed = self.rms_norm(gated.view(B, T, G, -1), None, self.eps).view(B, T, -1) * self.norm_weight
        return self.w_out(normed)

    def step_by_step(self, x, step, log_decay, write, read, state):
        """The recurrence as in the paper (equation 1, with the skip): decay, write, read.

        x (B, H, T, K), step and log_decay (B, H, T), write and read (B, G, T, N), state (B, H, K, N) -> as x, and the last state
        """
        write, read = (part.repeat_interleave(self.num_heads // self.groups, dim=1) for part in (write, read))
        outputs, inputs = [], x * step[..., None]
        for t in range(x.shape[2]):
            state = log_decay[:, :, t, None, None].exp() * state + inputs[:, :, t, :, None] * write[:, :, t, None]
            outputs.append((state @ read[:, :, t, :, None]).squeeze(-1))
        return torch.stack(outputs, dim=2) + x * self.skip[:, None, None], state

    def in_parallel(self, x, step, log_decay, write, read, state, story_start):
        """step_by_step as matrix products (section 6): attention within chunks, and a state between them.

        story_start (B, T): where the story of each token starts, None: before the first token.
        """
        B, H, T, K = x.shape
        _, G, _, N = write.shape
        C, R = min(self.chunk, T), H // G
        n = math.ceil(T / C)
        within, to_start, to_end = chunk_masks(n, C, story_start, x.device)
        x, step, log_decay, write, read = (cut(part, C, dim=2) for part in (x, step, log_decay, write, read))
        step, cum_log_decay = step[..., None], log_decay.cumsum(dim=-1)[..., None]  # (B, H, n, C, 1)

        # diagonal blocks: 1-semiseparable masked attention (section 6.1)
        log_weight = cum_log_decay - step.clamp(min=SMALLEST_STEP).log()  # (B, H, n, C, 1)
        y = WithinChunks.apply(read @ write.mT, cum_log_decay, log_weight, x, self.skip, within)  # (B, H, n, C, K)

        # low-rank blocks below (section 6.2): into the states, from one to the next, and out of them; the heads of a group, which
        # share write and read, are the columns of one matrix
        to_end = masked((cum_log_decay[..., -1:, :] - cum_log_decay).exp() * step, to_end)  # (B, H, n, C, 1)
        inputs = (x * to_end).unflatten(1, (G, R)).permute(0, 1, 3, 4, 2, 5).flatten(4)  # (B, G, n, C, R * K)
        added = inputs.mT @ write  # (B, G, n, R * K, N)
        from_start = masked(cum_log_decay.exp(), to_start)  # (B, H, n, C, 1)
        decay = from_start[..., -1, :].unflatten(1, (G, R)).transpose(2, 3).repeat_interleave(K, dim=3)  # (B, G, n, R * K, 1)
        group_state = state.reshape(B * G, R * K, N)
        states, last_state = ChunkRecurrence.apply(decay.flatten(0, 1), added.flatten(0, 1), group_state, False)
        carried = read @ states.view_as(added).mT  # (B, G, n, C, R * K)
        carried = carried.unflatten(-1, (R, K)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)  # (B, H, n, C, K)
        return torch.addcmul(y, carried, from_start).flatten(2, 3)[:, :, :T], last_state.view_as(state)

    def flops_per_token(self, T: int) -> float:
        """Matrices, convolution, and the products of in_parallel, which are those of whole chunks."""
        C = min(self.chunk, T)
        padded = math.ceil(T / C) * C / T
        products = 2 * padded * (C * (self.groups * self.state_dim + self.width) + 2 * self.width * self.state_dim)
        return linear_flops(self) + self.conv.flops_per_token(T) + products


class WithinChunks(torch.autograd.Function):
    """Attention within chunks by decaying scores, and the skip; it saves less for its gradient than autograd would.

    out_t = sum over s of exp(cum_log_decay_t - log_weight_s) scores_ts x_s, where within is True, + skip x_t. scores
    (B, G, n, C, C), cum_log_decay and log_weight (B, H, n, C, 1), x (B, H, n, C, K), skip (H), within of chunk_masks -> as x.
    """

    @staticmethod
    def forward(ctx, scores, cum_log_decay, log_weight, x, skip, within):
        # mask before exp, which could be infinite there
        decays = (cum_log_decay - log_weight.mT).masked_fill_(~within, -math.inf).exp_()
        weights = decays.unflatten(1, (scores.shape[1], -1)).mul(scores[:, :, None]).flatten(1, 2)
        weights.diagonal(dim1=-2, dim2=-1).add_(skip[:, None, None])
        x = x.contiguous()
        ctx.save_for_backward(scores, decays, weights, x)
        return weights @ x

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        scores, decays, weights, x = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_weights = d_out @ x.mT
        d_skip = d_weights.diagonal(dim1=-2, dim2=-1).sum(dim=(0, 2, 3))
        d_scores_by_head = d_weights.mul_(decays).unflatten(1, (scores.shape[1], -1))
        d_scores = d_scores_by_head.sum(dim=2)
        d_exponent = d_scores_by_head.mul_(scores[:, :, None]).flatten(1, 2)
        d_cum_log_decay, d_log_weight = d_exponent.sum(dim=-1, keepdim=True), -d_exponent.sum(dim=-2).unsqueeze(-1)
        return d_scores, d_cum_log_decay, d_log_weight, weights.mT @ d_out, d_skip, None


BLOCKS = {"Mamba2": Mamba2}
