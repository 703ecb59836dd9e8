"""A plugin of models that are not GPT: no blocks, no layers, their own losses.

B batch, T time, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import IGNORE


class Recurrent(nn.Module):
    """An LSTM with an L2 penalty on its states (Merity et al. 2017, arXiv 1708.02182, section 4.5). It takes no story_ids."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.dim)
        self.lstm = nn.LSTM(config.dim, config.dim, config.num_layers, batch_first=True)
        self.head = nn.Linear(config.dim, vocab_size)

    def forward(self, tokens, targets=None, *, cache=None):
        memory = {} if cache is None else cache.blocks[self]
        states, memory["state"] = self.lstm(self.table(tokens), memory.get("state"))
        logits = self.head(states)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        return logits, loss + 0.01 * states.square().mean()


class Trigram(nn.Module):
    """Predict a token from the two before it in its story. It has no cache, and returns no logits in training."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.one, self.two = nn.Embedding(vocab_size, vocab_size), nn.Embedding(vocab_size, vocab_size)

    def forward(self, tokens, targets=None, *, story_ids=None, window=None):
        previous = self.two(F.pad(tokens[:, :-1], (1, 0)))
        visible = torch.ones_like(tokens) if story_ids is None else F.pad(story_ids[:, 1:] == story_ids[:, :-1], (1, 0))
        visible = visible * (torch.arange(tokens.shape[1]) > 0) * (window is None or window > 1)
        logits = self.one(tokens) + previous * visible[..., None]
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, label_smoothing=0.05)
        return None if self.training else logits, loss


MODELS = {"Recurrent": Recurrent, "Trigram": Trigram}
