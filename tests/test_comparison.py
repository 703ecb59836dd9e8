"""Promises of the verdict: none from one seed, valid when seeds are added, nothing compared in silence."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from conftest import MODEL, change, shifted_run
from evaluation import __main__ as evaluation
from evaluation.comparison import compare
from evaluation.pairwise import SAME_WEIGHTS
from evaluation.statistics import Correction
from inference import load_model
from metrics.story_losses import COLUMNS, read_losses, save_losses, validation_stories
from model import GPT
from runs.code import digest
from runs.folder import Run
from train import train
from training.report import write_report

ROOT = Path(__file__).parents[1]


def bits(name):
    losses, _ = read_losses(name)
    return losses["nats"].sum() / losses["bytes"].sum() / np.log(2)


def first_matrices(config):
    torch.manual_seed(0)
    return {name: weight for name, weight in GPT(config, vocab_size=95).named_parameters() if weight.dim() > 1}


class TestLooks:
    @pytest.fixture
    def groups(self, make_run):
        for seed in range(3):
            self.add_seed(seed)

    @staticmethod
    def add_seed(seed):
        shifted_run(f"a-seed{seed}", 0.01 * seed, seed, "a"), shifted_run(f"b-seed{seed}", 0.004 * (seed % 2), seed, "b")

    def test_seeds_added_after_a_look_are_tested_as_such(self, groups):
        first = compare("a", "b")
        assert compare("b", "a").differences["p (corrected)"].item() == first.differences["p (corrected)"].item()
        self.add_seed(3)
        result = compare("b", "a")
        row, (verdict,) = result.differences.iloc[0], result.verdicts
        assert row["p (corrected)"] == Correction(1, first_look=3).p(row["p"]) > row["p"] * 1.5
        assert "corrected for repeated looks" in verdict

    def test_groups_trained_again_are_a_new_comparison(self, groups):
        compare("a", "b")
        for name in "ab":
            for seed in range(3):
                change(f"{name}-seed{seed}", "story_losses.json", weights="x")
                Run(f"{name}-seed{seed}").path("model.pth").write_bytes(b"x")
                change(f"{name}-seed{seed}", "story_losses.json", weights=digest(b"x"))
        self.add_seed(3)
        assert "repeated looks" not in compare("a", "b").verdicts[0]

    def test_beyond_20_seeds_there_is_no_verdict(self, groups, monkeypatch):
        compare("a", "b")
        monkeypatch.setattr("evaluation.pairwise.MAX_SEEDS", 3)
        self.add_seed(3)
        assert "no verdict on a and b: seeds were added after a first look" in compare("a", "b").verdicts[0]

    def test_a_look_that_cannot_be_recorded_is_noted(self, groups, monkeypatch):
        def read_only(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("os.replace", read_only)
        assert any("could not record this look" in note for note in compare("a", "b").notes)

    def test_a_damaged_record_is_named(self, groups):
        for text in ("{", '["a"]'):
            Run("looks.json").folder.write_text(text)
            with pytest.raises(ValueError, match=r"looks\.json is damaged: restore it, or delete it"):
                compare("a", "b")


class TestLosses:
    def test_they_are_those_of_the_model(self, tiny_run):
        write_report(tiny_run)
        losses, scored = read_losses(tiny_run)
        model, tokenizer = load_model(tiny_run)
        assert len(losses) == 200 and losses["story"].is_unique and scored.data == "little.txt"
        assert losses["nats"].sum() / losses["tokens"].sum() == pytest.approx(Run(tiny_run).log()["validation_loss"].iloc[-1])
        assert (losses["top1"] <= losses["top5"]).all() and (losses["top10"] <= losses["tokens"]).all()
        assert scored.code.keys() >= {"model.py", "train.py", "modules/mamba.py"} and scored.data_fingerprint
        assert scored.parameters == sum(weight.numel() for weight in model.parameters()) and scored.tokenizer == tokenizer.name

    @pytest.mark.parametrize("damage, said", [
        (lambda folder: (folder / "story_losses.csv").unlink(), "has no losses by story: scoring it"),
        (lambda folder: (folder / "story_losses.csv").write_text("story,bytes\n1,2\n"), "are damaged: scoring it .* again"),
        (lambda folder: (folder / "story_losses.json").write_text("{}"), "are damaged or of an older version: scoring it"),
        (lambda folder: (folder / "model.pth").write_bytes((folder / "model.pth").read_bytes() + b" "), "of other weights than"),
    ])  # fmt: skip
    def test_what_is_missing_damaged_or_old_is_scored_again_and_said(self, make_run, capsys, damage, said):
        make_run("a"), make_run("b")
        wanted, _ = read_losses("tiny")
        damage(Run("a").folder)
        compare("a", "b")
        assert re.search(f"'a' .*{said}|'a' {said}", capsys.readouterr().out)
        pd.testing.assert_frame_equal(read_losses("a")[0], wanted)


class TestCompare:
    def test_one_seed_gets_an_estimate_and_no_verdict(self, make_run):
        make_run("a"), make_run("b", shift=-0.02, seed=1)
        make_run("c-seed0", -0.02, 0, "c"), make_run("c-seed1", -0.03, 1, "c")
        for result in (compare("a", "b"), compare("a", "c"), compare("c", "a")):
            row, (verdict,) = result.differences.iloc[0], result.verdicts
            assert np.isnan(row["p"]) and np.isnan(row["p (corrected)"]) and row["over"] == "stories"
            assert 0 < abs(row["difference"]) < 0.04 and row["95% from"] < row["difference"] < row["to"]
            assert verdict.startswith("no verdict on ") and "better" not in verdict and "p =" not in verdict
            assert "over stories, not over seeds" in verdict and re.search(r"takes \d+ seeds of each", verdict)

    def test_runs_that_differ_in_the_seed_alone_are_noted(self, make_run):
        make_run("a"), make_run("b", shift=-0.02, seed=1), make_run("c", seed=1)
        change("c", "train_config.json", lr_max=0.02)
        same, other = (any("differ in nothing but the seed" in note for note in compare("a", name).notes) for name in "bc")
        assert same and not other

    def test_seeds_are_the_unit_where_there_are_several(self, make_run):
        for seed, luck in enumerate([0.01, -0.005, 0.002]):
            make_run(f"a-seed{seed}", luck, seed, "a"), make_run(f"b-seed{seed}", luck - 0.05 - 0.001 * seed, seed, "b")
            make_run(f"c-seed{seed}", -luck, seed, "c"), make_run(f"d-seed{seed}", luck - 0.05, seed + 7, "d")
        result = compare("a", "b", "c", "d")
        values = {name: [bits(f"{name}-seed{seed}") for seed in range(3)] for name in "abcd"}
        tests = [stats.ttest_rel(values["b"], values["a"]), stats.ttest_rel(values["c"], values["a"]),
                 stats.ttest_ind(values["d"], values["a"], equal_var=False)]  # fmt: skip
        p, level = np.array([test.pvalue for test in tests]), 0.05 * 2 / 3 / 3
        assert result.differences["p"].tolist() == pytest.approx(p)
        assert result.differences["p (corrected)"].tolist() == pytest.approx(np.minimum(1, p * 0.05 / level))
        intervals = [test.confidence_interval(1 - level) for test in tests]
        assert result.differences["95% from"].tolist() == pytest.approx([interval.low for interval in intervals])
        assert result.differences["over"].tolist() == ["seeds, paired", "seeds, paired", "seeds"]
        expected = r"b is better than a by 0\.05\d+ ± 0\.0\d+ bits per byte \(3 seeds, p .*corrected for 3 comparisons\)"
        assert re.fullmatch(expected, result.verdicts[0])
        assert re.match("a and c are not distinguishable; even 20 seeds of each would hardly do", result.verdicts[1])
        assert len(compare("a", "b", "c", all_pairs=True).verdicts) == 3

    def test_what_shares_weights_and_batches_is_paired(self, make_run):
        for seed in range(5):
            make_run(f"a-seed{seed}", 0.01 * seed, seed, "a")
        changes = {"lr_max": 0.02, "logit_soft_cap": 9.0, "mlp_dim": 32, "batch_size": 8}
        for (field, value), seed in itertools.product(changes.items(), range(3)):
            run = make_run(f"{field}-seed{seed}", 0.01 * seed - 0.02, seed, field)
            change(run, "model_config.json" if hasattr(MODEL, field) else "train_config.json", **{field: value})
        result = compare("a", *changes)
        assert result.differences["over"].tolist() == ["seeds, paired"] * 2 + ["seeds"] * 2
        for reason in ("a and lr_max are paired by seed, as runs of a seed have the same first weights and batches",
                       "a and mlp_dim are not paired (Welch), as their first weights differ (mlp_dim)",
                       "a and batch_size are not paired (Welch), as their batches differ (batch_size)"):  # fmt: skip
            assert reason in result.notes
        values = [[bits(f"{name}-seed{seed}") for seed in range(3)] for name in ("lr_max", "a")]  # seeds 3 and 4 have no partner
        assert result.differences["p"].iloc[0] == pytest.approx(stats.ttest_rel(*values).pvalue)

    def test_paired_configs_have_the_same_random_first_weights(self):
        values = {
            "rope_theta": 5e3, "norm": "LayerNorm", "norm_affine": False, "norm_bias": True, "norm_eps": 1e-6, "qk_norm": True,
            "activation": "GELU", "attention_soft_cap": 9.0, "logit_soft_cap": 9.0, "logit_scale": 0.5, "embedding_scale": 2.0,
            "dropout": 0.1,
        }  # fmt: skip
        assert values.keys() == SAME_WEIGHTS
        expected = first_matrices(MODEL)
        for field, value in values.items():
            matrices = first_matrices(replace(MODEL, **{field: value}))
            assert matrices.keys() == expected.keys() and all(matrices[name].equal(expected[name]) for name in expected), field

    def test_diverged_runs_and_second_runs_of_a_seed_are_left_out(self, make_run):
        for seed in range(3):
            make_run(f"a-seed{seed}", 0.01 * seed, seed, "a"), make_run(f"b-seed{seed}", 0.01 * seed, seed, "b")
        Run("b-seed1").save_text("diverged.txt", "the loss is no longer finite at step 7")
        make_run("b-again", 0, 2, "b")
        make_run("infinite", math.inf)
        result = compare("a", "b", "infinite")
        said = "\n".join(result.notes)
        assert "b-seed1 diverged and is left out: the loss is no longer finite at step 7" in said
        assert "b-seed2 has the same seed as b-again and is left out" in said
        assert "infinite diverged and is left out: not all of its losses are finite" in said
        assert result.differences["seeds"].tolist() == ["2 and 3"] and len(result.verdicts) == 1

    def test_files_that_one_side_lacks_are_changed_but_not_its_plugins(self, make_run):
        make_run("a", code={"model.py": "1", "old.py": "1"})
        make_run("b", code={"model.py": "1", "new.py": "1", "experiments.mine.blocks": "1"})
        notes = [note for note in compare("a", "b").notes if "different code" in note]
        assert notes == ["a and b were trained with different code: new.py, old.py"]

    @pytest.mark.parametrize("facts, said, compared", [
        ({"validation": "others"}, "a and b are not compared: scored on different validation stories", False),
        ({"data_fingerprint": "other"}, "may have been trained on different data: both are little.txt (300 ", True),
        ({"data_fingerprint": "other", "training_stories": 9_000}, "little.txt (300 stories) and little.txt (9,000", True),
        ({"lost": 0.0123}, "b is left out: its tokenizer bpe_tokenizer_128 loses 1.2% of the text", False),
        ({"lost": 0.0099}, "bpe_tokenizer_128 loses 0.99% of the text, which is not counted as predicted", True),
        ({"data_fingerprint": None}, "whether they were trained on the same data is not known", True),
        ({"tokenizer": "other"}, "a and b have different tokenizers", True),
        ({"code": {"model.py": "other"}}, "a and b were trained with different code: ", True),
        ({"code": None}, "whether the same code trained them is not known", True),
    ])  # fmt: skip
    def test_what_is_not_equal_is_never_compared_in_silence(self, make_run, facts, said, compared):
        make_run("a"), change(make_run("b", -0.02), "train_config.json", lr_max=0.02)
        assert not compare("a", "b").notes
        if "validation" in facts:
            losses, _ = read_losses("b")
            Run("b").save_log(losses[:100].to_dict("records"), COLUMNS, "story_losses.csv")
            facts = {"validation": digest("".join(losses["story"][:100]).encode())}
        change("b", "story_losses.json", **facts)
        result = compare("a", "b")
        assert said in "\n".join(result.notes) and len(result.verdicts) == compared
        if "validation" in facts:  # a sample and the whole of a data set have one name
            assert re.search(r"those of little\.txt \(300 stories; 200 for validation, digest \w{16}\) and of "
                             r"little\.txt \(300 stories; 100 for validation, digest \w{16}\)", result.notes[0])  # fmt: skip

    def test_what_a_lossy_tokenizer_throws_away_wins_nothing(self, make_run, make_config, tmp_path):
        """On Cyrillic bpe_tokenizer_128 gives back white space and full stops alone."""
        stories = ("Жил был кот. " + "Он ел. " * (number % 9) + str(number) for number in range(600))
        (tmp_path / "cyrillic.txt").write_text("\n\n".join(stories), encoding="utf-8")
        list(train(MODEL, make_config(data=str(tmp_path / "cyrillic.txt"), max_steps=2), "lossy"))
        save_losses("lossy")
        _, scored = read_losses("lossy")
        assert 0.6 < scored.lost < 0.8
        result = compare("tiny", "lossy")
        assert not result.verdicts and f"its tokenizer bpe_tokenizer_128 loses {scored.lost:.1%} of the text" in result.notes[0]

    def test_a_difference_counts_the_bytes_of_each_tokenizer(self, make_run):
        make_run("a"), make_run("b", lost=0.005)
        losses, _ = read_losses("b")
        Run("b").save_log(losses.assign(bytes=0.995 * losses["bytes"]).to_dict("records"), COLUMNS, "story_losses.csv")
        result = compare("a", "b")
        a, b = (group.values.item() for group in result.groups)
        assert b > 1.002 * a and result.differences["difference"].item() == pytest.approx(b - a)

    def test_the_validation_stories_decide_which_data_are_its_own(self, tiny_run, corpus, stories, tmp_path):
        """Not their path: a copy with another name is its own, and other stories of the same name are not."""
        copy = tmp_path / "copy.txt"
        copy.write_text("\n\n".join(stories), encoding="utf-8")
        change(tiny_run, "train_config.json", data="gone/little.txt")
        save_losses(tiny_run, str(copy))
        assert read_losses(tiny_run)[1].data == "copy.txt"
        copy.write_text("\n\n".join(stories[:450]), encoding="utf-8")
        change(tiny_run, "train_config.json", data=str(copy))
        save_losses(tiny_run)
        assert read_losses(tiny_run)[1].data == "copy.txt (not its own)"
        with pytest.raises(FileNotFoundError, match=r"'gone'.*To score on other stories, give data_if_missing, such as auto"):
            validation_stories("gone", None)

    def test_the_same_data_in_another_place_are_the_same(self, make_run):
        make_run("a"), make_run("b", -0.02)
        change("b", "train_config.json", data="elsewhere/little.txt", lr_max=0.02)
        assert not compare("a", "b").notes

    def test_who_was_given_more_is_told(self, make_run):
        make_run("a"), make_run("b", parameters=10**6), make_run("c", seed=2)
        change("b", "train_config.json", lr_max=0.02), change("c", "train_config.json", max_minutes=7.0)
        size, budget = compare("a", "b", "c").notes
        assert "different sizes: " in size and "1,000,000 parameters (b)" in size
        assert "20 steps (a, b), 20 steps or 7 minutes (c)" in budget

    def test_the_same_config_twice(self, make_run):
        make_run("a"), make_run("b", noise=0)
        assert "the same config with the same seed" in compare("a", "b").notes[0]
        change("b", "model_config.json", version=1, attention="kernel", mlp_dim=24)
        assert Run("b").model_config == MODEL and "the same config with the same seed" in compare("a", "b").notes[0]
        shutil.copytree(Run("b").folder, Run("c").folder)
        assert "no verdict" in compare("b", "c").verdicts[0]

    def test_at_equal_cost(self, make_run):
        make_run("a"), make_run("b", parameters=10**6, seed=1)
        assert "parameters are not equal within 5%" in compare("a", "b", at="parameters").notes[0]
        log = Run("b").log()
        doubled = log.assign(tokens=2 * log["tokens"], flops=2 * log["flops"], bits_per_byte=log["bits_per_byte"] - 0.1)
        doubled.to_csv(Run("b").path("log_data.csv"), index=False)
        for at in ("tokens", "flops"):
            result = compare("a", "b", at=at)
            curve = doubled.dropna(subset="bits_per_byte")
            budget = log[at].max()
            wanted = np.interp(budget, curve[at], curve["bits_per_byte"]) - log["bits_per_byte"].iloc[-1]
            assert result.differences["difference"].item() == pytest.approx(wanted)
            assert "by the curves of the log" in result.notes[0] and "no verdict" in result.verdicts[0]
        assert "within 2%" in compare("a", "b", at="step").notes[0]

    def test_another_plan_or_machine_is_noted(self, make_run):
        make_run("a0", group="a"), make_run("a1", seed=1, group="a"), make_run("b")
        assert not [note for note in compare("a", "b").notes if "executed" in note]
        stages = json.loads(Run("a1").path("execution.json").read_text())
        stages[0]["plan"] |= {"dtype": "bfloat16", "fast": not stages[0]["plan"]["fast"]}
        stages[0]["machine"]["processor"] = "M4"
        Run("a1").save_text("execution.json", json.dumps(stages))
        processor, fast = Run("b").stages[0].machine["processor"], Run("b").stages[0].plan.fast
        seeds, pair = [note for note in compare("a", "b").notes if "executed" in note]
        both = " and ".join([str(fast), str(not fast)])
        assert seeds == (
            f"the seeds of a were executed differently: dtype float32 and bfloat16, fast {both}, processor {processor} and M4"
        )
        assert pair.startswith("a and b were executed differently: dtype bfloat16/float32 and float32, ")

    def test_of_an_older_run_only_what_it_prescribes_is_compared(self, make_run):
        make_run("a"), make_run("b", seed=1)
        Run("b").path("execution.json").unlink()
        assert not [note for note in compare("a", "b").notes if "executed" in note]
        change("b", "train_config.json", threads=7)
        assert compare("a", "b").notes[-1] == "a and b were executed differently: threads 1 and 7"

    def test_seconds_that_count_everything_are_noted(self, make_run):
        make_run("a"), make_run("b", seed=1)
        assert not any("include compiling" in note for note in compare("a", "b", at="seconds").notes)
        Run("b").log().drop(columns="overhead_seconds").to_csv(Run("b").path("log_data.csv"), index=False)
        assert any("minutes of b include compiling" in note for note in compare("a", "b", at="seconds").notes)
        assert not any("include compiling" in note for note in compare("a", "b").notes)  # their budget is in steps

    def test_a_run_that_is_older_than_the_column_flops(self, make_run):
        make_run("a"), make_run("b", seed=1)
        Run("b").log().drop(columns="flops").to_csv(Run("b").path("log_data.csv"), index=False)
        assert "within 2%" in compare("a", "b", at="flops").notes[0]

    def test_bad_input(self, make_run):
        make_run("a")
        for names, options, said in [(("a",), {}, "name at least two runs"), (("a", "a"), {}, "each once"),
                                     (("a", "tiny"), {"at": "hours"}, "at='hours': it must be one of")]:  # fmt: skip
            with pytest.raises(ValueError, match=said):
                compare(*names, **options)
        with pytest.raises(FileNotFoundError, match="no run is called 'nobody'"):
            compare("a", "nobody")
        Run("a").save_text("group.json", "{")
        with pytest.raises(ValueError, match=r"group\.json of the run 'a' is damaged"):
            compare("tiny", "nobody")

    def test_a_run_whose_tokenizer_is_missing_is_named(self, make_run):
        """Kept losses need no tokenizer; to score anew does. A run of an older version has no copy of its own."""
        make_run("a"), make_run("b", seed=1)
        change("b", "train_config.json", tokenizer="mine.model")
        compare("a", "b")
        for file in ("story_losses.json", "tokenizer.json"):
            Run("b").path(file).unlink()
        with pytest.raises(SystemExit, match=r"^error: .*mine\.model.*$") as error:
            evaluation.main(["compare", "a", "b"])
        assert "\n" not in str(error.value)

    def test_as_markdown_it_says_the_same(self, make_run):
        make_run("a"), make_run("b", 0.02, seed=1)
        result = compare("a", "b")
        lines = result.as_markdown().splitlines()
        assert [line for line in lines if line.startswith("> ")] == [f"> **{verdict}.**" for verdict in result.verdicts]
        assert [line for line in lines if line.startswith("- ")] == [f"- {note}" for note in result.notes] != []

    def test_in_the_terminal_and_without_torch(self, make_run, capsys):
        make_run("a"), make_run("b", -0.02, seed=1)
        evaluation.main(["compare", "a", "b"])
        printed = capsys.readouterr().out
        assert "no verdict on a and b" in printed and "(corrected)" in printed
        with pytest.raises(SystemExit) as stop:
            evaluation.main(["compare", "a", "b", "--exit_code"])
        assert stop.value.code == 3
        with pytest.raises(SystemExit, match="error: no run is called 'nobody'"):
            evaluation.main(["compare", "a", "nobody"])
        code = "import sys; from evaluation.comparison import compare; compare('a', 'b'); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
