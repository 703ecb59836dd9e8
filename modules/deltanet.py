"""The delta rule: a matrix that maps keys to values, in which each token corrects what its key is answered with.

B batch, T time, D model dim, H heads of values, K head dim, V width of a value, n chunks of C tokens each.

    code        DeltaNet 2406.06484   Gated DeltaNet 2412.06464   what it is
    q, k, v     q, k, v               q, k, v                     queries and keys (B, H, T, K), values (B, H, T, V)
    state       S, transposed         S, transposed               what is remembered, (B, H, K, V): asked for q, it answers q S
    beta        β                     β                           how far an answer is corrected, from 0 to 1
    log_decay                         log α                       how the state fades with each token: by exp(log_decay)
    faded                             log γ                       the sum of log_decay from the beginning of the chunk on
    decays                            Γ                           how much is left of one token's correction at another
    solved      T                     T, with Γ                   what each correction of a chunk takes of every value in it
    log_rate, w_step, step_bias                                   what log α is made of: -exp(log_rate) softplus(w_step x +
                                                                  step_bias), in Mamba 2's code A_log, dt and dt_bias
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, activate, linear
from modules.chunks import FromChunkToChunk, check_sizes, in_chunks, masked, remembered, sight
from modules.convolution import ShortConv
from modules.mamba import first_step_biases
from modules.norms import rms_norm
from tools import LoggingModule


class DeltaNet(LoggingModule):
    """Linear attention by the delta rule: before a value is written, what its key is answered with is taken off.

    Yang et al. 2024, arXiv 2406.06484. Queries, keys and values go through a short convolution and SiLU, queries and keys are
    brought to length 1, and a head's answer is normed (section 3.3). State and time for a token are constant.

    v_heads is how many heads there are for values, a multiple of num_heads that share their queries and keys; None is num_heads.
    v_dim is the width of a value, None is head_dim. conv_width is how many tokens the convolution sees. The sequence is read in
    chunks of so many tokens; the result does not depend on it. Stories of a row do not see each other, but a growing window has
    no effect. Small triangular systems, norms, convolutions and gates are not as fast as the products of large matrices: per
    FLOP this takes about twice as long as Attn.  (B, T, D) -> (B, T, D)
    """

    activate, rms_norm = staticmethod(activate), staticmethod(rms_norm)
    examples = ("DeltaNet", "DeltaNet(num_heads=2, v_heads=6, v_dim=5, conv_width=1, chunk=100)")

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, norm_eps: float = 1e-5, v_heads: int | None = None,
        v_dim: int | None = None, conv_width: int = 4, chunk: int = 32,
    ):  # fmt: skip
        super().__init__()
        check_sizes(v_heads=v_heads, v_dim=v_dim, conv_width=conv_width, chunk=chunk)
        v_heads, v_dim = v_heads or num_heads, v_dim or head_dim
        if v_heads % num_heads:
            raise ValueError(f"v_heads={v_heads}: they share the queries and keys of {num_heads} heads: give a multiple of that")
        self.num_heads, self.head_dim, self.v_heads, self.v_dim, self.chunk = num_heads, head_dim, v_heads, v_dim, chunk
        self.widths = (num_heads * head_dim, num_heads * head_dim, v_heads * v_dim)
        self.w_qkv = linear(dim, sum(self.widths))
        self.conv = ShortConv(sum(self.widths), conv_width)
        self.w_beta = linear(dim, v_heads)
        self.norm = RMSNorm(v_dim, norm_eps=norm_eps)
        self.w_out = linear(v_heads * v_dim, dim)

    def forward(self, x, *, story_start=None, cache=None):
        B, T, D = x.shape
        state = remembered(cache, (B, self.v_heads, self.head_dim, self.v_dim), x)
        q, k, v = self.project(x, story_start, cache)
        with torch.autocast(x.device.type, enabled=False):
            beta = self.w_beta(x.float()).sigmoid().transpose(1, 2)  # (B, v_heads, T)
            log_decay = self.log_decay(x.float())
            if cache is not None and T == 1:
                mixed, state = self.step_by_step(q, k, v, beta, log_decay, state)
            else:
                mixed, state = self.in_parallel(q, k, v, beta, log_decay, state, story_start)
        if cache is not None:
            cache["state"] = state
        mixed = self.finish(mixed.transpose(1, 2), x)  # (B, T, v_heads, v_dim)
        return self.w_out(mixed.flatten(2))

    def project(self, x, story_start, cache):
        """Queries and keys (B, v_heads, T, head_dim), values (B, v_heads, T, v_dim), in float32.

        Keys have the length 1, queries 1 / sqrt(head_dim).
        """
        conv_cache = None if cache is None else cache.setdefault("conv", {})
        mixed = self.conv(self.w_qkv(x), story_start=story_start, cache=conv_cache)
        q, k, v = self.activate("SiLU", mixed.float()).split(self.widths, dim=-1)
        q, k = (part.unflatten(2, (self.num_heads, -1)) for part in (q, k))
        q, k = (part.transpose(1, 2) for part in (self.with_length(q, self.head_dim**-0.5), self.with_length(k, 1.0)))
        if self.v_heads > self.num_heads:
            q, k = (part.repeat_interleave(self.v_heads // self.num_heads, dim=1) for part in (q, k))
        return q, k, v.unflatten(2, (self.v_heads, -1)).transpose(1, 2)

    def with_length(self, x, length: float):
        """x length / |x|, with 1e-6 added to |x|²: the norm that comes to sqrt(K), and a gain that is not learned.  (..., K)"""
        K = x.shape[-1]
        return self.rms_norm(x, x.new_full((K,), length / math.sqrt(K)), 1e-6 / K)

    def log_decay(self, x):
        """None: nothing fades."""
        return None

    def finish(self, answers, x):
        """What is made of the heads' answers.  (B, T, v_heads, v_dim) -> the same"""
        return self.norm(answers)

    def step_by_step(self, q, k, v, beta, log_decay, state):
        """Token after token: S_t = α_t (I - β_t k_t k_t) S_{t-1} + β_t k_t v_t, o_t = q_t S_t (Gated DeltaNet, equation 10).

        Without α it is DeltaNet's (section 2.2). The answers (B, v_heads, T, v_dim) and the state after them.
        """
        answers = []
        for t in range(q.shape[2]):
            if log_decay is not None:
                state = log_decay[:, :, t, None, None].exp() * state
            answered = (k[:, :, t, None, :] @ state).squeeze(2)
            correction = beta[:, :, t, None] * (v[:, :, t] - answered)
            state = state + k[:, :, t, :, None] * correction[:, :, None, :]
            answers.append((q[:, :, t, None, :] @ state).squeeze(2))
        return torch.stack(answers, dim=2), state

    def in_parallel(self, q, k, v, beta, log_decay, state, starts):
        """The same by products of matrices, chunk by chunk (DeltaNet, sections 3.1 and 3.2; Gated DeltaNet, section 3.3).

        The corrections of a chunk depend on each other: (I + found) corrections = beta (v - exp(faded) k state), where found is
        how much of those before each key finds. So they are solved (v - exp(faded) k state), linear in the state, as are then the
        answers of a chunk and the state behind it. All chunks are worked out at once, with the state left open; from chunk to
        chunk there is one product.
        """
        B, H, T, K = q.shape
        C = min(self.chunk, T)
        n = math.ceil(T / C)
        seen = sight(n, C, starts, q.device)
        q, k, v, beta = (in_chunks(x, n, C).contiguous() for x in (q, k, v, beta))
        decays, before, behind = self.decays(None if log_decay is None else in_chunks(log_decay, n, C), seen)
        found = ((k * beta[..., None]) @ k.mT) * decays  # (B, H, n, C, C), below the diagonal: what solve_triangular reads
        solved = torch.linalg.solve_triangular(found, beta.diag_embed(), upper=False, unitriangular=True)  # (B, H, n, C, C)
        answered = ((q @ k.mT) * decays) @ solved  # (B, H, n, C, C)
        added = masked(k, behind).mT @ solved  # (B, H, n, K, C)
        known = masked(k, before)
        states, state = self.carry(added @ v, added @ known, before, state)
        answers = answered @ v + (masked(q, before) - answered @ known) @ states  # (B, H, n, C, self.v_dim)
        return answers.flatten(2, 3)[:, :, :T], state

    def decays(self, log_decay, seen):
        """How much is left of each token at those of its chunk (..., C, C), of the state before the chunk at each token, and of
        each token in the state behind it (..., C, 1): 0 where stories differ, None where nothing is lost.  log_decay (B, H, n, C)
        """
        if log_decay is None:
            return seen.within, seen.before, seen.behind
        faded = log_decay.cumsum(dim=3)[..., None]
        within = (faded - faded.mT).masked_fill(~seen.within, -math.inf).exp()
        last = faded[:, :, :, -1:]
        return within, masked(faded.exp(), seen.before), masked((last - faded).exp(), seen.behind)

    def carry(self, written, erased, before, state):
        """The state in front of each chunk (B, H, n, K, V), and the one behind all: S' = kept S + written - erased S.

        written (B, H, n, K, V) is what a chunk adds, erased (B, H, n, K, K) what it takes off the state in front of it.
        """
        B, H, n, K, V = written.shape
        kept = torch.eye(K, device=state.device)
        if before is not None:
            kept = kept * before[:, :, :, -1:]
        passed = (kept - erased).flatten(0, 1)  # (B * H, n, K, K)
        states, state = FromChunkToChunk.apply(passed, written.flatten(0, 1), state.flatten(0, 1), True)
        return states.view(B, H, n, K, V), state.view(B, H, K, V)

    def flops_per_token(self, T: int) -> float:
        """Of the matrices, the convolution, and the products of in_parallel, which are those of whole chunks."""
        C, K, V = min(self.chunk, T), self.head_dim, self.v_dim
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        scores_and_solution = 2 * C * K + C * C / 2
        sums = C * (C + K) + (C + K) * (K + V)
        states = K * K * V / C + K * V
        of_chunks = math.ceil(T / C) * C / T * self.v_heads * (scores_and_solution + sums + states)
        return 2.0 * (matrices + of_chunks) + self.conv.flops_per_token(T)


class GatedDeltaNet(DeltaNet):
    """The delta rule with a state that fades, and a gate on what is read from it.  (B, T, D) -> (B, T, D)

    Yang et al. 2024, arXiv 2412.06464, section 3; the block is that of Qwen3-Next and Qwen3.5. How much is kept of the state is a
    number from 0 to 1 that each token says for each head, by Mamba 2's formula. The normed answer of a head is multiplied by SiLU
    of a linear map (section 3.4). v_dim is by default 2 head_dim. All else is as in DeltaNet.
    """

    examples = ("GatedDeltaNet", "GatedDeltaNet(num_heads=2, v_heads=6, v_dim=5, conv_width=2, chunk=100)")

    def __init__(self, dim: int, num_heads: int, head_dim: int, v_dim: int | None = None, **delta):
        super().__init__(dim, num_heads, head_dim, v_dim=2 * head_dim if v_dim is None else v_dim, **delta)
        self.w_gate = linear(dim, self.v_heads * self.v_dim)
        self.w_step = linear(dim, self.v_heads)
        # As Mamba 2 begins (arXiv 2405.21060): rates up to 16, steps from 0.001 to 0.1, evenly in their logarithm.
        self.log_rate = nn.Parameter(torch.empty(self.v_heads).uniform_(0.01, 16).log())
        self.step_bias = nn.Parameter(first_step_biases(self.v_heads))

    def log_decay(self, x):
        """(B, T, D) -> (B, v_heads, T)"""
        step = F.softplus(self.w_step(x) + self.step_bias)
        return -(self.log_rate.exp() * step).transpose(1, 2)

    def finish(self, answers, x):
        return self.activate("SiLU", self.w_gate(x).view_as(answers), self.norm(answers))


BLOCKS = {"DeltaNet": DeltaNet, "GatedDeltaNet": GatedDeltaNet}
