"""Promises of report.py: the curves, the tables, and a command that trains the same again."""

import shlex
import subprocess
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from config import ModelConfig, TrainConfig
from conftest import MODEL
from inference import load_model
from runs.command_line import command, parse
from runs.folder import Run
from runs.presets import PRESETS
from train import train
from training.report import PROMPTS, film_strip, plot_losses, samples, table, write_report


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


class TestPlot:
    @pytest.mark.parametrize("by", ["step", "tokens", "seconds", "flops"])
    def test_training_and_validation_by(self, tiny_run, by):
        axes = plot_losses(tiny_run, by=by)
        training, validation = axes.get_lines()
        log = Run(tiny_run).log()
        assert training.get_xdata().tolist() == validation.get_xdata().tolist() == log[by].tolist()
        assert training.get_ydata().tolist() == log["train_loss"].tolist()
        assert validation.get_ydata().tolist() == log["validation_loss"].tolist()
        assert by.rstrip("s") in axes.get_xlabel().lower()

    def test_several_runs_on_given_axes_each_with_its_data(self, tiny_run, make_config):
        list(train(MODEL, make_config(max_steps=25, eval_every=15), "other"))
        axes = plt.subplots()[1]
        assert plot_losses(tiny_run, "other", axes=axes) is axes
        assert axes.get_legend_handles_labels()[1] == ["tiny on little.txt", "other on little.txt"]
        assert len({line.get_color() for line in axes.get_lines()}) == 2
        assert axes.get_lines()[3].get_xdata().tolist() == [15, 25]  # rows without a validation are no gap

    def test_unknown_axis_and_unknown_run(self, tiny_run):
        with pytest.raises(ValueError, match="by='time': it must be one of step, tokens, seconds, flops"):
            plot_losses(tiny_run, by="time")
        with pytest.raises(FileNotFoundError, match="no run is called 'nobody'"):
            plot_losses("nobody")


ODD = {
    "parallel": (ModelConfig(layers=["Norm->Attn->+->Norm->MLP->+", "Norm->MLP->+"]), TrainConfig()),
    "tile": (ModelConfig(layers=("Norm->Attn(window=64)->+", ["Norm->Attn->+", "Norm->MLP->+"])), TrainConfig()),
    "quotes": (ModelConfig(layers="""Norm->Attn(norm="LayerNorm", dropout=0.5)->+->MLP(activation='ReLU')->+"""), TrainConfig()),
    "quotes in a tile": (ModelConfig(layers=("""Norm->Attn(norm="it's")->+""", "Norm->MLP->+")), TrainConfig()),
    "scale": (ModelConfig(embedding_scale="sqrt(dim)", head_dim=20, logit_soft_cap=15.0), TrainConfig()),
    "scale as a number": (ModelConfig(embedding_scale=0.1, tied_embeddings=False, norm_affine=False), TrainConfig()),
    "plugins": (ModelConfig(plugins=("experiments.mine", "experiments.yours"), gated=False), TrainConfig()),
    "none": (ModelConfig(), TrainConfig(max_minutes=None, max_steps=70, grad_clip=None, max_stories=None)),
    "numbers": (ModelConfig(norm_eps=1e-7), TrainConfig(betas=(0.5, 0.999), eps=1e-12, lr_max=3e-05, micro_batch_size=4)),
    "switches": (ModelConfig(qk_norm=True, linear_bias=True), TrainConfig(compile=True, mask_stories=True, packing="padded")),
    "paths": (ModelConfig(), TrainConfig(data="my stories/it's (mine).txt", tokenizer="C:\\my tokenizer\\a.model")),
    "tiny": (MODEL, TrainConfig(optimizer="Muon", schedule="wsd", data="storyworld:500", device="cuda:1", dtype="bfloat16")),
}


class TestCommand:
    @pytest.mark.parametrize("model, config", ODD.values(), ids=ODD)
    def test_a_shell_reads_it_back_as_the_same_configs(self, model, config):
        line = f"printf '%s\\n' {command(model, config, 'mine')}"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
        python, script, *words = done.stdout.splitlines()
        assert [python, script, *words] == shlex.split(command(model, config, "mine"))
        assert (python, script) == ("python", "train.py")
        arguments = parse(words)
        assert (arguments.model, arguments.train, arguments.name) == (model, config, "mine")

    @pytest.mark.parametrize("name", PRESETS)
    def test_a_preset_needs_no_more_than_its_name(self, name):
        assert command(*PRESETS[name], "mine") == f"python train.py --preset {name} --name mine"
        changed = replace(PRESETS[name].train, seed=7)
        arguments = parse(shlex.split(command(PRESETS[name].model, changed, "mine"))[2:])
        assert (arguments.model, arguments.train) == (PRESETS[name].model, changed)


class TestTables:
    def test_a_row_for_each_run(self, tiny_run, make_config):
        list(train(replace(MODEL, dim=8), make_config(max_steps=5, tokenizer="bpe_tokenizer_256"), "other"))
        shown = table(tiny_run, "other", top_k=(1, 5))
        assert shown.index.tolist() == ["tiny", "other"]
        assert list(shown) == [
            "data", "stories", "parameters", "without embeddings", "FLOPs per token", "training FLOPs", "minutes", "loss",
            "bits per byte", "top-1", "top-5",
        ]  # fmt: skip
        assert shown["data"].tolist() == ["little.txt"] * 2 and shown["stories"].tolist() == [200, 200]
        for name, row in shown.iterrows():
            log = Run(name).log()
            assert row["bits per byte"] == pytest.approx(log["bits_per_byte"].min(), rel=1e-5)
            assert row["minutes"] == pytest.approx(log["seconds"].iloc[-1] / 60)
            assert row["training FLOPs"] == pytest.approx(3 * row["FLOPs per token"] * log["tokens"].iloc[-1])
            assert 0 <= row["top-1"] <= row["top-5"] <= 1
        model, _ = load_model("tiny")
        assert shown.loc["tiny", "parameters"] == sum(weight.numel() for weight in model.parameters())
        assert shown.loc["tiny", "without embeddings"] == shown.loc["tiny", "parameters"] - 131 * MODEL.dim

    def test_the_first_stories_alone(self, tiny_run):
        shown = table(tiny_run, num_stories=7)
        assert shown["stories"].tolist() == [7]
        assert {f"top-{k}" for k in (1, 5, 10)} <= set(shown)

    def test_data_that_are_not_here(self, make_config, tmp_path, stories, corpus, capsys):
        path = tmp_path / "gone.txt"
        path.write_text("\n\n".join(stories[:450]), encoding="utf-8")
        list(train(MODEL, make_config(data=str(path), max_steps=2), "mine"))
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"gone\.txt"):
            table("mine")
        assert table("mine", data_if_missing=corpus)["data"].tolist() == ["little.txt (not its own)"]
        assert "gone.txt" in capsys.readouterr().out

    def test_a_run_that_was_stopped_before_its_first_row(self, make_config):
        next(train(MODEL, make_config(), "young"))
        assert table("young", num_stories=5)["minutes"].isna().all()

    def test_samples_side_by_side(self, tiny_run, make_config):
        list(train(MODEL, make_config(max_steps=5, seed=1), "other"))
        told = samples(tiny_run, "other", prompts=("Tom", "Lily had a"), seed=3)
        assert list(told) == ["tiny", "other"] and told.index.tolist() == ["Tom", "Lily had a"]
        for prompt, row in told.iterrows():
            assert all(story.startswith(prompt) for story in row)
        assert told.equals(samples(tiny_run, "other", prompts=("Tom", "Lily had a"), seed=3))

    def test_a_run_that_is_older_than_the_column_flops(self, tiny_run):
        path = Run(tiny_run).path("log_data.csv")
        Run(tiny_run).path("digests.txt").unlink()
        log = pd.read_csv(path)
        log.drop(columns="flops").to_csv(path, index=False)
        assert plot_losses(tiny_run, by="flops").get_lines()[0].get_xdata().tolist() == log["flops"].tolist()
        assert table(tiny_run, num_stories=5).loc[tiny_run, "training FLOPs"] == log["flops"].iloc[-1]


class TestWriteReport:
    def test_readme_and_loss_curve(self, tiny_run, make_config):
        told = write_report(tiny_run)
        folder = Run(tiny_run).folder
        assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
        readme = (folder / "README.md").read_text(encoding="utf-8")
        log = Run(tiny_run).log()
        assert len(told.texts) == len(PROMPTS) and told.as_markdown() in readme
        assert film_strip(tiny_run).as_markdown() in readme
        for said in (
            "# tiny", "loss.png", "trained on little.txt (300 stories; 200 for ", ") with bpe_tokenizer_128: 20 steps",
            f"{log['bits_per_byte'].min():.4f} bits", "on all 200 validation stories", "on the first 200 of them",
            command(MODEL, make_config(data="little.txt")), "inference.py tiny",
        ):  # fmt: skip
            assert said in readme
        assert plt.get_fignums() == []

    def test_the_best_step_is_named_and_the_stories_are_counted(self, make_config):
        """Fewer stories are there than were asked for."""
        list(train(MODEL, make_config(eval_stories=1000), "mine"))
        write_report("mine")
        log = Run("mine").log()
        best = log.loc[log["validation_loss"].idxmin()]
        readme = (Run("mine").folder / "README.md").read_text(encoding="utf-8")
        assert f"best at step {int(best.step)}:" in readme and "on the first 200 of them" in readme
