"""Which block gets which fast path, and how it is swapped in.

    fast.use(model)     # C++ kernels; fast.use(model, kernels=False): faster PyTorch alone
    fast.undo(model)    # the plain model again

A block computes by functions that are attributes of its class, such as Attention.causal_attention. A fast class differs in these
functions alone, so weights, names and hooks stay as they are. Classes are swapped by exact type: a subclass, such as a block of a
plugin, is accelerated only if `register` names it. Each function here has the signature of the plain one, and falls back to it
for inputs that the kernels do not support.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import model as plain
from config import did_you_mean
from data.cache import say
from fast import build, ops
from fast.loss import chunked_cross_entropy, cross_entropy_
from fast.selective_scan import selective_scan
from modules import attention, convolution, embeddings, moe
from modules.registry import BLOCKS
from modules.windows import windowed_attention

MANY_STORIES = 1000  # for which it is worth compiling the kernels before an evaluation


def causal_attention(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    if not kernel_attends(q, k, v, soft_cap, dropout):
        return windowed_attention(q, k, v, story_start, window, soft_cap, dropout)
    return ops.attention(q, k, v, first_visible(q, story_start, window))


def attention_with_sinks(q, k, v, sinks, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    if not kernel_attends(q, k, v, soft_cap, dropout):
        return attention.attention_with_sinks(q, k, v, sinks, story_start, window, soft_cap, dropout)
    return ops.attention(q, k, v, first_visible(q, story_start, window), sinks)


def kernel_attends(q: Tensor, k: Tensor, v: Tensor, soft_cap: float | None, dropout: float) -> bool:
    is_whole_sequence = q.shape[2] == k.shape[2] and k.shape == v.shape
    is_supported = q.device.type == "cpu" and q.dtype != torch.float64
    return is_supported and is_whole_sequence and soft_cap is None and not dropout


def first_visible(q: Tensor, story_start: Tensor | None, window: int | None) -> Tensor | None:
    """The first position that each query sees, (B, T) of int32; None if that is 0 for all."""
    B, _, T, _ = q.shape
    first = None if story_start is None else story_start.int()
    if window is not None and window < T:
        window_start = torch.arange(1 - window, T - window + 1, device=q.device, dtype=torch.int32).clamp(min=0)
        first = window_start.expand(B, T) if first is None else first.maximum(window_start)
    return first


def apply_rope(x, rope) -> Tensor:
    return ops.apply_rope(x, rope) if ops.supports(x) else plain.apply_rope(x, rope)


def activate(activation, x, factor=None) -> Tensor:
    if ops.supports(x) and activation in ops.ACTIVATIONS:
        return ops.activate(activation, x, factor)
    return plain.activate(activation, x, factor)


def rms_norm(x, weight, eps) -> Tensor:
    return ops.rms_norm(x, weight, eps) if ops.supports(x) else plain.rms_norm(x, weight, eps)


def short_conv(x, weight, bias=None, story_start=None) -> Tensor:
    conv = ops.short_conv if ops.supports(x) else convolution.short_conv
    return conv(x, weight, bias, story_start)


def weighted_sum(x, y, weights) -> Tensor:
    return ops.weighted_sum(x, y, weights) if ops.supports(x) else embeddings.weighted_sum(x, y, weights)


class RMSNorm(plain.RMSNorm):
    """RMSNorm that writes the dtype that the next matrix product reads."""

    def forward(self, x):
        if not ops.supports(x):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        normed = ops.rms_norm(x, self.weight, self.eps, dtype)
        return normed if self.bias is None else normed + self.bias


class ChunkedGPT(plain.GPT):
    """GPT whose cross-entropy in training is computed in chunks of loss_chunk tokens, without logits.  `use` sets attributes."""

    def predict(self, x, targets):
        if targets is None or not self.loss_chunk or not self.training or self.own_loss is not None:
            return super().predict(x, targets)
        in_place_loss = ops.cross_entropy_ if self.has_kernels and ops.supports(x) else cross_entropy_
        soft_cap = self.config.logit_soft_cap
        return None, chunked_cross_entropy(x, self.head.weight, targets, soft_cap, self.loss_chunk, in_place_loss)


# the classes to swap in, with and without the C++ kernels
SWAPS: dict[bool, dict[type, type]] = {True: {plain.RMSNorm: RMSNorm, plain.GPT: ChunkedGPT}, False: {plain.GPT: ChunkedGPT}}
PLAIN: dict[type, type] = {fast: block for swaps in SWAPS.values() for block, fast in swaps.items()}


def register(block: type[nn.Module], *, kernels: bool = True, **functions: Callable):
    """Accelerate a block: `use` replaces these functions, which are static attributes of its class, by the given ones.

    Raises ValueError for a function that the block does not have.
    """
    for name in functions:
        if not callable(getattr(block, name, None)):
            raise ValueError(f"{block.__name__} has no function {name!r} to replace.{did_you_mean(name, vars(block))}")
    methods = {name: staticmethod(function) for name, function in functions.items()}
    fast = type(block.__name__, (block,), {"__module__": block.__module__, "__doc__": block.__doc__, **methods})
    SWAPS[kernels][block], PLAIN[fast] = fast, block


_ATTENTION: dict[str, dict[str, Callable]] = {  # with the functions that they have besides those of all attention blocks
    "Attn": {}, "RopeAttn": {}, "GatedAttn": {}, "DiffAttn": {}, "StridedAttn": {}, "LatentAttn": {},
    "SinkAttn": {"attention_with_sinks": attention_with_sinks}, "ValueAttn": {"weighted_sum": weighted_sum},
    "Megalodon": {"activate": activate},
}  # fmt: skip
for _name, _others in _ATTENTION.items():
    register(BLOCKS[_name], causal_attention=causal_attention, apply_rope=apply_rope, **_others)
    register(BLOCKS[_name], kernels=False, causal_attention=windowed_attention)
for _name in ("BlockAttn", "FullAttn"):
    register(BLOCKS[_name], apply_rope=apply_rope)
register(BLOCKS["Shortcut"], weighted_sum=weighted_sum)
register(BLOCKS["ShortConv"], short_conv=short_conv)
register(BLOCKS["Mamba"], activate=activate, selective_scan=selective_scan)
for _name in ("Mamba2", "DeltaNet", "GatedDeltaNet"):
    register(BLOCKS[_name], activate=activate, rms_norm=rms_norm)
for _block in (moe.Experts, *(BLOCKS[_name] for _name in ("MLP", "RGLRU", "LinearAttn"))):
    register(_block, activate=activate)


def use(model: nn.Module, kernels: bool = True, loss_chunk: int | None = None):
    """Swap faster classes into a model, with the C++ kernels or without them; loss_chunk is that of TrainConfig.

    Raises BuildError, with the cure, where the kernels cannot be compiled.
    """
    undo(model)
    if kernels:
        build.build()
    for module in model.modules():
        module.__class__ = SWAPS[kernels].get(type(module), type(module))
        if isinstance(module, ChunkedGPT):
            module.loss_chunk, module.has_kernels = loss_chunk, kernels


def undo(model: nn.Module):
    """The plain classes again."""
    for module in model.modules():
        module.__class__ = PLAIN.get(type(module), type(module))


def is_used(model: nn.Module) -> bool:
    """Whether anything in the model has been swapped."""
    return any(type(module) in PLAIN for module in model.modules())


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """The plain model for a while."""
    classes = {module: type(module) for module in model.modules()}
    undo(model)
    try:
        yield
    finally:
        for module, fast in classes.items():
            module.__class__ = fast


@contextmanager
def for_evaluation(model: nn.Module, num_stories: int) -> Iterator[None]:
    """Evaluate with the kernels, if they are compiled already or there are many stories.

    A model that has been configured for training is left as it is. What fails is said, and the plain model evaluates.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    if is_used(model) or not on_cpu or not kernels_are_ready(may_compile=num_stories >= MANY_STORIES):
        yield
        return
    use(model)
    try:
        yield
    finally:
        undo(model)


def kernels_are_ready(may_compile: bool) -> bool:
    machine_code = build.fingerprint()
    if machine_code == "none" or not (may_compile or build.library_path(machine_code).exists()):
        return False
    try:
        build.build()
    except build.BuildError as error:
        say(str(error))
        return False
    return True
