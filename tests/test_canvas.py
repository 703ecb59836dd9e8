"""Models that fill in a whole story: lengths, pieces of long stories, noise, writing, and rows that do not fit."""

import math

import pytest
import torch
from errors import one_line_error

from config import IGNORE, ModelConfig
from inference import Sampling
from modules.canvas import CanvasModel, Lengths

BOS, EOS, VOCAB_SIZE = 3, 4, 5
CONFIG = ModelConfig(dim=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8, max_seq_len=8, layers="Norm->MLP->+")


class Noisy(CanvasModel):
    """Every token is as likely as any, and the bound is off by the noise."""

    def noise(self, T, generator=None):
        return torch.randn(T, generator=generator)

    def bound(self, canvas, levels, noise):
        self.canvas = canvas
        nats = math.log(VOCAB_SIZE) * canvas.is_open.sum(dim=1) + noise.sum(dim=1) + levels
        return nats, {"weights": self.head.weight.square().sum()}

    def fill(self, canvas, sampling, generators):
        return canvas.tokens.masked_fill(canvas.is_open, 1)


class Uniform(Noisy):
    def bound(self, canvas, levels, noise):
        return super().bound(canvas, levels * 0, noise * 0)


def build(model=Noisy, **options) -> CanvasModel:
    torch.manual_seed(0)
    built = model(CONFIG, VOCAB_SIZE, **options).eval()
    for weight in built.lengths.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return built


def some_story(length: int, seed: int = 0) -> list[int]:
    text = torch.randint(3, (length - 2,), generator=torch.Generator().manual_seed(seed))
    return [BOS, *text.tolist(), EOS]


def test_lengths_are_a_distribution_also_given_a_prompt():
    lengths = build().lengths
    for given in (1, 4, 8):
        possible = torch.arange(given + 1, 10)
        nats = lengths.nats(possible, torch.full_like(possible, given))
        assert (-nats).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_lengths_are_learned():
    lengths, observed = Lengths(40), torch.tensor([20, 21, 22, 41])
    optimizer = torch.optim.AdamW(lengths.parameters(), lr=4e-3)
    for _ in range(300):
        lengths.nats(observed, torch.ones_like(observed)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    probabilities = lengths.log_probabilities(torch.tensor([1]))[0].exp()
    assert probabilities[-1].item() == pytest.approx(0.25, abs=0.1) and probabilities[18:21].sum() > 0.4
    drawn = [lengths.draw(15, 1.0, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert min(drawn) > 15 and 41 in drawn and lengths.draw(1, 0.0, torch.Generator()) in (20, 21, 22, 41)


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 12, 13, 30])
def test_every_token_of_a_story_is_paid_for_once(length):
    model, story = build(Uniform, samples=2), some_story(length)
    pieces = list(model.pieces([story]))[::2]
    lengths, given = (torch.tensor([getattr(piece, name) for piece in pieces]) for name in ("length", "given"))
    open_tokens = [token for piece in pieces for token in piece.tokens[piece.given :]]
    assert open_tokens == story[1:]
    expected = (length - 2) * math.log(VOCAB_SIZE) + model.lengths.nats(lengths, given).sum().item()
    assert model.story_nats([story]).item() == pytest.approx(expected, rel=1e-5)


def test_all_stories_of_a_long_context_sum_to_one():
    """Of a model that takes every token for equally likely: the number of stories times their likelihood, length by length."""
    model, total = build(Uniform, samples=1), 0.0
    for length in range(2, 200):
        total += math.exp(-model.story_nats([some_story(length)]).item() + (length - 2) * math.log(VOCAB_SIZE))
    assert total == pytest.approx(1, abs=1e-3)


def test_the_noise_of_a_story_depends_on_the_story_and_the_seed_alone():
    model, stories = build(), [some_story(length, seed) for seed, length in enumerate((5, 20, 3, 7, 5, 8))]
    together = model.story_nats(stories)
    assert together.tolist() == pytest.approx([model.story_nats([story]).item() for story in stories], rel=1e-6)
    assert together.tolist() == pytest.approx(model.story_nats(stories[::-1]).tolist()[::-1], rel=1e-6)
    assert not together.allclose(model.story_nats(stories, seed=1))
    assert model.story_nats([]).shape == (0,)


def test_training_rows_are_stories_that_end_or_not():
    model = build(prompts=1.0).train()
    rows = torch.tensor([[*some_story(5), 0, 0, 0], [BOS, *([1] * 7)]])
    targets = torch.cat([rows[:, 1:], torch.full((2, 1), 2)], dim=1)
    targets[0, 4:] = IGNORE
    _, loss = model(rows, targets)
    assert list(model.losses) == ["next_token", "weights"] and loss.item() == pytest.approx(sum(model.losses.values()).item())
    assert model.canvas.lengths.tolist() == [5, 9] and not model.canvas.is_open[0, 4:].any()
    assert model.canvas.is_open[1, -1]
    model(rows[:1], targets[:1])
    assert model.canvas.tokens.shape == (1, 5)  # without the padding
    packed = targets.clone()
    packed[0, 6] = 1
    one_line_error(lambda: model(rows, packed), "Noisy", "--train.packing padded")


def test_it_writes_from_each_prompt_up_to_its_limit():
    model, prompts = build(), [[BOS], [BOS, 2, 2], [BOS] * 8]
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    *steps, last = model.write(prompts, EOS, [3, 9, 1], Sampling(temperature=0), generators)
    texts = [[step[row] for step in steps if step[row] is not None] for row in range(3)]
    assert last == [None] * 3 and texts[2] == [] and set(texts[0] + texts[1]) <= {1}
    assert len(texts[0]) == min(3, model.lengths.draw(1, 0.0, generators[0]) - 2)
    assert prompts == [[BOS], [BOS, 2, 2], [BOS] * 8]
