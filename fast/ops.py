"""The C++ kernels as PyTorch functions with gradients: attention about twice as fast as torch's, more for packed stories; norms,
rotations, convolutions, activations and the loss in one pass over memory.

B batch, H query heads, G key/value heads, T time, K head dim, D model dim, V vocabulary.
"""

import math
import struct

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.build import build


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention with a gradient.  q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K), as q

    The query at time t sees the keys from first[b, t] to t; first (B, T) of integers is the start of its story or of its window,
    None is 0. Masked keys cost nothing. Computed in float32; bfloat16 is read and written. The result is the same to the last
    bit with any number of threads. Raises BuildError where there is no compiler.
    """
    first, dtype = None if first is None else first.to(torch.int32).contiguous(), q.dtype
    if {x.dtype for x in (q, k, v)} != {torch.bfloat16}:
        q, k, v = q.float(), k.float(), v.float()
    return Attention.apply(q, k, v, first).to(dtype)


def attention_with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, first: Tensor | None = None) -> Tensor:
    """The same with one more score for each head in the softmax, sinks (H), which has no value."""
    first = None if first is None else first.to(torch.int32).contiguous()
    return AttentionWithSinks.apply(q.float(), k.float(), v.float(), first, sinks).to(q.dtype)


class Attention(torch.autograd.Function):
    """The gradient is tied to the operators here, since `torch.library.register_autograd` costs 20 µs more a call."""

    @staticmethod
    def forward(ctx, q, k, v, first):
        out, lse = torch.ops.basegpt.attention(q, k, v, first)
        ctx.save_for_backward(q, k, v, first, out, lse)
        return out

    @staticmethod
    def backward(ctx, d_out):
        return *torch.ops.basegpt.attention_backward(d_out, *ctx.saved_tensors), None


class AttentionWithSinks(torch.autograd.Function):
    """The kernel keeps the logarithm, in base 2, of each softmax's sum; a sink adds to that sum.

    The kernel's gradients are right for whatever these sums are.
    """

    @staticmethod
    def forward(ctx, q, k, v, first, sinks):
        out, sums = torch.ops.basegpt.attention(q, k, v, first)  # sums: (B, H, T)
        sinks = sinks.float()[:, None] / math.log(2)
        with_sinks = torch.logaddexp2(sums, sinks)
        out = out * torch.exp2(sums - with_sinks)[..., None]
        ctx.save_for_backward(q, k, v, first, out, with_sinks, torch.exp2(sinks - with_sinks))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *saved, of_sinks = ctx.saved_tensors
        d_sinks = -(of_sinks * (d_out * saved[4]).sum(dim=-1)).sum(dim=(0, 2))
        return *torch.ops.basegpt.attention_backward(d_out, *saved), None, d_sinks


def run_forward(q, k, v, first):
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    out, lse = empty_outputs(q, k, v, first)
    build().attention_forward(arguments(k.shape[1], first, lse, q, k, v, out))
    return out, lse


def run_backward(d_out, q, k, v, first, out, lse):
    d_out, q, k, v, out = (last_contiguous(x) for x in (d_out, q, k, v, out))
    gradients = empty_gradients(d_out, q, k, v, first, out, lse)
    build().attention_backward(arguments(k.shape[1], first, lse, q, k, v, out, d_out, *gradients))
    return gradients


def last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def arguments(G: int, first: Tensor | None, lse: Tensor, q: Tensor, *others: Tensor) -> bytes:
    """`Attention` of kernels.cpp as far as the call reads it: 6 sizes, 2 pointers, and pointer, strides and type of each view."""
    B, H, T, K = q.shape
    pointers = 0 if first is None else first.data_ptr(), lse.data_ptr()
    views = [number for x in (q, *others) for number in (x.data_ptr(), *x.stride()[:3], is_half(x))]
    return struct.pack(f"{8 + len(views)}q", B, H, G, T, K, torch.get_num_threads(), *pointers, *views)


def empty_outputs(q, k, v, first):
    B, H, T, K = q.shape
    assert H % k.shape[1] == 0 and k.shape == v.shape == (B, k.shape[1], T, K) and (first is None or first.shape == (B, T))
    return empty_as_projected(q), q.new_empty(B, H, T, dtype=torch.float32)


def empty_gradients(d_out, q, k, v, first, out, lse):
    return empty_as_projected(q), empty_as_projected(k), empty_as_projected(v)


def empty_as_projected(x: Tensor) -> Tensor:
    """(B, heads, T, K), in memory (B, T, heads, K): as a linear layer gives it and the next one takes it, without a copy."""
    B, heads, T, K = x.shape
    return x.new_empty_strided((B, heads, T, K), (T * heads * K, K, heads * K, 1))


LIBRARY = torch.library.Library("basegpt", "DEF")
LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, Tensor? first) -> (Tensor, Tensor)")
LIBRARY.define("attention_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? first, Tensor out, Tensor lse)"
               " -> (Tensor, Tensor, Tensor)")  # fmt: skip
LIBRARY.impl("attention", run_forward, "CPU")
LIBRARY.impl("attention_backward", run_backward, "CPU")
torch.library.register_fake("basegpt::attention", empty_outputs, lib=LIBRARY)
torch.library.register_fake("basegpt::attention_backward", empty_gradients, lib=LIBRARY)


def is_half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def supports(x: Tensor) -> bool:
    """Whether the functions below take x: float32 on a CPU, or bfloat16 under autocast.

    Not under torch.compile, which fuses torch's formulas by itself.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight, in the given dtype or that of x.  x (..., D), weight (D) -> (..., D)"""
    return RMSNorm.apply(x, None if weight is None else weight.float(), eps, dtype or x.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x, D = without_gaps(x), x.shape[-1]
        assert weight is None or weight.shape == (D,)
        out = torch.empty_like(x, dtype=dtype)
        inverse_rms = x.new_empty(x.numel() // D, dtype=torch.float32)
        halves = is_half(x), is_half(out)
        build().rms_norm_forward(x, weight, out, inverse_rms, len(inverse_rms), D, eps, *halves, torch.get_num_threads())
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, inverse_rms = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        d_out, sizes = laid_out_as(x, d_out), (len(inverse_rms), x.shape[-1])
        halves = is_half(x), is_half(d_out)
        build().rms_norm_backward(d_out, x, weight, inverse_rms, d_x, d_weight, *sizes, *halves, torch.get_num_threads())
        return d_x, d_weight, None, None


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channels k and k + K / 2 by the angle of the position.  x (B, H, T, K), rope 2 x (1, T, K / 2) -> (B, H, T, K)"""
    return Rope.apply(x, *rope)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return rotated(d_out, *ctx.saved_tensors, -1.0), None, None


def rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # (B, T, H, K), as it was projected
    B, T, H, K = x.shape
    assert cos.shape == sin.shape == (1, T, K // 2)
    out = torch.empty_like(x)
    sizes = B * T, T, H, K // 2
    build().rope(x, cos.contiguous(), sin.contiguous(), out, *sizes, direction, is_half(x), torch.get_num_threads())
    return out.transpose(1, 2)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """x[t] + bias + the sum over i of x[t - i] weight[i], for t - i >= first[t].

    x (B, T, D), weight (width, D), bias (D), first (B, T) of integers or None -> (B, T, D)
    """
    return ShortConv.apply(x, weight, bias, None if first is None else first.to(torch.int32).contiguous())


class ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, first):
        x, (B, T, D) = x.contiguous(), x.shape
        assert weight.shape[1] == D and weight.is_contiguous() and (first is None or first.shape == (B, T))
        assert bias is None or bias.shape == (D,)
        out = torch.empty_like(x)
        sizes = B * T, T, D, len(weight)
        build().short_conv_forward(x, weight, bias, first, out, *sizes, is_half(x), torch.get_num_threads())
        ctx.save_for_backward(x, weight, bias, first)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, bias, first = ctx.saved_tensors
        (B, T, D), d_x, d_weight = x.shape, torch.empty_like(x), torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        gradients, sizes = (d_x, d_weight, d_bias), (B * T, T, D, len(weight))
        build().short_conv_backward(d_out.contiguous(), x, weight, first, *gradients, *sizes, is_half(x), torch.get_num_threads())
        return *gradients, None


ACTIVATIONS = ["SiLU", "GELU", "ReLU", "ReLU2"]  # in the order of elementwise.cpp


def activate(activation: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """activation(x), or activation(x) * factor.  Any shape -> the same"""
    if factor is not None and factor.dtype != x.dtype:
        x, factor = x.float(), factor.float()
    return Activation.apply(x, factor, ACTIVATIONS.index(activation))


class Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, activation):
        x, factor = x.contiguous(), None if factor is None else factor.contiguous()
        assert factor is None or factor.shape == x.shape
        out, ctx.activation = torch.empty_like(x), activation
        build().activation_forward(activation, x, factor, out, x.numel(), is_half(x), torch.get_num_threads())
        ctx.save_for_backward(x, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, factor = ctx.saved_tensors
        d_x, d_factor = torch.empty_like(x), None if factor is None else torch.empty_like(x)
        gradients = d_out.contiguous(), x, factor, d_x, d_factor
        build().activation_backward(ctx.activation, *gradients, x.numel(), is_half(x), torch.get_num_threads())
        return d_x, d_factor, None


def weighted_sum(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """weights[0] * x + weights[1] * y.  x and y of one shape -> the same; weights (2)"""
    return WeightedSum.apply(x.float(), y.float(), weights).to(x.dtype)


class WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, weights):
        assert x.shape == y.shape and weights.shape == (2,)
        x = without_gaps(x)
        y, out = laid_out_as(x, y), torch.empty_like(x)
        build().weighted_sum_forward(x, y, weights, out, x.numel(), torch.get_num_threads())
        ctx.save_for_backward(x, y, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, y, weights = ctx.saved_tensors
        gradients = torch.empty_like(x), torch.empty_like(x), torch.empty_like(weights)
        build().weighted_sum_backward(laid_out_as(x, d_out), x, y, weights, *gradients, x.numel(), torch.get_num_threads())
        return gradients


def cross_entropy_(logits: Tensor, targets: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor]:
    """Summed loss of soft_cap(logits) in nats, and its gradient (N, V) in place of the logits.  logits (N, V), targets (N)

    A negative target is not scored.
    """
    losses, targets = logits.new_empty(len(logits), dtype=torch.float32), targets.contiguous()
    assert logits.is_contiguous() and targets.shape == losses.shape and targets.dtype == torch.int64
    assert targets.max() < logits.shape[1]
    build().cross_entropy(logits, targets, losses, *logits.shape, soft_cap or 0.0, is_half(logits), torch.get_num_threads())
    return losses.sum(), logits


def without_gaps(x: Tensor) -> Tensor:
    """x, or a copy of it, whose rows of x.shape[-1] numbers fill one piece of memory, in any order."""
    in_order = x.is_contiguous() or (x.ndim == 4 and x.transpose(1, 2).is_contiguous())
    return x if in_order else x.contiguous()


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)


