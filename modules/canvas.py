"""Models that fill in a whole story in any order, such as diffusion models: canvases, lengths, bounds, writing.

A canvas is a row with room for bos, text and eos. The length of the story is drawn first, from a distribution that the model
learns, and pays for where the story ends. Then bos, eos and a prompt are given, and the other places are open: the model fills
them in. A story longer than the context is a canvas without eos, followed by others that are given the last half of the one
before.

B canvases, T places, V vocabulary.
"""

import math
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from config import IGNORE, ModelConfig
from model import BLOCKS, GPT

MAX_PLACES = 2**12  # of the canvases that are scored at once
NUM_WAVES = 16  # of the distribution of lengths


class Canvas(NamedTuple):
    """Canvases of different lengths, with padding after the shorter ones."""

    tokens: Tensor  # (B, T)
    is_open: Tensor  # (B, T): True where a token is to be filled in
    lengths: Tensor  # (B): tokens of the story, bos and eos included; more than the canvas holds if it does not end there

    @property
    def story_ids(self) -> Tensor:
        """0 in the story and 1 in the padding, so that neither sees the other.  (B, T)"""
        return (torch.arange(self.tokens.shape[1], device=self.tokens.device) >= self.lengths[:, None]).long()

    @property
    def num_targets(self) -> Tensor:
        """The number of open tokens in all, and one for the end of each story.  ()"""
        return self.is_open.sum() + len(self.tokens)


def make_canvas(tokens: Tensor, lengths: Tensor, given: Tensor) -> Canvas:
    """A canvas with the first `given` tokens of each row, and eos, given.  tokens (B, T), lengths and given (B)"""
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return Canvas(tokens, (places >= given[:, None]) & (places < lengths[:, None] - 1), lengths)


class Lengths(nn.Module):
    """The distribution of the number of tokens of a story: 2 to max_len, or max_len + 1 for all longer ones.

    Smooth, since few stories are read: the exponential of a sum of cosines, and a probability of its own for the longer ones.
    """

    def __init__(self, max_len: int):
        super().__init__()
        angles = torch.outer(torch.arange(max_len - 1) / max_len, math.pi * torch.arange(1, NUM_WAVES + 1))
        self.register_buffer("waves", angles.cos(), persistent=False)  # (max_len - 1, NUM_WAVES)
        self.weight = nn.Parameter(torch.zeros(NUM_WAVES))
        self.longer = nn.Parameter(torch.zeros(1))

    def log_probabilities(self, given: Tensor) -> Tensor:
        """Log-probabilities of the lengths from 2 on, for stories of more than `given` tokens.  (B) -> (B, max_len)"""
        scores = 4 * torch.cat([self.waves @ self.weight, self.longer])  # times 4, to be learned in fewer steps
        is_shorter = torch.arange(2, len(scores) + 2, device=scores.device) <= given[:, None]
        return scores.masked_fill(is_shorter, -math.inf).log_softmax(dim=1)

    def nats(self, lengths: Tensor, given: Tensor) -> Tensor:
        """Minus the log-probability of each length, for a story of more than `given` tokens.  (B), (B) -> (B)"""
        return -self.log_probabilities(given).gather(1, lengths[:, None] - 2)[:, 0]

    def draw(self, given: int, temperature: float, generator: torch.Generator) -> int:
        """Draw the length of a story of more than `given` tokens; the most likely one at a temperature of 0."""
        probabilities = self.log_probabilities(torch.tensor([given], device=self.longer.device))[0].exp().cpu()
        if temperature == 0:
            return 2 + probabilities.argmax().item()
        return 2 + torch.multinomial(probabilities, 1, generator=generator).item()


class Piece(NamedTuple):
    """A canvas of a story that is scored, with one of its samples of noise."""

    story: int
    tokens: list[int]
    length: int  # as in Canvas
    given: int
    sample: int


class CanvasModel(GPT):
    """Base class of models that fill in canvases. `samples` draws of noise estimate the bound of a story.

    A model of this kind defines, on top of GPT's layers,

        noise(T, generator) -> (T, ...)                   the random numbers that its bound needs for T places
        bound(canvas, levels, noise) -> (B), losses       an estimate of the bound of the open tokens in nats, and the terms by
                                                          name that training minimises besides the bound
        fill(canvas, sampling, generators) -> (B, T)      the tokens, with the open ones drawn
        guess(tokens) -> (B, T, V)                        logits of all tokens of full canvases

    where levels (B) are noise levels from 0 to below 1. It trains with --train.packing padded. `prompts` is the share of the
    rows in training whose first tokens, a random number of them, are given.
    """

    causal = False
    is_bound = True

    def __init__(
        self, config: ModelConfig, vocab_size: int, blocks: dict[str, type] = BLOCKS, samples: int = 1, prompts: float = 0.0
    ):  # fmt: skip
        super().__init__(config, vocab_size, blocks)
        if samples < 1:
            raise ValueError(f"samples={samples}: give a whole number of at least 1")
        if not 0 <= prompts <= 1:
            raise ValueError(f"prompts={prompts}: give the share of the rows with a prompt, from 0 to 1")
        self.samples, self.prompts = samples, prompts
        self.lengths = Lengths(config.max_seq_len)

    def forward(self, tokens, targets=None):
        """Logits of full canvases without targets; else None and the training loss.  tokens, targets (B, T)

        In self.losses the bound in nats per token is called next_token, as the loss that it is compared with.
        """
        if targets is None:
            return self.guess(tokens), None
        canvas = self.training_canvas(tokens, targets)
        B, T = canvas.tokens.shape
        # one uniform number spreads the levels evenly over the batch (Kingma et al. 2021, arXiv 2107.00630, appendix I.1)
        levels = (torch.rand(1, device=tokens.device) + torch.arange(B, device=tokens.device)) / B
        noise = torch.stack([self.noise(T) for _ in range(B)]).to(tokens.device)
        nats, losses = self.bound(canvas, levels, noise)
        nats = nats + self.lengths.nats(canvas.lengths, torch.ones_like(canvas.lengths))
        losses = {"next_token": nats.sum() / canvas.num_targets, **losses}
        self.losses = {name: value.detach() for name, value in losses.items()}
        return None, sum(losses.values())

    def training_canvas(self, tokens, targets) -> Canvas:
        """The canvas of rows of one story each, without the padding after the longest. Raises ValueError for other rows."""
        is_scored = targets != IGNORE
        if (is_scored[:, 1:] & ~is_scored[:, :-1]).any():
            raise ValueError(f"{type(self).__name__} fills in one story a row: take --train.packing padded")
        lengths = is_scored.sum(dim=1) + 1  # (B)
        has_prompt = torch.rand(len(lengths), device=tokens.device) < self.prompts
        given = 1 + (has_prompt * torch.rand(len(lengths), device=tokens.device) * (lengths - 2)).long()
        return make_canvas(tokens[:, : lengths.max()], lengths, given)

    @torch.no_grad()
    def story_nats(self, stories: list[list[int]], seed: int = 0) -> Tensor:
        """An upper bound of minus the log-likelihood of each story, in nats: of its tokens after bos, eos included.  (stories)

        A Monte Carlo estimate, whose noise depends on the story and the seed alone: it is the same alone and with others.
        """
        device, nats = self.embedding.weight.device, torch.zeros(len(stories), dtype=torch.float64)
        pieces = sorted(self.pieces(stories), key=lambda piece: len(piece.tokens))
        batch_size = max(1, MAX_PLACES // max((len(piece.tokens) for piece in pieces), default=1))
        for start in range(0, len(pieces), batch_size):
            batch = pieces[start : start + batch_size]
            tokens = pad_sequence([torch.tensor(piece.tokens) for piece in batch], batch_first=True)  # (B, T)
            lengths, given = (torch.tensor([getattr(piece, name) for piece in batch]) for name in ("length", "given"))
            levels, noise = zip(*(self.draws(piece, seed) for piece in batch), strict=True)
            parts = tokens, lengths, given, torch.cat(levels), pad_sequence(noise, batch_first=True)
            tokens, lengths, given, levels, noise = (part.to(device) for part in parts)
            bounds, _ = self.bound(make_canvas(tokens, lengths, given), levels, noise)
            bounds = (bounds + self.lengths.nats(lengths, given)).double().cpu() / self.samples
            nats.index_add_(0, torch.tensor([piece.story for piece in batch]), bounds)
        return nats

    def pieces(self, stories: list[list[int]]) -> Iterator[Piece]:
        """Cut stories into canvases, each once for every sample of noise."""
        T = self.config.max_seq_len
        for number, story in enumerate(stories):
            start, given = 0, 1
            while start + given < len(story):
                tokens = story[start : start + T]
                length = min(len(story) - start, T + 1)
                yield from (Piece(number, tokens, length, given, sample) for sample in range(self.samples))
                start, given = start + T - T // 2, T // 2

    def draws(self, piece: Piece, seed: int) -> tuple[Tensor, Tensor]:
        """The noise level of a piece, one of `samples` that are spread evenly, and its noise.  (1), (T, ...)"""
        generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, piece.sample, piece.tokens)).encode()))
        level = (piece.sample + torch.rand(1, generator=generator)) / self.samples
        return level, self.noise(len(piece.tokens), generator)

    @torch.no_grad()
    def write(self, prompts, eos_id, max_new_tokens, sampling, generators) -> Iterator[list[int | None]]:
        """Fill in a canvas for each prompt, then yield a token of each at a time, and None after its last one."""
        T, device = self.config.max_seq_len, self.embedding.weight.device
        rows, lengths = [], []
        for prompt, generator in zip(prompts, generators, strict=True):
            length = self.lengths.draw(len(prompt), sampling.temperature, generator)
            row = prompt + [eos_id] * (min(length, T) - len(prompt))
            rows.append(torch.tensor(row))
            lengths.append(length)
        tokens, given = pad_sequence(rows, batch_first=True).to(device), torch.tensor([len(prompt) for prompt in prompts])
        canvas = make_canvas(tokens, torch.tensor(lengths, device=device), given.to(device))
        texts = []
        for row, prompt, length, limit in zip(self.fill(canvas, sampling, generators).tolist(), prompts, lengths, max_new_tokens,
                                              strict=True):  # fmt: skip
            text = row[len(prompt) : length][:limit]
            texts.append(text[: text.index(eos_id)] if eos_id in text else text)
        for step in range(max(map(len, texts)) + 1):
            yield [text[step] if step < len(text) else None for text in texts]
