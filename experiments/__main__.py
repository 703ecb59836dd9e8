"""python -m experiments new my_idea: make experiments/my_idea, a folder for an idea of your own."""

import argparse
import sys

from runs.experiments import new_experiment


def main(words: list[str]):
    """The command line. A mistake ends the program with one line."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description="Folders for ideas of your own.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    making = commands.add_parser("new", help="make a folder in experiments/ for an idea")
    making.add_argument("name", help="small letters, digits and _, such as my_idea")
    name = parser.parse_args(words).name
    try:
        new_experiment(name)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"""made experiments/{name}. It is the example with names of its own: put your idea into its blocks.py.
Check what it promises:  pytest experiments/{name}
Train it:                python train.py --preset {name}/{name}""")


if __name__ == "__main__":
    main(sys.argv[1:])
