"""Attention for training on a CPU, about twice as fast as torch's, more for packed stories; and norms, rotations, convolutions,
activations and the loss in one pass over memory, where torch takes several. In C++ (kernels*.cpp), compiled when needed;
kernels_scan.cpp is for modules/mamba.py.

B batch, H query heads, G key/value heads, T time, K head dim, D model dim, V vocabulary.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data.cache import default_cache_dir, first_line

SOURCES = [Path(__file__).with_name(name) for name in ("attention.cpp", "elementwise.cpp", "scan.cpp", "kernels.h")]
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(ValueError):
    """The kernel cannot be had on this machine; the message is one line with the cure."""


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention with a gradient.  q (B, H, T, K), k and v (B, G, T, K) → (B, H, T, K), as q

    The query at time t sees the keys from first[b, t] to t: first (B, T) of integers says where its story begins, or its
    window; None is 0 everywhere, and int32 saves a conversion. What no query sees costs nothing. All is computed in float32,
    bfloat16 is only how it is read and written, and comes out the same to the last bit with any number of threads. Raises
    BuildError where there is no compiler.
    """
    first, dtype = None if first is None else first.to(torch.int32).contiguous(), q.dtype
    if {x.dtype for x in (q, k, v)} != {torch.bfloat16}:
        q, k, v = q.float(), k.float(), v.float()
    return Attention.apply(q, k, v, first).to(dtype)


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


def fit(backend: str, x: Tensor) -> bool:
    """Does a block of this backend take the functions below for x? They are for float32 on a CPU, and bfloat16 under autocast.

    Not under torch.compile, which fuses torch's formulas by itself.
    """
    if backend != "kernel" or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16 and x.dtype in (torch.float32, torch.bfloat16)
    return x.dtype == torch.float32


def rms_norm(x: Tensor, shape: tuple[int], weight: Tensor | None, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight, in that dtype or as x.  x (..., D) → (..., D), shape (D), weight (D): as torch's"""
    assert shape == x.shape[-1:]
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
    """Turn channels k and k + K / 2 by the angle of their position.  (B, H, T, K) → the same; cosines and sines (1, T, K / 2)"""
    return Rope.apply(x, *rope)


class Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return turned(d_out, *ctx.saved_tensors, -1.0), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    x = x.transpose(1, 2).contiguous()  # as it was projected
    B, T, H, K = x.shape
    assert cos.shape == sin.shape == (1, T, K // 2)
    out = torch.empty_like(x)
    sizes = B * T, T, H, K // 2
    build().rope(x, cos.contiguous(), sin.contiguous(), out, *sizes, direction, is_half(x), torch.get_num_threads())
    return out.transpose(1, 2)


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, first: Tensor | None = None) -> Tensor:
    """x[t] + bias + the sum over back of x[t - back] * weight[back], as far as first.

    x (B, T, D), weight (width, D), bias (D) → (B, T, D). first (B, T) of integers is the first token that each one sees; None is
    the first of the row.
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


ACTIVATIONS = ["SiLU", "GELU", "ReLU", "ReLU2"]  # in the order of kernels_elementwise.cpp


def activate(activation: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
    """activation(x), or activation(x) * factor.  Any shape → the same"""
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
    """weights[0] * x + weights[1] * y.  x and y of one shape → the same; weights (2)"""
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


def cross_entropy_(logits: Tensor, targets: Tensor, soft_cap: float | None) -> Tensor:
    """The summed loss of soft_cap(logits) in nats; the logits become its gradient.  logits (N, V), targets (N) → ()

    As that of losses.py; a negative target is left out.
    """
    losses, targets = logits.new_empty(len(logits), dtype=torch.float32), targets.contiguous()
    assert logits.is_contiguous() and targets.shape == losses.shape and targets.dtype == torch.int64
    assert targets.max() < logits.shape[1]
    build().cross_entropy(logits, targets, losses, *logits.shape, soft_cap or 0.0, is_half(logits), torch.get_num_threads())
    return losses.sum()


def without_gaps(x: Tensor) -> Tensor:
    """x, or a copy of it, as rows of x.shape[-1] numbers in a piece of memory, in any order."""
    in_order = x.is_contiguous() or (x.ndim == 4 and x.transpose(1, 2).is_contiguous())
    return x if in_order else x.contiguous()


def laid_out_as(x: Tensor, y: Tensor) -> Tensor:
    return y if y.stride() == x.stride() else torch.empty_like(x, dtype=y.dtype).copy_(y)


class Pointer(ctypes.c_void_p):
    """An argument of the library that is a tensor, or None for null."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:
        if tensor is None:
            return ctypes.c_void_p()
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.int32, torch.int64)
        return ctypes.c_void_p(tensor.data_ptr())


SIGNATURES = {  # p pointer, i integer, f float
    "rms_norm_forward": "ppppiifiii", "rms_norm_backward": "ppppppiiiii", "rope": "ppppiiiifii",
    "short_conv_forward": "pppppiiiiii", "short_conv_backward": "pppppppiiiiii",
    "activation_forward": "ipppiii", "activation_backward": "ipppppiii",
    "weighted_sum_forward": "ppppii", "weighted_sum_backward": "pppppppii", "cross_entropy": "pppiifii",
    "selective_scan_forward": "ppppppppiiiiii", "selective_scan_backward": "pppppppppppppiiiiii",
}  # fmt: skip
KINDS = {"p": Pointer, "i": ctypes.c_int64, "f": ctypes.c_float}


@cache
def build() -> ctypes.CDLL:
    """Compiles the kernels unless the cache folder has it for this compiler and CPU, and loads it.  Raises BuildError."""
    recipe = choose_recipe()
    path = library_path(digest(recipe))
    if not path.exists():
        compile_to(path, recipe)
    try:
        if recipe.runtime is not None:
            ctypes.CDLL(str(recipe.runtime), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        reason = first_line(error)
        raise BuildError(f"the kernel cannot be loaded ({reason}): delete {path}, or take attention='sdpa'") from error
    for function in (library.attention_forward, library.attention_backward):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in signature], None
    return library


def library_path(fingerprint: str) -> Path:
    """Where the machine code of that fingerprint is kept once it is compiled."""
    return default_cache_dir() / f"kernels-{fingerprint}.so"


def fingerprint() -> str:
    """Equal where the same machine code would be built; "none" where there is no compiler."""
    try:
        return digest(choose_recipe())
    except BuildError:
        return "none"


class Recipe(NamedTuple):
    command: list[str]  # all but the name of the output
    version: str  # what the compiler says about itself
    runtime: Path | None  # of OpenMP, where it has to be loaded before what the command makes


def choose_recipe() -> Recipe:
    """How to compile here.  Raises BuildError where there is no compiler.

    torch has an OpenMP runtime of its own. A second one in the same process would wait for work at the expense of the first,
    so the kernel takes torch's: GCC is given that file to link with, Apple's clang leaves the names open until they are loaded.
    Other compilers leave OpenMP out, and the kernel runs on one thread.
    """
    compiler = find_compiler()
    version = compiler_says([*compiler, "--version"])
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*compiler, *FLAGS, native, *(str(source) for source in SOURCES if source.suffix == ".cpp")]
    libraries = Path(torch.__file__).parent / "lib"
    if "clang" not in version:
        runtimes = sorted(libraries.glob("libgomp*.so*"))
        return Recipe([*command, "-fopenmp", "-Wl,--as-needed", *map(str, runtimes)], version, None)
    if sys.platform == "darwin" and (libraries / "libomp.dylib").exists():
        openmp = ["-Xpreprocessor", "-fopenmp", "-Wl,-undefined,dynamic_lookup"]
        return Recipe([*command, *openmp], version, libraries / "libomp.dylib")
    return Recipe([*command, "-fopenmp-simd"], version, None)


def find_compiler() -> list[str]:
    wanted = os.environ.get("CXX")
    for compiler in [shlex.split(wanted)] if wanted else [["g++"], ["clang++"]]:
        if path := shutil.which(compiler[0]):
            return [path, *compiler[1:]]
    missing = f"$CXX={wanted!r} is not" if wanted else "neither g++ nor clang++ is"
    raise BuildError(f"attention='kernel' needs a C++ compiler, but {missing} here: install g++, or take attention='sdpa'")


def compile_to(path: Path, recipe: Recipe):
    """Built beside its place and moved there in one step, so that two processes may do it at the same time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent, ignore_cleanup_errors=True) as folder:
            draft = Path(folder, path.name)
            compiler_says([*recipe.command, "-o", str(draft)])
            os.replace(draft, path)
    except OSError as error:
        reason = first_line(error)
        raise BuildError(f"the kernel cannot be kept ({reason}): set $BASEGPT_CACHE, or take attention='sdpa'") from error


def compiler_says(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({first_line(error)}): set $CXX, or take attention='sdpa'") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} cannot compile the kernels ({reason}): set $CXX, or take attention='sdpa'")
    return done.stdout


def digest(recipe: Recipe) -> str:
    """Of all that the machine code depends on: source, compiler, flags, CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or platform.processor()
    return hashlib.sha256(repr(([source.read_bytes() for source in SOURCES], recipe, cpu)).encode()).hexdigest()[:16]
