"""Compare models from the terminal.

    python -m evaluation compare A B C      # which run, or group of seeds, is better, and by how much
    python -m evaluation measures A         # where its loss is, how well it is calibrated, how often it repeats itself
    python -m evaluation probes A B         # what the architectures of these learn of synthetic tasks
    python -m evaluation scaling A B --sizes 0.25m 0.5m 1m 2m    # how their losses fall with the size, and which overtakes which
    python -m evaluation grade A B          # on storyworld: which share of their stories the world accepts, and what broke
    python -m evaluation cost A B           # parameters, FLOPs and memory, block by block
    python -m evaluation diff A B           # what differs between two architectures, block by block
"""

import argparse
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path

COMMANDS = {  # all but compare, with the module that holds their `main`
    "measures": "metrics.measures", "probes": "evaluation.probes", "scaling": "evaluation.scaling",
    "grade": "metrics.world_grades", "cost": "metrics.cost", "diff": "evaluation.diff",
}  # fmt: skip


def main(words: list[str]):
    """Run the command that the first word names. A mistake ends the program with one line."""
    names = ("compare", *COMMANDS)
    if not words or words[0] not in names:
        asked_for_help = words[:1] in (["--help"], ["-h"])
        usage = f"usage: python -m evaluation {{{','.join(names)}}} ... (--help behind it tells more)"
        sys.exit(print(usage) if asked_for_help else f"error: {usage}")
    try:
        command = import_module(COMMANDS[words[0]]).main if words[0] in COMMANDS else compare_runs
        command(words[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def compare_runs(words: list[str]):
    """Run `compare`: print the verdict, and write the page where --html names a file."""
    from evaluation.comparison import AT, compare

    parser = argparse.ArgumentParser(
        prog="python -m evaluation compare", description="Which run is better, and how sure is that?"
    )
    parser.add_argument("names", nargs="+", help="runs or groups in trained_models/; all are compared with the first")
    parser.add_argument("--at", choices=AT, default="end", help="compare at equal cost (default: the best weights of each run)")
    parser.add_argument("--all_pairs", action="store_true", help="compare each with each")
    parser.add_argument("--data_if_missing", help="score runs without losses on this where their own data are not here")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report there, too: one page that can be mailed")
    parser.add_argument("--prompts", nargs="+", help="what the stories in the report begin with")
    arguments = parser.parse_args(words)
    if arguments.html is not None and not arguments.html.parent.is_dir():
        raise FileNotFoundError(f"--html {arguments.html}: there is no folder {arguments.html.parent}: make it first")
    if arguments.prompts and arguments.html is None:
        raise ValueError("--prompts are for the report: name a file for it by --html")
    options = {"at": arguments.at, "all_pairs": arguments.all_pairs, "data_if_missing": arguments.data_if_missing}
    result = compare(*arguments.names, **options)
    print(result, flush=True)
    if arguments.html is not None:
        from evaluation.page import write_page

        print("\nfor the report: where the loss is, and what each model tells", file=sys.stderr)
        given = {"prompts": tuple(arguments.prompts)} if arguments.prompts else {}
        command = shlex.join(["python", "-m", "evaluation", "compare", *words])
        write_page(result, arguments.html, command=command, data_if_missing=arguments.data_if_missing, **given)
        print(f"\nthe report is in {arguments.html}")


if __name__ == "__main__":
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; a file is not to fill with progress bars
    main(sys.argv[1:])
