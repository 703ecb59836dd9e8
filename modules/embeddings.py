"""More from the embedding: a way for it to later layers, and tables for pairs of tokens.

B batch, T time, D model dim, V vocabulary.
"""

import torch
from torch import nn

from fast import ops as kernels
from tools import LoggingModule


class Shortcut(LoggingModule):
    """Mixes what the first Shortcut of the depth was given into the residual stream: a x + b first, with learned a and b.

    From Jordan et al. 2024 (modded-nanogpt, the embedding shortcut). Begins as the identity.  (B, T, D) → (B, T, D)
    """

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.backend = "auto"

    def forward(self, x, *, shared):
        first = shared.setdefault("shortcut", x)  # as x
        if kernels.fit(self.backend, x):
            return kernels.weighted_sum(x, first, self.mix)
        return self.mix[0] * x + self.mix[1] * first


class Bigram(LoggingModule):
    """Adds an embedding of the pair that each token makes with the one before it.  (B, T, D) → (B, T, D)

    The V^2 pairs share a table of `size` entries by a hash, as the n-gram tables of fastText (Bojanowski et al. 2017, arXiv
    1607.04606, section 3.2), so it costs memory, but hardly any time. Begins with zeros.
    """

    def __init__(self, dim: int, vocab_size: int, size: int = 4096):
        super().__init__()
        if size < 1:
            raise ValueError(f"layers: Bigram(size={size}): give a whole number of at least 1")
        self.vocab_size = vocab_size
        self.table = nn.Embedding(size, dim)
        nn.init.zeros_(self.table.weight)

    def forward(self, x, *, tokens, first=None, cache=None):
        """tokens (B, T); first (B, T) is the first token that each one may look at, None is the first of the row."""
        B, T, D = x.shape
        no_token = tokens.new_full((B, 1), self.vocab_size)
        before = cache["last"] if cache else no_token
        if cache is not None:
            cache["last"] = tokens[:, -1:]
        previous = torch.cat([before, tokens[:, :-1]], dim=1)  # (B, T)
        if first is not None:
            previous = torch.where(torch.arange(T, device=x.device) > first, previous, no_token)
        pair = previous * (self.vocab_size + 1) + tokens
        return x + self.table(pair * 2_654_435_761 % 2**32 % self.table.num_embeddings)  # Knuth's multiplicative hash


BLOCKS = {"Shortcut": Shortcut, "Bigram": Bigram}
