"""What Megalodon makes of all tokens before: a moving average of each channel in complex numbers, and a norm over time.

Ma et al. 2024, arXiv 2404.08801. B batch, T time, D model dim, N numbers of a channel's state, G groups of channels, C chunks
of a row, L steps of a chunk, E stories that begin inside of a chunk.

    here             paper     what it is (section 3.1)
    x                x, u      the input; the factor β that expands it to u is left out, since η can take it
    state            h_t       N complex numbers for each channel
    alpha, delta     α, δ      how much of the input comes in, and how much of α the state then loses: both from 0 to 1
    theta            θ         by how much a state turns in a step: k ω_j 2 π / N for the k-th number of channel j
    base_angle       ω         the channel's part of that, from 0 to 1
    eta              η         how the state becomes the output
    entry            α (cos θ + i sin θ)         what of an input comes into the state
    q                (1 - α δ) (cos θ + i sin θ) what becomes of a state in a step
    skip             -         a share of the input itself, which the authors' code (github.com/XuezheMax/megalodon) adds

    mean, variance   μ_t, σ_t² of all that a group of channels has been so far (section 3.2)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.chunks import check_sizes
from modules.scan import check_rows, recurrence, scan
from tools import LoggingModule


class CEMA(LoggingModule):
    """The complex exponential moving average of each channel (arXiv 2404.08801, section 3.1).  (B, T, D) -> (B, T, D)

    h_t = α (cos θ + i sin θ) x_t + (1 - α δ) (cos θ + i sin θ) h_{t-1} and y_t = Re(η h_t) + skip x_t, with state_dim complex
    numbers h for each channel. What came before fades and swings, but by nothing that depends on the input: so a chunk of
    tokens is one product with a matrix of powers of q, and only the states at the ends of chunks are a recurrence. A story
    begins anew; windows are nothing to it. Each channel has a small matrix of its own: per FLOP that takes 4 times as long as
    Attn, whose matrices are large.
    """

    examples = ("CEMA", "Norm->CEMA(state_dim=3, chunk=8)->+")

    def __init__(self, dim: int, state_dim: int = 16, chunk: int = 32):
        super().__init__()
        check_sizes(state_dim=state_dim, chunk=chunk)
        self.chunk = chunk
        # As the authors' code begins: angles from about 1 / D to 1 of the N-th of a turn, another one in each channel.
        self.alpha = nn.Parameter(torch.randn(dim, state_dim) * 0.2)
        self.delta = nn.Parameter(torch.randn(dim, state_dim) * 0.2)
        base_angle = (dim + 1.0) ** (-(torch.randperm(dim) + 0.5) / dim)
        self.base_angle = nn.Parameter(torch.logit(base_angle))
        self.eta = nn.Parameter(torch.stack([torch.randn(dim, state_dim), torch.zeros(dim, state_dim)], dim=-1) * state_dim**-0.5)
        self.skip = nn.Parameter(nn.init.trunc_normal_(torch.empty(dim), std=0.25, a=-1.0, b=1.0))

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state, two numbers for each complex one."""
        B, T, D = x.shape
        state = None
        if cache:
            check_rows(cache["state"], B)
            state = torch.view_as_complex(cache["state"])
        with torch.autocast(x.device.type, enabled=False):
            if T == 1:
                mixed, state = self.step_by_step(x.float(), state)
            else:
                mixed, state = self.in_chunks(x.float(), state, story_start, keep=cache is not None)
        if cache is not None:
            cache["state"] = torch.view_as_real(state)
        return mixed.type_as(x)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α, the logarithm of 1 - α δ, θ and η, each (D, N); η is complex."""
        N = self.alpha.shape[1]
        alpha, delta = self.alpha.sigmoid(), self.delta.sigmoid()
        log_loss = torch.log1p(-(alpha * delta).clamp(max=1 - 1e-6))  # finite where a step leaves nothing
        turns = torch.arange(1, N + 1, device=alpha.device) * (2 * math.pi / N)
        return alpha, log_loss, self.base_angle.sigmoid()[:, None] * turns, as_complex(self.eta)

    def step_by_step(self, x, state=None):
        """The equations of section 3.1 for one token after the other: the outputs (B, T, D), and the state (B, D, N) behind."""
        B, T, D = x.shape
        alpha, log_loss, theta, eta = self.coefficients()
        N = alpha.shape[1]
        entry, q = torch.polar(alpha, theta), torch.polar(log_loss.exp(), theta)
        update = entry * x[..., None]  # (B, T, D, N)
        states = recurrence(q.expand(B, T, D, N), update, state)
        return (states * eta).sum(dim=-1).real + self.skip * x, states[:, -1]

    def in_chunks(self, x, state=None, starts=None, keep=False):
        """The same by products with matrices. starts (B, T): where the story of each token begins; None is before the first.

        keep: the state behind the last token is asked for, too; only where there are no starts.
        """
        B, T, D = x.shape
        L = min(self.chunk, T)
        within, entry, leave, through, scale = self.matrices(L)
        N = through.shape[1]
        chunks = Permuted.apply(F.pad(x, (0, 0, 0, -T % L)), (2, 0, 1)).unflatten(2, (-1, L))
        C = chunks.shape[2]  # chunks: (D, B, C, L)
        stories = None if starts is None else Stories(starts, L)

        mixed = self.within_chunks(chunks.view(D, B * C, L), within, stories)
        entering = chunks if stories is None else chunks * stories.is_last
        ends = entering.view(D, B * C, L) @ entry  # (D, B * C, 2 * N)
        ends = torch.view_as_complex(ends.view(D * B, C, N, 2))
        decays = through.view(D, 1, 1, N) if stories is None else through.view(D, 1, 1, N) * stories.passed
        decays = decays.expand(D, B, C, N).reshape(D * B, C, N)
        before = torch.zeros_like(ends[:, 0]) if state is None else (state / scale).transpose(0, 1).reshape(D * B, N)
        begins = torch.cat([before[:, None], scan(decays, ends, before)], dim=1)  # (D * B, C + 1, N), what chunks begin with
        carried = torch.view_as_real(begins[:, :-1]).reshape(D, B * C, 2 * N) @ leave  # (D, B * C, L)
        mixed = mixed + (carried if stories is None else carried * stories.reached.view(B * C, L))
        mixed = Permuted.apply(mixed.view(D, B, C * L), (1, 2, 0))[:, :T]
        return mixed, self.last_state(begins, chunks, entry, T) * scale if keep else None

    def matrices(self, L: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a chunk of L steps does, as products from the right.

        within (D, L, L): what each token of a chunk adds to the outputs of itself and those behind it; entry (D, L, 2 * N): and
        to the state at the end; leave (D, 2 * N, L): what the state before a chunk adds to its outputs; through (D, N), complex:
        what is left of it at the end. Complex numbers are pairs in 2 * N. The state is in units of `scale` (D, N), so that an
        input k steps ago is in it as q to the power of k + 1.
        """
        alpha, log_loss, theta, eta = self.coefficients()
        D, N = alpha.shape
        steps = torch.arange(1, L + 1, device=alpha.device)[:, None]
        powers = torch.polar((steps * log_loss[:, None]).exp(), steps * theta[:, None])  # (D, L, N), q to the power of 1 to L
        scale = alpha * (-log_loss).exp()  # the entry turns as q does, but is α where that is 1 - α δ
        outputs = (scale * eta)[:, None] * powers  # (D, L, N)
        response = outputs.real.sum(dim=-1) + F.pad(self.skip[:, None], (0, L - 1))  # (D, L), to an input 0 to L - 1 steps ago
        within = F.pad(response, (L - 1, 0)).unfold(1, L, 1).flip(1)  # (D, L, L)
        entry = torch.view_as_real(powers.flip(1)).flatten(2)  # (D, L, 2 * N)
        leave = torch.view_as_real(outputs.conj().resolve_conj()).flatten(2).transpose(1, 2)  # (D, 2 * N, L)
        return within, entry, leave, powers[:, -1], scale

    def within_chunks(self, chunks, within, stories):
        """What the tokens of a chunk tell those behind them in it, story by story.  (D, B * C, L) -> the same"""
        if stories is None:
            return chunks @ within
        columns = torch.cat([chunks, chunks.index_select(1, stories.chunks)], dim=1) * stories.columns
        mixed = (columns @ within) * stories.columns
        whole, inside = mixed.split([chunks.shape[1], len(stories.chunks)], dim=1)
        return whole.index_add(1, stories.chunks, inside)

    def last_state(self, begins, chunks, entry, T):
        """(B, D, N) behind the last token, which need not be the last of its chunk."""
        D, B, C, L = chunks.shape
        rest = T - (C - 1) * L
        _, log_loss, theta, _ = self.coefficients()
        through = torch.polar((rest * log_loss).exp(), rest * theta)[:, None]
        added = (chunks[:, :, -1, :rest] @ entry[:, L - rest :]).unflatten(-1, (-1, 2))
        state = through * begins[:, -2].unflatten(0, (D, B)) + torch.view_as_complex(added)
        return state.transpose(0, 1).contiguous()

    def flops_per_token(self, T: int) -> float:
        """The products of whole chunks, and between these a complex multiply-add for each number of the state."""
        D, N = self.alpha.shape
        L = min(self.chunk, T)
        return 2.0 * D * (L + 4 * N) + 8 * D * N / L


class Stories:
    """Who belongs to whom where stories of a row begin inside of chunks of L tokens, from starts (B, T)."""

    def __init__(self, starts: Tensor, L: int):
        behind = -starts.shape[1] % L
        starts = torch.cat([starts, starts[:, -1:].expand(-1, behind)], dim=1).unflatten(1, (-1, L))
        B, C, _ = starts.shape
        places = torch.arange(C * L, device=starts.device).view(C, L)
        begins = places[:, :1]
        self.reached = starts < begins  # (B, C, L), tokens whose story has begun before the chunk
        self.passed = self.reached[:, :, -1:]  # (B, C, 1), chunks in which no story begins
        self.is_last = starts == starts[:, :, -1:]  # (B, C, L), tokens of the story that goes on behind the chunk
        inside = (starts == places) & (places > begins)
        rows, chunks, steps = inside.nonzero(as_tuple=True)
        self.chunks = rows * C + chunks  # (E), of B * C
        whole = (starts <= begins).view(B * C, L)
        later = starts.view(B * C, L)[self.chunks] == (chunks * L + steps)[:, None]
        # (B * C + E, L): of each chunk the tokens of its first story, then those of each story that begins inside of one
        self.columns = torch.cat([whole, later])


class Permuted(torch.autograd.Function):
    """x.permute(order), written out in memory, as its gradient is: batched products copy matrix by matrix what is not.

    (B, T, D) -> the same axes in another order
    """

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return x.permute(order).contiguous()

    @staticmethod
    def backward(ctx, d_out):
        return d_out.permute([ctx.order.index(axis) for axis in range(d_out.dim())]).contiguous(), None


class TimestepNorm(LoggingModule):
    """(x - mean) / std over all that a group of channels has been so far, with a gain and a shift.  (B, T, D) -> (B, T, D)

    arXiv 2404.08801, section 3.2: group normalisation whose mean and variance are those of the tokens up to each one, of its
    story. The cache keeps both and the number of tokens. Both are kept up to date as by Welford: what is new counts 1 / n of n
    tokens, so each is a recurrence that decays by 1 - 1 / n, and begins anew where n is 1.
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
        G = self.groups
        groups = x.float().view(B, T, G, -1)  # (B, T, G, D // G)
        positions = torch.arange(T, device=x.device) + (cache["num_tokens"] if cache else 0)
        number = 1 + (positions if story_start is None else positions - story_start)
        new_mean = groups.mean(dim=-1)  # (B, T, G)
        away = groups - new_mean[..., None]  # (B, T, G, D // G)
        new_variance = away.square().mean(dim=-1)
        share = (1 / number)[..., None].expand_as(new_mean)
        mean, variance = self.running(new_mean, new_variance, share, cache)
        if cache is not None:
            cache["mean"], cache["variance"], cache["num_tokens"] = mean[:, -1], variance[:, -1], int(positions[-1]) + 1
        normed = (away + (new_mean - mean)[..., None]) * torch.rsqrt(variance + self.eps)[..., None]
        return (normed.view(B, T, D) * self.weight + self.bias).type_as(x)

    def running(self, new_mean, new_variance, share, cache):
        """Means and variances so far, from those of each token and the share that it has in them.  Each (B, T, G)"""
        accumulate = recurrence if share.shape[1] == 1 else scan
        last_mean, last_variance = (cache["mean"], cache["variance"]) if cache else (None, None)
        mean = accumulate(1 - share, share * new_mean, last_mean)
        mean_before = torch.zeros_like(mean[:, :1]) if last_mean is None else last_mean[:, None]
        away = new_mean - torch.cat([mean_before, mean[:, :-1]], dim=1)
        variance = accumulate(1 - share, share * (new_variance + (1 - share) * away.square()), last_variance)
        return mean, variance


def as_complex(pairs: Tensor) -> Tensor:
    """(..., 2) -> (...)"""
    return torch.view_as_complex(pairs.float().contiguous())


BLOCKS = {"CEMA": CEMA, "TimestepNorm": TimestepNorm}
