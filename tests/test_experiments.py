"""Promises to those who plug in an idea of their own: blocks, whole models, experiments, and clear words where that fails."""

import contextlib
import importlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import nbformat
import pytest
import torch
from errors import one_line_error
from torch import nn

from conftest import MODEL
from experiments.__main__ import Kind, main, new_experiment, plugin_file
from inference import generate, load_model
from metrics.cost import num_parameters
from metrics.scores import evaluate
from modules.contract import CONFIG, check_block
from modules.registry import all_blocks, build_model
from runs import experiments as experiment
from runs.folder import Run, run_names
from runs.presets import PRESETS, Preset, preset
from tokenizer import load_tokenizer
from train import train
from training import autotune, plan
from training.report import table

REPOSITORY = Path(__file__).parents[1]
OWN = {name: replace(MODEL, model=name, plugins=("own_models",)) for name in ("Recurrent", "Trigram")}
TRAINING = {"Recurrent": {"packing": "padded"}, "Trigram": {"window_start": 1, "lr_max": 0.1}}


@pytest.mark.parametrize("name", OWN)
def test_an_own_model_trains_resumes_evaluates_and_is_compared(name, tiny_run, make_config, stories, train_in_parts):
    config = make_config(**TRAINING[name], max_steps=12)
    whole, parts = train_in_parts(OWN[name], config, stop_at=7)
    assert whole[-1].validation_loss < whole[9].validation_loss < whole[0].train_loss
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[7:]]

    model, tokenizer = load_model("parts")
    assert type(model).__name__ == name and model.config == OWN[name]
    for weight, other in zip(model.state_dict().values(), load_model("whole")[0].state_dict().values(), strict=True):
        assert weight.equal(other)
    score = evaluate(model, tokenizer, stories[:50], top_k=(1,))
    assert score.loss < whole[0].train_loss

    rows = table("whole", tiny_run, num_stories=50)
    assert list(rows.index) == ["whole", tiny_run]
    assert rows.loc["whole", "parameters"] == sum(weight.numel() for weight in model.parameters())
    assert rows.loc["whole", "bits per byte"] < 8 and rows.loc[tiny_run, "bits per byte"] < 8


def test_an_own_model_continues_from_another_run_and_its_weights_are_averaged(make_config):
    config = make_config(max_steps=6, ema_decay=0.9, optimizer="Muon", packing="padded")
    for name, continue_from in (("first", None), ("second", "first")):
        records = list(train(OWN["Recurrent"], config, name, continue_from=continue_from))
    assert records[-1].validation_loss < Run("first").log()["validation_loss"].min()
    assert Run("second").load("model.pth", {"continued_from"})["continued_from"] == "first"


@pytest.mark.parametrize("name", OWN)
def test_an_own_model_writes_the_same_with_and_without_a_cache(name):
    tokenizer = load_tokenizer("bpe_tokenizer_128")
    torch.manual_seed(0)
    model, prompts = build_model(OWN[name], tokenizer.vocab_size), ["Tom", "Lily had a red ball"]
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    told = generate(model, tokenizer, prompts, max_new_tokens=20)
    assert told == generate(model, tokenizer, prompts, max_new_tokens=20, use_cache=False)
    assert told == [generate(model, tokenizer, prompt, max_new_tokens=20, seed=row) for row, prompt in enumerate(prompts)]
    assert all(len(story) > len(prompt) for story, prompt in zip(told, prompts, strict=True))


def test_a_model_that_does_not_count_its_parameters_is_counted():
    recurrent, trigram = build_model(OWN["Recurrent"], 50), build_model(OWN["Trigram"], 50)
    lstm = 2 * 4 * (16 * 16 + 16)
    assert num_parameters(recurrent, embeddings=False) == lstm
    assert num_parameters(recurrent) == lstm + 50 * 16 + 50 * 16 + 50
    assert num_parameters(trigram) == 2 * 50 * 50 and num_parameters(trigram, embeddings=False) == 0


@pytest.mark.parametrize("name", OWN)
def test_it_is_measured_how_an_own_model_trains_fastest(name, make_config, monkeypatch, capsys):
    monkeypatch.setattr(plan, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(autotune, "SHORT_RUN", 0)
    model = build_model(OWN[name], 50)
    config = make_config(**TRAINING[name], fast=False, max_steps=None, max_minutes=1.0)
    chosen = autotune.choose_plan(model, config, torch.device("cpu"))
    assert chosen.micro_batch_size in (1, 2, 4) and not chosen.compile
    assert "this machine: " in capsys.readouterr().err
    plain = replace(chosen, dtype="float32")
    assert plan.difference(model, config, plain, torch.device("cpu")) == ""
    assert min(plan.memory_needed(model, config, torch.device("cpu"))) > 0


@pytest.mark.parametrize("name", OWN)
def test_an_own_model_may_be_compiled(name, monkeypatch):
    calls = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, dynamic: calls.append(module))
    model = build_model(OWN[name], 50)
    plan.compile_parts(model)
    assert calls == [model]


def test_what_an_own_model_cannot_do_is_said(make_config):
    recurrent = OWN["Recurrent"]
    one_line_error(lambda: list(train(recurrent, make_config(), "x")), "'Recurrent'", "story_ids", "--train.packing padded")
    padded = make_config(packing="padded", window_start=4)
    one_line_error(lambda: list(train(recurrent, padded, "x")), "window_start=4", "'Recurrent'")
    less = make_config(gradient_checkpointing=True)
    one_line_error(lambda: list(train(OWN["Trigram"], less, "x")), "gradient_checkpointing=True", "'Trigram'")
    unknown = replace(recurrent, model="Recurent")
    one_line_error(lambda: build_model(unknown, 50), "no model is called 'Recurent'", "Did you mean 'Recurrent'?", "GPT, ")


def git(folder: Path, *words: str) -> str:
    settings = ("user.name=A", "user.email=a@b.c", "protocol.file.allow=always")
    words = ("git", *itertools.chain(*(("-c", setting) for setting in settings)), *words)
    return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout


def commit_all(folder: Path):
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "all")


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What of this repository is not copied: runs, and the experiments of whoever runs the tests."""
    ignored = shutil.ignore_patterns(".[!g]*", ".git", ".gitmodules", "__pycache__", "tests", "trained_models")(folder, names)
    if Path(folder) == REPOSITORY / "experiments":
        ignored |= {name for name in names if Path(folder, name).is_dir()} - {"example", "templates"}
    return ignored


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """A copy of this repository, as a repository of its own without runs; a new experiment, my_idea, is a submodule of it."""
    folder = tmp_path_factory.mktemp("core")
    core, idea = folder / "core", folder / "my_idea"
    shutil.copytree(REPOSITORY, core, ignore=not_copied)
    commit_all(core)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(experiment, "FOLDER", core / "experiments")
        patch.setattr(sys, "argv", ["experiments", "new", "my_idea", "--kind", "attention"])
        runpy.run_module("experiments", run_name="__main__")
    assert "python train.py --preset my_idea/my_idea" in printed.getvalue()
    shutil.move(core / "experiments" / "my_idea", idea)
    commit_all(idea)
    git(core, "submodule", "--quiet", "add", str(idea), "experiments/my_idea")
    return core


def run_python(folder: Path, *words: str) -> str:
    """What a fresh process prints, which must not fail. The runs are where they are for everybody; nothing is compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "BASEGPT_RUNS"} | {"CXX": "no-such-compiler"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TRAIN_AND_COMPARE = """
import runpy
runpy.run_path("train.py", run_name="__main__")
from inference import generate, load_model
from training.report import table
from runs.folder import run_names
print(run_names(), list(table(*run_names(), num_stories=20)["bits per byte"].notna()))
print(generate(*load_model("my_idea/first"), "Tom", max_new_tokens=3))
"""


def test_a_new_experiment_passes_its_own_tests(core):
    run_python(core, "-m", "pytest", "experiments/my_idea", "-p", "no:cacheprovider")


def test_a_new_experiment_trains_and_is_compared(core, tiny_run, folders, corpus):
    shutil.copytree(folders / "runs" / tiny_run, core / "trained_models" / tiny_run)
    quick = f"--train.data {shlex.quote(corpus)} --train.tokenizer bpe_tokenizer_128 --train.max_steps 3 --train.warmup_steps 0"
    words = f"--preset my_idea/my_idea --name my_idea/first --model.max_seq_len 64 {quick}"
    shown = run_python(core, "-c", TRAIN_AND_COMPARE, *shlex.split(words))
    assert "['tiny', 'my_idea/first'] [True, True]" in shown and "\nTom" in shown
    changed = {line.split()[1] for line in git(core, "status", "--porcelain").splitlines()}
    assert changed == {".gitmodules", "experiments/my_idea", "trained_models/"}  # of the core, nothing
    ours = git(core / "experiments" / "my_idea", "status", "--porcelain", "--untracked-files=all").split()[1::2]
    assert "trained_models/first/model.pth" in ours and "trained_models/first/checkpoint.pth" not in ours


READERS_FILES = {  # each of these kinds once made a test fail
    "experiments/wild/__init__.py": "",
    "experiments/wild/models.py": "import nothing_of_that_name\n",
    "my_blocks.py": '"""\n>>> 1\n2\n"""\nimport matplotlib.pyplot as plt\n\ndef plot():\n    plt.subplots()\n',
    "my_notebook.ipynb": "{}",
    "tokenizers/mine.model": "{}",
}
LISTING_TESTS = (
    "test_runs.py::TestShippedRuns test_migration.py::test_shipped_runs_are_files_of_today test_imports.py test_doctests.py "
    "test_plots.py::test_every_function_that_makes_a_plot_uses_the_style "
    "test_docs.py::test_the_readme_has_the_results_of_the_shipped_runs "
    "test_docs.py::test_every_notebook_has_a_thumbnail_of_an_output "
    "test_notebooks.py::test_every_notebook_of_the_readme_is_tested test_experiments.py::TestNewExperiment "
    "test_experiments.py::test_the_runs_of_an_experiment_go_with_it "
    "test_statistics.py::TestNeededSeeds::test_the_typical_deviation_is_that_of_the_shipped_runs"
)


@pytest.mark.slow
def test_the_tests_pass_beside_files_of_the_reader(tmp_path):
    copy = shutil.copytree(REPOSITORY, tmp_path / "copy", ignore=shutil.ignore_patterns(".[!g]*", ".git", "__pycache__"))
    run_python(copy, "-m", "experiments", "new", "my_own_idea")
    for path, text in READERS_FILES.items():
        (copy / path).parent.mkdir(exist_ok=True)
        (copy / path).write_text(text, encoding="utf-8")
    for folder in ("trained_models/0.5m_mine-seed0", "experiments/wild/trained_models/first"):
        shutil.copytree(REPOSITORY / "trained_models" / "0.5m_short_and_thick-seed0", copy / folder)
        config = copy / folder / "model_config.json"
        config.write_text(config.read_text().replace('"plugins": []', '"plugins": ["experiments.wild.models"]'))
        (copy / folder / "story_losses.csv").unlink()
    run_python(copy, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/{test}" for test in LISTING_TESTS.split()))


class TestNewExperiment:
    @pytest.fixture(autouse=True)
    def in_a_folder_of_its_own(self, folders, monkeypatch):
        (folders / "experiments").mkdir()
        monkeypatch.setattr(experiment, "FOLDER", folders / "experiments")

    @pytest.mark.parametrize("kind", get_args(Kind))
    def test_its_names_are_its_own(self, kind):
        folder = new_experiment("my_template", kind)
        files = {path.name for path in folder.iterdir()}
        assert files == {"__init__.py", ".gitignore", "README.md", "config.py", "test_my_template.py", "my_template.ipynb",
                         plugin_file(kind)}  # fmt: skip
        texts = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
        words = re.findall(r"\w*[Tt]emplate\w*|\w*PLUGIN\b", "".join(texts.values()))
        assert set(words) <= {"my_template", "MyTemplate", "test_my_template"}
        assert all(f"]({name})" in texts["README.md"] for name in files - {"__init__.py", ".gitignore", "README.md"})
        assert "experiments.my_template." in texts["config.py"] and len(texts[plugin_file(kind)].splitlines()) < 45

    def test_its_notebook_runs(self, folders, corpus, make_config, monkeypatch, capsys):
        monkeypatch.setitem(PRESETS, "0.5m_short_and_thick", Preset(MODEL, make_config(data="auto")))
        folder = new_experiment("my_idea", "attention")
        monkeypatch.setattr("experiments.__path__", [str(folder.parent)])
        names = {}
        for cell in nbformat.read(folder / "my_idea.ipynb", as_version=4).cells:
            if cell.cell_type == "code":
                exec(cell.source, names)
                if "parameters" in cell.metadata.get("tags", []):
                    names |= {"data": corpus, "max_steps": 2, "eval_every": 2}
        assert set(names["scores"].index) == {"base", "my_idea"} and names["scores"]["bits per byte"].notna().all()
        assert "MyIdea" in capsys.readouterr().out
        assert sorted(run.name.split("_")[0] for run in (folders / "runs" / "my_idea").iterdir()) == ["base", "my"]

    def test_a_name_that_will_not_do_is_said(self):
        for name in ("My_idea", "my-idea", "2nd", "class", "../x", ""):
            one_line_error(lambda name=name: new_experiment(name), repr(name), "my_idea")
        new_experiment("mine")
        one_line_error(lambda: new_experiment("mine"), "experiments/mine exists")
        one_line_error(lambda: new_experiment("attn"), "'attn' would call what it makes 'Attn'", "taken")
        one_line_error(lambda: new_experiment("x", "blok"), "kind='blok'", "block, attention")
        assert experiment.experiment_names() == ["mine"]

    def test_the_terminal_says_it_in_one_line(self, monkeypatch, capsys):
        new_experiment("mine")
        for words, told in ((["new", "mine"], "error: experiments/mine exists"), (["new"], 2)):
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert told == stop.value.code or told in str(stop.value.code)
        assert "python -m experiments new" in capsys.readouterr().err


def test_the_presets_of_an_experiment_are_called_by_its_name():
    model, train_config = preset("example/forgetting")
    assert model.plugins == ("experiments.example.blocks",) and "ForgettingAttn" in all_blocks(model)
    one_line_error(lambda: preset("exampel/forgetting"), "no experiment is called 'exampel'", "Did you mean 'example'?")
    one_line_error(lambda: preset("example/forgeting"), "'example/forgeting'", "Did you mean 'example/forgetting'?")


def test_the_runs_of_an_experiment_go_with_it(tiny_run, folders, monkeypatch):
    (folders / "runs" / "example").mkdir()
    shutil.move(folders / "runs" / tiny_run, folders / "runs" / "example" / "little")
    assert run_names() == ["example/little"]
    model, _ = load_model("example/little")
    assert model.config == MODEL
    one_line_error(lambda: load_model("example/litle"), "Did you mean 'example/little'?", error=FileNotFoundError)
    one_line_error(lambda: Run("nobody/x").check_is_new(), "no experiment is called 'nobody'", "There are: ", "example")
    one_line_error(lambda: Run("example/little").check_is_new(), "a run called 'example/little' exists")
    monkeypatch.delenv("BASEGPT_RUNS")
    assert Run("example/little").folder == REPOSITORY / "experiments" / "example" / "trained_models" / "little"


BLOCK = "from tools import LoggingModule\nclass Mine(LoggingModule):\n    def forward(self, x): return 2 * x\n"
MENU = "BLOCKS = {'Mine': Mine}\n"


@pytest.mark.parametrize(
    "source, told",
    [
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("x = (", "cannot be imported: SyntaxError:"),
        ("raise RuntimeError('two\\nlines')", "cannot be imported: RuntimeError: two lines"),
        ("import sys\nsys.exit(3)", "cannot be imported: SystemExit: 3"),
        ("x = nn.Linear(2, 2)", "cannot be imported: NameError: name 'nn' is not defined (an_idea.py, line 1)"),
        (BLOCK + "BLOCK = {'Mine': Mine}", "has no BLOCKS. Give it one"),
        (BLOCK + "BLOCKS = [Mine]", "BLOCKS of the plugin 'an_idea' must be a dict"),
        (BLOCK + "BLOCKS = {'Mine': Mine()}", "BLOCKS must name classes of torch modules, so write Mine without ()"),
        (BLOCK + "BLOCKS = {'My-Block': Mine}", "'My-Block': take a name of letters"),
        (BLOCK + "BLOCKS = {'MLP': Mine}", "calls a block 'MLP', but that name is taken: it is that of 'baseGPT'. Rename it"),
        (BLOCK + "BLOCKS = {'ShortConv': Mine}", "'ShortConv', but that name is taken: it is that of 'baseGPT'"),
        (BLOCK + MENU + "MODELS = {'GPT': Mine}", "calls a model 'GPT', but that name is taken"),
    ],
)
def test_a_plugin_that_fails_is_told_in_one_line_in_the_terminal(source, told, script, folders, monkeypatch, corpus):
    monkeypatch.syspath_prepend(str(folders))
    monkeypatch.delitem(sys.modules, "an_idea", raising=False)
    (folders / "an_idea.py").write_text(source, encoding="utf-8")
    code, printed = script("--model.plugins", "an_idea", "--name", "x", "--train.data", corpus)
    assert code == 1 and "error: " in printed and "'an_idea'" in printed
    assert told in printed and "Traceback" not in printed
    assert "\n" not in printed.split("error: ")[1].strip()
    assert not (folders / "runs" / "x").exists()


def test_a_plugin_that_is_given_as_a_path_is_told_its_name():
    for path in ("ideas/mine.py", "ideas\\mine"):
        one_line_error(lambda path=path: all_blocks(replace(MODEL, plugins=(path,))), "write ideas.mine", error=ImportError)


def test_two_plugins_with_one_name_are_told_apart(folders, monkeypatch):
    monkeypatch.syspath_prepend(str(folders))
    for plugin in ("idea_a", "idea_b"):
        (folders / f"{plugin}.py").write_text(BLOCK + MENU, encoding="utf-8")
    both = replace(MODEL, plugins=("idea_a", "idea_b"))
    one_line_error(lambda: all_blocks(both), "the plugin 'idea_b' calls a block 'Mine'", "it is that of 'idea_a'")


def test_a_run_whose_plugin_is_gone_says_so(make_config, folders, monkeypatch):
    monkeypatch.syspath_prepend(str(folders))
    (folders / "gone_soon.py").write_text(BLOCK + MENU, encoding="utf-8")
    config = replace(MODEL, plugins=("gone_soon",), layers="Norm->Mine->MLP->+")
    list(train(config, make_config(max_steps=2), "orphan"))
    load_model("orphan")
    (folders / "gone_soon.py").unlink()
    monkeypatch.delitem(sys.modules, "gone_soon")
    one_line_error(lambda: load_model("orphan"), "the plugin 'gone_soon' cannot be imported", error=ImportError)


@pytest.mark.parametrize("page, file, kind", [
    ("README.md", "my_blocks.py", "BLOCKS"),
    ("CONTRIBUTING.md", "my_blocks.py", "BLOCKS"),
    ("CONTRIBUTING.md", "my_model.py", "MODELS"),
])  # fmt: skip
def test_what_the_pages_show_keeps_its_promises(page, file, kind, folders, monkeypatch, make_config):
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (source,) = re.findall(rf"```python\n# {re.escape(file)}\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.syspath_prepend(str(folders))
    module = file.removesuffix(".py")
    monkeypatch.delitem(sys.modules, module, raising=False)
    (folders / file).write_text(source, encoding="utf-8")
    for name in getattr(importlib.import_module(module), kind):
        if kind == "BLOCKS":
            check_block(name, replace(CONFIG, plugins=(module,)))
        else:
            *_, last = train(replace(MODEL, plugins=(module,), model=name), make_config(max_steps=10), "shown")
            assert last.validation_loss < 5.5
    monkeypatch.delitem(sys.modules, module)
