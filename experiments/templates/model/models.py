"""Say here what the model does, and name the paper.  B batch, T time, D model dim, V vocabulary."""

import torch
from torch import nn

from model import GPT


class Template(GPT):
    """GPT with a learned scale of its logits: put your idea in its place.

    `forward` is `hidden_states`, which embeds the tokens and goes through the layers, and `score`, which makes logits and loss.
    A model that is no GPT needs a forward alone: modules/registry.py says what it takes and returns.
    """

    def __init__(self, config, vocab_size, blocks, scale: float = 1.0):
        super().__init__(config, vocab_size, blocks)
        self.scale = nn.Parameter(torch.tensor(scale))

    def predict(self, x, targets):
        return super().predict(self.scale * x, targets)  # logits (B, T, V), and the cross-entropy with the targets


MODELS = {"Template": Template}
