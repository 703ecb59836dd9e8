"""Attention for training on a CPU, about twice as fast as torch's, more for packed stories: kernels.cpp, compiled when needed.

B batch, H query heads, G key/value heads, T time, K head dim.
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

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(RuntimeError):
    """The kernel cannot be had on this machine; the message is one line with the cure."""


def attention(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> Tensor:
    """Causal grouped-query attention with a gradient.  q (B, H, T, K), k and v (B, G, T, K) → (B, H, T, K), as q

    The query at time t sees the keys from first[b, t] to t: first (B, T) of integers says where its story begins, or its
    window; None is 0 everywhere, and int32 saves a conversion. What no query sees costs nothing. All is computed in float32,
    and comes out the same to the last bit with any number of threads. Raises BuildError where there is no compiler.
    """
    first = None if first is None else first.to(torch.int32).contiguous()
    return Attention.apply(q.float(), k.float(), v.float(), first).to(q.dtype)


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
    """`Attention` of kernels.cpp as far as the call reads it: 6 sizes, 2 pointers, and pointer and strides of each view."""
    B, H, T, K = q.shape
    pointers = 0 if first is None else first.data_ptr(), lse.data_ptr()
    views = [number for x in (q, *others) for number in (x.data_ptr(), *x.stride()[:3])]
    return struct.pack(f"{8 + len(views)}q", B, H, G, T, K, torch.get_num_threads(), *pointers, *views)


def empty_outputs(q, k, v, first):
    B, H, T, K = q.shape
    assert H % k.shape[1] == 0 and k.shape == v.shape == (B, k.shape[1], T, K) and (first is None or first.shape == (B, T))
    return empty_as_projected(q), q.new_empty(B, H, T)


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


@cache
def build() -> ctypes.CDLL:
    """Compiles kernels.cpp unless the cache folder has it for this compiler and CPU, and loads it.  Raises BuildError."""
    from data import default_cache_dir  # not on top: it takes a while to import, and most models do without the kernel

    recipe = choose_recipe()
    path = default_cache_dir() / f"kernels-{digest(recipe)}.so"
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
    return library


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
    command = [*compiler, *FLAGS, native, str(SOURCE)]
    libraries = Path(torch.__file__).parent / "lib"
    if "clang" not in version:
        runtimes = sorted(libraries.glob("libgomp*.so*"))
        return Recipe([*command, "-fopenmp", "-Wl,--as-needed", *map(str, runtimes)], version, None)
    if sys.platform == "darwin" and (libraries / "libomp.dylib").exists():
        openmp = ["-Xpreprocessor", "-fopenmp", "-Wl,-undefined,dynamic_lookup"]
        return Recipe([*command, *openmp], version, libraries / "libomp.dylib")
    return Recipe(command, version, None)


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
        raise BuildError(f"{command[0]} cannot compile kernels.cpp ({reason}): set $CXX, or take attention='sdpa'")
    return done.stdout


def digest(recipe: Recipe) -> str:
    """Of all that the machine code depends on: source, compiler, flags, CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or platform.processor()
    return hashlib.sha256(repr((SOURCE.read_bytes(), recipe, cpu)).encode()).hexdigest()[:16]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
