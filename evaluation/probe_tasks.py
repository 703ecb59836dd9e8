"""Synthetic tasks that each test one capability: recall, copying, compression, memorisation, multi-step reasoning.

All are smaller than in their papers, so that a CPU can learn them in minutes.

A task generates fresh sequences from a random generator. At each scored position the model, given the tokens so far, must predict
the token in the targets.

B sequences, T tokens in each, V vocabulary, P different key-value pairs, N key-value pairs in a sequence.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import IGNORE

COMPRESSION_VOCAB = 64  # larger than the alphabet: the last logits must hold the sequence


class Size(NamedTuple):
    vocab_size: int
    T: int  # sequence length
    num_answers: int  # possible answers, all equally likely


class Sequences(NamedTuple):
    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T), the answer after each token, or IGNORE if it is not scored
    level: Tensor  # (B,) difficulty, 0 if the task has no levels


@dataclass(frozen=True)
class Task:
    """Base class of all tasks. chance is the accuracy of the best guess that ignores the sequence.

    seed alone determines the test sequences, which are the same for every model.
    """

    seed: int = 0
    compressed: ClassVar[bool] = False  # decode all answers from the logits after the last token

    @property
    def size(self) -> Size:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        return self.size.vocab_size

    @property
    def T(self) -> int:
        return self.size.T

    @property
    def chance(self) -> float:
        return 1 / self.size.num_answers

    def draw(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Draw tokens and targets (number, T), and levels (number,) if there are any."""
        raise NotImplementedError

    def sequences(self, number: int, rng: np.random.Generator) -> Sequences:
        """Generate sequences."""
        tokens, targets, *level = (torch.from_numpy(np.ascontiguousarray(array)) for array in self.draw(number, rng))
        return Sequences(tokens, targets, *(level or [torch.zeros(number, dtype=torch.long)]))

    def training_sequences(self, number: int, rng: np.random.Generator) -> Sequences:
        """Generate training sequences, by default distributed like the test."""
        return self.sequences(number, rng)

    def test_sequences(self, number: int) -> Sequences:
        """Generate the fixed sequences that models are scored on."""
        return self.sequences(number, np.random.default_rng([self.seed, 1]))

    def training_rng(self, seed: int) -> np.random.Generator:
        """Random generator for training, different for each task and seed and from the test."""
        return np.random.default_rng([self.seed, 2, seed])


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """Key-value pairs, then all keys in another order: recall their values (Zoology, arXiv 2312.04927, section 3)."""

    seed: int = 1
    num_pairs: int = 6
    num_keys: int = 12
    num_values: int = 12

    @property
    def size(self):
        return Size(self.num_keys + self.num_values, 3 * self.num_pairs, self.num_values)

    def draw(self, number, rng):
        return self.draw_pairs(rng, np.full(number, self.num_pairs))

    def training_sequences(self, number, rng):
        """Draw 1 to num_pairs different pairs, repeated to fill the sequence: easy ones speed up learning."""
        tokens, targets = self.draw_pairs(rng, rng.integers(1, self.num_pairs + 1, size=number))
        return Sequences(torch.from_numpy(tokens), torch.from_numpy(targets), torch.zeros(number, dtype=torch.long))

    def draw_pairs(self, rng: np.random.Generator, different: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw tokens and targets (B, T).  different (B,): number of different pairs"""
        number, P = len(different), self.num_pairs
        which = np.arange(P) % different[:, None]  # (B, P)
        keys = np.take_along_axis(distinct(rng, number, self.num_keys, P), which, axis=1)
        values = self.num_keys + np.take_along_axis(distinct(rng, number, self.num_values, P), which, axis=1)
        order = distinct(rng, number, P, P)  # (B, P)
        pairs = np.stack([keys, values], axis=2).reshape(number, 2 * P)
        tokens = np.concatenate([pairs, np.take_along_axis(keys, order, axis=1)], axis=1)
        targets = np.full_like(tokens, IGNORE)
        targets[:, 2 * P :] = np.take_along_axis(values, order, axis=1)
        return tokens, targets


@dataclass(frozen=True)
class InContextRecall(Task):
    """Repeated key-value pairs: recall the value of every key shown before (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 2
    num_pairs: int = 8  # different keys in a sequence: all of them, so that the choice of keys gives no hint
    num_keys: int = 8  # key tokens
    num_values: int = 8  # value tokens
    longest: int = 1  # maximum tokens of a key or value
    noise: float = 0.0  # share of pairs replaced by noise
    num_noise: int = 0  # noise tokens
    length: int = 32

    @property
    def size(self):
        return Size(self.num_keys + self.num_values + self.num_noise, self.length, self.num_values)

    def draw(self, number, rng):
        T, N = self.T, self.T // 2 + 1  # a pair has at least two tokens
        keys, values = self.pairs(number, rng)  # (B, P, longest)
        which = rng.integers(self.num_pairs, size=(number, N))  # (B, N)
        pieces = np.concatenate([keys, values], axis=2)[np.arange(number)[:, None], which]  # (B, N, 2 * longest)

        is_noise = rng.random((number, N)) < self.noise
        shown = (which[:, :, None] == np.arange(self.num_pairs)) & ~is_noise[:, :, None]  # (B, N, P)
        shown_before = np.cumsum(shown, axis=1) - shown > 0
        known = np.take_along_axis(shown_before, which[:, :, None], axis=2)[:, :, 0] & ~is_noise  # (B, N)
        if self.num_noise:
            noise = rng.integers(self.vocab_size - self.num_noise, self.vocab_size, size=pieces.shape)
            pieces = np.where(is_noise[:, :, None] & (pieces >= 0), noise, pieces)
        scored = known[:, :, None] & (np.arange(2 * self.longest) >= self.longest)  # (B, N, 2 * longest)

        pieces, scored = pieces.reshape(number, -1), scored.reshape(number, -1)
        order = np.argsort(pieces < 0, axis=1, kind="stable")[:, : T + 1]  # remove the padding
        text, scored = (np.take_along_axis(array, order, axis=1) for array in (pieces, scored))  # (B, T + 1)
        return text[:, :-1], np.where(scored[:, 1:], text[:, 1:], IGNORE)

    def pairs(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw different keys, and values, both (number, num_pairs, longest), padded with -1."""
        words, shares = motifs(self.num_keys, self.longest)
        # Gumbel top-k: the largest log(share) + Gumbel noise are a weighted draw without replacement.
        drawn = np.argsort(-np.log(shares) - rng.gumbel(size=(number, len(words))), axis=1)[:, : self.num_pairs]
        keys = words[drawn]
        words, shares = motifs(self.num_values, self.longest)
        values = words[rng.choice(len(words), p=shares, size=(number, self.num_pairs))]
        return keys, np.where(values >= 0, values + self.num_keys, -1)


@dataclass(frozen=True)
class NoisyRecall(InContextRecall):
    """In-context recall with noise tokens in between (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 3
    noise: float = 0.1
    num_noise: int = 8


@dataclass(frozen=True)
class FuzzyRecall(InContextRecall):
    """In-context recall of keys and values of one or two tokens (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 4
    num_pairs: int = 3
    num_keys: int = 3
    num_values: int = 3
    longest: int = 2
    length: int = 40


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Letters scattered among noise: copy them in order (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 5
    num_letters: int = 8
    num_noise: int = 4
    num_copied: int = 6
    length: int = 24  # input tokens; the copied letters follow

    @property
    def size(self):
        return Size(self.num_letters + self.num_noise + 1, self.length + self.num_copied, self.num_letters)

    def draw(self, number, rng):
        blank = self.vocab_size - 1
        letters = rng.integers(self.num_letters, size=(number, self.num_copied))
        positions = np.sort(distinct(rng, number, self.length, self.num_copied), axis=1)
        tokens = np.full((number, self.T), blank)
        tokens[:, : self.length] = rng.integers(self.num_letters, blank, size=(number, self.length))
        np.put_along_axis(tokens, positions, letters, axis=1)
        targets = np.full_like(tokens, IGNORE)
        targets[:, self.length :] = letters
        return tokens, targets


@dataclass(frozen=True)
class Compression(Task):
    """Random letters: decode all of them from the logits after the last token (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 6
    num_letters: int = 8
    length: int = 12
    compressed: ClassVar[bool] = True

    @property
    def size(self):
        return Size(COMPRESSION_VOCAB, self.length + 1, self.num_letters)

    def draw(self, number, rng):
        tokens = rng.integers(self.num_letters, size=(number, self.T))
        targets = tokens.copy()
        tokens[:, -1], targets[:, -1] = self.num_letters, IGNORE
        return tokens, targets


class Compressor(nn.Module):
    """A model and an MLP that decodes all tokens from its last logits (MAD, arXiv 2403.17844, section 3.1)."""

    def __init__(self, model: nn.Module, dim: int, vocab_size: int, T: int):
        super().__init__()
        self.model = model
        self.w_in = nn.Linear(vocab_size, 4 * dim)
        self.position = nn.Embedding(T, 4 * dim)
        self.w_hidden = nn.Linear(4 * dim, 4 * dim)
        self.head = nn.Linear(4 * dim, vocab_size)

    def forward(self, tokens, targets=None):
        """Return logits (B, T, V) and the loss; logits at t predict token t, not t + 1."""
        B, T = tokens.shape
        logits, _ = self.model(tokens)
        hidden = F.gelu(self.w_in(logits[:, -1:]) + self.position.weight)  # (B, T, 4 * dim)
        answers = self.head(F.gelu(self.w_hidden(hidden)))
        if targets is None:
            return answers, None
        return answers, F.cross_entropy(answers.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


@dataclass(frozen=True)
class Memorisation(Task):
    """Facts shared by all sequences: give the value of each key, at the blank after it (MAD, arXiv 2403.17844, section 3.1)."""

    seed: int = 7
    num_keys: int = 128
    num_values: int = 32
    num_asked: int = 16

    @property
    def size(self):
        return Size(self.num_keys + self.num_values + 1, 2 * self.num_asked, self.num_values)

    @property
    def facts(self) -> np.ndarray:
        """(num_keys,) the value of each key; values are shared evenly among keys."""
        values = np.arange(self.num_keys) % self.num_values
        return self.num_keys + np.random.default_rng(self.seed).permutation(values)

    def draw(self, number, rng):
        keys = distinct(rng, number, self.num_keys, self.num_asked)
        tokens = np.full((number, self.T), self.vocab_size - 1)
        tokens[:, ::2] = keys
        targets = np.full_like(tokens, IGNORE)
        targets[:, 1::2] = self.facts[keys]
        return tokens, targets


@dataclass(frozen=True)
class HopChains(Task):
    """Hop to the letter after the previous occurrence, k times; k comes first (k-hop, arXiv 2402.09268, section 4)."""

    seed: int = 8
    num_letters: int = 6
    max_hops: int = 4
    length: int = 32

    @property
    def size(self):
        return Size(self.num_letters + self.max_hops, self.length + 1, self.num_letters)

    def draw(self, number, rng):
        rows = np.arange(number)
        letters = rng.integers(self.num_letters, size=(number, self.length))
        hops = rng.integers(1, self.max_hops + 1, size=number)
        follower = np.full((number, self.num_letters), -1)  # position after each letter's last occurrence; -1: none
        hop = np.empty_like(letters)
        for position in range(self.length):
            letter = letters[:, position]
            hop[:, position] = follower[rows, letter]
            follower[rows, letter] = position + 1
        reached = np.broadcast_to(np.arange(self.length), letters.shape)
        for step in range(self.max_hops):
            following = np.where(reached >= 0, np.take_along_axis(hop, reached.clip(0), axis=1), -1)
            reached = np.where((step < hops)[:, None], following, reached)
        answers = np.where(reached >= 0, np.take_along_axis(letters, reached.clip(0), axis=1), IGNORE)
        tokens = np.concatenate([self.num_letters + hops[:, None] - 1, letters], axis=1)
        return tokens, np.concatenate([np.full((number, 1), IGNORE), answers], axis=1), hops


TASKS: dict[str, Task] = {
    "multi-query recall": MultiQueryRecall(),
    "in-context recall": InContextRecall(),
    "noisy recall": NoisyRecall(),
    "fuzzy recall": FuzzyRecall(),
    "selective copying": SelectiveCopying(),
    "compression": Compression(),
    "memorisation": Memorisation(),
    "hop chains": HopChains(),
}


def distinct(rng: np.random.Generator, rows: int, choices: int, number: int) -> np.ndarray:
    """Draw different integers below `choices` in each row, in random order.  (rows, number)"""
    assert number <= choices
    return rng.random((rows, choices)).argsort(axis=1)[:, :number]


def motifs(num_tokens: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """List all words of 1 to `longest` different tokens, padded with -1, and their shares: all lengths are equally likely."""
    words, shares = [], []
    for length in range(1, longest + 1):
        ordered = list(permutations(range(num_tokens), length))
        words += [[*word, *[-1] * (longest - length)] for word in ordered]
        shares += [1 / longest / len(ordered)] * len(ordered)
    return np.array(words), np.array(shares)
