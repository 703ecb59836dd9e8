"""Compile the C++ kernels for this machine, once, and load them."""

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
    """The kernels are not available on this machine; the message is one line with the cure."""


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
        raise BuildError(f"the kernel cannot be loaded ({reason}): delete {path}, or take --train.fast False") from error
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
    raise BuildError(f"fast=True needs a C++ compiler, but {missing} here: install g++, or take --train.fast False")


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
        raise BuildError(f"the kernel cannot be kept ({reason}): set $BASEGPT_CACHE, or take --train.fast False") from error


def compiler_says(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run ({first_line(error)}): set $CXX, or take --train.fast False") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} cannot compile the kernels ({reason}): set $CXX, or take --train.fast False")
    return done.stdout


def digest(recipe: Recipe) -> str:
    """Of all that the machine code depends on: source, compiler, flags, CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}) or platform.processor()
    return hashlib.sha256(repr(([source.read_bytes() for source in SOURCES], recipe, cpu)).encode()).hexdigest()[:16]
