"""Linear attention: each head keeps one matrix, the decaying sum of the products of its keys and values.

B batch, T time, D model dim, H heads, K head dim, V value dim, n chunks of C tokens each.

    here           RetNet 2307.08621   GLA 2312.06635   meaning
    q, k, v        Q, K, V             q, k, v          queries and keys (B, H, T, K), values (B, H, T, V)
    state          S                   S                (B, H, K, V): a query q reads q S
    log_decay      log γ               log α            the state decays by exp(log_decay) with each token: a number for each head
                                                        in RetNet, for each channel of the keys in GLA
    cum_log_decay  n log γ             log b            sum of log_decay from the start of the chunk up to the token
    w_gate         W_G                 W_r              the output gate
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F

from model import RMSNorm, activate, apply_rope, linear
from modules.checks import check_sizes
from modules.chunks import ChunkRecurrence, chunk_masks, masked
from modules.flops import linear_flops
from modules.scan import cached_state, cut
from tools import LoggingModule

TEMPERATURE = 16  # of learned decays, so that they start slow (GLA, section 4.4)
MIN_LOG_DECAY = -5.0  # of learned decays: less than a hundredth of the state remains after one token
MAX_CHUNK = 32  # for learned decays, so that the exponents of half a chunk stay below 16 * 5


class LinearAttention(LoggingModule):
    """Linear attention with a decay: a state of constant size, time and memory linear in T.  (B, T, D) -> (B, T, D)

    decay="learned" is gated linear attention: the decay of each channel of the keys depends on the token, by a matrix of rank
    decay_rank (Yang et al. 2023, arXiv 2312.06635, section 4). "fixed" is retention: the decay of head h is 1 - 2^(-5 - h), and
    queries and keys are rotated if the model has RoPE (Sun et al. 2023, arXiv 2307.08621, section 2). "none" has no decay, and
    queries and keys are made positive by elu + 1 (Katharopoulos et al. 2020, arXiv 2006.16236, section 3.2.1); the norm replaces
    the division by the sum of the weights.

    In all three, the output of each head is normalised and gated (RetNet, equation 8; GLA, section 4.4). v_dim is the width of a
    value (None is head_dim). Sequences are read in chunks of `chunk` tokens, at most 32 for learned decays; the result does not
    depend on it. A window has no effect: the state covers the whole story. Decays are elementwise work: per FLOP a learned one
    takes 1.5 times as long as Attn.
    """

    activate = staticmethod(activate)
    examples = ("LinearAttn", "LinearAttn(decay='fixed', v_dim=12)", "LinearAttn(decay='none', chunk=100)")

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, norm_eps: float = 1e-5, v_dim: int | None = None,
        decay: Literal["learned", "fixed", "none"] = "learned", decay_rank: int = 16, chunk: int = 32,
    ):  # fmt: skip
        super().__init__()
        check_sizes(v_dim=v_dim, decay_rank=decay_rank, chunk=chunk)
        if decay == "learned" and chunk > MAX_CHUNK:
            raise ValueError(f"chunk={chunk}: learned decays would overflow: give at most {MAX_CHUNK}")
        self.num_heads, self.head_dim, self.v_dim, self.decay, self.chunk = num_heads, head_dim, v_dim or head_dim, decay, chunk
        self.w_q = linear(dim, num_heads * head_dim)
        self.w_k = linear(dim, num_heads * head_dim)
        self.w_v = linear(dim, num_heads * self.v_dim)
        self.w_gate = linear(dim, num_heads * self.v_dim)
        self.norm = RMSNorm(self.v_dim, norm_eps=norm_eps)
        self.w_out = linear(num_heads * self.v_dim, dim)
        if decay == "learned":
            self.w_decay_down = linear(dim, decay_rank)
            self.w_decay_up = linear(decay_rank, num_heads * head_dim, bias=True)
        else:
            decays = [1 - 2.0 ** (-5 - head) if decay == "fixed" else 1.0 for head in range(num_heads)]
            log_decay = torch.tensor([math.log(share) for share in decays]).view(1, num_heads, 1, 1)
            self.register_buffer("fixed_log_decay", log_decay, persistent=False)

    def forward(self, x, *, rope=None, story_start=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        state = cached_state(cache, x, B, self.num_heads, self.head_dim, self.v_dim)
        with torch.autocast(x.device.type, enabled=False):
            log_decay = self.log_decay(x)
            if cache is not None and T == 1:
                y, state = self.step_by_step(q, k, v, log_decay, state)
            else:
                y, state = self.in_parallel(q, k, v, log_decay, state, story_start)
        if cache is not None:
            cache["state"] = state
        gate = self.w_gate(x).view(B, T, self.num_heads, self.v_dim)
        gated = self.activate("SiLU", gate, self.norm(y.transpose(1, 2)))  # (B, T, num_heads, v_dim)
        return self.w_out(gated.flatten(2))

    def project(self, x, rope):
        """Queries and keys (B, num_heads, T, head_dim), values (B, num_heads, T, v_dim), in float32."""
        q, k, v = (
            matrix(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2).float() for matrix in (self.w_q, self.w_k, self.w_v)
        )
        if self.decay == "none":
            q, k = F.elu(q) + 1, F.elu(k) + 1
        if self.decay == "fixed" and rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q * self.head_dim**-0.5, k, v

    def log_decay(self, x):
        """(B, num_heads, T, head_dim) if learned, log of a sigmoid's 16th root (GLA, section 4.4); else (1, num_heads, T, 1)."""
        if self.decay != "learned":
            return self.fixed_log_decay.expand(-1, -1, x.shape[1], -1)
        logits = self.w_decay_up(self.w_decay_down(x.float()))
        log_decay = (F.logsigmoid(logits) / TEMPERATURE).clamp(min=MIN_LOG_DECAY)
        return log_decay.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def step_by_step(self, q, k, v, log_decay, state):
        """S_t = α_t S_{t-1} + k_t v_t and y_t = q_t S_t, token by token (RetNet, equation 6; GLA, section 4.1).

        Returns y (B, num_heads, T, v_dim) and the last state.
        """
        outputs = []
        for t in range(q.shape[2]):
            state = log_decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            outputs.append((q[:, :, t, None, :] @ state).squeeze(2))
        return torch.stack(outputs, dim=2), state

    def in_parallel(self, q, k, v, log_decay, state, story_start):
        """step_by_step as matrix products: attention within chunks, and a state between them (GLA, section 4.2).

        The decay between two tokens of a chunk, exp(cum_log_decay_t - cum_log_decay_s), is split into exp(cum_log_decay_t -
        middle) on the query and exp(middle - cum_log_decay_s) on the key. The exponents are then those of half a chunk, which
        MIN_LOG_DECAY bounds. Scores of later keys may overflow; they are masked.
        """
        B, H, T, K = q.shape
        C = min(self.chunk, T)
        n = math.ceil(T / C)
        within, to_start, to_end = chunk_masks(n, C, story_start, q.device)
        q, k, v, log_decay = (cut(x, C, dim=2).contiguous() for x in (q, k, v, log_decay))
        cum_log_decay = log_decay.cumsum(dim=3)
        middle, last = cum_log_decay[:, :, :, max(0, C // 2 - 1), None], cum_log_decay[:, :, :, -1:]
        scores = (q * (cum_log_decay - middle).exp()) @ (k * (middle - cum_log_decay).exp()).mT  # (B, H, n, C, C)
        y = scores.masked_fill(~within, 0.0) @ v
        to_end = masked((last - cum_log_decay).exp(), to_end)
        added = (k * to_end).mT @ v  # (B, H, n, K, v_dim)
        from_start = masked(cum_log_decay.exp(), to_start)
        decay = from_start[:, :, :, -1:].mT.expand(B, -1, -1, -1, -1)
        states, last_state = ChunkRecurrence.apply(decay.flatten(0, 1), added.flatten(0, 1), state.flatten(0, 1), False)
        y = y + (q * from_start) @ states.view_as(added)  # (B, H, n, C, v_dim)
        return y.flatten(2, 3)[:, :, :T], last_state.view_as(state)

    def flops_per_token(self, T: int) -> float:
        """Matrices, and the products of in_parallel, which are those of whole chunks."""
        C, K, V = min(self.chunk, T), self.head_dim, self.v_dim
        padded = math.ceil(T / C) * C / T
        return linear_flops(self) + 2 * padded * self.num_heads * (C * (K + V) + 2 * K * V)


BLOCKS = {"LinearAttn": LinearAttention}
