"""The examples in the docstrings give what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("data", "evaluation", "metrics", "modules", "runs", "shapes", "training")
CORE = ("config.py", "model.py", "tokenizer.py", "train.py", "inference.py", "tools.py")
FILES = [*(ROOT / name for name in CORE), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
NAMES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", NAMES)
def test_examples_in_docstrings_are_true(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
