"""The base model, Llama 3 style by default, from RoPE up to GPT. Read it from top to bottom; the norms are in norms.py.

B batch, T time (the new tokens), S time with what the cache remembers in front, D model dim, V vocabulary.
The names of the config's fields are used for all other sizes: num_heads, num_kv_heads, head_dim, ...
Where a block has a `backend`, "kernel" is our own C++ (kernels.py), as far as that fits; all others are torch's formulas.
"""

import inspect
import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig, layer_steps, marked
from fast import ops as kernels
from fast.loss import IGNORE, chunked_cross_entropy
from modules.norms import NORMS
from modules.registry import build_block
from modules.windows import attend_spans, mean_seen, visible
from tools import LoggingModule


def rope_table(max_seq_len: int, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE's angles, each (max_seq_len, head_dim / 2) (Su et al. 2021, arXiv 2104.09864, equation 15)."""
    frequencies = rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turn channels k and k + head_dim / 2 by the angle of their position.  (B, num_heads, T, head_dim) → the same

    rope holds cosines and sines, each (1, T, head_dim / 2).
    """
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).type_as(x)


def soft_cap(x: Tensor, cap: float | None) -> Tensor:
    """Squash x smoothly into (-cap, cap), as Gemma 2 does (arXiv 2408.00118, section 2); None leaves it alone."""
    return x if cap is None else cap * torch.tanh(x / cap)


def first_of_story(story_ids: Tensor) -> Tensor:
    """Where the story of each token begins in its row.  (B, T) → (B, T)"""
    places = torch.arange(story_ids.shape[1], device=story_ids.device)
    begins = F.pad(story_ids[:, 1:] != story_ids[:, :-1], (1, 0))
    return torch.where(begins, places, 0).cummax(dim=1).values


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """nn.Linear that begins as GPT-2's (Radford et al. 2019): weights of standard deviation 0.02, no bias."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class SoftmaxAttention(LoggingModule):
    """What every attention does with queries, keys and values: softmax-weighted averages of the values that a token sees.

    With a window, a token sees itself and the window - 1 before it (Beltagy et al. 2020, arXiv 2004.05150, section 3.1).
    Scores, softmax and weighted sum are written out for attention="plain" and for a soft cap; "sdpa" is torch's fused kernel
    and "kernel" our own for the CPU (kernels.cpp), which do the same without keeping them. "auto" is sdpa until train.py has
    measured which is faster. Without our kernel a window is read in blocks, of which each token sees about half: per FLOP that
    takes up to twice as long.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        window: int | None = None,
        attention: str = "auto",
        attention_soft_cap: float | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        assert num_heads % num_kv_heads == 0
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself, so give a whole number of at least 1, or None")
        self.num_heads, self.num_kv_heads, self.head_dim, self.window = num_heads, num_kv_heads, head_dim, window
        self.backend = attention
        self.soft_cap = attention_soft_cap
        self.dropout = dropout

    def mix(self, q, k, v, first, cache):
        """Each query's average of the values, now and in the cache, by the fastest way there is.  (B, num_heads, T, head_dim)"""
        if cache is not None:
            k, v = self.remember(k, v, cache)
        return self.blend(q, k, v, first, self.window)

    def remember(self, k, v, cache):
        """Keys and values with those of the tokens before in front; the cache keeps what the next token sees of them."""
        if "k" in cache:
            k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
        outside = 0 if self.window is None else max(0, k.shape[2] - self.window + 1)
        cache["k"], cache["v"] = k[:, :, outside:], v[:, :, outside:]
        return k, v

    def blend(self, q, k, v, first, window):
        """As mix; the queries are the last T of S tokens, whose keys and values k and v (B, num_kv_heads, S, head_dim) are."""
        B, _, T, _ = q.shape
        S = k.shape[2]
        if self.fits_kernel(T, S):
            if window is not None and window < S:
                begins = torch.arange(1 - window, T - window + 1, device=q.device).clamp(min=0).int()
                first = begins.expand(B, T) if first is None else first.maximum(begins)
            return self.by_kernel(q, k, v, first)
        if window is not None and window < S:
            return attend_spans(self.weigh, q, k, v, ((0, window - 1),), first)
        return self.weigh(q, k, v, None if first is None and T in (1, S) else visible(T, S, first, q.device))

    def fits_kernel(self, T, S):
        return self.backend == "kernel" and T == S and self.soft_cap is None and not (self.training and self.dropout)

    def by_kernel(self, q, k, v, first):
        return kernels.attention(q, k, v, first)

    def weigh(self, q, k, v, mask):
        """As mix; mask (..., T, S) is True where a query sees a key, None is all before it.  (B, num_heads, T, head_dim)"""
        T, S = q.shape[2], k.shape[2]
        if self.backend == "plain" or self.soft_cap is not None:
            return self.attend(q, k, v, visible(T, S, device=q.device) if mask is None else mask)
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1, enable_gqa=True)

    def attend(self, q, k, v, mask):
        """Written out.  q (B, num_heads, T, head_dim), k and v (B, num_kv_heads, S, head_dim) → as q"""
        weights = self.softmax(self.scores(q, k, mask))
        return self.average(F.dropout(weights, self.dropout, self.training), v)

    def scores(self, q, k, mask):
        """(B, num_heads, T, S), -inf where the mask is False."""
        B, H, T, K = q.shape
        G, S = k.shape[1:3]
        # The query heads of a group stand below each other, so that one product serves a group without copying its keys.
        scores = (q.reshape(B, G, -1, K) * self.head_dim**-0.5) @ k.transpose(2, 3)
        return soft_cap(scores, self.soft_cap).view(B, H, T, S).masked_fill(~mask, -math.inf)  # (B, H, T, S)

    def softmax(self, scores):
        """The weights of a query's keys.  (..., T, S) → the same"""
        return scores.softmax(dim=-1)

    def average(self, weights, v):
        """The weighted sums of the values.  (B, num_heads, T, head_dim)"""
        B, H, T, S = weights.shape
        mixed = weights.reshape(B, v.shape[1], -1, S) @ v
        return mixed.view(B, H, T, -1)

    def flops_per_token(self, T: int) -> float:
        """Matrices, scores and weighted sum: the mean over T tokens, of what each of them sees."""
        matrices = sum(layer.weight.numel() for layer in self.modules() if isinstance(layer, nn.Linear))
        return 2 * matrices + 4 * self.num_heads * self.head_dim * self.seen_per_token(T)

    def seen_per_token(self, T: int) -> float:
        """How many tokens one of T sees on average."""
        return mean_seen(T, self.window)


class Attention(SoftmaxAttention):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).  (B, T, D) → (B, T, D)

    num_kv_heads = num_heads is multi-head attention, 1 is multi-query attention. Scores are q k times query_scale, None is
    1 / sqrt(head_dim). out_bias says whether the last matrix has a bias, None is as the others.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        linear_bias: bool = False,
        qk_norm: bool = False,
        norm: str = "RMSNorm",
        norm_eps: float = 1e-5,
        query_scale: float | None = None,
        out_bias: bool | None = None,
        **softmax,
    ):
        super().__init__(num_heads, num_kv_heads, head_dim, **softmax)
        if query_scale is not None and query_scale <= 0:
            raise ValueError(f"query_scale={query_scale}: give a positive number, or None for 1 / sqrt(head_dim)")
        self.w_q = linear(dim, num_heads * head_dim, bias=linear_bias)
        self.w_k = linear(dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_v = linear(dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_out = linear(num_heads * head_dim, dim, bias=linear_bias if out_bias is None else out_bias)
        self.q_norm = NORMS[norm](head_dim, norm_eps=norm_eps) if qk_norm else None
        self.k_norm = NORMS[norm](head_dim, norm_eps=norm_eps) if qk_norm else None
        self.query_scale = query_scale

    def forward(self, x, *, first=None, rope=None, cache=None):
        """first (B, T): the first token that each one may look at, None is the first of all; rope: what `apply_rope` takes."""
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        mixed = self.mix(q, k, v, first, cache)
        return self.w_out(mixed.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def project(self, x, rope):
        """Queries (B, num_heads, T, head_dim), and keys and values (B, num_kv_heads, T, head_dim)."""
        B, T, D = x.shape
        q = self.w_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, num_heads, T, head_dim)
        k = self.w_k(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, T, head_dim)
        v = self.w_v(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, T, head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            turn = kernels.apply_rope if kernels.fit(self.backend, q) else apply_rope
            q, k = turn(q, rope), turn(k, rope)
        if self.query_scale is not None:  # what follows divides by sqrt(head_dim)
            q = q * (self.query_scale * math.sqrt(self.head_dim))
        return q, k, v


ACTIVATIONS = {
    "SiLU": F.silu,
    "GELU": lambda x: F.gelu(x, approximate="tanh"),
    "ReLU": F.relu,
    "ReLU2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
}


class MLP(LoggingModule):
    """The feed-forward block, gated (Shazeer 2020, arXiv 2002.05202, section 2) or plain.  (B, T, D) → (B, T, D)

    A gated one has three matrices instead of two, so its hidden width is 2/3 of mlp_dim, to the nearest multiple of 8.
    """

    def __init__(self, dim: int, mlp_dim: int, activation: str = "SiLU", gated: bool = True, linear_bias: bool = False):
        super().__init__()
        self.hidden_dim = max(8, round(mlp_dim * 2 / 3 / 8) * 8) if gated else mlp_dim
        self.w_gate = linear(dim, self.hidden_dim, bias=linear_bias) if gated else None
        self.w_in = linear(dim, self.hidden_dim, bias=linear_bias)
        self.w_out = linear(self.hidden_dim, dim, bias=linear_bias)
        self.activation = activation
        self.backend = "auto"

    def forward(self, x):
        B, T, D = x.shape
        hidden = self.w_in(x)  # (B, T, hidden_dim)
        if self.w_gate is None:
            hidden = self.activate(hidden)
        else:
            hidden = self.activate(self.w_gate(x), hidden)  # (B, T, hidden_dim)
        return self.w_out(hidden)  # (B, T, D)

    def activate(self, x, factor=None):
        """activation(x), times the factor where there is one.  Any shape → the same"""
        if kernels.fit(self.backend, x) and self.activation in kernels.ACTIVATIONS:
            return kernels.activate(self.activation, x, factor)
        active = ACTIVATIONS[self.activation](x)
        return active if factor is None else active * factor


BLOCKS = {"Attn": Attention, "MLP": MLP, **NORMS}


class Steps(LoggingModule):
    """One layer string: blocks in a row, `+` adds the skip and opens the next one, `|` opens one without adding.

    (B, T, D) → (B, T, D). Each block is given those of the `needs` that its forward names.
    """

    def __init__(self, layer: str, config: ModelConfig, num_residuals: int, vocab_size: int | None = None):
        super().__init__()
        self.layer = layer
        self.steps = [name for name, _ in layer_steps(layer)]
        self.blocks = nn.ModuleList()
        for place, (name, options) in enumerate(layer_steps(layer)):
            if name not in "+|":
                try:
                    self.blocks.append(build_block(name, options, config, vocab_size))
                except ValueError as error:
                    raise ValueError(f"layers={marked(layer, place)!r}: {error}") from error
        self.needs = [set(inspect.signature(block.forward).parameters) for block in self.blocks]
        self.dropout = config.dropout
        for block in self.blocks:
            scale_residual_output(block, 0.0 if config.zero_init else num_residuals**-0.5)

    def forward(self, x, *, cache=None, **needs):
        skip = x
        blocks = iter(zip(self.blocks, self.needs, strict=True))
        for step in self.steps:
            if step == "+":
                x = skip + F.dropout(x, self.dropout, self.training)
            if step in "+|":
                skip = x
            else:
                block, wanted = next(blocks)
                given = {name: value for name, value in needs.items() if name in wanted}
                if cache is not None and "cache" in wanted:
                    given["cache"] = cache[block]
                x = block(x, **given)
        return x


def scale_residual_output(block: nn.Module, scale: float):
    """Shrink a block's last matrices, called w_out, so that the sum of all residual updates does not grow with the depth.

    By 1 / sqrt(number of residual updates), as in GPT-2 (Radford et al. 2019, section 2.3); by 0 for zero_init.
    """
    for part in block.modules():
        if hasattr(part, "w_out"):
            weight = part.w_out if isinstance(part.w_out, nn.Parameter) else part.w_out.weight
            with torch.no_grad():
                weight.mul_(scale)


class Layer(LoggingModule):
    """One layer of the depth: a single layer string, or several side by side whose residual updates are summed.

    (B, T, D) → (B, T, D). A branch's residual update is what it gives minus what it was given, so that branches can
    have steps of their own, as the dense and the expert branch of Snowflake Arctic.
    """

    def __init__(self, layer: str | list[str], config: ModelConfig, num_residuals: int, vocab_size: int | None = None):
        super().__init__()
        layer = [layer] if isinstance(layer, str) else layer
        self.branches = nn.ModuleList(Steps(branch, config, num_residuals, vocab_size) for branch in layer)

    def forward(self, x, **needs):
        if len(self.branches) == 1:
            return self.branches[0](x, **needs)
        return x + sum(branch(x, **needs) - x for branch in self.branches)


def repeatable(layer: Layer, x: Tensor, shared: dict, **needs) -> tuple[Tensor, dict]:
    """What a layer gives, and what `shared` is then; the given one stays as it is, so that the same may be done again."""
    shared = {name: left.copy() if isinstance(left, list | dict) else left for name, left in shared.items()}
    return layer(x, shared=shared, **needs), shared


@dataclass
class Cache:
    """What a model remembers of the tokens that it has read: how many, and whatever each block keeps of them."""

    num_tokens: int = 0
    blocks: dict[nn.Module, dict] = field(default_factory=lambda: defaultdict(dict))


class GPT(LoggingModule):
    """A decoder-only language model: embedding, layers, norm, head."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        head_dim = config.block_values["head_dim"]
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim) if config.positions == "learned" else None
        if config.positions == "sinusoidal":
            waves = torch.cat(rope_table(config.max_seq_len, config.dim, rope_theta=10_000.0), dim=1)
            self.register_buffer("sinusoids", waves, persistent=False)
        if config.positions == "rope":
            cos, sin = rope_table(config.max_seq_len, head_dim, config.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.embedding_scale = math.sqrt(config.dim) if config.embedding_scale == "sqrt(dim)" else config.embedding_scale
        self.dropout = config.dropout
        branches = [branch for layer in config.depth_layers for branch in ([layer] if isinstance(layer, str) else layer)]
        num_residuals = sum(layer_steps(branch).count(("+", {})) for branch in branches)
        self.layers = nn.ModuleList(Layer(layer, config, max(1, num_residuals), vocab_size) for layer in config.depth_layers)
        self.norm = build_block("Norm", {}, config)
        self.head = linear(config.dim, vocab_size, bias=False)
        for table in (self.embedding, self.position_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        elif config.zero_init:
            nn.init.zeros_(self.head.weight)
        self.checkpoint_layers = False  # compute each layer again on the way back instead of keeping what is inside
        self.backend = "auto"  # of the loss
        self.loss_chunk = None  # how many tokens go through head and loss at once in training; None is all

    def forward(self, tokens, targets=None, *, story_ids=None, window=None, memory=None, cache=None):
        """Logits (B, T, V), and the mean loss in nats where targets are given (else None). No logits with a loss_chunk.

        tokens (B, T) of integers; targets (B, T), IGNORE where there is nothing to predict; story_ids (B, T) number the
        stories packed into a row, which then do not see each other; window is how many tokens back a token may look,
        itself included; memory (B, M, ...) is whatever else the tokens are to be predicted from, for blocks that read it;
        cache is a Cache of the tokens before these.

        The blocks may ask for: rope, the cosines and sines of the positions; first (B, T), the first token that each one may
        look at, or None where that is the first of all; cache, a dict of its own that lasts from call to call; tokens; memory;
        shared, a dict that is empty at the first layer, for what layers tell later ones. Numbers in its list "losses" are
        added to the loss in training.

        Raises ValueError where the tokens go beyond max_seq_len.
        """
        B, T = tokens.shape
        start = cache.num_tokens if cache is not None else 0
        S = start + T
        if S > self.config.max_seq_len:
            raise ValueError(f"{S} tokens do not fit into max_seq_len={self.config.max_seq_len}: give the model fewer")
        first = None
        places = positions = torch.arange(start, S, device=tokens.device)  # (T,)
        if story_ids is not None:
            assert cache is None, "stories in a row are for training, a cache for generating"
            first = first_of_story(story_ids)  # (B, T)
            positions = places - first  # (B, T) counted from the beginning of the story
        if window is not None and window < S:
            assert cache is None, "a window is for training"
            first = (places - window + 1).clamp(min=0).expand(B, T) if first is None else first.maximum(places - window + 1)
        if first is not None:
            first = first.int()  # as the kernels take it

        x = self.embedding(tokens) * self.embedding_scale  # (B, T, config.dim)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        if self.config.positions == "sinusoidal":
            x = x + self.sinusoids[positions]
        rope = None
        if self.config.positions == "rope":
            rope = self.rope_cos[None, start:S], self.rope_sin[None, start:S]  # it sees distances alone: no need for positions
        x = F.dropout(x, self.dropout, self.training)
        needs, shared = {"rope": rope, "first": first, "tokens": tokens, "memory": memory}, {}
        for layer in self.layers:
            if self.checkpoint_layers and self.training:
                x, shared = checkpoint(repeatable, layer, x, shared, use_reentrant=False, **needs)
            else:
                x = layer(x, cache=None if cache is None else cache.blocks, shared=shared, **needs)
        if cache is not None:
            cache.num_tokens = S

        x = self.norm(x)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        if targets is not None and self.loss_chunk and self.training:
            cap = self.config.logit_soft_cap
            loss = chunked_cross_entropy(x, self.head.weight, targets, cap, self.loss_chunk, self.backend)
            return None, sum(shared.get("losses", []), loss)
        logits = soft_cap(self.head(x), self.config.logit_soft_cap).float()  # (B, T, vocab_size)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits, sum(shared.get("losses", []), loss) if self.training else loss

    def num_parameters(self, embeddings: bool = True) -> int:
        """How many numbers are learned; without embeddings, the tables of tokens and positions and the head are left out."""
        tables = {id(table.weight) for table in (self.embedding, self.position_embedding, self.head) if table is not None}
        return sum(weight.numel() for weight in self.parameters() if embeddings or id(weight) not in tables)


MODELS = {"GPT": GPT}
