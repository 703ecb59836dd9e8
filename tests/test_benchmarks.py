"""The benchmarks at their tiniest: they run, print their tables, and a stopped one goes on where it was."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from config import ModelConfig, TrainConfig
from presets import Preset, preset

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.mlp_dim=24"]
QUICK = [*TINY, "model.max_seq_len=32", "train.batch_size=2", "train.compile=False", "train.max_minutes=0.01"]


def run(script: str, *words: str) -> str:
    """What the script prints."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *words], cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of all tables' rows by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


def test_train_speed_compares():
    words = ["--vocab_size", "64", "--rounds", "2", "--seconds", "0.01", "--variants", "transformers_float32", "ours_probed"]
    table = rows(run("train_speed.py", "--set", *QUICK, *words))
    assert table["transformers_float32"][1] == "1.00 (1.00–1.00)"
    peak, without_imports = (int(megabytes.replace(",", "")) for megabytes in table["ours_probed"][-2:])
    assert 0 <= without_imports < peak


def test_time_to_loss_goes_on_and_compares(corpus, tmp_path):
    results, page = tmp_path / "results.jsonl", tmp_path / "page"
    steps = ["train.max_steps=6", "train.warmup_steps=2", "train.eval_every=3", "train.eval_stories=200"]
    words = ["--preset", "1m", "--set", *TINY, *steps, "model.max_seq_len=48", "train.tokenizer=bpe_tokenizer_95",
             "--data", corpus, "--longest_story", "60", "--at", "20", "0.01", "--results", str(results)]  # fmt: skip
    first = rows(run("time_to_loss.py", *words, "--seeds", "0"))["0"]
    assert first[0] == "6" and float(first[4]) >= 0 and first[5] == "–"
    line = results.read_text()
    assert [seconds > 0 for seconds, _ in json.loads(line)["curve"]] == [True, True]

    table = rows(run("time_to_loss.py", *words, "--seeds", "0", "--ablate", "batches_of_8", "no_zero_init", "--save", str(page)))
    assert table["0"] == first and float(table["batches_of_8"][2]) != 0 and "no_zero_init" not in table
    assert results.read_text().startswith(line) and results.read_text().count("\n") == 2
    assert page.with_suffix(".png").stat().st_size > 0 and "batches_of_8" in page.with_suffix(".md").read_text()


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_train_speed_sweeps(scripts, monkeypatch, capsys):
    import train_speed

    monkeypatch.setattr(train_speed, "in_new_process", lambda function, *arguments: function(*arguments))
    arguments = train_speed.Arguments(vocab_size=64, rounds=2, seconds=0.01, dims=(32,), depths=(2,), contexts=(64,))
    train_speed.sweep(train_speed.changed(train_speed.SHAPE, QUICK), arguments)
    table = rows(capsys.readouterr().out)
    assert [table[point][0] for point in ("dim=32", "num_layers=2", "max_seq_len=64")] == ["8,288", "4,176", "2,608"]


def test_every_ablation_is_a_change_that_the_config_takes(scripts):
    import ablations

    for change in ablations.ABLATIONS.values():
        ablations.changed(preset("speedrun"), change)


def test_a_change_is_written_as_in_python_and_a_wrong_one_named(scripts):
    import ablations

    preset = Preset(ModelConfig(), TrainConfig())
    new = ablations.changed(preset, ["model.layers=Norm->MLP->+", "train.lr_max=1e-2", "train.grad_clip=None"])
    assert (new.model.layers, new.train.lr_max, new.train.grad_clip) == ("Norm->MLP->+", 0.01, None)
    for change, said in (("lr_max=1", "group.field=value"), ("model.dims=8", "Did you mean 'dim'"), ("model.dim=x", "dim='x'")):
        with pytest.raises(ValueError, match=said):
            ablations.changed(preset, [change])


def test_preset_speed_tells_training_and_writing(scripts, monkeypatch, capsys):
    import preset_speed

    small = {name: Preset(replace(preset(name).model, dim=32, num_layers=1)) for name in ("1m", "mamba2_like")}
    arguments = preset_speed.Arguments(lengths=(32,), tokens=64, places=(5,), vocab_size=50, rounds=2, seconds=0.01)
    monkeypatch.setattr(preset_speed, "in_new_process", lambda function, *arguments: function(*arguments))
    preset_speed.training_table(small, arguments)
    preset_speed.writing_table(small, arguments)
    table = rows(capsys.readouterr().out)
    assert float(table["T 32"][0].split()[0].replace(",", "")) > 0 and float(table["T 32"][1].split()[0]) > 0
    assert all(float(speed.replace(",", "")) > 0 for speed in table["behind 5 tokens"])
