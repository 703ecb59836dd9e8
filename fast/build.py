"""Compile the C++ kernels for this machine once, and load them."""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.cache import default_cache_dir, first_line

SOURCES = [Path(__file__).with_name(name) for name in ("attention.cpp", "elementwise.cpp", "scan.cpp", "kernels.h")]
FLAGS = ["-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]


class BuildError(ValueError):
    """The kernels cannot be built on this machine; the message is one line with the cure."""


class TensorOf:
    """The type of a tensor argument of the library: a tensor of one of these dtypes, or None for a null pointer."""

    def __init__(self, *dtypes: torch.dtype):
        self.dtypes = dtypes

    def from_param(self, tensor: Tensor | None) -> ctypes.c_void_p:
        assert tensor is None or tensor.dtype in self.dtypes, f"the kernel reads {self.dtypes}, not {tensor.dtype}"
        return ctypes.c_void_p(tensor if tensor is None else tensor.data_ptr())


KINDS = {
    "x": TensorOf(torch.float32, torch.bfloat16), "w": TensorOf(torch.float32), "s": TensorOf(torch.int32),
    "t": TensorOf(torch.int64), "i": ctypes.c_int64, "f": ctypes.c_float,
}  # fmt: skip
SIGNATURES = {
    "rms_norm_forward": "xwxwiifiii", "rms_norm_backward": "xxwwxwiiiii", "rope": "xwwxiiiifii",
    "short_conv_forward": "xwwsxiiiiii", "short_conv_backward": "xxwsxwwiiiiii",
    "activation_forward": "ixxxiii", "activation_backward": "ixxxxxiii",
    "weighted_sum_forward": "wwwwii", "weighted_sum_backward": "wwwwwwwii", "cross_entropy": "xtwiifii",
    "selective_scan_forward": "wwwwwswwiiiiii", "selective_scan_backward": "wwwwwswwwwwwwiiiiii",
}  # fmt: skip


@cache
def build() -> ctypes.CDLL:
    """Load the kernels, compiled first unless they are in the cache folder for this compiler and CPU.  Raises BuildError."""
    recipe = find_recipe()
    path = library_path(digest(recipe))
    if not os.path.exists(path):  # False also for a cache that this account may not read
        compile_to(path, recipe)
    try:
        if recipe.runtime is not None:
            ctypes.CDLL(str(recipe.runtime), mode=ctypes.RTLD_GLOBAL)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        reason = first_line(error)
        raise BuildError(f"the kernel cannot be loaded ({reason}): delete {path}, or take --train.fast False") from error
    for function in (library.attention_forward, library.attention_backward):
        function.argtypes, function.restype = [ctypes.c_char_p], None
    for name, signature in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [KINDS[kind] for kind in signature], None
    return library


def library_path(fingerprint: str) -> Path:
    """Where the library with that fingerprint is cached."""
    return default_cache_dir() / f"kernels-{fingerprint}.so"


def fingerprint() -> str:
    """Digest of everything that the library depends on; "none" without a compiler."""
    try:
        return digest(find_recipe())
    except BuildError:
        return "none"


class Recipe(NamedTuple):
    command: list[str]  # without the name of the output
    version: str  # of the compiler
    runtime: Path | None  # the OpenMP library, if it has to be loaded first


def find_recipe() -> Recipe:
    """How to compile on this machine.  Raises BuildError without a compiler.

    PyTorch brings its OpenMP runtime. The threads of a second one would busy-wait and slow down the first, so the kernels use
    PyTorch's: GCC links with that file, Apple's clang leaves the symbols undefined until the library is loaded. With other
    compilers the kernels run on one thread.
    """
    compiler = find_compiler()
    version = run_compiler([*compiler, "--version"])
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
    """The command of the compiler: $CXX, or else g++ or clang++."""
    name = os.environ.get("CXX")
    for compiler in [shlex.split(name)] if name else [["g++"], ["clang++"]]:
        if path := shutil.which(compiler[0]):
            return [path, *compiler[1:]]
    missing = f"$CXX={name!r} is not" if name else "neither g++ nor clang++ is"
    raise BuildError(f"fast=True needs a C++ compiler, but {missing} here: install g++, or take --train.fast False")


def compile_to(path: Path, recipe: Recipe):
    """Compile to a temporary file and rename it, so that several processes may compile at once."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="building-", dir=path.parent, ignore_cleanup_errors=True) as folder:
            library = Path(folder, path.name)
            run_compiler([*recipe.command, "-o", str(library)])
            os.replace(library, path)
    except OSError as error:
        reason = first_line(error)
        raise BuildError(f"the kernel cannot be saved ({reason}): set $BASEGPT_CACHE, or take --train.fast False") from error


def run_compiler(command: list[str]) -> str:
    """Run the compiler and return its output.  Raises BuildError with its first error."""
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({first_line(error)}): set $CXX, or take --train.fast False") from error
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} cannot compile the kernels ({reason}): set $CXX, or take --train.fast False")
    return process.stdout


def digest(recipe: Recipe) -> str:
    """Digest of sources, compiler, flags and CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or platform.processor()
    return hashlib.sha256(repr(([source.read_bytes() for source in SOURCES], recipe, cpu)).encode()).hexdigest()[:16]
