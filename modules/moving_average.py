"""Megalodon's complex moving average, and its norm over time (Ma et al. 2024, arXiv 2404.08801).

B batch, T time, D model dim, N numbers of a channel's state, G groups of channels, C chunks of a row, L steps of a chunk, E
stories that start inside a chunk.

    here             paper     meaning (section 3.1)
    x                x, u      the input; there is no factor β that expands it to u, since η can include it
    state            h_t       N complex numbers for each channel
    alpha, delta     α, δ      share of the input that enters the state, and share of α that the state then loses: both 0 to 1
    theta            θ         rotation of a state in one step: k ω_j 2 π / N for number k of channel j
    base_angle       ω         the channel's part of it, from 0 to 1
    eta              η         output weights of the state
    entry            α (cos θ + i sin θ)          factor of an input as it enters the state
    q                (1 - α δ) (cos θ + i sin θ)  factor of the state in one step
    skip             -         weight of the input in the output, which the authors' code (github.com/XuezheMax/megalodon) adds

    mean, variance   μ_t, σ_t² of a group of channels over all tokens so far (section 3.2)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checks import check_rows, check_sizes
from modules.operators import once_differentiable
from modules.scan import cached_state, recurrence, scan
from tools import LoggingModule


class CEMA(LoggingModule):
    """Complex exponential moving average of each channel (arXiv 2404.08801, section 3.1).  (B, T, D) -> (B, T, D)

    h_t = α (cos θ + i sin θ) x_t + (1 - α δ) (cos θ + i sin θ) h_{t-1} and y_t = Re(η h_t) + skip x_t, with state_dim complex
    numbers h for each channel. The coefficients do not depend on the input, so a chunk of `chunk` tokens is one product with a
    matrix of powers of q, and only the states between chunks are a recurrence. A window has no effect: the state covers the whole
    story. Each channel has its own small matrices: per FLOP it takes 4 times as long as Attn, whose matrices are large.
    """

    examples = ("CEMA", "Norm->CEMA(state_dim=3, chunk=8)->+")

    def __init__(self, dim: int, state_dim: int = 16, chunk: int = 32):
        super().__init__()
        check_sizes(state_dim=state_dim, chunk=chunk)
        self.chunk = chunk
        # as in the authors' code: ω from about 1 / D to 1, a different one for each channel
        self.alpha = nn.Parameter(torch.randn(dim, state_dim) * 0.2)
        self.delta = nn.Parameter(torch.randn(dim, state_dim) * 0.2)
        base_angle = (dim + 1.0) ** (-(torch.randperm(dim) + 0.5) / dim)
        self.base_angle = nn.Parameter(torch.logit(base_angle))
        self.eta = nn.Parameter(torch.stack([torch.randn(dim, state_dim), torch.zeros(dim, state_dim)], dim=-1) * state_dim**-0.5)
        self.skip = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.25, a=-1.0, b=1.0))

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state, each complex number as two real ones."""
        state = cached_state(cache, x)
        state = None if state is None else torch.view_as_complex(state)
        with torch.autocast(x.device.type, enabled=False):
            if x.shape[1] == 1:
                y, state = self.step_by_step(x.float(), state)
            else:
                y, state = self.in_chunks(x.float(), state, story_start, keep=cache is not None)
        if cache is not None:
            cache["state"] = torch.view_as_real(state)
        return y.type_as(x)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α, log(1 - α δ), θ and the complex η, each (D, N)."""
        N = self.alpha.shape[1]
        alpha, delta = self.alpha.sigmoid(), self.delta.sigmoid()
        log_decay = torch.log1p(-(alpha * delta).clamp(max=1 - 1e-6))  # finite even if a step loses everything
        angles = torch.arange(1, N + 1, device=alpha.device) * (2 * math.pi / N)
        eta = torch.view_as_complex(self.eta.float().contiguous())
        return alpha, log_decay, self.base_angle.sigmoid()[:, None] * angles, eta

    def step_by_step(self, x, state=None):
        """The equations of section 3.1, token by token: the outputs (B, T, D) and the last state (B, D, N)."""
        B, T, D = x.shape
        alpha, log_decay, theta, eta = self.coefficients()
        N = alpha.shape[1]
        entry, q = torch.polar(alpha, theta), torch.polar(log_decay.exp(), theta)
        update = entry * x[..., None]  # (B, T, D, N)
        states = recurrence(q.expand(B, T, D, N), update, state)
        return (states * eta).sum(dim=-1).real + self.skip * x, states[:, -1]

    def in_chunks(self, x, state=None, story_start=None, keep=False):
        """step_by_step as matrix products. story_start (B, T): where the story of each token starts, None: before the first.

        keep: whether to return the last state, else None; only without story_start.
        """
        B, T, D = x.shape
        L = min(self.chunk, T)
        within, entry, leave, q_L, scale = self.matrices(L)
        N = q_L.shape[1]
        chunks = Permute.apply(F.pad(x, (0, 0, 0, -T % L)), (2, 0, 1)).unflatten(2, (-1, L))
        C = chunks.shape[2]
        rows, decays = chunks.view(D, B * C, L), q_L.view(D, 1, 1, N)

        # the outputs within chunks, and what each chunk adds to the state, both by story
        if story_start is None:
            y, ends = rows @ within, rows @ entry  # ends: (D, B * C, 2 * N)
        else:
            stories = StoryMasks(story_start, L)
            columns = torch.cat([rows, rows.index_select(1, stories.chunks)], dim=1) * stories.columns
            first, later = ((columns @ within) * stories.columns).split([B * C, len(stories.chunks)], dim=1)
            y = first.index_add(1, stories.chunks, later)  # (D, B * C, L)
            ends = (chunks * stories.to_end).view(D, B * C, L) @ entry  # (D, B * C, 2 * N)
            decays = decays * stories.through
        ends = torch.view_as_complex(ends.view(D * B, C, N, 2))
        decays = decays.expand(D, B, C, N).reshape(D * B, C, N)

        # the states before the chunks, and after the last
        start = torch.zeros_like(ends[:, 0]) if state is None else (state / scale).transpose(0, 1).reshape(D * B, N)
        states = torch.cat([start[:, None], scan(decays, ends, start)], dim=1)  # (D * B, C + 1, N)
        carried = torch.view_as_real(states[:, :-1]).reshape(D, B * C, 2 * N) @ leave  # (D, B * C, L)
        y = y + (carried if story_start is None else carried * stories.to_start.view(B * C, L))
        y = Permute.apply(y.view(D, B, C * L), (1, 2, 0))[:, :T]
        return y, self.last_state(states, chunks, entry, T) * scale if keep else None

    def matrices(self, L: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The matrices of a chunk of L steps, which multiply from the right.

        within (D, L, L): from inputs to outputs. entry (D, L, 2 * N): from inputs to the state at the end. leave (D, 2 * N, L):
        from the state before the chunk to the outputs. q_L (D, N), complex: from that state to the one at the end. 2 * N are
        pairs, the complex numbers. The state is in units of scale (D, N), in which an input k steps ago counts q^(k + 1).
        """
        alpha, log_decay, theta, eta = self.coefficients()
        D, N = alpha.shape
        steps = torch.arange(1, L + 1, device=alpha.device)[:, None]
        powers = torch.polar((steps * log_decay[:, None]).exp(), steps * theta[:, None])  # (D, L, N), q to the power of 1 to L
        scale = alpha * (-log_decay).exp()  # entry / q, which is real
        outputs = (scale * eta)[:, None] * powers  # (D, L, N)
        response = outputs.real.sum(dim=-1) + F.pad(self.skip[:, None], (0, L - 1))  # (D, L), to an input 0 to L - 1 steps ago
        within = F.pad(response, (L - 1, 0)).unfold(1, L, 1).flip(1)  # (D, L, L)
        entry = torch.view_as_real(powers.flip(1)).flatten(2)  # (D, L, 2 * N)
        leave = torch.view_as_real(outputs.conj().resolve_conj()).flatten(2).transpose(1, 2)  # (D, 2 * N, L)
        return within, entry, leave, powers[:, -1], scale

    def last_state(self, states, chunks, entry, T):
        """The state (B, D, N) after token T, which need not be the last of its chunk."""
        D, B, C, L = chunks.shape
        steps = T - (C - 1) * L  # in the last chunk
        _, log_decay, theta, _ = self.coefficients()
        decay = torch.polar((steps * log_decay).exp(), steps * theta)[:, None]
        added = (chunks[:, :, -1, :steps] @ entry[:, L - steps :]).unflatten(-1, (-1, 2))
        state = decay * states[:, -2].unflatten(0, (D, B)) + torch.view_as_complex(added)
        return state.transpose(0, 1).contiguous()

    def flops_per_token(self, T: int) -> float:
        """The products of whole chunks, and between these a complex multiply-add for each number of the state."""
        D, N = self.alpha.shape
        L = min(self.chunk, T)
        return 2.0 * D * (L + 4 * N) + 8 * D * N / L


class StoryMasks:
    """Which tokens of a chunk share a story, where stories start inside chunks of L tokens; story_start (B, T)."""

    def __init__(self, story_start: Tensor, L: int):
        padding = -story_start.shape[1] % L
        starts = torch.cat([story_start, story_start[:, -1:].expand(-1, padding)], dim=1).unflatten(1, (-1, L))
        B, C, _ = starts.shape
        positions = torch.arange(C * L, device=starts.device).view(C, L)
        chunk_start = positions[:, :1]
        self.to_start = starts < chunk_start  # (B, C, L), tokens whose story started before the chunk
        self.through = self.to_start[:, :, -1:]  # (B, C, 1), chunks in which no story starts
        self.to_end = starts == starts[:, :, -1:]  # (B, C, L), tokens of the story at the end of the chunk
        rows, chunks, steps = ((starts == positions) & (positions > chunk_start)).nonzero(as_tuple=True)
        self.chunks = rows * C + chunks  # (E), out of B * C: the chunk of each story that starts inside one
        first = (starts <= chunk_start).view(B * C, L)
        later = starts.view(B * C, L)[self.chunks] == (chunks * L + steps)[:, None]
        self.columns = torch.cat([first, later])  # the tokens of each chunk's first story, then of each story that starts inside


class Permute(torch.autograd.Function):
    """x.permute(order) as a contiguous copy, and so its gradient: batched products are slow for strided inputs.

    (B, T, D) -> the same axes in another order
    """

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x.permute(order).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return d_out.permute([ctx.order.index(axis) for axis in range(d_out.dim())]).contiguous(), None


class TimestepNorm(LoggingModule):
    """Group norm over all tokens so far, (x - mean) / std, with a gain and a shift.  (B, T, D) -> (B, T, D)

    arXiv 2404.08801, section 3.2: mean and variance of each group of channels over the tokens of the story up to each one,
    updated by Welford's formulas: token n has the weight 1 / n, so both are recurrences with a decay of 1 - 1 / n, which is 0
    where a story starts. The cache keeps both, and the number of tokens.
    """

    examples = ("TimestepNorm", "TimestepNorm(groups=1)")

    def __init__(self, dim: int, groups: int = 4, norm_eps: float = 1e-5):
        super().__init__()
        if groups < 1 or dim % groups or groups == dim:
            raise ValueError(f"groups={groups}: it must divide dim={dim}, and be less, so that the first token has a variance")
        self.groups, self.eps = groups, norm_eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x, *, story_start=None, cache=None):
        B, T, D = x.shape
        if cache:
            check_rows(cache["mean"], B)
        start_mean, start_variance, num_tokens = (cache[name] if cache else None for name in ("mean", "variance", "num_tokens"))
        positions = torch.arange(T, device=x.device) + (num_tokens or 0)
        number = 1 + (positions if story_start is None else positions - story_start)

        # each token's own mean and variance, and its weight in the running ones
        groups = x.float().view(B, T, self.groups, -1)  # (B, T, self.groups, D // self.groups)
        token_mean = groups.mean(dim=-1)  # (B, T, self.groups)
        deviation = groups - token_mean[..., None]
        token_variance = deviation.square().mean(dim=-1)
        weight = (1 / number)[..., None].expand_as(token_mean)

        # the running mean and variance
        accumulate = recurrence if T == 1 else scan
        mean = accumulate(1 - weight, weight * token_mean, start_mean)  # (B, T, self.groups)
        start_mean = torch.zeros_like(mean[:, :1]) if start_mean is None else start_mean[:, None]
        shift = token_mean - torch.cat([start_mean, mean[:, :-1]], dim=1)
        variance = accumulate(1 - weight, weight * (token_variance + (1 - weight) * shift.square()), start_variance)
        if cache is not None:
            cache["mean"], cache["variance"], cache["num_tokens"] = mean[:, -1], variance[:, -1], int(positions[-1]) + 1
        normed = (deviation + (token_mean - mean)[..., None]) * torch.rsqrt(variance + self.eps)[..., None]
        return (normed.view(B, T, D) * self.weight + self.bias).type_as(x)


BLOCKS = {"CEMA": CEMA, "TimestepNorm": TimestepNorm}
