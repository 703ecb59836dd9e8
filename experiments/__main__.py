"""Start a new experiment from a template of templates/.

    python -m experiments new my_idea                     # creates experiments/my_idea, with a block and a passing test
    python -m experiments new my_idea --kind attention    # or another kind
"""

import keyword
import re
import sys
from pathlib import Path
from typing import Literal, get_args

from runs import experiments
from runs.terminal import errors_in_one_line, parse_command

TEMPLATES = Path(__file__).parent / "templates"
Kind = Literal["block", "attention", "model", "loss", "optimizer", "data"]


def main(words: list[str]):
    """Run the command line. A mistake ends the program with one line."""
    with errors_in_one_line():
        parse_command({"new": new}, words, "python -m experiments", "Make a folder for an idea of your own.")


def new(name: str, /, kind: Kind = "block"):
    """Make a folder in experiments/ for an idea.

    Args:
        name: small letters, digits and _, such as my_idea
        kind: what the idea is
    """
    new_experiment(name, kind)
    print(f"""made experiments/{name}: put your idea into its {plugin_file(kind)}.
Check what it promises:  pytest experiments/{name}
Train it:                python train.py --preset {name}/{name}""")


def new_experiment(name: str, kind: Kind = "block") -> Path:
    """Copy the template of a kind to experiments/NAME, with its names replaced by that of the experiment. Returns the folder.

    The preset is called NAME, the class NAME in camel case. Raises ValueError for an invalid name, or one that is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be an experiment's name: use small letters, digits and '_', such as my_idea")
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: give one of {', '.join(get_args(Kind))}")
    folder = experiments.FOLDER / name
    if folder.exists():
        raise ValueError(f"experiments/{name} exists: take another name")
    check_not_taken(name)
    folder.mkdir()
    for path in [*(TEMPLATES / "common").iterdir(), *(TEMPLATES / kind).iterdir()]:
        if path.is_file():
            text = renamed(path.read_text(encoding="utf-8"), name, kind)
            (folder / path.name.replace("template", name)).write_text(text, encoding="utf-8")
    return folder


def check_not_taken(name: str):
    """Raise ValueError if a block, model, ... of the core has the name that the experiment would give to its own."""
    from modules.registry import BLOCKS, MODELS

    for taken in {*BLOCKS, *MODELS} & {name, camel_case(name)}:
        raise ValueError(f"{name!r} would call what it makes {taken!r}, but that name is taken: take another name")


def plugin_file(kind: Kind) -> str:
    """The file of a template that holds the idea, such as blocks.py."""
    others = ("__init__.py", "config.py", "test_template.py")
    (file,) = [path.name for path in (TEMPLATES / kind).glob("*.py") if path.name not in others]
    return file


def camel_case(name: str) -> str:
    """'my_idea' becomes 'MyIdea'"""
    return "".join(part.capitalize() for part in name.split("_"))


def renamed(text: str, name: str, kind: Kind) -> str:
    """The text of a file of a template, as that of an experiment of that name."""
    names = {"template": name, "Template": camel_case(name), "PLUGIN": plugin_file(kind)}
    places = r"\btemplates\.\w+|(?<![A-Za-z])(?:[Tt]emplate|PLUGIN)(?![A-Za-z])"
    return re.sub(places, lambda match: names.get(match[0], name), text)


if __name__ == "__main__":
    main(sys.argv[1:])
