"""Promises of the pages for people: links, commands, options and code in them are real."""

import ast
import importlib.util
import re
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from PIL import Image

from config import ModelConfig, TrainConfig
from conftest import MODEL
from evaluation.__main__ import COMMANDS
from modules.registry import build_model
from runs import presets
from runs.command_line import parse, read_layers

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("experiments", "benchmarks")),
    *(ROOT / "experiments" / name / "README.md" for name in ("example", "masked_diffusion", "diffuseq")),
]  # fmt: skip
page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def code_blocks(path: Path, language: str = r"\w*") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_every_relative_link_exists(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@page
def test_every_command_exists(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for command in re.findall(r"python -m evaluation (\w+)", text):
        assert command in COMMANDS
    for script in re.findall(r"python ([\w/]+\.py)", text):
        assert (ROOT / script).exists(), script


@page
def test_every_option_of_the_config_exists(page):
    for group, config in (("model", ModelConfig), ("train", TrainConfig)):
        names = {field.name for field in fields(config)}
        for pair in re.findall(rf"--{group}\.(\w+)|\b{group}\.(\w+)=", page.read_text(encoding="utf-8")):
            option = "".join(pair)
            assert option.removeprefix("no_") in names, option


@page
def test_every_import_in_python_code_works(page):
    for code in code_blocks(page, "python"):
        for node in ast.parse(code).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(ast.unparse(node), {})


def test_every_layer_string_of_the_config_page_builds():
    table = re.findall(r"^\| [^|]+ \| `\"(.*)\"` \|$", (ROOT / "docs" / "config.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(table) == 8
    for layers in table:
        changes = {"layers": read_layers(layers.replace(r"\|", "|")), "num_layers": 2}
        build_model(ModelConfig(**{**vars(MODEL), **changes}), 50)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@page
def test_code_fits_a_screen(page):
    for line in (line for code in code_blocks(page) for line in code.splitlines()):
        assert len(line) < 95 or page.parent.name == "benchmarks", line  # there, tables.py writes them


def test_the_recipe_of_tracking_logs_every_step(make_config, folders, monkeypatch):
    logged = []
    tracker = SimpleNamespace(init=lambda project, name, config: None, finish=lambda: None,
                              log=lambda metrics, step: logged.append((step, metrics)))  # fmt: skip
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setattr(presets, "preset", lambda name: (MODEL, make_config(max_steps=10)))
    (recipe,) = code_blocks(ROOT / "docs" / "tracking.md", "py")
    exec(recipe, {})
    assert [step for step, _ in logged] == list(range(1, 11)) and "step" not in logged[0][1]
    assert "bits_per_byte" not in logged[0][1] and logged[-1][1]["bits_per_byte"] > 0


def test_shell_completion_of_the_readme_completes(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert "_tyro_train_py" in (ROOT / "README.md").read_text(encoding="utf-8")
    with pytest.raises(SystemExit), redirect_stdout(StringIO()) as script:
        parse(["--tyro-print-completion", "bash"])
    assert "complete -F _tyro_train_py train.py" in script.getvalue() and "train.lr_max" in script.getvalue()


@page
def test_every_picture_has_a_text_and_exists(page):
    text = page.read_text(encoding="utf-8")
    pictures = re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text)
    for tag in re.findall(r"<img [^>]*>", text):
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        pictures.append((attributes.get("alt", ""), attributes["src"]))
    for alt, path in pictures:
        assert len(alt) > 10 and (page.parent / path).exists(), path


@pytest.fixture(scope="module")
def pictures():
    """docs/pictures.py as a module."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_results_of_the_shipped_runs(pictures, shipped):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| \[(.+)\]\(trained_models/", text, re.MULTILINE)
    assert "2m_speedrun" in names
    assert pictures.with_results(text, names) == text, "run python docs/pictures.py results"


def test_every_notebook_has_a_thumbnail_of_an_output(pictures):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(pictures.SHOWN) == set(re.findall(r"\]\((\w+)\.ipynb\)", readme))
    for name, words in pictures.SHOWN.items():
        cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
        assert any(words in cell.source and cell.outputs for cell in cells if cell.cell_type == "code"), name
        image = f"docs/images/{name}.png"
        assert f'src="{image}"' in readme and Image.open(ROOT / image).size == pictures.THUMBNAIL
