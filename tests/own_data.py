"""A plugin of DATA: changed rows, an order, and stories; a model that asks for the tokenizer; and a tokenizer of bytes.

B batch, T time.  docs/data.md has more of them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from config import IGNORE
from data.dataset import Batch
from data.plugin import DataPlugin
from tokenizer import Tokenizer


class SpanCorruption(DataPlugin):
    """Replace spans of a row by bos, and predict them behind it (Raffel et al. 2020, arXiv 1910.10683, section 3.1.4)."""

    def __init__(self, data, rate: float = 0.15, length: int = 3):
        super().__init__(data)
        self.rate, self.length = rate, length

    def batch(self, start, batch_size, seed):
        bos, T = self.tokenizer.bos_id, self.max_seq_len
        num_spans = max(1, round(self.rate * T / self.length))
        inputs, targets = [], []
        for number, row in enumerate(self.data.rows(start, batch_size, seed).tolist(), start):
            row = row[: T + 1 - 2 * num_spans]
            places = np.arange(1, len(row) - self.length, self.length + 1)
            text, spans, end = [], [], 0
            for place in sorted(np.random.default_rng((seed, number)).choice(places, num_spans, replace=False)):
                text += [*row[end:place], bos]
                end = place + self.length
                spans += [bos, *row[place:end]]
            whole = text + row[end:] + spans
            inputs.append(whole[:-1])
            targets.append([IGNORE] * (len(whole) - len(spans)) + spans[1:])
        return Batch(torch.tensor(inputs), torch.tensor(targets))


class FillInTheMiddle(DataPlugin):
    """Cut each row in three and put the middle last (Bavarian et al. 2022, arXiv 2207.14255, section 3, PSM).

    The last three ids of the tokenizer stand before the prefix, the suffix and the middle.
    """

    def batch(self, start, batch_size, seed):
        pad, T = self.tokenizer.pad_id, self.max_seq_len
        marks = [[self.tokenizer.vocab_size - back] for back in (3, 2, 1)]
        rows = self.data.rows(start, batch_size, seed)  # (B, T + 1)
        for number, row in enumerate(rows, start):
            tokens = row[row != pad][: T + 1 - 3].tolist()
            one, two = sorted(np.random.default_rng((seed, number)).integers(1, len(tokens), 2))
            parts = tokens[:one], tokens[two:], tokens[one:two]
            whole = [token for mark, part in zip(marks, parts, strict=True) for token in mark + part]
            row[: len(whole)] = torch.tensor(whole)
        return Batch(rows[:, :-1], rows[:, 1:].masked_fill(rows[:, 1:] == pad, IGNORE))


class ShortFirst(DataPlugin):
    """A curriculum: rows with few tokens first, in every epoch."""

    def __init__(self, data):
        super().__init__(data)
        is_padding = data.take(range(data.num_rows)) == data.tokenizer.pad_id
        self.order = is_padding.sum(dim=1).argsort(descending=True, stable=True).tolist()

    def batch(self, start, batch_size, seed):
        numbers = range(start, start + batch_size)
        return self.data.to_batch(self.data.take(self.order[number % len(self.order)] for number in numbers))


class Fables:
    """Stories of its own."""

    def __init__(self, count: int = 300):
        self.count = count

    def stories(self):
        animals = "fox", "crow", "ant", "bear", "hen"
        for number in range(self.count):
            one, other = animals[number % 5], animals[number // 5 % 5]
            yield f"A {one} met a {other} on day {number}. They shared {number % 7} grapes."


class Patches(nn.Module):
    """Predict a token from those since the last space, which the tokenizer knows, by the mean of their embeddings."""

    def __init__(self, config, vocab_size, tokenizer):
        super().__init__()
        (self.space,) = tokenizer.encode(" ")
        self.table = nn.Embedding(vocab_size, config.dim)
        self.head = nn.Linear(config.dim, vocab_size)

    def forward(self, tokens, targets=None):
        word = (tokens == self.space).cumsum(dim=1)  # (B, T)
        visible = (word[:, :, None] == word[:, None]).tril().float()  # (B, T, T)
        logits = self.head(visible / visible.sum(dim=-1, keepdim=True) @ self.table(tokens))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits, loss


class Bytes(Tokenizer):
    """The bytes of UTF-8, bos, eos and pad, and some ids that no text has."""

    bos_id, eos_id, pad_id = 256, 257, 258

    def __init__(self, sentinels: int = 0):
        self.vocab_size = 259 + sentinels

    def ids_of(self, text):
        return list(text.encode())

    def text_of(self, ids):
        return bytes(index for index in ids if index < 256).decode(errors="replace")


DATA = {data.__name__: data for data in (SpanCorruption, FillInTheMiddle, ShortFirst, Fables)}
MODELS = {"Patches": Patches}
