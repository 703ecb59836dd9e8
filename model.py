"""The base model, Llama 3 style by default, in plain PyTorch.

Read it from top to bottom: norms, RoPE, attention, MLP, the layer string, GPT. The other blocks are in modules/; fast/ swaps in
faster versions from outside.  B batch, T time (new tokens), S time with cached tokens, D model dim, H query heads, G key/value
heads, K head dim, V vocabulary.
"""

import math
from collections import Counter, defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, ModelConfig, all_steps, init_parameters, layer_steps, look_up, marking, method_parameters
from tools import LoggingModule


class Norm(LoggingModule):
    """Base class of the norms: an optional learned gain and shift."""

    def __init__(self, dim: int, norm_affine: bool = True, norm_bias: bool = False, norm_eps: float = 1e-5):
        super().__init__()
        self.eps = norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if norm_bias else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / rms(x) * weight.  x (..., D), weight (D) -> (..., D)"""
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.type_as(x), eps)


class RMSNorm(Norm):
    """x / rms(x) with a learned gain (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).  (..., D) -> (..., D)"""

    def forward(self, x):
        normed = rms_norm(x, self.weight, self.eps)
        return normed if self.bias is None else normed + self.bias


class LayerNorm(Norm):
    """(x - mean) / std with a learned gain and shift (Ba et al. 2016, arXiv 1607.06450, eq. 4).  (..., D) -> (..., D)"""

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def rope_table(max_seq_len: int, head_dim: int, rope_theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (max_seq_len, head_dim / 2) (Su et al. 2021, arXiv 2104.09864, eq. 15)."""
    frequencies = rope_theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channels k and k + K / 2 by the angle of the position.  x (B, H, T, K), rope 2 x (1, T, K / 2) -> (B, H, T, K)"""
    cos, sin = rope
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).type_as(x)


def causal_mask(T: int, S: int, story_start: Tensor | None = None, window: int | None = None, device=None) -> Tensor:
    """True where a query may attend to a key: (T, S), or (B, 1, T, S) with story_start.  The queries are the last T of S tokens.

    story_start (B, T): where the story of each query starts. window: how many recent tokens are visible, the query included.
    """
    mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    if window is not None:
        mask = mask.triu(S - T - window + 1)
    return mask if story_start is None else mask & (torch.arange(S, device=device) >= story_start[..., None])[:, None]


def masked_attention(q, k, v, mask: Tensor | None, soft_cap: float | None = None, dropout: float = 0.0) -> Tensor:
    """Softmax attention; mask (..., T, S) is boolean or added to the scores, None: causal.  q (B, H, T, K), k, v (B, G, S, K)"""
    (B, H, T, K), (G, S) = q.shape, k.shape[1:3]
    if soft_cap is None:  # PyTorch's fused version of the lines below
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1, enable_gqa=True)
    mask = causal_mask(T, S, device=q.device) if mask is None else mask
    scores = (q.reshape(B, G, -1, K) * K**-0.5) @ k.mT  # one matmul for all query heads that share a key head
    scores = (soft_cap * torch.tanh(scores / soft_cap)).view(B, H, T, S)  # Gemma 2, arXiv 2408.00118, section 2
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = F.dropout(scores.softmax(dim=-1), dropout)  # (B, H, T, S)
    return (weights.reshape(B, G, -1, S) @ v).view(B, H, T, -1)


def causal_attention(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    """Softmax attention to earlier tokens of the same story, at most `window` back.  q (B, H, T, K), k and v (B, G, S, K)"""
    T, S = q.shape[2], k.shape[2]
    is_plain = story_start is None and T in (1, S) and (window is None or window >= S)  # needs no mask, which is faster
    mask = None if is_plain else causal_mask(T, S, story_start, window, q.device)
    return masked_attention(q, k, v, mask, soft_cap, dropout)


def append_to_cache(cache: dict, k: Tensor, v: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
    """Append new keys and values to the cached ones; keep the window - 1 that the next token can see.  (B, G, S, K)"""
    if "k" in cache:
        k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
    dropped = 0 if window is None else max(0, k.shape[2] - window + 1)
    cache["k"], cache["v"] = k[:, :, dropped:], v[:, :, dropped:]
    return k, v


def linear(in_features: int, out_features: int, bias: bool = False) -> nn.Linear:
    """nn.Linear with GPT-2's initialization (Radford et al. 2019): weights of standard deviation 0.02, no bias."""
    layer = nn.Linear(in_features, out_features, bias=bias)
    nn.init.normal_(layer.weight, std=0.02)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(LoggingModule):
    """Causal grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245).  (B, T, D) -> (B, T, D)

    num_kv_heads=1 is multi-query attention. query_scale replaces 1 / sqrt(head_dim), out_bias replaces linear_bias for w_out.
    """

    causal_attention, apply_rope = staticmethod(causal_attention), staticmethod(apply_rope)

    def __init__(
        self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None = None, linear_bias: bool = False,
        qk_norm: bool = False, norm: type[Norm] = RMSNorm, norm_eps: float = 1e-5, query_scale: float | None = None,
        out_bias: bool | None = None, attention_soft_cap: float | None = None, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself, so give a whole number of at least 1, or None")
        if query_scale is not None and query_scale <= 0:
            raise ValueError(f"query_scale={query_scale}: give a positive number, or None for 1 / sqrt(head_dim)")
        self.num_heads, self.num_kv_heads, self.head_dim, self.window = num_heads, num_kv_heads, head_dim, window
        self.query_scale, self.soft_cap, self.dropout = query_scale, attention_soft_cap, dropout
        self.w_q = linear(dim, num_heads * head_dim, bias=linear_bias)
        self.w_k = linear(dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_v = linear(dim, num_kv_heads * head_dim, bias=linear_bias)
        self.w_out = linear(num_heads * head_dim, dim, bias=linear_bias if out_bias is None else out_bias)
        self.q_norm = norm(head_dim, norm_eps=norm_eps) if qk_norm else None
        self.k_norm = norm(head_dim, norm_eps=norm_eps) if qk_norm else None

    def forward(self, x, *, rope=None, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = self.project(x, rope)
        y = self.attend(q, k, v, story_start, window, cache)
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)

    def project(self, x, rope):
        """Queries (B, H, T, K), keys and values (B, G, T, K)."""
        B, T, D = x.shape
        q = self.w_q(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, num_heads, T, head_dim)
        k = self.w_k(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, T, head_dim)
        v = self.w_v(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, num_kv_heads, T, head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self.apply_rope(q, rope), self.apply_rope(k, rope)
        if self.query_scale is not None:  # the scores will be divided by sqrt(head_dim)
            q = q * (self.query_scale * math.sqrt(self.head_dim))
        return q, k, v

    def attend(self, q, k, v, story_start, window, cache):
        """Average the values that each query sees, the cached ones included.  (B, H, T, K)"""
        if cache is not None:
            k, v = append_to_cache(cache, k, v, self.window)
        window = self.window if window is None else min(window, self.window or window)  # the narrower one
        return self.causal_attention(q, k, v, story_start, window, self.soft_cap, self.dropout if self.training else 0.0)


ACTIVATIONS = {
    "SiLU": F.silu,
    "GELU": lambda x: F.gelu(x, approximate="tanh"),
    "ReLU": F.relu,
    "ReLU2": lambda x: F.relu(x).square(),  # So et al. 2021, arXiv 2109.08668
}


def activate(activation: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """activation(x), times the factor if there is one.  Any shape -> the same"""
    active = ACTIVATIONS[activation](x)
    return active if factor is None else active * factor


class MLP(LoggingModule):
    """Feed-forward block, gated (SwiGLU, GeGLU: Shazeer 2020, arXiv 2002.05202, section 2) or plain.  (B, T, D) -> (B, T, D)"""

    activate = staticmethod(activate)

    def __init__(self, dim: int, mlp_dim: int, activation: str = "SiLU", gated: bool = True, linear_bias: bool = False):
        super().__init__()
        self.w_gate = linear(dim, mlp_dim, bias=linear_bias) if gated else None
        self.w_in = linear(dim, mlp_dim, bias=linear_bias)
        self.w_out = linear(mlp_dim, dim, bias=linear_bias)
        self.activation = activation

    def forward(self, x):
        if self.w_gate is None:
            return self.w_out(self.activate(self.activation, self.w_in(x)))
        return self.w_out(self.activate(self.activation, self.w_gate(x), self.w_in(x)))


BLOCKS = {"Attn": Attention, "MLP": MLP, "RMSNorm": RMSNorm, "LayerNorm": LayerNorm}


def build_block(name: str, options: dict, config: ModelConfig, blocks: dict, vocab_size: int) -> nn.Module:
    """Build a block; each argument of its __init__ comes from the options in the layer string, or else from the config.

    The argument `layer` is the layer in brackets, built: a Branch.
    """
    block = look_up("block", config.norm if name == "Norm" else name, blocks)
    values = config.block_values(options) | {"vocab_size": vocab_size}
    values["norm"] = blocks.get(values["norm"])  # the class
    if "layer" in options:
        values["layer"] = Branch(options["layer"], config, blocks, residual_scale=1.0, vocab_size=vocab_size)
    return block(**{argument: values[argument] for argument in init_parameters(block) if argument in values})


class Branch(LoggingModule):
    """One layer string: blocks in sequence; `+` adds the skip and opens the next one, `|` opens one without adding.

    (B, T, D) -> (B, T, D). A block is given what its forward names of: rope (cosines and sines of the positions), story_start
    (B, T) or None, window, tokens, targets (only in training), memory, cache (its own dict), and shared (a dict in which layers
    pass things on). A block with a layer in brackets is given all of it, and the whole Cache, to hand on to that layer.
    """

    def __init__(self, layer: str, config: ModelConfig, blocks: dict, residual_scale: float, vocab_size: int):
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.steps = [name for name, _ in layer_steps(layer)]
        self.blocks, self.accepted = nn.ModuleList(), []  # the inputs that a block accepts; None: all
        for position, (name, options) in enumerate(layer_steps(layer)):
            if name not in "+|":
                with marking(layer, position):
                    block = build_block(name, options, config, blocks, vocab_size)
                self.blocks.append(block)
                self.accepted.append(None if "layer" in options else set(method_parameters(type(block), "forward")))
        # scale down the output projections, so that the residual stream does not grow with depth (GPT-2, section 2.3)
        for module in self.blocks.modules():
            if hasattr(module, "w_out"):
                weight = module.w_out if isinstance(module.w_out, nn.Parameter) else module.w_out.weight
                weight.data.mul_(residual_scale)

    def forward(self, x, *, cache=None, **inputs):
        skip, blocks = x, iter(zip(self.blocks, self.accepted, strict=True))
        for step in self.steps:
            if step == "+":
                x = skip + F.dropout(x, self.dropout, self.training)
            if step in "+|":
                skip = x
            else:
                block, accepted = next(blocks)
                given = {name: value for name, value in inputs.items() if accepted is None or name in accepted}
                if accepted is None:
                    given["cache"] = cache
                elif cache is not None and "cache" in accepted:
                    given["cache"] = cache.of(block)
                x = block(x, **given)
        return x


class Layer(LoggingModule):
    """One layer: a branch, or parallel branches of one input whose residual updates are summed.  (B, T, D) -> (B, T, D)"""

    def __init__(self, layer: str | list[str], *arguments):
        super().__init__()
        self.branches = nn.ModuleList(Branch(branch, *arguments) for branch in ([layer] if isinstance(layer, str) else layer))

    def forward(self, x, **inputs):
        if len(self.branches) == 1:
            return self.branches[0](x, **inputs)
        return x + sum(branch(x, **inputs) - x for branch in self.branches)


class Cache:
    """What generation keeps between calls: the number of tokens read, and a dict for each block (e.g. its keys and values).

    A block that runs several times in a pass, as in a loop, has a dict for each of its turns.
    """

    def __init__(self):
        self.num_tokens, self.blocks, self.turns = 0, defaultdict(dict), Counter()

    def of(self, block: nn.Module) -> dict:
        self.turns[block] += 1
        return self.blocks[block, self.turns[block]]


class GPT(LoggingModule):
    """Decoder-only language model. The layer string may name the given blocks; modules/registry.py passes all there are."""

    def __init__(self, config: ModelConfig, vocab_size: int, blocks: dict[str, type] = BLOCKS):
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.embedding = nn.Embedding(vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, config.dim) if config.positions == "learned" else None
        if config.positions == "sinusoidal":
            waves = torch.cat(rope_table(config.max_seq_len, config.dim, rope_theta=10_000.0), dim=1)
            self.register_buffer("sinusoids", waves, persistent=False)
        if config.positions == "rope":
            cos, sin = rope_table(config.max_seq_len, config.block_values()["head_dim"], config.rope_theta)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.embedding_scale = math.sqrt(config.dim) if config.embedding_scale == "sqrt(dim)" else config.embedding_scale
        self.dropout = config.dropout
        num_residuals = sum(times for branch in config.branch_strings for name, _, times in all_steps(branch) if name == "+")
        scale = 0.0 if config.zero_init else max(1, num_residuals) ** -0.5
        self.losses: dict[str, Tensor] = {}  # terms of the last training loss
        self.own_loss = None  # a function (logits, targets) -> (name, loss) that training minimises in place of cross-entropy
        self.layers = nn.ModuleList(Layer(layer, config, blocks, scale, vocab_size) for layer in config.depth_layers)
        self.norm = build_block("Norm", {}, config, blocks, vocab_size)
        self.head = linear(config.dim, vocab_size)
        for table in (self.embedding, self.position_embedding):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight
        elif config.zero_init:
            nn.init.zeros_(self.head.weight)

    def forward(self, tokens, targets=None, *, story_ids=None, window=None, memory=None, cache=None):
        """Logits (B, T, V), and the loss if targets are given (else None): the mean of nats per target.

        tokens and targets (B, T), targets are IGNORE where nothing is to be predicted. story_ids (B, T): stories packed into a
        row do not see each other. window: how many recent tokens are visible. memory: (B, M) tokens or (B, M, D) for
        cross-attention. cache: a Cache of earlier tokens. Raises ValueError beyond max_seq_len. In training the loss includes
        those of blocks; afterwards self.losses has the terms by name.
        """
        x, shared = self.hidden_states(tokens, targets, story_ids, window, memory, cache)
        return self.score(x, targets, shared)

    def hidden_states(self, tokens, targets=None, story_ids=None, window=None, memory=None, cache=None):
        """The output of the last layer (B, T, D), and the dict that the layers share."""
        B, T = tokens.shape
        start = 0 if cache is None else cache.num_tokens
        S = start + T
        if S > self.config.max_seq_len:
            raise ValueError(f"{S} tokens do not fit into max_seq_len={self.config.max_seq_len}: give the model fewer")
        assert cache is None or (story_ids is None and window is None), "packed stories and a growing window are for training"

        # count positions from the start of the row, or of the story where several share a row
        positions = torch.arange(start, S, device=tokens.device)  # (T,)
        story_start = None if story_ids is None else story_starts(story_ids)
        if story_start is not None:
            positions = positions - story_start  # (B, T)

        # embed tokens and positions; RoPE is relative, so that attention applies it and it need not restart with each story
        x = self.embedding(tokens) * self.embedding_scale  # (B, T, config.dim)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        if self.config.positions == "sinusoidal":
            x = x + self.sinusoids[positions]
        rope = (self.rope_cos[None, start:S], self.rope_sin[None, start:S]) if self.config.positions == "rope" else None
        x = F.dropout(x, self.dropout, self.training)
        if memory is not None and not memory.is_floating_point():
            memory = self.embedding(memory) * self.embedding_scale  # of (B, M) tokens

        # go through the layers
        shared = {"losses": defaultdict(float)}
        inputs = {"rope": rope, "story_start": story_start, "window": window, "tokens": tokens, "memory": memory}
        inputs["targets"] = targets if self.training else None
        for layer in self.layers:
            x = layer(x, cache=cache, shared=shared, **inputs)
        if cache is not None:
            cache.num_tokens = S
            cache.turns.clear()
        return x, shared

    def score(self, x, targets, shared):
        """Logits and loss of the last layer's output, as `forward` returns them."""
        x = self.norm(x)
        if self.config.logit_scale != 1:
            x = x * self.config.logit_scale
        logits, loss = self.predict(x, targets)
        if self.training and targets is not None:
            name, minimised = ("next_token", loss) if self.own_loss is None else self.own_loss(logits, targets)
            assert name not in shared["losses"], f"two losses are called {name!r}"
            losses = {name: minimised, **shared["losses"]}
            self.losses = {name: value.detach() for name, value in {"next_token": loss, **losses}.items()}
            loss = sum(losses.values())
        return logits, loss

    def predict(self, x, targets):
        """Logits (B, T, V) of the head, and their mean cross-entropy with the targets, if there are any."""
        logits, cap = self.head(x), self.config.logit_soft_cap
        logits = (logits if cap is None else cap * torch.tanh(logits / cap)).float()
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def story_starts(story_ids: Tensor) -> Tensor:
    """Position at which the story of each token starts in its row.  (B, T) -> (B, T)"""
    positions = torch.arange(story_ids.shape[1], device=story_ids.device)
    is_start = F.pad(story_ids[:, 1:] != story_ids[:, :-1], (1, 0))
    return torch.where(is_start, positions, 0).cummax(dim=1).values
