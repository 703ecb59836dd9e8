"""Evaluate and compare models from the terminal.

    python -m evaluation compare A B C      # which run, or group of seeds, is better, and by how much
    python -m evaluation measures A         # loss by position and word class, calibration, repetition
    python -m evaluation probes A B         # what the architectures learn on synthetic tasks
    python -m evaluation scaling A B --sizes 0.25m 0.5m 1m 2m    # how their losses fall with size, and which overtakes which
    python -m evaluation grade A B          # on storyworld: the share of possible stories, and what broke in the others
    python -m evaluation cost A B           # parameters, FLOPs and memory, block by block
    python -m evaluation diff A B           # the differences between two architectures, block by block
    python -m evaluation judge A B --model gpt-4o-mini           # a large language model grades and compares their stories
"""

import argparse
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {  # the module that holds the command's `main`; None is compare_runs below
    "compare": None, "measures": "metrics.measures", "probes": "evaluation.probes", "scaling": "evaluation.scaling",
    "grade": "metrics.world_grades", "cost": "metrics.cost", "diff": "evaluation.diff", "judge": "evaluation.judge.judging",
}  # fmt: skip


def main(words: list[str]):
    """Run the command named by the first word. An error ends the program with one line."""
    if not words or words[0] not in COMMANDS:
        usage = f"usage: python -m evaluation {{{','.join(COMMANDS)}}} ... (COMMAND --help lists its options)"
        sys.exit(print(usage) if words[:1] in (["--help"], ["-h"]) else f"error: {usage}")
    command, *words = words
    try:
        run = import_module(COMMANDS[command]).main if COMMANDS[command] else compare_runs
        run(words)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped; what was finished is saved, and the same command continues from there", file=sys.stderr)
        sys.exit(130)  # as a shell does after Ctrl-C


def compare_runs(words: list[str]):
    """Print the verdict, and write a report if --html names a file."""
    from evaluation.comparison import AT, compare
    from evaluation.statistics import SIGNIFICANCE

    parser = argparse.ArgumentParser(
        prog="python -m evaluation compare", description="Which run is better, and how certain is that?"
    )
    parser.add_argument("names", nargs="+", help="runs or groups in trained_models/; all are compared with the first")
    parser.add_argument("--at", choices=AT, default="end", help="compare at equal cost (default: the best weights of each run)")
    parser.add_argument("--all_pairs", action="store_true", help="compare every pair")
    parser.add_argument("--data_if_missing", help="score runs without losses on this if their own data are not available")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write a report, one self-contained page")
    parser.add_argument("--exit_code", action="store_true", help="exit with 3 unless all pairs differ, for scripts")
    parser.add_argument("--prompts", nargs="+", help="what the stories in the report start with")
    arguments = parser.parse_args(words)
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise FileNotFoundError(f"--html {arguments.html}: there is no folder {arguments.html.parent}: make it first")
    if arguments.prompts and arguments.html is None:
        raise ValueError("--prompts are for the report: name a file for it by --html")
    missing = {"data_if_missing": arguments.data_if_missing}
    result = compare(*arguments.names, at=arguments.at, all_pairs=arguments.all_pairs, **missing)
    print(result, flush=True)
    if arguments.html is not None:
        from evaluation.page import write_page

        print("\nfor the report: measuring losses and writing stories", file=sys.stderr)
        options = {"prompts": tuple(arguments.prompts)} if arguments.prompts else {}
        command = shlex.join(["python", "-m", "evaluation", "compare", *words])
        write_page(result, arguments.html, command=command, **missing, **options)
        print(f"\nthe report is in {arguments.html}")
    if arguments.exit_code:
        if result.differences.empty:
            raise ValueError("nothing could be compared; the notes above say why")
        if not (result.differences["p (corrected)"] <= SIGNIFICANCE).all():
            sys.exit(3)


if __name__ == "__main__":
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; keeps progress bars in a log file short
    main(sys.argv[1:])
