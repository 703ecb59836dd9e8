"""Linear attention: instead of all keys and values, a head remembers one matrix, the sum of their products, which fades.

B batch, T time, D model dim, H heads, K head dim, n chunks of C tokens each.

    code        RetNet 2307.08621   GLA 2312.06635   what it is
    q, k, v     Q, K, V             q, k, v          queries and keys (B, H, T, K), values (B, H, T, v_dim)
    state       S                   S                what is remembered, (B, H, K, v_dim): asked for q, it answers q S
    log_decay   log γ               log α            how it fades with each token: by exp(log_decay), a number a head in RetNet,
                                                     one for each channel of the keys in GLA
    faded       n log γ             log b            the sum of log_decay from the beginning of the chunk up to the token
    w_gate      W_G                 W_r              the gate on what is read from the state
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from model import RMSNorm, activate, apply_rope, linear
from modules.chunks import FromChunkToChunk, check_sizes, in_chunks, masked, remembered, sight
from tools import LoggingModule

TEMPERATURE = 16  # of learned decays, so that they begin as slow ones (GLA, section 4.4)
FASTEST = -5.0  # the least log_decay: less than a hundredth is left after one token. No larger number is made than exp(16 * 5)
LONGEST = 32  # the longest chunk that this holds for


class LinearAttention(LoggingModule):
    """Linear attention with a decay: a state of constant size, time and memory linear in T.  (B, T, D) -> (B, T, D)

    decay="learned" is gated linear attention: each token says for each channel of the keys how much is kept of the state, by a
    matrix of rank decay_rank (Yang et al. 2023, arXiv 2312.06635, section 4). "fixed" is retention: head h keeps a share of
    1 - 2^(-5 - h) with every token, and RoPE turns queries and keys where the model has it (Sun et al. 2023, arXiv 2307.08621,
    section 2). "none" forgets nothing; queries and keys are then made positive by elu + 1 (Katharopoulos et al. 2020, arXiv
    2006.16236, section 3.2.1), and the norm behind takes the place of the sum that is divided by there.

    In all of them a head's answer is normed and gated (RetNet, equation 8; GLA, section 4.4). v_dim is the width of a head's
    values, None is head_dim. The sequence is read in chunks of so many tokens, at most 32 for learned decays; the result does not
    depend on it. Stories of a row do not see each other, but a growing window has no effect. Decays are elementwise work: per
    FLOP a learned one takes half as long again as Attn.
    """

    activate = staticmethod(activate)
    examples = ("LinearAttn", "LinearAttn(decay='fixed', v_dim=12)", "LinearAttn(decay='none', chunk=100)")

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, norm_eps: float = 1e-5, v_dim: int | None = None,
        decay: Literal["learned", "fixed", "none"] = "learned", decay_rank: int = 16, chunk: int = 32,
    ):  # fmt: skip
        super().__init__()
        check_sizes(v_dim=v_dim, decay_rank=decay_rank, chunk=chunk)
        if decay == "learned" and chunk > LONGEST:
            raise ValueError(f"chunk={chunk}: with learned decays numbers would grow too large: give at most {LONGEST}")
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
            kept = [1 - 2.0 ** (-5 - head) if decay == "fixed" else 1.0 for head in range(num_heads)]
            log_decay = torch.tensor([math.log(share) for share in kept]).view(1, num_heads, 1, 1)
            self.register_buffer("fixed_log_decay", log_decay, persistent=False)

    def forward(self, x, *, rope=None, story_start=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        state = remembered(cache, (B, self.num_heads, self.head_dim, self.v_dim), x)
        with torch.autocast(x.device.type, enabled=False):
            log_decay = self.log_decay(x)
            if cache is not None and T == 1:
                mixed, state = self.step_by_step(q, k, v, log_decay, state)
            else:
                mixed, state = self.in_parallel(q, k, v, log_decay, state, story_start)
        if cache is not None:
            cache["state"] = state
        gate = self.w_gate(x).view(B, T, self.num_heads, self.v_dim)
        gated = self.activate("SiLU", gate, self.norm(mixed.transpose(1, 2)))  # (B, T, num_heads, v_dim)
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
        """(B, num_heads, T, head_dim) where it is learned, the logarithm of a sigmoid's 16th root (GLA, section 4.4); else
        (1, num_heads, T, 1)."""
        T = x.shape[1]
        if self.decay != "learned":
            return self.fixed_log_decay.expand(-1, -1, T, -1)
        logits = self.w_decay_up(self.w_decay_down(x.float()))
        log_decay = (F.logsigmoid(logits) / TEMPERATURE).clamp(min=FASTEST)
        return log_decay.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def step_by_step(self, q, k, v, log_decay, state):
        """Token after token: S_t = α_t S_{t-1} + k_t v_t, o_t = q_t S_t (RetNet, equation 6; GLA, section 4.1).

        The answers (B, num_heads, T, v_dim) and the state after them.
        """
        answers = []
        for t in range(q.shape[2]):
            state = log_decay[:, :, t, :, None].exp() * state + k[:, :, t, :, None] * v[:, :, t, None, :]
            answers.append((q[:, :, t, None, :] @ state).squeeze(2))
        return torch.stack(answers, dim=2), state

    def in_parallel(self, q, k, v, log_decay, state, starts):
        """The same by products of matrices: within a chunk as attention, across chunks by its state (GLA, section 4.2).

        A key meets a query of its chunk with exp(faded_t - faded_s). That is split into exp(faded_t - middle) on the query and
        exp(middle - faded_s) on the key, so that the exponents are those of half a chunk, which FASTEST keeps small. Products of
        a query with a later key may overflow, and are never used.
        """
        B, H, T, K = q.shape
        C = min(self.chunk, T)
        n = math.ceil(T / C)
        seen = sight(n, C, starts, q.device)
        q, k, v, log_decay = (in_chunks(x, n, C).contiguous() for x in (q, k, v, log_decay))
        faded = log_decay.cumsum(dim=3)
        middle, last = faded[:, :, :, C // 2 - 1 : C // 2] if C > 1 else faded, faded[:, :, :, -1:]
        scores = (q * (faded - middle).exp()) @ (k * (middle - faded).exp()).mT  # (B, H, n, C, C)
        within = scores.masked_fill(~seen.within, 0.0) @ v
        added = (k * masked((last - faded).exp(), seen.behind)).mT @ v  # (B, H, n, K, v_dim)
        before = masked(faded.exp(), seen.before)
        kept = before[:, :, :, -1:].mT.expand(B, -1, -1, -1, -1)
        states, last_state = FromChunkToChunk.apply(kept.flatten(0, 1), added.flatten(0, 1), state.flatten(0, 1), False)
        answers = within + (q * before) @ states.view_as(added)  # (B, H, n, C, v_dim)
        return answers.flatten(2, 3)[:, :, :T], last_state.view_as(state)

    def flops_per_token(self, T: int) -> float:
        """Of the matrices, and of the products of in_parallel, which are those of whole chunks."""
        C, K, V = min(self.chunk, T), self.head_dim, self.v_dim
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        whole = math.ceil(T / C) * C / T
        return 2.0 * (matrices + whole * self.num_heads * (C * (K + V) + 2 * K * V))


BLOCKS = {"LinearAttn": LinearAttention}
