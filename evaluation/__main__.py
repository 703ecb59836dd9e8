"""Compare models from the terminal.

    python -m evaluation compare A B C      # which run, or group of seeds, is better, and by how much
    python -m evaluation measures A         # where its loss is, how well it is calibrated, how often it repeats itself
    python -m evaluation probes A B         # what the architectures of these learn of synthetic tasks
    python -m evaluation scaling A B --sizes 0.25m 0.5m 1m 2m    # how their losses fall with the size, and which overtakes which
    python -m evaluation grade A B          # on storyworld: which share of their stories the world accepts, and what broke
    python -m evaluation cost A B           # parameters, FLOPs and memory, block by block
    python -m evaluation diff A B           # what differs between two architectures, block by block
"""

import os
import sys
from importlib import import_module

COMMANDS = {  # the module that holds the command's `main`
    "compare": "evaluation.comparison", "measures": "metrics.measures", "probes": "evaluation.probes",
    "scaling": "evaluation.scaling", "grade": "metrics.world_grades", "cost": "metrics.cost", "diff": "evaluation.diff",
}  # fmt: skip


def main(words: list[str]):
    """The command line: the first word chooses what is done with the others. A mistake ends the program with one line."""
    if not words or words[0] not in COMMANDS:
        asked_for_help = words[:1] in (["--help"], ["-h"])
        usage = f"usage: python -m evaluation {{{','.join(COMMANDS)}}} ... (--help behind it tells more)"
        sys.exit(print(usage) if asked_for_help else f"error: {usage}")
    try:
        import_module(COMMANDS[words[0]]).main(words[1:])
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; a file is not to fill with progress bars
    main(sys.argv[1:])
