"""Promises of this experiment: the bound is that of the paper and a bound, and the model trains, resumes and writes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from config import ModelConfig
from experiments.diffuseq.config import PRESETS
from inference import Sampling, generate, load_model
from modules.canvas import make_canvas
from modules.registry import build_model
from tests.errors import one_line_error

BOS, EOS, VOCAB_SIZE = 3, 4, 5
TINY = ModelConfig(
    dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, max_seq_len=8, layers="Norm->FullAttn->+->Norm->MLP->+",
    model="DiffuSeq(width=2, steps=3, turns=3)", plugins=("experiments.diffuseq.models",),
)  # fmt: skip


def build(**changes):
    """A model with large random weights, so that its guesses depend on what it sees."""
    torch.manual_seed(0)
    model = build_model(replace(TINY, **changes), VOCAB_SIZE).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
    return model


def canvases(story: list[int], number: int, given: int = 1):
    length = torch.full((number,), len(story))
    return make_canvas(torch.tensor([story] * number), length, given * torch.ones_like(length))


def step_back(model, z, t, story_ids) -> Normal:
    """p(z_t-1 | z_t) in the form of Ho et al. 2020 (arXiv 2006.11239, equations 6 and 7), with the guess for x_0."""
    v, last = model.variances[t], model.variances[t - 1]
    alpha = (1 - v) / (1 - last)
    guess, _ = model.denoise(z, torch.full((len(z),), t), story_ids)
    mean = (1 - last).sqrt() * (1 - alpha) / v * guess + alpha.sqrt() * last / v * z
    return Normal(mean, (last / v * (1 - alpha)).sqrt())


@torch.no_grad()
def test_the_bound_is_that_of_diffusion_lm():
    """Equation 2, as log q(z_0 ... z_T | w) - log p(z_0 ... z_T, w) of trajectories."""
    model, number = build(), 8000
    canvas = canvases([BOS, 0, 1, EOS], number)
    x, is_open = model.embedding(canvas.tokens), canvas.is_open[..., None]
    z, log_ratio = [], torch.zeros_like(x)
    for t in range(model.steps + 1):
        alpha = (1 - model.variances[t]) / (1 - model.variances[t - 1] if t else 1.0)
        q = Normal(alpha.sqrt() * (z[-1] if t else x), (1 - alpha).sqrt())
        z.append(q.sample())
        log_ratio += q.log_prob(z[-1]) * is_open
    log_ratio -= Normal(0.0, 1.0).log_prob(z[-1]) * is_open
    for t in range(model.steps, 0, -1):
        log_ratio -= step_back(model, z[t].where(is_open, x), t, canvas.story_ids).log_prob(z[t - 1]) * is_open
    log_p = model.round(z[0]).log_softmax(dim=-1).gather(2, canvas.tokens[..., None])
    expected = log_ratio.sum(dim=(1, 2)) - (log_p * is_open).sum(dim=(1, 2))

    levels, noise = (torch.arange(number) % model.steps + 0.5) / model.steps, torch.randn(number, 4, 2, model.width)
    bounds, _ = model.bound(canvas, levels, noise)
    error = math.sqrt(expected.var().item() / number + bounds.var().item() / number)
    assert abs(bounds.mean() - expected.mean()).item() < 4 * error < 0.1 * expected.mean().item()


@torch.no_grad()
def test_the_bound_is_above_the_likelihood():
    """That of one token with one channel, which is an integral over z_0, z_1 and z_2."""
    model = build(model="DiffuSeq(width=1, steps=2, turns=2)")
    model.embedding.weight.mul_(4)  # far enough from each other to be told apart
    grid = torch.linspace(-7, 7, 400)
    density = Normal(0.0, 1.0).log_prob(grid).exp()  # of z_t, from the last t on
    canvas = canvases([BOS, 0, EOS], len(grid))
    z = grid[:, None, None].where(canvas.is_open[..., None], model.embedding(canvas.tokens))
    for t in (2, 1):
        back = step_back(model, z, t, canvas.story_ids)
        steps = Normal(back.mean[:, 1], back.stddev[:, 1]).log_prob(grid).exp()  # (z_t, z_t-1)
        density = density @ steps * (grid[1] - grid[0])
    likelihoods = density @ model.round(grid[:, None]).softmax(dim=-1) * (grid[1] - grid[0])
    assert likelihoods.sum().item() == pytest.approx(1, abs=1e-3)
    for token, likelihood in enumerate(likelihoods):
        bounds, _ = model.bound(canvases([BOS, token, EOS], 4000), torch.rand(4000), torch.randn(4000, 3, 2, 1))
        assert bounds.mean() - 4 * bounds.std() / math.sqrt(4000) > -likelihood.log()


def test_the_bounds_of_all_stories_sum_to_less_than_one():
    model = build(model="DiffuSeq(width=2, steps=3, turns=3, samples=30)", max_seq_len=4)
    stories = [[BOS, *text, EOS] for n in range(3) for text in itertools.product(range(VOCAB_SIZE), repeat=n)]
    nats = model.story_nats(stories)
    length = model.lengths.log_probabilities(torch.tensor([1]))[0, 0].item()
    assert nats[0].item() == pytest.approx(-length)  # no token is open
    assert (-nats).exp().sum() < 1


@torch.no_grad()
def test_a_prompt_stays_clean():
    model, levels, noise = build(), torch.tensor([0.9]), torch.randn(1, 6, 2, 2)
    canvas, other = canvases([BOS, 0, 1, 2, 0, EOS], 1, given=3), noise.clone()
    other[:, [0, 1, 2, 5]] = 9.0
    bounds = [model.bound(canvas, levels, changed)[0].item() for changed in (noise, other, -noise)]
    assert bounds[0] == bounds[1] != bounds[2]
    for clamp in (False, True):
        model.clamp = clamp
        tokens = model.fill(canvas, Sampling(), [torch.Generator().manual_seed(0)])
        assert tokens[~canvas.is_open].equal(canvas.tokens[~canvas.is_open])


def test_it_trains_resumes_bit_for_bit_loads_and_writes(make_config, train_in_parts):
    (preset,) = PRESETS.values()
    config = make_config(
        **{name: getattr(preset.train, name) for name in ("packing", "optimizer", "ema_decay", "betas")}, max_steps=12
    )  # fmt: skip
    model = "DiffuSeq(width=8, steps=50, turns=5, samples=1)"
    model_config = replace(preset.model, dim=16, num_layers=1, max_seq_len=64, model=model)
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
    model = build_model(replace(TINY, max_seq_len=16, model="DiffuSeq(width=4, steps=100, samples=16)"), VOCAB_SIZE)
    rows = torch.tensor([[BOS, *((start + i) % 3 for i in range(12)), EOS, 0, 0] for start in range(3)])
    targets = torch.full_like(rows, -100)
    targets[:, :13] = rows[:, 1:14]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        model(rows.repeat(8, 1), targets.repeat(8, 1))[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    nats = model.eval().story_nats([row[:14].tolist() for row in rows]).mean().item()
    assert nats < 12 * math.log(3)  # the nats of any order of the three letters


def test_bad_options_are_one_line():
    for options, words in (("turns=9", "turns=9"), ("prompts=2.0", "prompts=2.0"), ("samples=0", "samples=0")):
        one_line_error(lambda options=options: build(model=f"DiffuSeq(steps=3, {options})"), words)
    one_line_error(lambda: build(positions="none"), "positions='none'")
