"""The tables of benchmarks/README.md, and the numbers that other pages take from them, agree with benchmarks/results/."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
result_file = pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    return tables


def numbers(tables, name: str) -> pd.DataFrame:
    """The first table of a results file."""
    first, *_ = tables.tables_of(tables.read(name)).values()
    return pd.DataFrame(first).set_index("").apply(pd.to_numeric, errors="coerce")


def readme() -> str:
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_tables_agree_with_the_results(tables):
    text = tables.README.read_text(encoding="utf-8")
    assert tables.rendered(text) == text, "run python benchmarks/tables.py"


@result_file
def test_every_results_file_is_shown(tables, path):
    assert f"<!-- results/{path.name} -->" in tables.README.read_text(encoding="utf-8")


@result_file
def test_results_are_raw_or_say_that_they_are_not(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert "raw" in result or re.match(r"From the printed table of 20..-..-..; .* not kept", result["source"])


def test_a_changed_number_is_noticed(tables):
    text = tables.README.read_text(encoding="utf-8")
    assert "0.9936 ± 0.0037" in text
    assert tables.rendered(text.replace("0.9936 ± 0.0037", "0.9836 ± 0.0037")) == text


def test_a_table_is_made_again_from_saved_raw_results(tables, tmp_path, monkeypatch, capsys):
    import script
    import train_speed

    plan = {"dtype": "float32", "fast": False, "micro_batch_size": 2, "threads": 1, "compile": False}
    run = {"plan": plan, "parameters": 1234, "flops_per_token": 5e5, "memory_mb": [300, 100]}
    results = {"transformers_float32": run | {"tokens_per_second": [100.0, 200.0, 300.0]},
               "ours_float32": run | {"tokens_per_second": [150.0, 400.0, 300.0]}}  # fmt: skip
    peaks = {"float32": 1e9, "bfloat16": 5e8}
    raw = {"shape": "small", "turns": "3 rounds", "sweep": False, "peak_flops": peaks, "results": results}
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr("sys.argv", ["benchmarks/train_speed.py", "--save", "speeds"])
    script.report(train_speed.tables, raw, "speeds")
    row = "| ours_float32 | 1,234 | 300 (225–350) | 1.50 (1.25–1.75) | 15.0 | 300 | 100 |"
    block = tables.block(tables.read("speeds"))
    assert row in block and row in capsys.readouterr().out
    assert "python benchmarks/train_speed.py --save speeds" in block


def test_a_cell_joins_a_value_and_its_parts(tables):
    from script import table

    row = {"": "T 1024", "x": "1234.5", "x: from": "999", "x: to": "2000", "x: MB": "7", "y": "-0.5", "y: ±": "0.1"}
    assert table([row, {"": "none"}])[2:] == ["| T 1024 | 1,234.5 (999–2,000); 7 | -0.5 ± 0.1 |", "| none | – | – |"]


def test_the_speeds_in_the_readme_are_those_of_the_tables(tables):
    xeon, epyc = numbers(tables, "train_speed_xeon"), numbers(tables, "train_speed_epyc")
    times = [table.loc["ours_probed", "times transformers_float32"] for table in (xeon, epyc)]
    assert f"{times[0]:.1f} times (Xeon, float32) and {times[1]:.1f} times (EPYC, bfloat16)" in readme()
    memory = [table["peak memory, MB"] for table in (xeon, epyc)]
    assert all(peak["ours_probed"] < 0.5 * peak["transformers_float32"] for peak in memory)


def test_the_score_on_short_stories_stands_beside_that_on_all():
    folder = ROOT / "trained_models" / "2m_speedrun"
    stories = pd.read_csv(folder / "story_losses.csv")
    parts = stories, stories[stories["bytes"] <= 700]
    whole, short = (part["nats"].sum() / math.log(2) / part["bytes"].sum() for part in parts)
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").split())
    assert f"has {short:.2f} bits per byte on them and {whole:.2f} on all" in text


def test_the_readme_counts_the_decided_recurrent_presets(tables):
    p = numbers(tables, "worth")["p (Holm, of 7)"].dropna()
    words = dict(enumerate(["none", "one", "two", "three", "four", "five", "six", "seven"]))
    assert f"{words[sum(p < 0.05)]} of {words[len(p)]} recurrent presets are worse than attention" in readme()


def test_corrected_p_values_decide_what_the_text_says_is_decided(tables):
    text = " ".join(tables.README.read_text(encoding="utf-8").split())
    decided = text.partition("**Decided**")[2].partition("**Muon**")[0]
    table = numbers(tables, "ablations")
    effects = table.loc[table["p (Holm, of 32)"] < 0.05, "difference to speedrun over seeds (95%, uncorrected)"]
    assert sorted(map(float, re.findall(r"0\.\d{3}", decided))) == pytest.approx(sorted(np.abs(effects)), abs=6e-4)
