"""Embedding shortcuts and hashed bigram embeddings.

B batch, T time, D model dim, V vocabulary.
"""

import torch
from torch import Tensor, nn

from modules.checks import check_sizes
from tools import LoggingModule


def weighted_sum(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """weights[0] x + weights[1] y.  x and y of one shape -> the same; weights (2)"""
    return weights[0] * x + weights[1] * y


class Shortcut(LoggingModule):
    """Mix the input of the first Shortcut into the residual stream: a x + b x_first with learned a and b.  (B, T, D) -> (B, T, D)

    The embedding shortcut of Jordan et al. 2024 (modded-nanogpt). Starts as the identity.
    """

    weighted_sum = staticmethod(weighted_sum)

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, x, *, shared):
        return self.weighted_sum(x, shared.setdefault("shortcut", x), self.mix)


class Bigram(LoggingModule):
    """Add an embedding of each token and the one before it, as a pair.  (B, T, D) -> (B, T, D)

    The V^2 pairs share a table of `size` entries by a hash, as the n-gram tables of fastText (Bojanowski et al. 2017, arXiv
    1607.04606, section 3.2), so it costs memory, but hardly any time. Starts at zero.
    """

    def __init__(self, dim: int, vocab_size: int, size: int = 4096):
        super().__init__()
        check_sizes(size=size)
        self.vocab_size = vocab_size
        self.table = nn.Embedding(size, dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, x, *, tokens, story_start=None, cache=None):
        B, T, D = x.shape
        no_token = tokens.new_full((B, 1), self.vocab_size)
        last = cache["last"] if cache else no_token
        if cache is not None:
            cache["last"] = tokens[:, -1:]
        previous = torch.cat([last, tokens[:, :-1]], dim=1)  # (B, T)
        if story_start is not None:
            previous = torch.where(torch.arange(T, device=x.device) > story_start, previous, no_token)
        pair = previous * (self.vocab_size + 1) + tokens
        return x + self.table(pair * 2_654_435_761 % 2**32 % self.table.num_embeddings)  # Knuth's multiplicative hash


BLOCKS = {"Shortcut": Shortcut, "Bigram": Bigram}
