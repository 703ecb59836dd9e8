"""Every notebook runs from top to bottom, and is committed as people should read it on a web page."""

import ast
import re
import shutil
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from conftest import MODEL, change
from train import train
from training.report import film_strip

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = "experiments/example/example"
NOTEBOOKS = ["build_tokenizer", "inference", "model_evaluation", "testing_modules", "train", EXAMPLE]
MACHINE_PATH = re.compile(r"""(?<![\w.:/])(/(home|Users|root|tmp|work|private|var|mnt|opt|usr)/|[A-Z]:\\\\?\w)""")


def read(name: str):
    return nbformat.read(REPOSITORY / f"{name}.ipynb", as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_parameters(cell) -> bool:
    return "parameters" in cell.metadata.get("tags", [])


def printed(notebook) -> str:
    """All that the notebook shows, but pictures."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    texts = [text for output in outputs for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join([output.get("text", "") for output in outputs] + texts)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, for notebooks that write into their folder."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "tests", "trained_models")
    return shutil.copytree(REPOSITORY, tmp_path_factory.mktemp("copy") / "copy", ignore=ignored)


@pytest.fixture
def run(copy, monkeypatch):
    """Run a notebook with other parameters, once or again and again in one kernel, and return it with its outputs."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel shows its plots in the notebook
    monkeypatch.setenv("CXX", "no-such-compiler")  # nothing is compiled

    def run_notebook(name: str, /, *again: dict, folder: str = "", **parameters):
        notebook = read(name)
        place = next(number for number, cell in enumerate(notebook.cells) if is_parameters(cell))
        known = {node.id for node in ast.walk(ast.parse(notebook.cells[place].source)) if isinstance(node, ast.Name)}
        cells, notebook.cells = notebook.cells, []
        for changes in (parameters, *again):
            assert changes.keys() <= known
            assignments = "\n".join(f"{parameter} = {value!r}" for parameter, value in changes.items())
            changed = [*cells[: place + 1], nbformat.v4.new_code_cell(assignments), *cells[place + 1 :]]
            notebook.cells += map(deepcopy, changed)
        resources = {"metadata": {"path": str((copy / name).parent / folder)}}
        return NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()

    return run_notebook


def test_train_leaves_a_run_and_runs_again(run, corpus, folders):
    small = {"preset": "0.5m_short_and_thick", "data": corpus}
    idea = {"layers": "Norm->ForgettingAttn->+->Norm->MLP->+", "plugins": ("experiments.example.blocks",)}
    shown = printed(run("train", small | idea | {"max_minutes": 0.001}, max_minutes=0.02, eval_every=10, **small))
    assert '--model.layers "Norm->ForgettingAttn->+->Norm->MLP->+"' in shown
    assert "--model.plugins experiments.example.blocks" in shown
    first, second = sorted((folders / "runs").iterdir(), key=lambda folder: (folder / "model_config.json").stat().st_mtime_ns)
    for folder in (first, second):
        assert folder.name.startswith("0.5m_short_and_thick_")
        assert {"model.pth", "samples.csv", "README.md", "loss.png"} <= {file.name for file in folder.iterdir()}
        assert film_strip(folder.name).as_markdown() in shown
    assert shown.count("bits per byte on little.txt") == 2 and shown.count("**Story 3**") == 2


def test_inference_in_another_folder(run, tiny_run):
    shown = printed(run("inference", folder="docs", run=tiny_run, prompts=["Tom had", "Lily saw a red"], max_new_tokens=4))
    assert "the same seed gives the same story: True" in shown and "greedy stories of three seeds are equal: True" in shown
    assert "**Lily saw a red**" in shown


def test_model_evaluation_compares_groups(run, make_run, make_config, corpus, folders):
    """And says which data are not here."""
    for number in (0, 1):
        make_run(f"base-seed{number}", 0.001 * number, number, "base"), make_run(f"lost-seed{number}", -0.02, number, "lost")
        change(f"lost-seed{number}", "train_config.json", data="moved/tinystories")
    world = make_config(data="storyworld:300", max_steps=2, eval_every=1, grade_stories=2)
    list(train(MODEL, world, "world"))
    page = folders / "page.html"
    small = {"num_stories": 20, "prompts": ("Tom had", "Mia saw"), "data_if_missing": corpus, "report": str(page)}
    notebook = run("model_evaluation", groups=("base", "lost"), worlds=("world",), **small)
    shown = printed(notebook)
    for told in ("lost is better than base by 0.0", "moved/tinystories", "top-10", "bits per byte", "Mia saw",
                 "(2 seeds, p", "punctuation", "distinct-2", "lost - base"):  # fmt: skip
        assert told in shown
    pictures = [output for cell in code_cells(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # curves, loss by position, curves of the world, and its grades
    assert "lost is better than base" in page.read_text(encoding="utf-8")


def test_build_tokenizer(run, corpus):
    assert "saved as tokenizers/of_the_test.model" in printed(
        run("build_tokenizer", data=corpus, num_stories=200, vocab_size=128, name="of_the_test")
    )


def test_testing_modules_in_another_folder(run):
    shown, committed = printed(run("testing_modules", folder="docs", num_layers=2)), printed(read("testing_modules"))
    assert 'the shapes are in <a href="trace.html">' in shown and "trace.html" not in committed  # which git ignores
    assert ".transpose(1, 2)" in committed and "…" not in shown + committed


def test_the_example_of_an_experiment(run, corpus, folders):
    shown = printed(run(EXAMPLE, data=corpus, max_steps=2, eval_every=1))
    base, idea = sorted((folders / "runs" / "example").iterdir())
    assert base.name.startswith("base_") and idea.name.startswith("forgetting_")
    assert "ForgettingAttn keeps the contract" in shown and "w_forget  Linear" in shown
    assert f"example/{idea.name}" in shown and "base from" in shown and "; forgetting from" in shown  # both in one plot


def test_every_notebook_of_the_readme_is_tested():
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert sorted({*re.findall(r"\]\((\w+)\.ipynb\)", readme), EXAMPLE}) == sorted(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
class TestCommitted:
    def test_it_chooses_calls_and_looks(self, name):
        tree = ast.parse("\n".join(cell.source for cell in code_cells(read(name))))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]

    def test_its_parameters_stand_at_the_top_in_one_cell(self, name):
        assert [is_parameters(cell) for cell in code_cells(read(name))][:1] == [True]
        assert sum(map(is_parameters, read(name).cells)) == 1

    def test_it_was_run_from_top_to_bottom_and_nothing_failed(self, name):
        cells = code_cells(read(name))
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        kinds = [output.output_type for cell in cells for output in cell.outputs]
        assert kinds and "error" not in kinds

    def test_it_is_fit_for_a_web_page(self, name):
        assert (REPOSITORY / f"{name}.ipynb").stat().st_size < 300_000
        shown = printed(read(name))
        assert "Warning" not in shown and "\r" not in shown
        assert not any("execution" in cell.metadata for cell in code_cells(read(name)))
        assert not any(output.get("name") == "stderr" for cell in code_cells(read(name)) for output in cell.outputs)

    def test_its_pictures_have_alt_texts(self, name):
        assert not any("plt.show(" in cell.source for cell in code_cells(read(name)))  # show_figure adds the text

    def test_it_holds_no_path_of_a_machine(self, name):
        text = "\n".join(cell.source for cell in read(name).cells) + printed(read(name))
        assert not MACHINE_PATH.search(text) and str(REPOSITORY) not in text
