"""Mamba-2: a state space whose heads fade as a whole, so that most of it is products of matrices (Dao and Gu 2024, 2405.21060).

B batch, T time, D model dim, H heads, K head dim, G groups, R heads of a group, N numbers of state for each channel of a head;
n chunks of C tokens each. The inner width is H K = expand x D.

    here       paper     what it is
    x          X         what goes into the state space, behind the short convolution: values, in the words of attention
    step       Δ         step size of each head, which says how much is forgotten and how much is taken in
    rates      A         how fast a head fades, a number below 0; learned as log_rates, log(-A)
    write      B         keys: what a token writes, shared by the heads of a group
    read       C         queries: what it reads, shared as well
    skip       D         how much of x goes past the state, a number a head
    state      H         (B, H, K, N)
    faded      A_cumsum  the sum of Δ A from the beginning of the chunk up to each token: log of the decay so far (section 6)
    seen       L         exp(faded_t - faded_s) Δ_s, what is left at t of what was written at s: the mask of section 3.3, times Δ
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model import activate
from modules.chunks import FromChunkToChunk, check_sizes, in_chunks, masked, remembered, sight
from modules.convolution import ShortConv
from modules.mamba import first_convolution, first_step_biases, projection
from modules.norms import rms_norm
from tools import LoggingModule

FIRST_RATES = (1.0, 16.0)  # the rates -A that heads begin with, evenly between these, as in the published code
SMALLEST_STEP = 1e-20  # whose logarithm is taken


class Mamba2(LoggingModule):
    """The Mamba-2 block: gate, short convolution, state space, norm (arXiv 2405.21060, section 7.1).  (B, T, D) -> (B, T, D)

    It takes the place of attention and MLP: "Norm->Mamba2->+" is a whole layer. The width inside is expand x D, in heads of
    head_dim channels that have state_dim numbers of state each. Heads of a group write and read alike; groups must divide the
    heads. conv_width is how many tokens the convolution sees. Sequences are read in chunks of so many tokens; the result
    does not depend on it. A window is nothing to a recurrence: it reaches back to the beginning of the story. The decays
    between the tokens of a chunk, the norm and the gates are elementwise: per FLOP it takes nearly twice as long as Attn.
    """

    activate, rms_norm = staticmethod(activate), staticmethod(rms_norm)
    examples = ("Mamba2", "Norm->Mamba2(state_dim=3, head_dim=4, groups=3, conv_width=1, chunk=13)->+")

    def __init__(
        self,
        dim: int,
        head_dim: int,
        state_dim: int = 32,
        expand: int = 2,
        groups: int = 1,
        conv_width: int = 4,
        chunk: int = 64,
        linear_bias: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes(state_dim=state_dim, expand=expand, groups=groups, conv_width=conv_width, chunk=chunk)
        width = expand * dim
        if width % head_dim:
            raise ValueError(f"head_dim={head_dim}: it must divide the width inside, expand * dim = {width}")
        heads = width // head_dim
        if heads % groups:
            raise ValueError(f"groups={groups}: it must divide the number of heads, expand * dim / head_dim = {heads}")
        self.width, self.num_heads, self.head_dim, self.groups, self.state_dim = width, heads, head_dim, groups, state_dim
        self.chunk, self.eps = chunk, norm_eps
        self.w_gate = projection(dim, width, linear_bias)
        self.w_in = projection(dim, width + 2 * groups * state_dim, linear_bias)
        self.w_step = nn.Linear(dim, heads)
        self.w_step.bias = nn.Parameter(first_step_biases(heads))
        self.conv = first_convolution(self.w_in.out_features, conv_width)
        self.log_rates = nn.Parameter(torch.empty(heads).uniform_(*FIRST_RATES).log())
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.w_out = projection(width, dim, linear_bias)

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        state = remembered(cache, (B, self.num_heads, self.head_dim, self.state_dim), x)
        step = F.softplus(self.w_step(x).float().transpose(1, 2).contiguous())  # (B, num_heads, T)
        inner, write, read = self.project(x, story_start, cache)
        with torch.autocast(x.device.type, enabled=False):
            log_decay = -self.log_rates.float().exp()[:, None] * step  # (B, num_heads, T)
            if cache is not None and T == 1:
                y, state = self.step_by_step(inner, step, log_decay, write, read, state)
            else:
                y, state = self.in_parallel(inner, step, log_decay, write, read, state, story_start)
        if cache is not None:
            cache["state"] = state
        y = y.transpose(1, 2).reshape(B, T, -1)  # (B, T, width)
        return self.w_out(self.norm(self.activate("SiLU", self.w_gate(x), y)))

    def project(self, x, story_start, cache):
        """What goes into the state space (B, num_heads, T, head_dim), is written and is read (B, groups, T, state_dim)."""
        B, T, D = x.shape
        u = self.conv(self.w_in(x), story_start=story_start, cache=None if cache is None else cache.setdefault("conv", {}))
        u = self.activate("SiLU", u).float()
        inner, write, read = u.split([self.width, self.groups * self.state_dim, self.groups * self.state_dim], dim=-1)
        inner = inner.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, num_heads, T, head_dim)
        write, read = (x.view(B, T, self.groups, self.state_dim).transpose(1, 2) for x in (write, read))
        return inner, write, read

    def step_by_step(self, x, step, log_decay, write, read, state):
        """The recurrence as the paper writes it (equation 1, with the skip): fade, write, read.

        x (B, H, T, K), step and log_decay (B, H, T), write and read (B, G, T, N), state (B, H, K, N) -> as x, and the last state
        """
        write, read = (x.repeat_interleave(self.num_heads // self.groups, dim=1) for x in (write, read))
        outputs, inputs = [], x * step[..., None]
        for t in range(x.shape[2]):
            state = log_decay[:, :, t, None, None].exp() * state + inputs[:, :, t, :, None] * write[:, :, t, None]
            outputs.append((state @ read[:, :, t, :, None]).squeeze(-1))
        return torch.stack(outputs, dim=2) + x * self.skip[:, None, None], state

    def in_parallel(self, x, step, log_decay, write, read, state, starts):
        """The same by products of matrices (section 6): inside of each chunk as attention, from chunk to chunk by the state.

        starts (B, T): where the story of each token begins; None is before the first. Else as step_by_step.
        """
        B, H, T, K = x.shape
        _, G, _, N = write.shape
        C, R = min(self.chunk, T), H // G
        n = math.ceil(T / C)
        sights = sight(n, C, starts, x.device)
        x, step, faded, write, read = (in_chunks(part, n, C) for part in (x, step, log_decay, write, read))
        step, faded = step[..., None], faded.cumsum(dim=-1)[..., None]  # (B, H, n, C, 1)

        # Blocks on the diagonal: 1-semiseparable masked attention (section 6.1).
        log_weight = faded - step.clamp(min=SMALLEST_STEP).log()  # (B, H, n, C, 1)
        y = WithinChunks.apply(read @ write.mT, faded, log_weight, x, self.skip, sights.within)  # (B, H, n, C, K)

        # Low-rank blocks below it (section 6.2): into the states, from one to the next, and out of them. The heads of a group are
        # side by side, as they are in memory, since they write and read alike.
        share = masked((faded[..., -1:, :] - faded).exp() * step, sights.behind)  # (B, H, n, C, 1)
        added = beside_each_other(x * share, G).mT @ write  # (B, G, n, R * K, N)
        since_begin = masked(faded.exp(), sights.before)  # (B, H, n, C, 1)
        kept = since_begin[..., -1, :].unflatten(1, (G, R)).transpose(2, 3).repeat_interleave(K, dim=3)  # (B, G, n, R * K, 1)
        state_of_groups = state.reshape(B * G, R * K, N)
        before, last_state = FromChunkToChunk.apply(kept.flatten(0, 1), added.flatten(0, 1), state_of_groups, False)
        before = before.view_as(added)
        carried = (read @ before.mT).unflatten(-1, (R, K)).permute(0, 1, 4, 2, 3, 5).flatten(1, 2)  # (B, H, n, C, K)
        return torch.addcmul(y, carried, since_begin).flatten(2, 3)[:, :, :T], last_state.view_as(state)

    def norm(self, y):
        """RMSNorm of each group (section 7.1 and 7.2).  (B, T, D) -> (B, T, D), where D is the width inside"""
        B, T, D = y.shape
        if self.groups == 1:
            return self.rms_norm(y, self.norm_weight.type_as(y), self.eps)
        y = y.view(B, T, self.groups, -1)
        return self.rms_norm(y, None, self.eps).view(B, T, D) * self.norm_weight

    def flops_per_token(self, T: int) -> float:
        """Matrices, convolution, and the products of in_parallel, which are those of whole chunks."""
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear | ShortConv))
        C = min(self.chunk, T)
        whole = math.ceil(T / C) * C / T
        return 2.0 * matrices + 2.0 * whole * (C * (self.groups * self.state_dim + self.width) + 2 * self.width * self.state_dim)


class WithinChunks(torch.autograd.Function):
    """Attention inside of each chunk by scores that fade, and the skip; its gradient takes less memory and time than torch's.

    out_t = sum over s of exp(faded_t - log_weight_s) scores_ts x_s, where within is True, + skip x_t. scores (B, G, n, C, C),
    faded and log_weight (B, H, n, C, 1), x (B, H, n, C, K), skip (H), within as that of Sight -> as x.
    """

    @staticmethod
    def forward(ctx, scores, faded, log_weight, x, skip, within):
        B, H, n, C, _ = x.shape
        # What is not seen is left out before exp, which could be infinite there.
        seen = (faded - log_weight.mT).masked_fill_(~within, -math.inf).exp_()  # (B, H, n, C, C)
        weights = of_groups(seen, scores).mul(scores[:, :, None]).flatten(1, 2)  # (B, H, n, C, C)
        weights.diagonal(dim1=-2, dim2=-1).add_(skip[:, None, None])
        x = x.contiguous()
        ctx.save_for_backward(scores, seen, weights, x)
        return weights @ x

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        scores, seen, weights, x = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_weights = d_out @ x.mT
        d_skip = d_weights.diagonal(dim1=-2, dim2=-1).sum(dim=(0, 2, 3))
        by_head = of_groups(d_weights.mul_(seen), scores)
        d_scores = by_head.sum(dim=2)
        d_exponent = by_head.mul_(scores[:, :, None]).flatten(1, 2)
        d_faded, d_log_weight = d_exponent.sum(dim=-1, keepdim=True), -d_exponent.sum(dim=-2).unsqueeze(-1)
        return d_scores, d_faded, d_log_weight, weights.mT @ d_out, d_skip, None


def beside_each_other(x: Tensor, G: int) -> Tensor:
    """The heads of each of G groups as columns of one matrix.  (B, H, n, C, K) -> (B, G, n, C, R * K)"""
    return x.unflatten(1, (G, -1)).permute(0, 1, 3, 4, 2, 5).flatten(4)


def of_groups(x: Tensor, scores: Tensor) -> Tensor:
    """(B, H, ...) -> (B, G, R, ...), with as many groups as the scores have."""
    return x.unflatten(1, (scores.shape[1], -1))


BLOCKS = {"Mamba2": Mamba2}
