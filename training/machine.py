"""Device, compiler and memory of this machine."""

import ctypes
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_device(device: str) -> torch.device:
    """Return the device of that name, or the best one for "auto". Raises ValueError if it is not available."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a missing device
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used here ({reason}): take --train.device cpu") from error
    return torch.device(device)


def cpu_name() -> str:
    """Model name of the CPU, from /proc/cpuinfo if that has one."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else f"{platform.processor()} {platform.machine()}".strip()


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What a run records of the machine that trains it."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "processor": processor, "cores": os.cpu_count(), "torch": torch.__version__}


def check_compiler(device: torch.device):
    """Raise ValueError if torch.compile needs a C++ compiler that is not installed."""
    compiler = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(f"compile=True needs the C++ compiler {compiler!r}, which is not here: install it, or leave compile off")


def peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def keep_freed_memory():
    """Keep glibc from returning freed memory to the system: the next step would take thousands of page faults to get it back."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError is only raised on GPUs; on a CPU only the message identifies it."""
    messages = ("can't allocate memory", "bad_alloc", "Cannot allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(message in str(error) for message in messages)


def available_memory(device: torch.device) -> float:
    """Bytes of free memory, within the limits of this process and of its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [psutil.virtual_memory().available]
    if sys.platform != "win32":
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            free.append(limit - psutil.Process().memory_info().vms)
    free += [limit - used for limit, used in container_limits()]
    return max(0, min(free))


def container_limits(root: Path = Path("/")) -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use without the page cache) of each cgroup of this process.

    Supports cgroups v1 and v2; a group's limit includes all groups below it (Linux, Documentation/admin-guide/cgroup-v2.rst and
    cgroup-v1/memory.rst). In a container the process's group may be mounted as the root instead of at the path in /proc.
    """
    listing = root / "proc/self/cgroup"
    for line in listing.read_text().splitlines() if listing.exists() else []:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = top / group.strip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            limit, used, statistics = (folder / name for name in (*names[:2], "memory.stat"))
            if limit.exists() and used.exists() and limit.read_text().strip().isdigit():
                stat = dict(line.split() for line in statistics.read_text().splitlines()) if statistics.exists() else {}
                yield int(limit.read_text()), int(used.read_text()) - int(stat.get(names[2], 0))
