"""What this machine can do: device, number format, compiler, memory."""

import os
import shutil
import sys

import torch

from config import TrainConfig


def choose_device(device: str) -> torch.device:
    """The device of that name, or the best there is. Raises ValueError for one that this machine does not have."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}): take --train.device cpu") from error
    return torch.device(device)


def choose_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The type of matrix products under autocast.

    On a CPU with bfloat16 units, bfloat16 pays once the casts are fused by compile; step by step it is no faster.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and config.compile and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast else torch.float32


def check_compiler(device: torch.device):
    """Raises ValueError where torch.compile would need a C++ compiler that is not here."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"compile=True needs the C++ compiler {compiler!r}, which is not here: install it, or leave compile off")


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
