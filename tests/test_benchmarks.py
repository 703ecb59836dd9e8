"""The benchmarks at their tiniest, in this process: they run, print their tables, and a stopped one goes on where it was."""

import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from config import ModelConfig, TrainConfig
from runs.presets import Preset, preset

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=1", "model.mlp_dim=16"]
QUICK = [*TINY, "model.max_seq_len=32", "train.batch_size=2", "train.compile=False", "train.max_minutes=0.01"]


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of all tables' rows by their first cell."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines() if line.startswith("|")]
    return {first: others for first, *others in cells}


def of_version_1(settings: dict, attention: str = "auto") -> dict:
    """Settings of TINY as version 1 recorded them."""
    model = {name: value for name, value in settings["model"].items() if name != "version"}
    train = {name: value for name, value in settings["train"].items() if name not in ("version", "fast", "ema_decay")}
    average = {"weight_averaging": settings["train"]["ema_decay"]}
    return {"model": model | {"mlp_dim": 24, "attention": attention}, "train": train | average}


@pytest.fixture
def scripts(monkeypatch):
    """The benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def one_process(scripts, monkeypatch):
    """What the scripts ask of new processes is done in this one, pickled as it would be, and the machine is not measured."""
    import script
    import train_speed

    class ThisProcess:
        def __init__(self, *_):
            self.under_way = []

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, *call):
            function, *arguments = pickle.loads(pickle.dumps(call))
            train_speed.UNDER_WAY[:] = self.under_way
            answer = pickle.loads(pickle.dumps(function(*arguments)))
            self.under_way = train_speed.UNDER_WAY[:]
            return SimpleNamespace(result=lambda: answer)

    monkeypatch.setattr(script, "ProcessPoolExecutor", ThisProcess)
    monkeypatch.setattr(train_speed, "PEAKS", ((8,), 1e-4))


@pytest.fixture
def results(scripts, monkeypatch, tmp_path):
    """The results files are written to a folder of the test."""
    import script

    monkeypatch.setattr(script, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture
def terminal(one_process, results, monkeypatch, capsys):
    """Run a script as from the terminal and return what it printed."""

    def run(module, *words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *words])
        module.run_script(module.main, module.Arguments, module.__doc__)
        return capsys.readouterr().out

    return run


def test_a_new_process_is_another_process(scripts):
    from script import in_new_process

    assert in_new_process(os.getpid) != os.getpid()


def test_train_speed_compares(terminal):
    import train_speed

    words = ["--vocab_size", "64", "--rounds", "2", "--seconds", "0.01", "--variants", "transformers_float32", "ours_probed"]
    table = rows(terminal(train_speed, "--set", *QUICK, *words))
    assert table["transformers_float32"][2] == "1.00 (1.00–1.00)"
    peak, without_imports = (int(megabytes.replace(",", "")) for megabytes in table["ours_probed"][-3:-1])
    assert 0 <= without_imports < peak


def test_train_speed_sweeps(one_process):
    import train_speed

    arguments = train_speed.Arguments(vocab_size=64, rounds=2, seconds=0.01, sweep=True, dims=(32,), depths=(2,), contexts=(64,))
    raw = train_speed.sweep(train_speed.changed(train_speed.SHAPE, QUICK), arguments)
    (table,) = train_speed.tables(raw).values()
    assert [row["parameters"] for row in table] == ["8288", "4176", "2608"]
    assert [row[""] for row in table] == ["dim=32", "num_layers=2", "max_seq_len=64"]


def test_time_to_loss_goes_on(terminal, results, corpus, monkeypatch):
    import time_to_loss

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set again by the script, and then taken back")
    monkeypatch.setattr(time_to_loss, "HERE", results)
    steps = ["train.max_steps=6", "train.warmup_steps=2", "train.eval_every=3", "train.eval_stories=200"]
    words = ["--preset", "1m", "--set", *TINY, *steps, "model.max_seq_len=48", "train.tokenizer=bpe_tokenizer_95",
             "--data", corpus, "--longest_story", "60", "--at", "20", "0.01", "--save", "runs"]  # fmt: skip
    first = rows(terminal(time_to_loss, *words, "--seeds", "0"))["0"]
    assert first[0] == "6" and float(first[5]) >= 0 and first[6] == "–"
    file = results / "runs.json"
    (run,) = json.loads(file.read_text())["raw"]["runs"]
    assert [seconds > 0 for seconds, _ in run["curve"]] == [True, True] and 0 < run["training_seconds"] < run["seconds"]

    table = rows(terminal(time_to_loss, *words, "--seeds", "1"))
    assert table["0"] == first and "–" in table["median (range)"][0] and float(table["1"][-1]) != float(first[-1])
    assert (results / "runs.png").stat().st_size > 0

    saved = json.loads(file.read_text())
    for run in saved["raw"]["runs"]:
        run["settings"] = of_version_1(run["settings"])
    file.write_text(json.dumps(saved))
    assert rows(terminal(time_to_loss, *words, "--seeds", "0", "1")) == table
    with pytest.raises(SystemExit, match="other settings"):
        terminal(time_to_loss, *words[:3], "train.fast=False", *words[3:], "--seeds", "0")


@pytest.mark.parametrize("attention, fast", [("auto", "auto"), ("kernel", True), ("sdpa", False), ("plain", False)])
def test_the_attention_of_older_results_is_fast_or_not(scripts, attention, fast):
    import time_to_loss

    tiny = time_to_loss.changed(preset("1m"), TINY)
    now = {way: time_to_loss.settings_of(time_to_loss.with_train(tiny, fast=way), "data") for way in ("auto", True, False)}
    older = of_version_1(now["auto"], attention)
    assert [way for way, settings in now.items() if time_to_loss.are_same(older, settings)] == [fast]


def test_every_ablation_is_a_change_that_the_config_takes(scripts):
    import ablations

    for change in ablations.chosen_ablations(["all", "tune_AdamW"]).values():
        ablations.changed(preset("speedrun"), change)


def test_a_change_is_written_as_in_python_and_a_wrong_one_named(scripts):
    import ablations

    preset = Preset(ModelConfig(), TrainConfig())
    new = ablations.changed(preset, ["model.layers=Norm->MLP->+", "train.lr_max=1e-2", "train.grad_clip=None"])
    assert (new.model.layers, new.train.lr_max, new.train.grad_clip) == ("Norm->MLP->+", 0.01, None)
    for change, said in (("lr_max=1", "group.field=value"), ("model.dims=8", "Did you mean 'dim'"), ("model.dim=x", "dim='x'")):
        with pytest.raises(ValueError, match=said):
            ablations.changed(preset, [change])


def test_preset_speed_measures_training_and_generation(one_process, monkeypatch, capsys):
    import preset_speed

    small = {name: Preset(replace(preset(name).model, dim=32, num_layers=1)) for name in ("1m", "mamba2_like")}
    sizes = {"lengths": (32,), "tokens": 64, "places": (5, 60), "vocab_size": 50}
    monkeypatch.setattr(preset_speed, "preset", small.__getitem__)
    preset_speed.main(preset_speed.Arguments(tuple(small), **sizes, rounds=2, seconds=0.01, threads=1))
    table = rows(capsys.readouterr().out)
    assert table["T 32"][0].startswith("1.00 (1.00–1.00); ") and float(table["T 32"][1].split()[0]) > 0
    assert all(float(speed.replace(",", "")) > 0 for prefix in (5, 60) for speed in table[f"after {prefix} tokens"])
    kinds = [float(share) for share in table["mamba2_like, T 32"][:-1]]
    assert sum(kinds) == pytest.approx(100, abs=4) and table["1m, T 32"][-1] in (*preset_speed.KINDS, preset_speed.REST)


@pytest.mark.parametrize("wrong", [{"lengths": (32, 16)}, {"lengths": (9000,)}, {"places": (60, 70)}, {"threads": 0}], ids=str)
def test_preset_speed_names_what_it_cannot_measure(scripts, wrong):
    import preset_speed

    with pytest.raises(ValueError, match=next(iter(wrong))):
        preset_speed.check(preset_speed.Arguments(**wrong))


def test_preset_speed_tells_a_product_from_a_scan_and_a_view(scripts):
    import torch
    from preset_speed import REST, kind_of

    from modules.scan import scan

    x = torch.rand(2, 300, 64, requires_grad=True)
    with torch.profiler.profile() as profile:
        scan(x, x).exp().matmul(torch.rand(64, 64)).transpose(0, 1).sum().backward()
    kinds = {}
    for event in profile.events():
        kinds.setdefault(event.name, set()).add(kind_of(event))
    assert kinds["aten::addcmul"] == {"scan"} and kinds["aten::exp"] == {REST}
    assert kinds["aten::transpose"] <= {"calls", "scan"} and kinds["aten::mm"] == {"matrix products"}


def test_growth_is_told_of_the_time_and_memory_of_a_row(scripts):
    import preset_speed

    lengths, paces = (256, 2048, 4096, 8192), {"linear": [9] * 4, "quadratic": [8, 4, 2, 1]}
    memories = {"linear": [90, 100, 200, 400], "quadratic": [90, 100, 400, 1600]}
    exponents = [list(row.values()) for row in preset_speed.growth_rows(lengths, paces, memories)]
    assert exponents == [["growth of time", "1.00", "2.00"], ["growth of memory", "1.00", "2.00"]]


@pytest.fixture
def worth_here(results, corpus, tmp_path, monkeypatch):
    """Arguments of worth.py that train for a moment in this process, and the names of what was trained."""
    import worth

    from train import train
    from training import seeds
    from training.report import write_report

    def train_here(todo, at_a_time):
        assert at_a_time == 2
        for run in todo:
            trained.append(run.name)
            for _ in train(run.model, run.train, run.name, group=run.group):
                pass
            write_report(run.name)
        return {}, False

    trained, way = [], {"dtype": "float32", "fast": False, "micro_batch_size": 2, "threads": 1, "compile": False}
    monkeypatch.setenv("BASEGPT_RUNS", "set again by main, and then taken back")
    monkeypatch.setattr(seeds, "run_side_by_side", create_autospec(seeds.run_side_by_side, side_effect=train_here))
    monkeypatch.setattr(worth, "HERE", tmp_path)
    monkeypatch.setattr(worth, "measure", lambda presets, settings, arguments: {
        name: worth.Speed(settings[name], way, [1000.0, 960.0 * number, 9000.0], "a machine")
        for number, name in enumerate(presets, 2)})  # fmt: skip
    settings = ["train.warmup_steps=1", "train.eval_stories=200", "train.batch_size=2", "train.tokenizer=bpe_tokenizer_95",
                "model.max_seq_len=48"]  # fmt: skip
    words = worth.Arguments(
        runs=tmp_path / "runs", presets=("1m", "mamba_like"), minutes=0.01, seeds=2, data=corpus, set=(*TINY, *settings),
        side_by_side=2, position_stories=20, save="worth",
    )  # fmt: skip
    return words, trained


def test_worth_trains_what_is_missing_and_tells_it_again(worth_here, tmp_path, capsys):
    import worth

    words, trained = worth_here
    worth.main(words)
    printed = capsys.readouterr().out
    told = rows(printed.partition("Nats per token")[0])
    assert [told["1m"][2], told["mamba_like"][2]] == ["1,920", "2,880"]  # tokens/s
    assert [told["1m"][3], told["mamba_like"][3]] == ["12", "18"]  # steps: 60 * 0.01 s at that speed, 96 tokens each
    assert "±" in told["1m"][5] and "±" in told["mamba_like"][6]
    assert trained == ["1m-seed0", "mamba_like-seed0", "1m-seed1", "mamba_like-seed1"]
    assert (tmp_path / "worth.png").stat().st_size > 0

    worth.main(words)
    assert rows(capsys.readouterr().out) == rows(printed) and len(trained) == 4
    speeds = json.loads((words.runs / "speeds.json").read_text())
    for speed in speeds.values():
        plan = speed.pop("plan")
        speed["choices"] = plan | {"attention": "kernel" if plan.pop("fast") else "sdpa"}
        speed["settings"] = of_version_1(speed["settings"])
    (words.runs / "speeds.json").write_text(json.dumps(speeds))
    worth.main(words)
    assert rows(capsys.readouterr().out) == rows(printed) and len(trained) == 4
    with pytest.raises(ValueError, match="other settings"):
        worth.main(replace(words, set=(*words.set, "model.mlp_dim=32")))


def test_worth_compares_a_preset_with_changes_of_it(worth_here, tmp_path, capsys):
    import worth

    words, trained = worth_here
    worth.main(replace(words, presets=("1m",), ablate=("no_zero_init", "no_clipping", "GELU")))
    told = capsys.readouterr()
    assert trained == ["1m-seed0", "no_clipping-seed0", "GELU-seed0", "1m-seed1", "no_clipping-seed1", "GELU-seed1"]
    assert "no_zero_init is left out" in told.err and "of the preset 1m and of changes of it" in told.out
    assert "±" in rows(told.out)["GELU"][6] and "Nats per token" not in told.out
    assert (tmp_path / "worth.png").stat().st_size > 0


def test_worth_trains_for_the_steps_that_fit_into_the_minutes(scripts):
    import worth

    speed = worth.Speed({}, {"dtype": "float32", "fast": False, "micro_batch_size": 2, "threads": 1, "compile": False},
                        [10.0, 4096.0, 9999.0], "a machine")  # fmt: skip
    trained = worth.for_steps(preset("1m"), speed, 10.0)
    assert trained.train.max_steps == 60 * 10 * 4096 / (4 * 512) and trained.train.max_minutes is None
    assert (trained.train.fast, trained.train.micro_batch_size, trained.train.dtype) == (False, 2, "float32")
    growing = worth.for_steps(preset("speedrun"), speed, 10.0)  # 8, 16 and 32 rows for 1/4, 1/4 and 1/2 of the steps
    assert growing.train.max_steps == round(60 * 10 * 4096 / (22 * 256))


def test_worth_measures_once_what_is_as_fast(scripts):
    import worth

    tuned = worth.as_fast(worth.chosen_presets(worth.Arguments(presets=("speedrun",), ablate=("tune_AdamW",))))
    assert len(tuned) == 13 and set(tuned.values()) == {"speedrun", "AdamW_0.002_decay_0.01"}
    chosen = worth.chosen_presets(worth.Arguments(presets=("speedrun",), ablate=("no_weight_decay", "cosine", "GELU", "tied")))
    assert worth.as_fast(chosen) == {
        "speedrun": "speedrun", "no_weight_decay": "speedrun", "cosine": "speedrun", "GELU": "GELU", "tied": "tied",
    }  # fmt: skip


def test_what_worth_cannot_do_is_one_line(scripts, monkeypatch, tmp_path):
    import worth

    for wrong in ({"seeds": 0}, {"presets": ("1m",)}, {"presets": ("1m", "1m")}, {"ablate": ("tied",), "presets": ("1m", "2m")},
                  {"budget": "clock", "measure_only": True}):  # fmt: skip
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            worth.check_early(worth.Arguments(runs=tmp_path, **wrong))
    monkeypatch.delenv("BASEGPT_RUNS")
    with pytest.raises(ValueError, match="--runs"):
        worth.check_early(worth.Arguments())


def test_worth_compares_by_position_in_the_story(scripts):
    import worth_tables

    losses = {"base": [[3.0, 2.0], [3.2, 2.2]], "idea": [[3.1, 1.9], [3.3, 2.1]]}
    positions = {"stories": 5, "octaves": ["1 to 1", "2 to 3"], "tokens": [10, 20], "losses": losses}
    seeds = {name: {"seeds": [0, 1]} for name in losses}
    counts, base, idea = worth_tables.position_rows({"results": seeds, "by_position": positions})
    assert (counts["1 to 1"], base["1 to 1"], base["2 to 3"]) == ("10", "3.100", "2.100")
    assert (idea["1 to 1"], idea["1 to 1: difference"], idea["2 to 3: difference"]) == ("3.200", "+0.100", "-0.100")


def test_the_first_run_is_timed_and_graded(scripts, capsys):
    """A real train.py of two steps in a process of its own, which takes some seconds."""
    import first_run

    options = ("--model.dim 16 --model.head_dim 8 --model.max_seq_len 32 --train.data storyworld_small:300",
               "--train.max_steps 2 --train.warmup_steps 1 --train.fast False --train.compile False")  # fmt: skip
    first_run.main(first_run.Arguments(seeds=(0,), threads=(1,), num_samples=2, set=options))
    seeds, minutes, steps, bits, over, *accepted = rows(capsys.readouterr().out)["1"]
    assert (seeds, steps, accepted) == ("1", "2 (2–2)", ["0 (0–0)"] * 3)
    assert 0.01 < float(minutes.split()[0]) < 5 and 0 < float(over.split()[0]) < float(bits.split()[0])
