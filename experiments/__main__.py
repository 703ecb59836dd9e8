"""Start a new experiment: a renamed copy of the example.

    python -m experiments new my_idea    # creates experiments/my_idea, with a passing test
"""

import json
import keyword
import re
import shutil
import sys
from pathlib import Path

from config import ModelConfig
from runs import experiments
from runs.terminal import errors_in_one_line, parse_command

TEMPLATE, TEMPLATE_BLOCK, TEMPLATE_PRESET = "example", "ForgettingAttn", "forgetting"


def main(words: list[str]):
    """Run the command line. A mistake ends the program with one line."""
    with errors_in_one_line():
        parse_command({"new": new}, words, "python -m experiments", "Make a folder for an idea of your own.")


def new(name: str, /):
    """Make a folder in experiments/ for an idea.

    Args:
        name: small letters, digits and _, such as my_idea
    """
    new_experiment(name)
    print(f"""made experiments/{name}, a renamed copy of the example: put your idea into its blocks.py.
Check what it promises:  pytest experiments/{name}
Train it:                python train.py --preset {name}/{name}""")


def new_experiment(name: str) -> Path:
    """Copy the example to experiments/NAME, with the experiment, its preset and its block renamed. Returns the folder.

    The preset is called NAME, the block NAME in camel case. Raises ValueError for an invalid name, or one that is taken.
    """
    from modules.registry import all_blocks

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be an experiment's name: use small letters, digits and '_', such as my_idea")
    folder, block = experiments.FOLDER / name, camel_case(name)
    if folder.exists():
        raise ValueError(f"experiments/{name} exists: take another name")
    if block in all_blocks(ModelConfig()):
        raise ValueError(f"{name!r} would call its block {block!r}, but that name is taken: take another name")
    left_out = shutil.ignore_patterns("__pycache__", "trained_models", ".ipynb_checkpoints", ".git")
    shutil.copytree(experiments.FOLDER / TEMPLATE, folder, ignore=left_out)
    for path in sorted(folder.iterdir()):
        text = renamed(path.read_text(encoding="utf-8"), name)
        if path.suffix == ".ipynb":
            text = without_outputs(text)
        path.unlink()
        (folder / path.name.replace(TEMPLATE, name)).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(README.format(name=name, block=block), encoding="utf-8")
    return folder


def camel_case(name: str) -> str:
    """'my_idea' becomes 'MyIdea'"""
    return "".join(part.capitalize() for part in name.split("_"))


def renamed(text: str, name: str) -> str:
    """The text of a file of the example, with its experiment, block and preset renamed."""
    names = {TEMPLATE: name, TEMPLATE_PRESET: name, TEMPLATE_BLOCK: camel_case(name)}
    return re.sub(rf"(?<![A-Za-z])({'|'.join(names)})(?![A-Za-z])", lambda match: names[match[0]], text)


def without_outputs(notebook: str) -> str:
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


README = """# {name}

Say here what the idea is, where it comes from, and what came of it. So far this is the Forgetting Transformer of
[experiments/example](../example), renamed: put your idea in its place.

- [blocks.py](blocks.py) has the block, `{block}`;
- [config.py](config.py) the preset `{name}/{name}`;
- [test_{name}.py](test_{name}.py) what is promised: `pytest experiments/{name}`;
- [{name}.ipynb]({name}.ipynb) its shapes, and a short race with the base model.

```bash
python train.py --preset {name}/{name}
```
"""


if __name__ == "__main__":
    main(sys.argv[1:])
