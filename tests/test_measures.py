"""Promises of measures.py, each against a slow and plain reference."""

import math

import numpy as np
import pytest
import torch

from evaluation import __main__ as evaluation
from inference import load_model
from metrics.measures import (
    TokenScores,
    calibration,
    distinct,
    loss_by_position,
    loss_by_word_class,
    names_in,
    repetition,
    token_classes,
    token_scores,
    word_classes,
)
from metrics.scores import evaluate
from tokenizer import load_tokenizer

STORIES = ["Tom had a red ball. One day Lily saw it! It was two big balls. " * 2, "Mia ran.", "“Hi, Ben,” said Tom. 7 cats sat."]


@torch.no_grad()
def test_scores_are_those_of_the_model_token_by_token(tiny_run):
    model, tokenizer = load_model(tiny_run)
    scores = token_scores(model, tokenizer, STORIES)
    context, wanted = model.config.max_seq_len, {}
    for number, story in enumerate(STORIES):
        ids = tokenizer.encode(story, bos=True, eos=True)
        for position in range(1, len(ids)):
            window = max(0, -(-(position - context) // (context // 2))) * (context // 2)
            probabilities = model(torch.tensor([ids[window:position]]))[0][0, -1].double().softmax(dim=-1)
            best = probabilities.argmax().item()
            own = ids[position]
            wanted[number, position] = (-math.log(probabilities[own]), probabilities[best].item(), best == own)
    keys = list(zip(scores.story.tolist(), scores.position.tolist(), strict=True))
    assert sorted(keys) == sorted(wanted)
    for key, nats, confidence, correct in zip(keys, scores.nats, scores.confidence, scores.correct, strict=True):
        assert (nats, confidence) == pytest.approx(wanted[key][:2], rel=1e-4) and correct == wanted[key][2]
    assert scores.nats.sum() == pytest.approx(evaluate(model, tokenizer, STORIES).story_nats.sum().item(), rel=1e-5)

    table = loss_by_position(scores)
    for label, line in table.iterrows():
        low, high = map(int, label.split(" to "))
        inside = [nats for (_, position), (nats, _, _) in wanted.items() if low <= position <= high]
        assert line["tokens"] == len(inside) and line["loss"] == pytest.approx(np.mean(inside), rel=1e-4)
    assert table["tokens"].sum() == len(wanted)
    by_class = loss_by_word_class(scores, tokenizer, STORIES)
    assert by_class["share of loss"].sum() == pytest.approx(1) and by_class["tokens"].sum() == len(wanted)
    assert by_class.loc["end", "tokens"] == 3
    ends = [wanted[number, len(tokenizer.encode(story)) + 1][0] for number, story in enumerate(STORIES)]
    assert by_class.loc["end", "loss"] == pytest.approx(np.mean(ends), rel=1e-4)


def test_classes_of_words_and_tokens():
    names = names_in(["One day Lily saw Tom's cat. Big cats ran.", "“Hi, Ben,” said Mia."])
    assert names == {"Lily", "Tom", "Ben", "Mia"}
    kinds = dict(word_classes("Tom's two cats didn't see 7 of Big Lily's hats.", names))
    assert kinds == {"Tom's": "name", "two": "number", "cats": "content", "didn't": "function", "see": "content", "7": "number",
                     "of": "function", "Big": "content", "Lily's": "name", "hats": "content", " ": "space", ".": "punctuation"}
    for tokenizer in map(load_tokenizer, ("bpe_tokenizer_95", "bpe_tokenizer_1024")):
        text = "Lily saw two cats."
        classes = token_classes(tokenizer, text, names)
        assert len(classes) == len(tokenizer.encode(text, eos=True)) and classes[-1] == "end"
        assert classes[0] == "name" and "number" in classes and classes[-2] == "punctuation"


def test_calibration_against_a_loop():
    random = np.random.default_rng(0)
    confidence = random.uniform(0, 1, 5000)
    correct = random.uniform(0, 1, 5000) < confidence**2
    error, table = calibration(TokenScores(None, None, None, np.append(confidence, 1.0), np.append(correct, True)), bins=10)
    wanted = 0.0
    for number in range(10):
        inside = [(c, r) for c, r in zip([*confidence, 1.0], [*correct, True], strict=True)
                  if number / 10 <= c < (number + 1) / 10 or (number == 9 and c == 1)]  # fmt: skip
        gap = sum(c for c, _ in inside) / len(inside) - sum(r for _, r in inside) / len(inside)
        wanted += abs(gap) * len(inside) / 5001
    assert error == pytest.approx(wanted) and table["tokens"].sum() == 5001
    honest, _ = calibration(TokenScores(None, None, None, confidence, random.uniform(0, 1, 5000) < confidence))
    assert honest < 0.03 < 0.1 < error


def test_repetition_and_distinct():
    assert distinct(["a b a b", "a c"], 1) == 3 / 6
    assert distinct(["a b a b", "a c"], 2) == 3 / 4  # ab ba ab ac
    assert repetition(["A b, c d. a b c d", "a b c d e"]) == pytest.approx(1 / 7)  # abcd bcda cdab dabc abcd; abcd bcde
    assert math.isnan(distinct(["", "a"], 2)) and math.isnan(repetition(["a"]))


def test_in_the_terminal(tiny_run, capsys):
    evaluation.main(["measures", tiny_run, "--num_stories", "20", "--num_samples", "2"])
    printed = capsys.readouterr().out
    for said in ("tiny on 20 stories of little.txt", "1 to 1", "punctuation", "calibration error", "distinct-2"):
        assert said in printed
    with pytest.raises(SystemExit, match="error: no run is called 'nobody'"):
        evaluation.main(["measures", "nobody"])
