"""Promises of the verdict: intervals that cover, p-values that are rarely wrong, nothing compared in silence."""

import itertools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import MODEL, change
from evaluation import __main__ as evaluation
from evaluation.comparison import compare
from evaluation.statistics import holm, over_seeds, over_stories, seeds_needed
from inference import load_model
from metrics.story_losses import COLUMNS, read_losses, save_losses, validation_stories
from runs.code import digest
from runs.folder import Run
from train import train
from training.report import write_report

ROOT = Path(__file__).parents[1]
SIMULATED = 2000
# A test with 5% false alarms has more than 5% in half of all simulations of any size, by mere chance. So these are simulated
# more often, and may be above by three standard errors of their count: 0.2%, where among 2,000 it would be 1.5%.
MANY = 100_000
CHANCE = 3 * math.sqrt(0.05 * 0.95 / MANY)


def alarms(a, b, paired):
    """The share of comparisons that call a difference where there is none."""
    return np.mean(over_seeds(a, b, paired).p <= 0.05)


def covered(difference, truth):
    return np.mean((difference.low <= truth) & (truth <= difference.high))


class TestCoverage:
    """2,000 comparisons whose truth is known."""

    @pytest.mark.parametrize("seeds", [3, 5])
    def test_over_seeds_paired(self, seeds):
        random = np.random.default_rng(seeds)
        order = random.normal(0.9, 0.02, (seeds, SIMULATED))  # what both owe to the seed
        a, b = order + random.normal(0, 0.01, order.shape), order - 0.02 + random.normal(0, 0.01, order.shape)
        assert 0.93 <= covered(over_seeds(a, b, paired=True), -0.02) <= 0.97

    @pytest.mark.parametrize("spread", [0.01, 0.02])
    def test_over_seeds_unpaired(self, spread):
        random = np.random.default_rng(0)
        a, b = random.normal(0.9, 0.01, (5, SIMULATED)), random.normal(0.88, spread, (4, SIMULATED))
        assert 0.93 <= covered(over_seeds(a, b, paired=False), -0.02) <= 0.97

    def test_over_stories(self):
        """Stories of very different length, whose losses depend on it."""
        random = np.random.default_rng(2)
        length = random.lognormal(6.5, 0.5, (300, SIMULATED)).round()
        hard = random.normal(0, 40, length.shape)
        a = 0.60 * length + hard + random.normal(0, 0.6, length.shape) * np.sqrt(length)
        b = 0.59 * length + hard + random.normal(0, 0.6, length.shape) * np.sqrt(length)
        assert 0.93 <= covered(over_stories(a, b, length), -0.01 / math.log(2)) <= 0.97

    def test_false_alarms_of_many_comparisons(self):
        """Eight ideas that change nothing against one base model: one of them is called a difference in at most 5%."""
        random = np.random.default_rng(3)
        base, ideas = random.normal(0.9, 0.01, (5, SIMULATED)), random.normal(0.9, 0.01, (8, 5, SIMULATED))
        p = np.array([over_seeds(base, idea, paired=True).p for idea in ideas])  # (8, SIMULATED)
        assert np.mean((p <= 0.05).any(axis=0)) > 0.15  # which is what the correction is for
        alarms = np.mean([(holm(values) <= 0.05).any() for values in p.T])
        assert 0.01 <= alarms <= 0.05

    @pytest.mark.parametrize("seeds", [2, 3, 5])
    def test_false_alarms_of_paired_seeds_are_exactly_5_percent(self, seeds):
        random = np.random.default_rng(seeds)
        order = random.normal(0.9, 0.02, (seeds, MANY))
        a, b = (order + random.normal(0, 0.01, order.shape) for _ in range(2))
        assert abs(alarms(a, b, paired=True) - 0.05) <= CHANCE

    @pytest.mark.parametrize("spread", [1, 2])
    @pytest.mark.parametrize("seeds", [(2, 2), (3, 3), (5, 5), (2, 4), (2, 5), (3, 5), (3, 8), (5, 10)])
    def test_false_alarms_of_seeds_that_are_not_paired_are_at_most_5_percent(self, seeds, spread):
        """The smaller group has the wider spread, which is where Welch's own degrees of freedom are too many."""
        random = np.random.default_rng(sum(seeds))
        a, b = random.normal(0.9, 0.01 * spread, (seeds[0], MANY)), random.normal(0.9, 0.01, (seeds[1], MANY))
        assert alarms(a, b, paired=False) <= 0.05 + CHANCE
        if seeds == (2, 5) and spread == 2:
            assert np.mean(stats.ttest_ind(b, a, equal_var=False).pvalue <= 0.05) > 0.08

    def test_false_alarms_of_one_seed_each_on_other_stories_are_5_percent(self):
        random = np.random.default_rng(8)
        length = random.lognormal(6.5, 0.5, (300, MANY // 5)).round()
        nats = random.normal(0, 0.6, length.shape) * np.sqrt(length)
        assert np.mean(over_stories(0 * length, nats, length).p <= 0.05) <= 0.05 + math.sqrt(5) * CHANCE

    def test_so_many_seeds_do_tell(self):
        random = np.random.default_rng(4)
        for paired, a, b in [(True, [0.90, 0.91, 0.92], [0.89, 0.91, 0.895]), (False, [0.90, 0.91, 0.92], [0.88, 0.905, 0.90])]:
            needed = seeds_needed(a, b, paired)
            seen = {}
            for seeds in (needed - 1, needed):
                truth = np.mean(b) - np.mean(a)
                if paired:
                    first = random.normal(0, 1, (seeds, SIMULATED))
                    second = first + random.normal(truth, np.std(np.subtract(b, a), ddof=1), first.shape)
                else:
                    first = random.normal(0, np.std(a, ddof=1), (seeds, SIMULATED))
                    second = random.normal(truth, np.std(b, ddof=1), first.shape)
                seen[seeds] = np.mean(over_seeds(first, second, paired).p <= 0.05)
            assert seen[needed] > 0.77 and seen[needed - 1] < 0.83


class TestStatistics:
    def test_stories_against_the_bootstrap(self):
        random = np.random.default_rng(5)
        length = random.integers(200, 1500, 400)
        a = 0.6 * length + random.normal(0, 20, 400)
        b = a - 0.02 * length + random.normal(0, 6, 400)
        ours = over_stories(a, b, length)

        def bits(a, b, length, axis=-1):
            return (b - a).sum(axis) / length.sum(axis) / math.log(2)

        resampled = stats.bootstrap((a, b, length), bits, paired=True, n_resamples=2000, rng=0, method="percentile")
        boot = resampled.confidence_interval
        assert ours.mean == pytest.approx(bits(a, b, length))
        assert (ours.low, ours.high) == pytest.approx((boot.low, boot.high), abs=0.05 * (boot.high - boot.low))

    def test_holm_is_bonferroni_of_every_set_of_hypotheses_that_holds_it(self):
        """The closed test that Holm's method is a short cut of."""
        p = np.random.default_rng(6).uniform(0, 0.2, 5)
        for number, corrected in enumerate(holm(p)):
            sets = [chosen for size in range(1, 6) for chosen in itertools.combinations(range(5), size) if number in chosen]
            assert corrected == pytest.approx(max(min(1, len(chosen) * p[list(chosen)].min()) for chosen in sets))
        assert holm([0.01, math.nan, 0.04]).tolist() == pytest.approx([0.02, math.nan, 0.04], nan_ok=True)

    def test_copies_and_what_has_no_spread(self):
        values = [0.9, 0.91]
        assert over_seeds(values, values, paired=True).p == 1.0
        assert np.isnan(over_seeds(values, [0.8, 0.81], paired=True).p) or over_seeds(values, [0.8, 0.81], paired=True).p < 1e-6
        assert np.isnan(over_seeds([0.9, 0.9], [0.8, 0.8], paired=False).p)
        assert seeds_needed(values, values, paired=True) is None


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
    def test_one_seed_each_is_paired_by_story_and_says_so(self, make_run):
        make_run("a"), make_run("b", shift=-0.02)
        result = compare("a", "b")
        difference = result.differences.loc["b - a"]
        assert difference["95% from"] < -0.02 < difference["to"] < 0 and difference["over"] == "stories"
        (verdict,) = result.verdicts
        assert re.fullmatch(r"b is better than a by 0\.0[12]\d\d ± 0\.00\d\d bits per byte \(1 seed, p < 0\.001\)\. "
                            r"The interval is from the stories alone; another seed may say otherwise", verdict)  # fmt: skip

    def test_seeds_are_the_unit_where_there_are_several(self, make_run):
        for seed, luck in enumerate([0.01, -0.005, 0.002]):
            make_run(f"a-seed{seed}", luck, seed, "a"), make_run(f"b-seed{seed}", luck - 0.05 - 0.001 * seed, seed, "b")
            make_run(f"c-seed{seed}", -luck, seed, "c"), make_run(f"d-seed{seed}", luck - 0.05, seed + 7, "d")
        result = compare("a", "b", "c", "d")
        values = {name: [np.log2(np.e) * read_losses(f"{name}-seed{seed}")[0]["nats"].sum() /
                         read_losses("tiny")[0]["bytes"].sum() for seed in range(3)] for name in "abcd"}  # fmt: skip
        p = [stats.ttest_rel(values["b"], values["a"]).pvalue, stats.ttest_rel(values["c"], values["a"]).pvalue,
             stats.ttest_ind(values["d"], values["a"], equal_var=False).pvalue]  # fmt: skip
        assert result.differences["p"].tolist() == pytest.approx(p)
        assert result.differences["p (Holm)"].tolist() == pytest.approx(holm(p).tolist())
        assert result.differences["over"].tolist() == ["seeds, paired", "seeds, paired", "seeds"]
        wanted = r"b is better than a by 0\.05\d+ ± 0\.00\d+ bits per byte \(3 seeds, p .*corrected for 3"
        assert re.match(wanted, result.verdicts[0])
        needed = seeds_needed(values["a"], values["c"], True, 0.05 / 3) - 3
        assert re.match(rf"a and c are not distinguishable; about {needed} more seeds would tell", result.verdicts[1])
        assert len(compare("a", "b", "c", all_pairs=True).verdicts) == 3
        assert compare("a-seed0", "b").differences["over"].tolist() == ["stories"]

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
        make_run("a"), make_run("b", -0.02, seed=1)
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
        make_run("a"), make_run("b", -0.02, seed=1)
        change("b", "train_config.json", data="elsewhere/little.txt")
        assert not compare("a", "b").notes

    def test_who_was_given_more_is_told(self, make_run):
        make_run("a"), make_run("b", parameters=10**6, seed=1), make_run("c", seed=2)
        change("c", "train_config.json", max_minutes=7.0)
        size, budget = compare("a", "b", "c").notes
        assert "different sizes: " in size and "1,000,000 parameters (b)" in size
        assert "20 steps (a, b), 20 steps or 7 minutes (c)" in budget

    def test_the_same_config_twice(self, make_run):
        make_run("a"), make_run("b", noise=0)
        assert "the same config with the same seed" in compare("a", "b").notes[0]
        change("b", "model_config.json", version=1, attention="kernel", mlp_dim=24)
        assert Run("b").model_config == MODEL and "the same config with the same seed" in compare("a", "b").notes[0]
        shutil.copytree(Run("b").folder, Run("c").folder)
        assert "not distinguishable" in compare("b", "c").verdicts[0]

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
            assert "by the curves of the log" in result.notes[0] and "one seed alone has no interval here" in result.verdicts[0]
        assert "within 2%" in compare("a", "b", at="step").notes[0]
        change("b", "train_config.json", threads=1)
        assert any("auto and 1 threads" in note for note in compare("a", "b", at="seconds").notes)

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
        """Kept losses need no tokenizer; to score anew does."""
        make_run("a"), make_run("b", seed=1)
        change("b", "train_config.json", tokenizer="mine.model")
        compare("a", "b")
        Run("b").path("story_losses.json").unlink()
        with pytest.raises(SystemExit, match=r"^error: .*mine\.model.*$") as error:
            evaluation.main(["compare", "a", "b"])
        assert "\n" not in str(error.value)

    def test_in_the_terminal_and_without_torch(self, make_run, capsys):
        make_run("a"), make_run("b", -0.02, seed=1)
        evaluation.main(["compare", "a", "b"])
        printed = capsys.readouterr().out
        assert "b is better than a" in printed and "p (Holm)" in printed
        unknown = (["compare", "a", "nobody"], "error: no run is called 'nobody'")
        for words, said in [([], "usage"), (["guess"], "usage"), unknown]:
            with pytest.raises(SystemExit, match=said):
                evaluation.main(words)
        code = "import sys; from evaluation.comparison import compare; compare('a', 'b'); assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
