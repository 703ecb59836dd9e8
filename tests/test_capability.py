"""The synthetic tasks are what they say, against slow and plain answers, and tell architectures apart."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from config import ModelConfig
from evaluation import __main__ as evaluation
from evaluation import probes as capability
from evaluation.probe_tasks import TASKS, HopChains
from evaluation.probes import QUICK, Score, probe, probes, radar, scaled, table
from fast.loss import IGNORE
from runs.presets import PRESETS
from runs.terminal import UsageError
from tests.errors import one_line_error

RECALL = "multi-query recall"
TINY = replace(QUICK, steps=2, batch_size=4, test_sequences=16, dim=16)
# A convolution shows each value its key, so that one layer with a memory of the past is enough.
LAYER = "Norm->ShortConv(width=2)->+->Norm->{}->+->Norm->MLP->+"


@pytest.mark.parametrize("name", TASKS)
def test_sequences_fit_their_task_and_repeat_by_their_seed(name):
    task = TASKS[name]
    made, again = task.test_sequences(512), task.test_sequences(512)
    assert made.tokens.shape == made.targets.shape == (512, task.T)
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))
    assert not torch.equal(made.tokens, task.training_sequences(512, task.training_rng(0)).tokens)
    asked = made.targets[made.targets != IGNORE]
    assert 0 <= made.tokens.min() and max(made.tokens.max(), asked.max()) < task.vocab_size
    assert asked.bincount().max() / len(asked) == pytest.approx(task.chance, rel=0.25)  # of the best constant answer


def test_answers_of_recall_are_the_values_that_were_seen():
    for tokens, targets in zip(*TASKS["noisy recall"].test_sequences(64)[:2], strict=True):
        known = {}
        for place, (token, target) in enumerate(zip(tokens.tolist(), targets.tolist(), strict=True)):
            is_key = token < TASKS["noisy recall"].num_keys
            assert target == (known.get(token, IGNORE) if is_key else IGNORE)
            if is_key and place + 1 < len(tokens):
                known[token] = tokens[place + 1].item()


def test_answers_of_hop_chains_by_following_them():
    task = HopChains()
    for tokens, targets, hops in zip(*task.test_sequences(32), strict=True):
        letters = tokens[1:].tolist()
        assert tokens[0] == task.num_letters + hops - 1
        for start in range(task.length):
            place = start
            for _ in range(hops):
                seen = [other + 1 for other in range(place or 0) if place is not None and letters[other] == letters[place]]
                place = seen[-1] if seen else None
            assert targets[start + 1] == (IGNORE if place is None else letters[place])


def test_letters_are_copied_in_order():
    task = TASKS["selective copying"]
    for tokens, targets in zip(*task.test_sequences(32)[:2], strict=True):
        assert tokens[tokens < task.num_letters].tolist() == targets[targets != IGNORE].tolist()


def test_attention_recalls_where_a_small_state_fails(monkeypatch):
    """As the pairs to be kept grow."""
    effort = replace(QUICK, steps=150, batch_size=32, test_sequences=128, dim=32, num_layers=1, lrs=(3e-2,))

    def accuracy(mixer, pairs):
        monkeypatch.setitem(capability.TASKS, RECALL, replace(TASKS[RECALL], num_pairs=pairs, num_keys=12, num_values=12))
        config = ModelConfig(layers=LAYER.format(mixer), num_layers=1, num_kv_heads=1)
        (score,) = probe(mixer, config, RECALL, effort=effort)
        return score.accuracy

    small_state = "LinearAttn(num_heads=1, v_dim=8)"
    few, many = accuracy(small_state, 2), accuracy(small_state, 8)
    assert many < 0.3 and few > many + 0.2
    assert accuracy("Attn", 8) > 0.8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_become_small(name):
    config = scaled(PRESETS[name].model, 64, capability.Effort())
    assert config.dim == 64 and config.num_layers < 7
    model = capability.build(PRESETS[name].model, TASKS["compression"], capability.Effort())
    tokens, targets, _ = TASKS["compression"].test_sequences(2)
    logits, loss = model(tokens, targets)
    assert logits.shape == (2, TASKS["compression"].T, 64) and loss.isfinite()


def test_intervals():
    sure = Score("a", "t", 0, torch.ones(1, 100), 0, 0.0).interval
    assert 0.95 < sure[0] < 1 and sure[1] == 1
    seeds = Score("a", "t", 0, torch.tensor([[0.4], [0.6]]).expand(2, 100), 0, 0.0)
    assert seeds.interval == pytest.approx(tuple(binomtest(50, 100).proportion_ci(method="exact")))
    assert str(seeds) == "0.500 [0.398, 0.602], seeds 0.400 to 0.600"
    assert str(Score("a", "t", 0, torch.full((1, 5), torch.nan), 0, 0.0)) == "diverged"


def test_a_table_and_a_picture_of_all_tasks(folders, capsys):
    path = folders / "radar.png"
    words = ["Norm->Attn->+", "--quick", "--steps", "1", "--tasks", "hop chains", "compression", "--save", str(path)]
    evaluation.run(["probes", *words])
    printed = capsys.readouterr().out
    assert "hop chains, 4" in printed and "arXiv 2402.09268" in printed and "0.125" in printed
    assert path.stat().st_size > 10_000 and path.with_suffix(".csv").read_text().startswith("task,chance,data seed")
    scores = [Score("a", task, 0, torch.full((1, 9), TASKS[task].chance), 0, 0.0) for task in TASKS]
    assert np.allclose(radar(scores).axes[0].lines[0].get_ydata(), 0, atol=1e-6)
    assert len(table(scores)) == len(TASKS)


def test_the_same_again(folders, monkeypatch):
    shares = []
    for cache in ("one", "other"):
        monkeypatch.setenv("BASEGPT_CACHE", str(folders / cache))
        shares.append(probe("a", ModelConfig(), RECALL, 2, TINY)[0].shares)
    first, second = shares
    assert torch.equal(first, second) and first.shape == (2, 16)


def test_what_was_scored_is_not_trained_again(folders, monkeypatch):
    first = probe("a", ModelConfig(), RECALL, 2, TINY)
    monkeypatch.setattr(capability, "best_model", lambda *_: pytest.fail("it was trained again"))
    again = probe("b", ModelConfig(), RECALL, 2, TINY)
    assert torch.equal(first[0].shares, again[0].shares) and again[0].lrs == first[0].lrs and again[0].seconds == first[0].seconds
    for other in (replace(TINY, steps=3), replace(TINY, lrs=(1e-3,))):
        with pytest.raises(pytest.fail.Exception):
            probe("a", ModelConfig(), RECALL, 1, other)


@pytest.mark.parametrize("losses, wanted", [
    ([3.0, 2.0, 4.0], (0.2, 3)),
    ([3.0, 0.01, 0.0], (0.2, 2)),
    ([math.inf] * 3, (0.1, 3)),
])  # fmt: skip
def test_the_best_learning_rate_is_that_of_the_lowest_loss(monkeypatch, losses, wanted):
    tried = []

    def train(model, task, seed, effort, lr):
        tried.append(lr)
        return losses[len(tried) - 1]

    monkeypatch.setattr(capability, "train", train)
    _, lr, loss = capability.best_model(ModelConfig(), TASKS[RECALL], 0, replace(TINY, lrs=(0.1, 0.2, 0.3)))
    assert (lr, len(tried)) == wanted and loss == min(losses[: len(tried)])


def test_a_training_ends_when_the_task_is_solved(monkeypatch):
    task, effort = TASKS["memorisation"], replace(TINY, steps=capability.LAST + 9)
    drawn = []
    draw = type(task).draw
    monkeypatch.setattr(type(task), "draw", lambda self, number, rng: drawn.append(number) or draw(self, number, rng))
    for limit, steps in ((100.0, capability.LAST), (0.0, effort.steps)):
        monkeypatch.setattr(capability, "SOLVED", limit)
        drawn.clear()
        capability.train(capability.build(ModelConfig(), task, effort), task, 0, effort, 1e-3)
        assert len(drawn) == steps


def test_mistakes_are_told_before_training(folders):
    one_line_error(lambda: probes("1m", tasks=("hop chain",)), "hop chain", "Did you mean 'hop chains'")
    one_line_error(lambda: probes("1n"), "1n", "neither a preset nor a run")
    one_line_error(lambda: probes("Norm->Atn->+"), "»Atn«", "Did you mean")
    one_line_error(lambda: probes("1m", "1m"), "named twice")
    one_line_error(lambda: probes("1m", seeds=0), "seeds=0")
    one_line_error(lambda: evaluation.run(["probes", "1m", "--save", "radar.doc"]), "radar.doc", ".png", error=UsageError)
    one_line_error(lambda: evaluation.run(["probes", "1m", "--steps", "0"]), "--steps 0", error=UsageError)
