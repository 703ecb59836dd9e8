"""Shared by the benchmark scripts: command line, separate processes for measurements, tables, results files.

A script measures raw results, a dict of plain values, and its tables(raw) makes the tables that it prints, by caption. With
--save NAME the raw results go to results/NAME.json, from which tables.py makes the same tables for README.md.
"""

import json
import multiprocessing
import os
import platform
import re
import shlex
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
RESULTS = HERE / "results"

Row = dict[str, str]  # plain numbers and words by column; "x: from" and the like belong to the cell of x, see table


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
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    return f"{name}, {cores} cores, {threads} used, {platform.system()}, {versions}, {date.today()}"


def quartiles(column: str, values: Iterable[float], style: str) -> Row:
    """Cell with the median and the quartiles of values."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {column: f"{middle:{style}}", f"{column}: from": f"{low:{style}}", f"{column}: to": f"{high:{style}}"}


def table(rows: list[Row]) -> list[str]:
    """Format rows as the lines of a markdown table.

    >>> table([{"": "ours", "tokens/s": "13247", "tokens/s: from": "12118", "tokens/s: to": "13362"}])[-1]
    '| ours | 13,247 (12,118–13,362) |'
    """
    head = dict.fromkeys(column.partition(": ")[0] for row in rows for column in row)
    lines = [[_cell(row, column) for column in head] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)]


def _cell(row: Row, column: str) -> str:
    """Join a value and its parts: a range in brackets, ± a margin, others after a semicolon."""
    text = ""
    for name, value in row.items():
        main, _, part = name.partition(": ")
        if main == column and value:
            value = re.sub(r"^\d{4,}", lambda digits: f"{int(digits[0]):,}", value)
            text += {"": "", "from": " (", "to": "–", "±": " ± "}.get(part, "; ") + value + ")" * (part == "to")
    return text or "–"


def page(tables: dict[str, list[Row]]) -> str:
    """Markdown of tables, each below its caption."""
    return "\n".join(line for caption, rows in tables.items() for line in ([caption, ""] * bool(caption) + [*table(rows), ""]))


def report(tables: Callable[[dict], dict[str, list[Row]]], raw: dict, name: str | None):
    """Print the tables of raw results; with a name, also save the results."""
    print(f"{describe_machine()}\n\n{page(tables(raw))}", flush=True)
    if name:
        save(name, raw)
        print(f"written to {results_file(name)}: python benchmarks/tables.py shows it in README.md", file=sys.stderr)


def results_file(name: str) -> Path:
    return RESULTS / f"{name}.json"


def save(name: str, raw: dict):
    """Write raw results to results/NAME.json, with the command, the machine and the versions that made them."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    text = json.dumps({"command": command, "machine": describe_machine(), "raw": raw}, indent=1)
    text = re.sub(r"\[\n([^][{}]*)\]", lambda numbers: "[" + " ".join(numbers[1].split()) + "]", text)  # one line each
    results_file(name).write_text(text + "\n", encoding="utf-8")
