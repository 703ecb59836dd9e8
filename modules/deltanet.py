"""The delta rule: linear attention whose state, a matrix, is corrected by each token at its key.

B batch, T time, D model dim, H value heads, K head dim, V value dim, n chunks of C tokens each.

    here           DeltaNet 2406.06484   Gated DeltaNet 2412.06464   meaning
    q, k, v        q, k, v               q, k, v                     queries and keys (B, H, T, K), values (B, H, T, V)
    state          S, transposed         S, transposed               (B, H, K, V): a query q reads q S
    beta           β                     β                           step size of the correction, from 0 to 1
    log_decay                            log α                       the state decays by exp(log_decay) with each token
    cum_log_decay                        log γ                       sum of log_decay from the start of the chunk
    within                               Γ                           decay between two tokens of a chunk
    solved         T                     T, with Γ                   share of each value in each correction of the chunk
    log_rate, w_step, step_bias                                      log α = -exp(log_rate) softplus(w_step x + step_bias); in
                                                                     the code of Mamba-2: A_log, dt and dt_bias
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, activate, linear, rms_norm
from modules.checks import check_sizes
from modules.chunks import ChunkRecurrence, chunk_masks, masked
from modules.convolution import ShortConv
from modules.flops import linear_flops
from modules.mamba import initial_step_biases
from modules.scan import cached_state, cut
from tools import LoggingModule


class DeltaNet(LoggingModule):
    """Linear attention with the delta rule: a value replaces what the state holds at its key.  (B, T, D) -> (B, T, D)

    Yang et al. 2024, arXiv 2406.06484. Queries, keys and values go through a short convolution and SiLU, queries and keys are
    normalised to length 1, and the output of each head is normalised (section 3.3). The state has a constant size.

    v_heads, a multiple of num_heads (None), is the number of value heads; those of a group share queries and keys. v_dim is the
    width of a value (None is head_dim). The convolution is over conv_width tokens. Sequences are read in chunks of `chunk`
    tokens; the result does not depend on it. A window has no effect: the state covers the whole story. Triangular systems,
    norms, convolutions and gates are slower than large matrix products: per FLOP it takes about twice as long as Attn.
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
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        state = cached_state(cache, x, B, self.v_heads, self.head_dim, self.v_dim)
        q, k, v = self.project(x, story_start, cache)
        with torch.autocast(x.device.type, enabled=False):
            beta = self.w_beta(x.float()).sigmoid().transpose(1, 2)  # (B, v_heads, T)
            log_decay = self.log_decay(x.float())
            if cache is not None and T == 1:
                y, state = self.step_by_step(q, k, v, beta, log_decay, state)
            else:
                y, state = self.in_parallel(q, k, v, beta, log_decay, state, story_start)
        if cache is not None:
            cache["state"] = state
        y = self.norm_and_gate(y.transpose(1, 2), x)  # (B, T, v_heads, v_dim)
        return self.w_out(y.flatten(2))

    def project(self, x, story_start, cache):
        """Queries and keys (B, v_heads, T, head_dim), values (B, v_heads, T, v_dim), in float32.

        Keys have length 1, queries 1 / sqrt(head_dim).
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
        """length x / |x|, with 1e-6 added to |x|²: RMSNorm, which gives the length sqrt(K), with a constant gain.  (..., K)"""
        K = x.shape[-1]
        return self.rms_norm(x, x.new_full((K,), length / math.sqrt(K)), 1e-6 / K)

    def log_decay(self, x):
        """None: the state does not decay."""
        return None

    def norm_and_gate(self, y, x):
        """(B, T, v_heads, v_dim) -> the same"""
        return self.norm(y)

    def step_by_step(self, q, k, v, beta, log_decay, state):
        """S_t = α_t (I - β_t k_t k_t) S_{t-1} + β_t k_t v_t and y_t = q_t S_t, token by token (Gated DeltaNet, equation 10).

        Without α it is DeltaNet (section 2.2). Returns y (B, v_heads, T, v_dim) and the last state.
        """
        outputs = []
        for t in range(q.shape[2]):
            if log_decay is not None:
                state = log_decay[:, :, t, None, None].exp() * state
            old_v = (k[:, :, t, None, :] @ state).squeeze(2)
            correction = beta[:, :, t, None] * (v[:, :, t] - old_v)
            state = state + k[:, :, t, :, None] * correction[:, :, None, :]
            outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
        return torch.stack(outputs, dim=2), state

    def in_parallel(self, q, k, v, beta, log_decay, state, story_start):
        """step_by_step as matrix products, chunk by chunk (DeltaNet, sections 3.1 and 3.2; Gated DeltaNet, section 3.3).

        The corrections of a chunk depend on each other: (I + overlap) corrections = beta (v - exp(cum_log_decay) k state), where
        overlap is how much each key reads of earlier ones. Hence they are solved (v - exp(cum_log_decay) k state), which is
        linear in the state, as are the outputs of a chunk and the state after it. All chunks are computed at once for an unknown
        state; then there is one product from each chunk to the next.
        """
        B, H, T, K = q.shape
        C = min(self.chunk, T)
        n = math.ceil(T / C)
        q, k, v, beta = (cut(x, C, dim=2).contiguous() for x in (q, k, v, beta))

        # decays between the tokens of a chunk, from the state before it to each token, and from each token to the state after it;
        # 0 where stories differ, None where nothing decays
        within, from_start, to_end = chunk_masks(n, C, story_start, q.device)
        if log_decay is not None:
            cum_log_decay = cut(log_decay, C, dim=2).cumsum(dim=3)[..., None]  # (B, H, n, C, 1)
            within = (cum_log_decay - cum_log_decay.mT).masked_fill(~within, -math.inf).exp()  # (B, H, n, C, C)
            last = cum_log_decay[:, :, :, -1:]
            from_start, to_end = masked(cum_log_decay.exp(), from_start), masked((last - cum_log_decay).exp(), to_end)

        # the chunks: what each adds to the state, and what it removes as a share of the state before it
        overlap = ((k * beta[..., None]) @ k.mT) * within  # (B, H, n, C, C), of which solve_triangular reads below the diagonal
        solved = torch.linalg.solve_triangular(overlap, beta.diag_embed(), upper=False, unitriangular=True)  # (B, H, n, C, C)
        scores = ((q @ k.mT) * within) @ solved  # (B, H, n, C, C)
        k_to_end = masked(k, to_end).mT @ solved  # (B, H, n, K, C)
        k_from_start = masked(k, from_start)
        added, removed = k_to_end @ v, k_to_end @ k_from_start  # added: (B, H, n, K, self.v_dim)

        # the states between the chunks, and the outputs
        decay = torch.eye(K, device=q.device)
        if from_start is not None:
            decay = decay * from_start[:, :, :, -1:]  # (..., n, K, K)
        decay = (decay - removed).flatten(0, 1)  # (B * H, n, K, K)
        states, last_state = ChunkRecurrence.apply(decay, added.flatten(0, 1), state.flatten(0, 1), True)
        y = scores @ v + (masked(q, from_start) - scores @ k_from_start) @ states.view_as(added)  # (B, H, n, C, self.v_dim)
        return y.flatten(2, 3)[:, :, :T], last_state.view_as(state)

    def flops_per_token(self, T: int) -> float:
        """Matrices, convolution, and the products of in_parallel, which are those of whole chunks."""
        C, K, V = min(self.chunk, T), self.head_dim, self.v_dim
        scores_and_solution = 2 * C * K + C * C / 2
        sums = C * (C + K) + (C + K) * (K + V)
        states = K * K * V / C + K * V
        per_chunk = math.ceil(T / C) * C / T * self.v_heads * (scores_and_solution + sums + states)
        return linear_flops(self) + 2 * per_chunk + self.conv.flops_per_token(T)


class GatedDeltaNet(DeltaNet):
    """The delta rule with a decaying state and an output gate.  (B, T, D) -> (B, T, D)

    Yang et al. 2024, arXiv 2412.06464, section 3; the block of Qwen3-Next and Qwen3.5. The decay of each head depends on the
    token, by the formula of Mamba-2; the normalised output of each head is gated by SiLU of a linear map (section 3.4). v_dim is
    by default 2 head_dim; the other options are those of DeltaNet.
    """

    examples = ("GatedDeltaNet", "GatedDeltaNet(num_heads=2, v_heads=6, v_dim=5, conv_width=2, chunk=100)")

    def __init__(self, dim: int, num_heads: int, head_dim: int, v_dim: int | None = None, **delta):
        super().__init__(dim, num_heads, head_dim, v_dim=2 * head_dim if v_dim is None else v_dim, **delta)
        self.w_gate = linear(dim, self.v_heads * self.v_dim)
        self.w_step = linear(dim, self.v_heads)
        # initialised as Mamba-2 (arXiv 2405.21060): rates up to 16, steps from 0.001 to 0.1, evenly in their logarithms
        self.log_rate = nn.Parameter(torch.empty(self.v_heads).uniform_(0.01, 16).log())
        self.step_bias = nn.Parameter(initial_step_biases(self.v_heads))

    def log_decay(self, x):
        """(B, T, D) -> (B, v_heads, T)"""
        step = F.softplus(self.w_step(x) + self.step_bias)
        return -(self.log_rate.exp() * step).transpose(1, 2)

    def norm_and_gate(self, y, x):
        return self.activate("SiLU", self.w_gate(x).view_as(y), self.norm(y))


BLOCKS = {"DeltaNet": DeltaNet, "GatedDeltaNet": GatedDeltaNet}
