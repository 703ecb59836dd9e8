"""Evaluate and compare models from the terminal: `python -m evaluation --help`.

    python -m evaluation compare A B C      # which run, or group of seeds, is better, and by how much
    python -m evaluation audit A            # whether the scores can be right: no future, no memory of the validation stories …
    python -m evaluation measures A         # loss by position and word class, calibration, repetition
    python -m evaluation probes A B         # what the architectures learn on synthetic tasks
    python -m evaluation scaling A B --sizes 0.25m 0.5m 1m 2m    # how their losses fall with size, and which overtakes which
    python -m evaluation grade A B          # on storyworld: the share of possible stories, and what broke in the others
    python -m evaluation cost A B           # parameters, FLOPs and memory, block by block
    python -m evaluation diff A B           # the differences between two architectures, block by block
    python -m evaluation judge A B --model gpt-4o-mini           # a large language model grades and compares their stories
"""

import os
import shlex
import sys
from importlib import import_module

from evaluation import arguments
from runs.tables import show
from runs.terminal import errors_in_one_line, parse_command

PROG = "python -m evaluation"
COMMANDS = {name: getattr(arguments, name.capitalize()) for name in (
    "compare", "audit", "measures", "probes", "scaling", "grade", "cost", "diff", "judge",
)}  # fmt: skip
MODULES = {  # whose `main` runs the command; imported only then, as most need torch
    "audit": "evaluation.audit", "measures": "metrics.measures", "probes": "evaluation.probes", "scaling": "evaluation.scaling",
    "cost": "metrics.cost", "grade": "metrics.world_grades", "diff": "evaluation.diff", "judge": "evaluation.judge.judging",
}  # fmt: skip
STOPPED = "stopped; what was finished is saved, and the same command continues from there"


def main(words: list[str]):
    """Run the command named by the first word. A mistake ends the program with one line."""
    with errors_in_one_line(STOPPED):
        run(words)


def run(words: list[str]):
    """Parse the words and run the command. Raises ValueError, OSError or ImportError with one line."""
    takes_train_options = words[:1] == ["scaling"]
    parsed = parse_command(
        COMMANDS, words, PROG, "Evaluate and compare trained models. COMMAND --help explains its options.",
        unknown=takes_train_options,
    )  # fmt: skip
    if takes_train_options:
        import_module(MODULES["scaling"]).main(*parsed)
    elif words[0] == "compare":
        compare_runs(parsed, words)
    else:
        import_module(MODULES[words[0]]).main(parsed)


def compare_runs(arguments: arguments.Compare, words: list[str]):
    """Print the verdict, and write a report if --html names a file."""
    from evaluation.comparison import compare
    from evaluation.statistics import SIGNIFICANCE

    missing = {"data_if_missing": arguments.data_if_missing}
    result = compare(*arguments.names, at=arguments.at, all_pairs=arguments.all_pairs, **missing)
    show(result)
    if arguments.html is not None:
        from evaluation.page import write_page

        print("\nfor the report: measuring losses and writing stories", file=sys.stderr)
        options = {"prompts": arguments.prompts} if arguments.prompts else {}
        write_page(result, arguments.html, command=shlex.join([*PROG.split(), *words]), **missing, **options)
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
