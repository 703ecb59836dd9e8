"""Promises to those who plug in an idea of their own: blocks, whole models, experiments, and clear words where that fails."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from errors import one_line_error

from conftest import MODEL
from evaluation import evaluate
from inference import generate
from menu import build_model
from report import num_parameters, table
from runs import Run, load_model
from train import train

REPOSITORY = Path(__file__).parents[1]
OWN = {name: replace(MODEL, model=name, plugins=("own_models",)) for name in ("Recurrent", "Trigram")}
TRAINING = {"Recurrent": {"packing": "padded"}, "Trigram": {"window_start": 1, "lr_max": 0.1}}


def run_python(*words: str, folder: Path = REPOSITORY, plugins: Path = Path(__file__).parent) -> subprocess.CompletedProcess:
    """What a fresh process says."""
    environment = os.environ | {"PYTHONPATH": str(plugins)}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", OWN)
def test_an_own_model_trains_resumes_evaluates_and_is_compared(name, tiny_run, make_config, stories):
    config = make_config(**TRAINING[name], max_steps=12)
    whole = list(train(OWN[name], config, "whole"))
    assert whole[-1].validation_loss < whole[9].validation_loss < whole[0].train_loss
    for record in train(OWN[name], config, "parts"):
        if record.step == 7:
            break
    parts = list(train(OWN[name], config, "parts", resume=True))
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
    config = make_config(max_steps=6, weight_averaging=0.9, optimizer="Muon", packing="padded")
    for name, continue_from in (("first", None), ("second", "first")):
        records = list(train(OWN["Recurrent"], config, name, continue_from=continue_from))
    assert records[-1].validation_loss < Run("first").log()["validation_loss"].min()
    assert Run("second").load("model.pth", {"continued_from"})["continued_from"] == "first"


@pytest.mark.parametrize("name", OWN)
def test_an_own_model_writes_the_same_with_and_without_a_cache(name):
    from tokenizer import load_tokenizer

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


def test_what_an_own_model_cannot_do_is_said(make_config):
    recurrent = OWN["Recurrent"]
    one_line_error(lambda: list(train(recurrent, make_config(), "x")), "'Recurrent'", "story_ids", "--train.packing padded")
    padded = make_config(packing="padded", window_start=4)
    one_line_error(lambda: list(train(recurrent, padded, "x")), "window_start=4", "'Recurrent'")
    less = make_config(gradient_checkpointing=True)
    one_line_error(lambda: list(train(OWN["Trigram"], less, "x")), "gradient_checkpointing=True", "'Trigram'")
    unknown = replace(recurrent, model="Recurent")
    one_line_error(lambda: build_model(unknown, 50), "no model is called 'Recurent'", "Did you mean 'Recurrent'?", "GPT, ")
