"""Experiments: one idea, one folder in experiments/. Their presets, and how a new one is made."""

import importlib
import json
import keyword
import re
import shutil
from pathlib import Path

from config import ModelConfig, did_you_mean

FOLDER = Path(__file__).parents[1] / "experiments"
TEMPLATE, TEMPLATE_BLOCK, TEMPLATE_PRESET = "example", "ForgettingAttn", "forgetting"


def experiment_names() -> list[str]:
    return sorted(path.parent.name for path in FOLDER.glob("*/__init__.py"))


def check_experiment(name: str):
    """Raises ValueError with the nearest match where there is no experiment of that name."""
    if name not in experiment_names():
        there = experiment_names()
        raise ValueError(f"no experiment is called {name!r}.{did_you_mean(name, there)} There are: {', '.join(there)}")


def experiment_preset(name: str):
    """The Preset `EXPERIMENT/PRESET`: PRESET in the PRESETS of experiments/EXPERIMENT/config.py.

    Raises ValueError with the nearest match for an unknown one, ImportError where that file cannot be imported.
    """
    experiment, _, own = name.partition("/")
    check_experiment(experiment)
    module = f"experiments.{experiment}.config"
    try:
        presets = importlib.import_module(module).PRESETS
    except Exception as error:  # a reader's own code: anything may be wrong in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"the presets of {module} cannot be had: {reason}") from error
    if own not in presets:
        there = [f"{experiment}/{preset}" for preset in presets]
        raise ValueError(f"no preset is called {name!r}.{did_you_mean(name, there)} There are: {', '.join(there)}")
    return presets[own]


def new_experiment(name: str) -> Path:
    """Make experiments/NAME, a copy of the example with names of its own, whose test passes. Returns its folder.

    Its preset is called NAME, and its block as NAME in camel case. Raises ValueError for a name that is none, or is taken.
    """
    from modules.registry import all_blocks

    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} cannot be an experiment's name: use small letters, digits and '_', such as my_idea")
    folder, block = FOLDER / name, camel_case(name)
    if folder.exists():
        raise ValueError(f"experiments/{name} exists: take another name")
    if block in all_blocks(ModelConfig()):
        raise ValueError(f"{name!r} would call its block {block!r}, but that name is taken: take another name")
    left_out = shutil.ignore_patterns("__pycache__", "trained_models", ".ipynb_checkpoints", ".git")
    shutil.copytree(FOLDER / TEMPLATE, folder, ignore=left_out)
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
    """The text of a file of the example, with the names of another experiment, its block and its preset."""
    names = {TEMPLATE: name, TEMPLATE_PRESET: name, TEMPLATE_BLOCK: camel_case(name)}
    return re.sub(rf"(?<![A-Za-z])({'|'.join(names)})(?![A-Za-z])", lambda found: names[found[0]], text)


def without_outputs(notebook: str) -> str:
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


README = """# {name}

Say here what the idea is, where it comes from, and what came of it. So far this is the Forgetting Transformer of
[experiments/example](../example), with names of its own: put your idea in its place.

- [blocks.py](blocks.py) has the block, `{block}`;
- [config.py](config.py) the preset `{name}/{name}`;
- [test_{name}.py](test_{name}.py) what is promised: `pytest experiments/{name}`;
- [{name}.ipynb]({name}.ipynb) its shapes, and a short race with the base model.

```bash
python train.py --preset {name}/{name}
```
"""
