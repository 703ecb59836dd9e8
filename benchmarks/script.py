"""Shared by the benchmark scripts: command line, separate processes for measurements, tables and pages."""

import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.machine import cpu_name

HERE = Path(__file__).resolve().parent


def run_script(main: Callable, arguments_type: type, description: str, when_stopped: str = ""):
    """Call main with the command line arguments; report errors and Ctrl-C in one line."""
    try:
        main(tyro.cli(arguments_type, use_underscores=True, description=description))
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: {error}. Install what requirements-dev.txt lists")
    except KeyboardInterrupt:
        sys.exit(f"stopped. {when_stopped}".rstrip())


def new_process() -> ProcessPoolExecutor:
    """Start a separate process, so that variants do not share settings of threads, memory allocator and compiler.

    Start it while this process is small: on Linux a child inherits the peak memory of its parent.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def in_new_process(function: Callable, *arguments):
    """Call a function in a separate process that ends with the call."""
    with new_process() as process:
        return process.submit(function, *arguments).result()


def describe_machine() -> str:
    name = cpu_name().rpartition(":")[2].strip()
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{name}, {cores} cores, {threads} used, {platform.system()}, PyTorch {torch.__version__}, {date.today()}"


def quartiles(values: Iterable[float], style: str) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:{style}} ({low:{style}}–{high:{style}})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Format a markdown table as a list of lines."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def show(lines: list[str]) -> list[str]:
    print("\n".join(lines), flush=True)
    return lines


def save_page(path: Path, lines: list[str]):
    path.write_text("\n".join([f"`python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}`", "", *lines, ""]))
    print(f"written to {os.path.relpath(path)}")
