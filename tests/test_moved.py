"""Promises of runs/moved.py: an import of an old place is answered with the new one."""

from pathlib import Path

import pytest
from errors import one_line_error

from runs import experiments
from runs.moved import MOVED, moved_to
from runs.presets import preset

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("line, place", [
    ("from visibility import visible", "model.py: `from model import ...`"),
    ("from kernels import attention", "fast/ops.py: `from fast.ops import ...`"),
    ("from data import load_data", "data/dataset.py: `from data.dataset import ...`"),
    ("from runs import Run, load_model", "runs/folder.py: `from runs.folder import ...`"),
    ("from runs import load_model", "inference.py: `from inference import ...`"),
])  # fmt: skip
def test_an_old_import_is_answered_with_the_new_place(line, place):
    with pytest.raises(ImportError) as error:
        exec(line)
    assert moved_to(error.value) == f" It is now in {place}"


@pytest.mark.parametrize("line", ["import nothing_of_that_name", "from modules.registry import nothing", "presets", "1 / 0"])
def test_other_errors_are_left_alone(line):
    with pytest.raises((ImportError, NameError, ZeroDivisionError)) as error:
        exec(line)
    assert moved_to(error.value) == ""


def test_every_new_place_exists_and_no_old_one():
    for old, new in MOVED.items():
        assert (ROOT / f"{new.replace('.', '/')}.py").is_file(), new
        assert not (ROOT / f"{old}.py").exists(), old


def test_an_experiment_that_imports_an_old_place_is_told(folders, monkeypatch):
    monkeypatch.setattr(experiments, "FOLDER", folders / "experiments")
    idea = folders / "experiments" / "an_old_idea"
    idea.mkdir(parents=True)
    (idea / "__init__.py").touch()
    (idea / "config.py").write_text("from presets import Preset, preset\n", encoding="utf-8")
    monkeypatch.setattr("experiments.__path__", [str(idea.parent)])
    one_line_error(lambda: preset("an_old_idea/x"), "It is now in runs/presets.py: `from runs.presets", error=ImportError)
