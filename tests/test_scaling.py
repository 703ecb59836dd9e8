"""Promises of a ladder: sizes that are met, rungs trained once and alike, and a verdict that claims no more than was measured."""

import itertools
import math
import os
import signal
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from config import ModelConfig, TrainConfig
from conftest import MODEL
from evaluation import __main__ as evaluation
from evaluation import ladder, scaling
from evaluation.ladder import Budget, at_width, fixed_widths, format_size, plan, read_size, resumed, train_all
from evaluation.loss_law import fit, race
from metrics.cost import cost_of
from metrics.story_losses import COLUMNS, read_losses
from runs.code import digest
from runs.folder import Run, run_names
from runs.presets import PRESETS, Preset
from runs.terminal import UsageError
from tests.errors import one_line_error
from tokenizer import load_tokenizer
from training import autotune
from training.seeds import members

SIZES = ("6k", "11k", "18k")
FEW = Budget("steps", 6)


@pytest.fixture
def presets(monkeypatch, make_config):
    """Two tiny architectures, called small and plain."""
    train = make_config(warmup_steps=1)
    monkeypatch.setattr(autotune, "most_threads", lambda: 1)  # so that nothing is trained in another process
    monkeypatch.setitem(PRESETS, "small", Preset(MODEL, train))
    plain = replace(MODEL, gated=False, mlp_dim=24, positions="none", norm="LayerNorm")
    monkeypatch.setitem(PRESETS, "plain", Preset(plain, train))
    return train


def weights_of(name):
    return Run(name).path("model.pth").stat().st_mtime_ns


class TestSizes:
    @pytest.mark.parametrize("text, size", [("0.25m", 250_000), ("250k", 250_000), ("2M", 2_000_000), ("1500", 1500)])
    def test_are_read(self, text, size):
        assert read_size(text) == size

    @pytest.mark.parametrize("text", ["2g", "m", "-1m", "0", "1e6", "two", "nan", "1 0m", "1000m"])
    def test_nonsense_is_one_line(self, text):
        one_line_error(lambda: read_size(text), f"--sizes {text}")

    @pytest.mark.parametrize("name", ["1m", "gpt2_like", "qwen3_like", "grok_like", "mamba_like", "griffin_like", "speedrun"])
    def test_are_met_with_the_same_layer_strings(self, name):
        config = PRESETS[name].model
        for rung in ladder.ladder(name, config, 1024, [300_000, 1_200_000]):
            made, values, old = rung.config, rung.config.block_values(), config.block_values()
            kept = {"dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim"}
            assert all(getattr(made, field) == getattr(config, field) for field in vars(config) if field not in kept)
            assert abs(rung.parameters / rung.target - 1) < 0.1
            share = made.dim / config.dim
            assert values["mlp_dim"] == pytest.approx(old["mlp_dim"] * share, abs=8) and values["mlp_dim"] % 8 == 0
            if config.num_heads > 1:
                assert 0.6 < values["head_dim"] / old["head_dim"] < 1.6
                group = config.num_heads // config.num_kv_heads if config.num_kv_heads > 1 else 1
                assert made.num_heads == pytest.approx(config.num_heads * share, abs=0.75 * group)
            assert name in str(rung) and f"{rung.parameters:,}" in str(rung) and f"dim {made.dim}" in str(rung)

    def test_none_is_nearer_and_they_are_counted_as_elsewhere(self):
        model = PRESETS["1m"].model
        (rung,) = ladder.ladder("1m", model, load_tokenizer(TrainConfig().tokenizer).vocab_size, [600_000])
        near = [cost_of(at_width(model, dim), T=8).parameters for dim in range(80, 121, ladder.STEP)]
        assert rung.parameters == cost_of(rung.config, T=8).parameters == min(near, key=lambda there: abs(there - 600_000))

    def test_heads_share_keys_as_they_did(self):
        four = replace(PRESETS["5m"].model)  # 8 heads, 2 of keys
        assert [(made.num_heads, made.num_kv_heads) for made in (at_width(four, dim) for dim in (64, 96, 128, 256, 512))] == [
            (4, 1), (4, 1), (4, 1), (8, 2), (16, 4)]  # fmt: skip
        assert at_width(four, 32).num_heads == 1
        one = PRESETS["gemma1_like"].model
        assert [(made.num_heads, made.num_kv_heads) for made in (at_width(one, dim) for dim in (48, 96, 144))] == [
            (2, 1), (4, 1), (6, 1)]  # fmt: skip
        assert at_width(PRESETS["2m"].model, 192) == PRESETS["2m"].model

    def test_what_cannot_be_reached_is_one_line(self):
        model = PRESETS["mamba2_hybrid_like"].model  # whose heads of 64 channels divide few widths
        one_line_error(lambda: ladder.ladder("hybrid", model, 1024, [500_000]), "hybrid cannot have 0.5m", "nearest is", "dim=")
        one_line_error(lambda: ladder.ladder("1m", PRESETS["1m"].model, 1024, [1000]), "cannot have 0.001m")
        one_line_error(lambda: ladder.ladder("1m", PRESETS["1m"].model, 1024, [500_000, 501_000]), "the same at 0.5m and 0.501m")

    def test_the_ladder_gives_the_reason_of_a_block(self):
        picky = ModelConfig(dim=640, num_layers=1, layers="Picky->+", plugins=("picky_blocks",))
        reasons = "no dim near 184 is valid", "dim=184: Picky needs 640", "take other sizes"
        one_line_error(lambda: ladder.ladder("picky", picky, 128, [40_000]), *reasons)

    def test_widths_in_the_layer_string_are_told(self):
        assert fixed_widths("Norm->Attn(window=64, num_heads=2)->+->Norm->MLP(mlp_dim=72)->+") == ["num_heads=2", "mlp_dim=72"]
        assert fixed_widths((["Norm->MLP->+", "Attn(head_dim=8)"], "Attn(head_dim=8)")) == ["head_dim=8"]


class TestPlan:
    def test_rungs_differ_in_size_alone(self, presets):
        planned = plan(("small", "plain"), SIZES, seeds=2, budget=FEW)
        assert [group.name for group in planned.groups][:4] == [
            "scaling-small-0.006m-6steps", "scaling-small-0.011m-6steps", "scaling-small-0.018m-6steps",
            "scaling-plain-0.006m-6steps"]  # fmt: skip
        assert {group.train for group in planned.groups} == {replace(presets, max_steps=6)}
        assert [rung.architecture for rung in planned.rungs] == ["small"] * 3 + ["plain"] * 3

    def test_budgets(self, presets):
        rung = plan(("small",), SIZES, budget=FEW).rungs[2]
        minutes = Budget("minutes", 1.5).apply(presets, rung)
        assert (minutes.max_steps, minutes.max_minutes) == (None, 1.5)
        tokens = Budget("tokens_per_parameter", 20).apply(presets, rung)
        assert tokens.max_steps * presets.batch_size * MODEL.max_seq_len == pytest.approx(20 * rung.parameters, rel=0.01)
        growing = Budget("tokens_per_parameter", 20).apply(replace(presets, batch_size_start=1), rung)  # 1, 2, then 4 at a time
        assert growing.max_steps / tokens.max_steps == pytest.approx(4 / (0.25 * 1 + 0.25 * 2 + 0.5 * 4), rel=0.01)
        for kind, amount in [("steps", 0), ("steps", 2.5), ("minutes", -1), ("minutes", math.inf), ("steps", math.nan)]:
            one_line_error(lambda kind=kind, amount=amount: Budget(kind, amount), f"--{kind}", "positive")

    def test_what_is_trained_otherwise_than_by_itself_is_told(self, presets, monkeypatch):
        own = replace(presets, lr_max=1e-4, optimizer="Muon", threads="auto", max_steps=99)
        monkeypatch.setitem(PRESETS, "plain", Preset(replace(PRESETS["plain"].model, max_seq_len=32), own))
        notes = plan(("small", "plain"), SIZES, budget=FEW).notes
        assert notes == ["plain is trained with the options of small, not its own optimizer='Muon', lr_max=0.0001",
                         "plain has the context of small, 48 tokens, not its own 32"]  # fmt: skip

    def test_runs_and_groups_lend_their_architecture(self, presets, tiny_run):
        assert ladder.architecture("tiny") == (MODEL, Run("tiny").train_config)
        Run("tiny").save_text("group.json", '{"group": "several"}')
        assert ladder.architecture("several")[0] == MODEL
        experiment, _ = ladder.architecture("example/forgetting")
        assert "ForgettingAttn" in experiment.layers
        planned = plan(("example/forgetting",), ("0.3m", "0.5m", "1m"), train=presets)
        assert planned.groups[0].name == "example/scaling-forgetting-0.3m-2000steps"

    @pytest.mark.parametrize("specs, changes, words", [
        (("small",), {"sizes": ("6k", "11k")}, ["--sizes 6k 11k", "at least three"]),
        (("small",), {"sizes": ("6k", "11k", "0.011m")}, ["name each size once"]),
        (("small", "small"), {}, ["each once"]),
        (("smal",), {}, ["'smal' is neither a preset nor a run", "Did you mean 'small'?"]),
        (("nobody/small",), {}, ["no experiment is called 'nobody'"]),
        (("small",), {"seeds": 0}, ["--seeds 0"]),
        (("small",), {"name": "a/b"}, ["--name a/b"]),
    ])  # fmt: skip
    def test_bad_input(self, presets, specs, changes, words):
        one_line_error(lambda: plan(specs, **{"sizes": SIZES, "budget": FEW} | changes), *words)


class TestTraining:
    def test_a_ladder_in_the_terminal_goes_on_where_it_was_stopped(self, presets, capsys, tmp_path, monkeypatch):
        words = ["scaling", "small", "plain", "--sizes", *SIZES, "--seeds", "1", "--steps", "6", "--save", str(tmp_path / "out")]
        save_model, saved = Run.save, itertools.count()

        def save_and_press_ctrl_c(run, file, content):
            save_model(run, file, content)
            if run.name == "scaling-small-0.011m-6steps-seed0" and next(saved) == 2:  # once training has begun
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Run, "save", save_and_press_ctrl_c)
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([*words, "--train.eval_every", "3"])
        assert stopped.value.code == 130 and "the same command continues" in capsys.readouterr().err
        finished = [name for name in run_names() if (Run(name).folder / "story_losses.json").exists()]
        assert 0 < len(finished) < len(run_names()) < 6
        before = {name: weights_of(name) for name in finished}

        monkeypatch.setattr(Run, "save", save_model)
        evaluation.main([*words, "--train.eval_every", "3"])
        printed = capsys.readouterr().out
        assert len(run_names()) == 6 and before == {name: weights_of(name) for name in finished}
        for sentence in ("small at 0.006m: ", "--seeds 1: a single seed gives estimates", "parameters, held out, measured",
                         "one seed of each size, so there is no interval", "L(N) = E + A N^-alpha",
                         "no verdict on small and plain from one seed of each size of small and plain"):
            assert sentence in printed
        assert not any(word in printed for word in ("95%", "better", "inside", "outside", "nan"))
        assert (tmp_path / "out/scaling.png").stat().st_size > 10_000
        runs = pd.read_csv(tmp_path / "out/runs.csv")
        assert len(runs) == 6 and runs["tokens"].nunique() == 1 and (tmp_path / "out/verdict.txt").read_text() in printed
        for row in runs.itertuples():
            losses, scored = read_losses(row.run)
            assert row.parameters == scored.parameters and Run(row.run).log()["step"].max() == 6
            assert row[5] == pytest.approx(losses["nats"].sum() / losses["bytes"].sum() / math.log(2))

        times = {name: weights_of(name) for name in run_names()}
        again = scaling.scaling("small", "plain", sizes=SIZES, seeds=1, budget=FEW, train=replace(presets, eval_every=3))
        assert times == {name: weights_of(name) for name in run_names()} and str(again) in printed
        with pytest.raises(SystemExit, match=r"error: the run 'scaling-small-.*-seed0' has other configs.* another --name"):
            evaluation.main([*words, "--train.eval_every", "2"])

    def test_seeds_and_a_rung_that_diverges(self, presets, capsys):
        planned = plan(("small",), (*SIZES, "30k"), seeds=2, budget=FEW)
        smallest, largest = planned.groups[0], planned.groups[-1]
        for member in (members(smallest)[1], *members(largest)):
            Run(member.name).create(member.model, member.train, member.group)
            Run(member.name).save_text("diverged.txt", "the loss is no longer finite at step 3\n")
        assert train_all(planned)
        assert not any(resumed(group).resume is False for group in planned.groups)
        largest = largest.name
        result = scaling.measure(planned)
        assert [note.split(" diverged")[0] for note in result.notes] == [
            "scaling-small-0.006m-6steps-seed1", f"{largest}-seed0", f"{largest}-seed1"]  # fmt: skip
        assert result.table["seeds"].tolist() == [1, 2, 2] and result.laws["small"].has_noise
        assert any(f"{format_size(planned.rungs[2].parameters)} parameters, held out" in line for line in result.verdicts)
        Run("scaling-small-0.006m-6steps-seed0").save_text("diverged.txt", "the loss is no longer finite at step 2\n")
        few = scaling.measure(planned)
        assert few.verdicts == ["small: a law needs three sizes, but only 2 have usable runs"] and not few.laws
        plt.close(scaling.plot(few))

    def test_runs_on_other_data_are_one_line(self, presets):
        planned = plan(("small",), SIZES, seeds=1, budget=FEW)
        one_line_error(lambda: scaling.measure(planned), "'scaling-small-0.006m-6steps-seed0' is not finished")
        train_all(planned)
        name = "scaling-small-0.018m-6steps-seed0"
        losses, scored = read_losses(name)
        facts = Run(name).path("story_losses.json").read_text()
        Run(name).save_log(losses[:100].to_dict("records"), COLUMNS, "story_losses.csv")
        shorter = digest("".join(losses["story"][:100]).encode())
        Run(name).save_text("story_losses.json", facts.replace(scored.validation, shorter))
        one_line_error(lambda: scaling.measure(planned), name, "was scored on other stories than", "another --name")

    def test_a_run_that_fails_otherwise_stops_the_ladder(self, presets, monkeypatch):
        planned = plan(("small",), SIZES, budget=FEW)
        broken = {"scaling-small-0.006m-6steps-seed0": "the disk is full"}
        monkeypatch.setattr(ladder, "train_members", lambda *given: (broken, False))
        one_line_error(lambda: train_all(planned), "seed0: the disk is full", error=ChildProcessError)

    @pytest.mark.parametrize("words, said", [
        (["small", "--sizes", "1q", "2m", "3m"], "--sizes 1q: write a number of parameters"),
        (["nobody", "--sizes", "1m", "2m", "3m"], "'nobody' is neither a preset nor a run"),
        (["small", "--sizes", *SIZES, "--minutes", "0"], "--minutes 0: give a positive number"),
    ])  # fmt: skip
    def test_bad_words_are_one_line(self, presets, words, said):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main(["scaling", *words])
        assert stopped.value.code.startswith(f"error: {said}") and "\n" not in stopped.value.code

    def test_the_budget_is_no_training_option(self, presets):
        words = ["scaling", "small", "--sizes", *SIZES, "--train.max_steps", "7"]
        one_line_error(lambda: evaluation.run(words), "--train.max_steps: give --steps", error=UsageError)


class TestSentences:
    """What is reported of laws that are known."""

    sizes = np.repeat([0.25e6, 0.5e6, 1e6, 2e6], 3)

    def losses(self, alpha, middle=0.85):
        return 0.5 + (middle - 0.5) * (self.sizes / 1e6) ** -alpha + 0.002 * np.tile([-1, 0, 1], 4)

    def law(self, alpha, middle=0.85):
        return fit(self.sizes, self.losses(alpha, middle))

    def verdict(self, one, other):
        return scaling.describe_race("A", "B", race(one, other), one, other)

    def test_which_overtakes_which(self):
        verdict = self.verdict(self.law(0.15), self.law(0.35))
        assert verdict.startswith("B is better than A from about 1m parameters on (95% interval 0.")
        assert verdict.endswith("and worse below that")
        assert self.verdict(self.law(0.35), self.law(0.15)).startswith("A is better than B from about 1m")
        assert self.verdict(self.law(0.2), self.law(0.2, 0.8)) == "B is better than A from 0.25m to 2m parameters"
        assert self.verdict(self.law(0.2), self.law(0.2)).startswith(
            "A and B are not distinguishable from 0.25m to 2m parameters: at the largest B - A is -0.0")  # fmt: skip

    def test_a_crossing_outside_of_the_sizes_is_a_guess(self):
        meet_at_8 = 0.35 * 8**-0.2
        verdict = self.verdict(self.law(0.2), self.law(0.4, 0.5 + meet_at_8 * 8**0.4))
        assert verdict.startswith("A is better than B from 0.25m to 2m")
        assert "cross at about 8" in verdict and "no more than a guess" in verdict

    def test_the_forecast(self):
        losses = self.losses(0.2)
        sentence = scaling.describe_forecast("A", fit(self.sizes, losses, held_out=2e6))
        assert sentence.startswith("A: 2m parameters, held out, measured 0.80") and "; inside the 95% interval" in sentence
        losses[-3:] += 0.1
        assert "; outside the 95% interval" in scaling.describe_forecast("A", fit(self.sizes, losses, held_out=2e6))
        assert "do not determine a forecast" in scaling.describe_forecast("A", fit(self.sizes[:9], losses[:9], held_out=1e6))

    def test_one_seed_gets_no_interval_and_no_verdict(self):
        one, other = (fit(self.sizes[::3], self.losses(0.2, middle)[::3]) for middle in (0.85, 0.75))
        verdict = self.verdict(one, other)
        assert verdict.startswith("no verdict on A and B from one seed of each size of A and B") and "better" not in verdict
        assert self.verdict(one, self.law(0.2)).startswith("no verdict on A and B from one seed of each size of A (")
        held_out = fit(self.sizes[::3], self.losses(0.2)[::3], held_out=2e6)
        sentence = scaling.describe_forecast("A", held_out)
        assert sentence.endswith("one seed of each size, so there is no interval") and "side the" not in sentence

    def test_a_law_that_does_not_fit_gets_no_parameters(self):
        bent = fit(self.sizes, np.repeat([0.95, 0.80, 0.79, 0.70], 3) + 0.002 * np.tile([-1, 0, 1], 4))
        assert scaling.describe_law("A", bent)[0].startswith("A: no such law fits (p = ")
        assert self.verdict(bent, self.law(0.2)).startswith("no verdict on A and B across sizes, as no law fits A")
        result = scaling.Scaling(pd.DataFrame(), {"A": bent, "B": self.law(0.2)}, {}, {}, [], [])
        assert list(result.parameters.index) == ["B"]

    def test_three_races_are_corrected_together(self, monkeypatch):
        runs = pd.DataFrame([
            [name, format_size(size), int(size), number % 3, loss, 1000, 1.0, False, f"{name}-{number}"]
            for name, middle in (("A", 0.85), ("B", 0.85), ("C", 0.75))
            for number, (size, loss) in enumerate(zip(self.sizes, self.losses(0.2, middle), strict=True))
        ], columns=scaling.COLUMNS)  # fmt: skip
        monkeypatch.setattr(scaling, "gather", lambda planned: (runs, []))
        rungs = [ladder.Rung(name, 250_000, 250_000, MODEL) for name in "ABC"]
        result = scaling.measure(ladder.Plan(rungs, [], FEW, []))
        alone = race(result.laws["A"], result.laws["C"]).simultaneous
        assert (result.races["A", "C"].simultaneous.high > alone.high).all()
        assert "the 3 comparisons of two architectures are corrected for their number" in str(result)
        assert "C is better than A from 0.25m to 2m parameters" in result.verdicts
        assert len(result.parameters) == 3 and "95% of the law" in result.table
        plt.close(scaling.plot(result))

    def test_what_a_law_leaves_open(self):
        assert scaling.describe_law("A", fit(self.sizes, 0.8 + 0.01 * np.log(self.sizes / 1e6))) == [
            "A: the loss does not fall with the size, so there is no law"]  # fmt: skip
        open_law = fit(self.sizes, 0.85 * (self.sizes / 1e6) ** -0.1 + 0.004 * np.tile([-1, 0, 1], 4))
        assert scaling.describe_law("A", open_law)[0].startswith("A: these sizes do not determine E: E = 0 to 0.")
        assert scaling.describe_law("A", self.law(0.9)) == []
