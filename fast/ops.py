"""The C++ kernels as PyTorch functions with gradients.

Attention skips what a query may not see, such as other stories of its row; norms, rotations, convolutions, activations and the
loss take one pass over memory.  B batch, H query heads, G key/value heads, T time, K head dim, D model dim, V vocabulary.
"""

import math
import struct

import torch
from torch import Tensor

from fast.build import build
from fast.loss import check_targets
from modules.operators import define_operator, once_differentiable


def supports(x: Tensor) -> bool:
    """Whether the kernels support this input: float32 on a CPU, or bfloat16 under autocast.

    Not under torch.compile, which fuses PyTorch's formulas itself.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32


def attention(q, k, v, first_visible: Tensor | None = None, sinks: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention.  q (B, H, T, K), k and v (B, G, T, K) -> (B, H, T, K), with the dtype of q

    The query at time t sees the keys from first_visible[b, t] to t; first_visible (B, T) of integers, None: 0. Masked keys cost
    nothing. sinks (H): one more score for each head in the softmax, without a value. Reads and writes float32 or bfloat16,
    computes in float32. The result does not depend on the number of threads. Raises BuildError if there is no compiler.
    """
    dtype = q.dtype
    if sinks is not None or {x.dtype for x in (q, k, v)} != {torch.bfloat16}:
        q, k, v = q.float(), k.float(), v.float()
    return Attention.apply(q, k, v, as_int32(first_visible), sinks).to(dtype)


class Attention(torch.autograd.Function):
    """Not torch.library.register_autograd, which takes 20 µs more for each call."""

    @staticmethod
    def forward(ctx, q, k, v, first_visible, sinks):
        out, lse = torch.ops.basegpt.attention(q, k, v, first_visible)  # lse: (B, H, T), in base 2
        sink_weights = None
        if sinks is not None:  # the backward kernel is correct for any lse
            sinks, lse_of_keys = sinks.float()[:, None] / math.log(2), lse
            lse = torch.logaddexp2(lse_of_keys, sinks)
            out = out * torch.exp2(lse_of_keys - lse)[..., None]
            sink_weights = torch.exp2(sinks - lse)
        ctx.save_for_backward(q, k, v, first_visible, out, lse, sink_weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *saved, sink_weights = ctx.saved_tensors
        gradients = torch.ops.basegpt.attention_backward(d_out, *saved)
        out = saved[4]
        d_sinks = None if sink_weights is None else -(sink_weights * (d_out * out).sum(dim=-1)).sum(dim=(0, 2))
        return *gradients, None, d_sinks


def attention_forward(q, k, v, first_visible):
    q, k, v = (last_contiguous(x) for x in (q, k, v))
    out, lse = empty_outputs(q, k, v, first_visible)
    build().attention_forward(pack_arguments(k.shape[1], first_visible, lse, q, k, v, out))
    return out, lse


def attention_backward(d_out, q, k, v, first_visible, out, lse):
    d_out, q, k, v, out = (last_contiguous(x) for x in (d_out, q, k, v, out))
    gradients = empty_gradients(d_out, q, k, v, first_visible, out, lse)
    build().attention_backward(pack_arguments(k.shape[1], first_visible, lse, q, k, v, out, d_out, *gradients))
    return gradients


def pack_arguments(G: int, first_visible: Tensor | None, lse: Tensor, q: Tensor, *others: Tensor) -> bytes:
    """The struct Attention of attention.cpp: 6 sizes, 2 pointers, then a pointer, 3 strides and a type for each view in use."""
    B, H, T, K = q.shape
    pointers = 0 if first_visible is None else first_visible.data_ptr(), lse.data_ptr()
    views = [number for x in (q, *others) for number in (x.data_ptr(), *x.stride()[:3], is_half(x))]
    return struct.pack(f"{8 + len(views)}q", B, H, G, T, K, torch.get_num_threads(), *pointers, *views)


def empty_outputs(q, k, v, first_visible):
    (B, H, T, K), G = q.shape, k.shape[1]
    assert H % G == 0 and k.shape == v.shape == (B, G, T, K) and (first_visible is None or first_visible.shape == (B, T))
    return empty_as_projected(q), q.new_empty(B, H, T, dtype=torch.float32)


def empty_gradients(d_out, q, k, v, first_visible, out, lse):
    return empty_as_projected(q), empty_as_projected(k), empty_as_projected(v)


def empty_as_projected(x: Tensor) -> Tensor:
    """(B, heads, T, K), stored as (B, T, heads, K): the order in which linear layers read and write it."""
    B, heads, T, K = x.shape
    return x.new_empty_strided((B, heads, T, K), (T * heads * K, K, heads * K, 1))


QKV = "Tensor q, Tensor k, Tensor v, Tensor? first_visible"
define_operator(f"attention({QKV}) -> (Tensor, Tensor)", attention_forward, empty_outputs, "CPU")
define_operator(f"attention_backward(Tensor d_out, {QKV}, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
                attention_backward, empty_gradients, "CPU")  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight, with the given dtype or that of x.  x (..., D), weight (D) -> (..., D)"""
    return RMSNorm.apply(x, None if weight is None else weight.float(), eps, dtype or x.dtype)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        x, D = without_gaps(x), x.shape[-1]
        assert weight is None or weight.shape == (D,)
        out = torch.empty_like(x, dtype=dtype)
        inverse_rms = x.new_empty(math.prod(x.shape[:-1]), dtype=torch.float32)
        halves = is_half(x), is_half(out)
        build().rms_norm_forward(x, weight, out, inverse_rms, len(inverse_rms), D, eps, *halves, torch.get_num_threads())
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, inverse_rms = ctx.saved_tensors
        d_x, d_weight = torch.empty_like(x), None if weight is None else torch.empty_like(weight)
        d_out, (rows, D) = laid_out_as(x, d_out), (len(inverse_rms), x.shape[-1])
        halves = is_half(x), is_half(d_out)
        build().rms_norm_backward(d_out, x, weight, inverse_rms, d_x, d_weight, rows, D, *halves, torch.get_num_threads())
        return d_x, d_weight, None, None


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channels k and k + K / 2 by the angle of the position.  x (B, H, T, K), rope 2 x (1, T, K / 2) -> (B, H, T, K)"""
    return Rope.apply(x, *(table.float() for table in rope))


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return rotate(d_out, *ctx.saved_tensors, -1.0), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # (B, T, H, K), the order of the projection
    B, T, H, K = x.shape
    assert cos.shape == sin.shape == (1, T, K // 2)
    out = torch.empty_like(x)
    sizes = B * T, T, H, K // 2
    build().rope(x, cos.contiguous(), sin.contiguous(), out, *sizes, direction, is_half(x), torch.get_num_threads())
    return out.transpose(1, 2)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, story_start: Tensor | None = None) -> Tensor:
    """x[t] + bias + the sum over i of x[t - i] weight[i], for t - i >= story_start[t].

    x (B, T, D), weight (width, D), bias (D), story_start (B, T) of integers or None -> (B, T, D)
    """
    return ShortConv.apply(x, weight.float(), None if bias is None else bias.float(), as_int32(story_start))


class ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, story_start):
        x, (B, T, D) = x.contiguous(), x.shape
        assert weight.shape[1] == D and weight.is_contiguous() and (story_start is None or story_start.shape == (B, T))
        assert bias is None or bias.shape == (D,)
        out, sizes = torch.empty_like(x), (B * T, T, D, len(weight))
        build().short_conv_forward(x, weight, bias, story_start, out, *sizes, is_half(x), torch.get_num_threads())
        ctx.save_for_backward(x, weight, bias, story_start)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, weight, bias, story_start = ctx.saved_tensors
        (B, T, D), inputs = x.shape, (d_out.contiguous(), x, weight, story_start)
        gradients = torch.empty_like(x), torch.empty_like(weight), None if bias is None else torch.empty_like(bias)
        sizes = B * T, T, D, len(weight)
        build().short_conv_backward(*inputs, *gradients, *sizes, is_half(x), torch.get_num_threads())
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
    return WeightedSum.apply(x.float(), y.float(), weights.float()).to(x.dtype)


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
    """Summed loss of soft_cap(logits) in nats, and its gradient (N, V) in place of the logits.  logits (N, V), targets (N)"""
    check_targets(targets, logits.shape[1])
    losses, targets = logits.new_empty(len(logits), dtype=torch.float32), targets.contiguous()
    assert logits.is_contiguous() and targets.shape == losses.shape
    build().cross_entropy(logits, targets, losses, *logits.shape, soft_cap or 0.0, is_half(logits), torch.get_num_threads())
    return losses.sum(), logits


def as_int32(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int32).contiguous()


def is_half(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16


def last_contiguous(x: Tensor) -> Tensor:
    """x, copied if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def without_gaps(x: Tensor) -> Tensor:
    """x, copied unless its rows of x.shape[-1] numbers fill a block of memory, in any order."""
    is_dense = x.is_contiguous() or (x.ndim == 4 and x.transpose(1, 2).is_contiguous())
    return x if is_dense else x.contiguous()


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    """y, copied unless it has the strides of x."""
    return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)
