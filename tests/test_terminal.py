"""Promises of all command lines: quick help, one style of mistakes, tables that fit."""

import functools
import io
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from config import ModelConfig, TrainConfig
from conftest import MODEL
from evaluation import __main__ as evaluation
from evaluation.arguments import Compare
from evaluation.comparison import AT
from model import RMSNorm
from runs import command_line
from runs.command_line import COMMON, parse, parse_or_exit
from runs.folder import Run
from runs.presets import PRESETS
from runs.tables import FrameTable, plain

ROOT = Path(__file__).parents[1]
HELP_OF_ALL = """
import runpy, sys
for line in ("train.py", "inference.py", "tokenizer.py", "evaluation", "evaluation cost", "experiments new"):
    file, *words = line.split()
    sys.argv = [file, *words, "--help"]
    try:
        (runpy.run_path if file.endswith(".py") else runpy.run_module)(file, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code
    assert not {"torch", "pandas", "matplotlib", "datasets"} & sys.modules.keys(), file
"""
FRAME = pd.DataFrame(
    {"bits per byte": [0.7123, float("nan")], "parameters": [1_234_567, 500], "layers": ["Norm->Attn->+", "Norm->MLP->+"]}
    | {f"column {number}": [f"{number:,}", "x"] for number in range(10**6, 10**6 + 9)},
    index=["0.5m_5foot11_and_skinnyfat - 0.5m_short_and_thick", "b"],
)


def test_help_imports_nothing_slow():
    shown = subprocess.run([sys.executable, "-c", HELP_OF_ALL], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_help_of_evaluation_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluation.main(["--help"])
    shown = capsys.readouterr().out
    for command, arguments in evaluation.COMMANDS.items():
        assert re.search(rf"• {command} +{' '.join(arguments.__doc__.split()[:3])}", shown)


def test_help_of_train_begins_with_examples_and_presets(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_or_exit(["--help"])
    before, _, options = capsys.readouterr().out.partition("-h, --help")
    assert before.count("python train.py") == 4 and all(preset in before for preset in PRESETS)
    assert "BLOCKS, MODELS, OPTIMIZERS, SCHEDULES, LOSSES or DATA" in before
    assert {name.split(".")[-1] for name in re.findall(r"--([\w.]+)", options)} == {*COMMON, "no_resume"}
    with pytest.raises(SystemExit, match="0"):
        parse_or_exit(["--help_all"])
    shown = capsys.readouterr().out
    assert all(f"--model.{field.name}" in shown for field in fields(ModelConfig))
    assert all(f"--train.{field.name}" in shown for field in fields(TrainConfig))


def test_examples_in_the_help_of_train_are_valid(capsys):
    with pytest.raises(SystemExit):
        parse_or_exit(["--help"])
    for words in re.findall(r"python train.py(.*)", capsys.readouterr().out)[:2]:
        parse(words.split())


@pytest.mark.parametrize("words, cure", [
    (["compar", "a"], "Did you mean 'compare'?"), ([], "name a command"), (["cost"], "name presets, runs or layer strings"),
    (["grade", "a", "--tempratur", "1"], "--temperature FLOAT"),
])  # fmt: skip
def test_wrong_usage_exits_with_2_and_the_cure(capsys, words, cure):
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(words)
    assert cure in capsys.readouterr().err


def test_a_wrong_option_of_train_exits_with_2(capsys):
    for words in (["--preset", "1n"], ["--resume"], ["--seeds", "0"], ["--model.dim", "0"]):
        with pytest.raises(SystemExit, match="2"):
            parse_or_exit(words)
        assert capsys.readouterr().err


def test_compare_offers_what_it_can_compare_at():
    assert Compare.__annotations__["at"].__args__ == AT


class TestCodePage:
    """Output that a file or a terminal of Windows takes, without arrows and boxes."""

    def printed(self, call) -> str:
        with redirect_stdout(io.TextIOWrapper(io.BytesIO(), encoding="cp1252")) as screen:
            call()
        screen.flush()
        return screen.buffer.getvalue().decode("cp1252")

    def test_show_shapes(self):
        show = functools.partial(RMSNorm(4).show, torch.ones(2, 3, 4), lines=False)
        assert "(2, 3, 4) ? (2, 3, 4)" in self.printed(show)

    def test_diff(self):
        assert "num_layers" in self.printed(lambda: evaluation.main(["diff", "quick", "1m"]))

    def test_a_finished_training_ends_with_0(self, make_config, monkeypatch):
        monkeypatch.setattr("training.report.generate", lambda *_, **__: ["→"] * 3)
        line = command_line.command(MODEL, make_config(max_steps=2), "mine")
        monkeypatch.setattr(sys, "argv", shlex.split(line)[1:])
        printed = self.printed(lambda: runpy.run_path(str(ROOT / "train.py"), run_name="__main__"))
        assert "bits per byte after 2 steps" in printed and "  ?" in printed and Run("mine").is_reported


def test_a_table_fits_80_columns_and_loses_nothing():
    text = plain(FrameTable(FRAME))
    assert max(map(len, text.splitlines())) <= 80
    assert "0.7123" in text and "–" in text and "1,234,567" in text and text.count("b ") > 1
    assert all(re.search(rf"column\n? *{number}|{number}", text) for number in range(10**6, 10**6 + 9))


def test_a_table_is_as_wide_as_the_terminal_and_in_colour():
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    console.print(FrameTable(FRAME))
    printed = console.file.getvalue()
    assert "\x1b[" in printed and len(printed.splitlines()) < len(plain(FrameTable(FRAME)).splitlines())
