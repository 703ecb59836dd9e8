"""Promises of this experiment: the bound is that of the paper and a bound, and the model trains, resumes and writes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from config import ModelConfig
from experiments.masked_diffusion.config import PRESETS
from inference import Sampling, generate, load_model
from modules.canvas import make_canvas
from modules.registry import build_model

BOS, EOS, VOCAB_SIZE = 3, 4, 5
TINY = ModelConfig(
    dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, max_seq_len=4, layers="Norm->FullAttn->+->Norm->MLP->+",
    model="MDLM", plugins=("experiments.masked_diffusion.models",),
)  # fmt: skip
STORIES = [[BOS, *text, EOS] for n in range(3) for text in itertools.product(range(VOCAB_SIZE), repeat=n)]  # all that fit


def build(**changes):
    """A model with large random weights, so that what it predicts depends on what it sees."""
    torch.manual_seed(0)
    model = build_model(replace(TINY, **changes), VOCAB_SIZE).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


@torch.no_grad()
def masked_nats(model, story, masked) -> torch.Tensor:
    """Minus the log-probability of each masked token, given the others.  (masked)"""
    tokens = torch.tensor([story])
    hidden = tokens.clone()
    hidden[0, list(masked)] = model.mask_id
    log_p = model.guess(hidden)[0].log_softmax(dim=-1)
    return -log_p[list(masked), tokens[0, list(masked)]]


@torch.no_grad()
def length_nats(model, story) -> float:
    return model.lengths.nats(torch.tensor([len(story)]), torch.tensor([1])).item()


@torch.no_grad()
def exact_bound(model, story) -> float:
    """The mean of model.bound over all numbers of masked tokens and all orders, and the nats of the length."""
    n, orders = len(story) - 2, list(itertools.permutations(range(len(story) - 2)))
    cases = [(level, [9, *order, 9]) for level in range(n) for order in orders]
    if not cases:
        return length_nats(model, story)
    levels, noise = (torch.tensor(part, dtype=torch.float32) for part in zip(*cases, strict=True))
    length = torch.full((len(cases),), len(story))
    canvas = make_canvas(torch.tensor([story] * len(cases)), length, torch.ones_like(length))
    return model.bound(canvas, (levels + 0.5) / n, noise)[0].mean().item() + length_nats(model, story)


def test_the_bound_is_that_of_equation_10():
    model, story, t = build(max_seq_len=5), [BOS, 0, 1, 2, EOS], (torch.arange(20_000) + 0.5) / 20_000
    expected = length_nats(model, story)
    for number in (1, 2, 3):
        for masked in itertools.combinations((1, 2, 3), number):
            weight = (t**number * (1 - t) ** (3 - number) / t).mean()  # probability of this mask at t, times 1 / t
            expected += weight.item() * masked_nats(model, story, masked).sum().item()
    assert exact_bound(model, story) == pytest.approx(expected, rel=1e-4)


def test_the_bound_is_above_the_likelihood_which_sums_to_one():
    model, total, total_of_bounds = build(), 0.0, 0.0
    for story in STORIES:
        likelihoods = []  # for each order in which the tokens may be filled in
        for order in itertools.permutations(range(1, len(story) - 1)):
            nats = [masked_nats(model, story, order[start:])[0].item() for start in range(len(order))]
            likelihoods.append(math.exp(-sum(nats)))
        likelihood = math.exp(-length_nats(model, story)) * sum(likelihoods) / len(likelihoods)
        bound = exact_bound(model, story)
        assert bound > -math.log(likelihood) - 1e-5
        total, total_of_bounds = total + likelihood, total_of_bounds + math.exp(-bound)
    longer = model.lengths.log_probabilities(torch.tensor([1])).exp()[0, -1].item()
    assert total + longer == pytest.approx(1, abs=1e-4) and 0.5 * total < total_of_bounds < total


def test_story_nats_estimates_the_bound():
    model = build(model="MDLM(samples=400)")
    stories = STORIES[::6]
    expected = [exact_bound(model, story) for story in stories]
    assert model.story_nats(stories).tolist() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_it_writes_in_the_given_number_of_turns(order):
    model, calls = build(max_seq_len=30, model=f"MDLM(turns=4, order='{order}')"), []
    model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    length = torch.tensor([30])
    canvas = make_canvas(torch.full((1, 30), EOS), length, torch.tensor([6]))
    with torch.no_grad():
        tokens = model.fill(canvas, Sampling(), [torch.Generator().manual_seed(0)])
    assert len(calls) == 4 and (tokens < model.mask_id).all()
    assert tokens[~canvas.is_open].equal(canvas.tokens[~canvas.is_open])


def test_it_trains_resumes_bit_for_bit_loads_and_writes(make_config, train_in_parts):
    (preset,) = PRESETS.values()
    config = make_config(
        **{name: getattr(preset.train, name) for name in ("packing", "optimizer", "ema_decay", "betas")}, max_steps=12
    )  # fmt: skip
    model_config = replace(preset.model, dim=16, num_layers=1, max_seq_len=64, model="MDLM(turns=3, samples=1)")
    whole, parts = train_in_parts(model_config, config, stop_at=7)
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[7:]]
    model, tokenizer = load_model("parts")
    for weight, other in zip(model.state_dict().values(), load_model("whole")[0].state_dict().values(), strict=True):
        assert weight.equal(other)
    told = generate(model, tokenizer, ["Tom", "Lily had a"], seed=1)
    assert told[0].startswith("Tom") and told[1].startswith("Lily had a")
    assert told == [generate(model, tokenizer, prompt, seed=1 + row) for row, prompt in enumerate(["Tom", "Lily had a"])]


def test_it_learns_a_toy_language():
    torch.manual_seed(0)
    model = build_model(replace(TINY, max_seq_len=16), VOCAB_SIZE)
    rows = torch.tensor([[BOS, *((start + i) % 3 for i in range(12)), EOS, 0, 0] for start in range(3)])
    targets = torch.full_like(rows, -100)
    targets[:, :13] = rows[:, 1:14]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        model(rows.repeat(8, 1), targets.repeat(8, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    nats = model.eval().story_nats([row[:14].tolist() for row in rows]).mean().item()
    assert nats < 0.5 * 12 * math.log(3)  # half of the nats of any order of the three letters
