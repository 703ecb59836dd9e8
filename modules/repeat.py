"""A layer that runs several times with the same weights, as in looped and universal transformers.

B batch, T time, D model dim.
"""

import torch
from torch import nn

from model import Branch
from modules.checks import check_sizes
from tools import LoggingModule


class Repeat(LoggingModule):
    """Run a layer `times` times, each turn on the output of the one before; `3 x [Norm->MLP->+]`.  (B, T, D) -> (B, T, D)

    All turns share the weights of the layer, as in the Universal Transformer without halting (Dehghani et al. 2018, arXiv
    1807.03819, section 2.1). Each turn has FLOPs and a cache of its own. turn_embedding: add a learned vector of the turn to its
    input, where the paper adds sinusoids; it starts at zero.
    """

    examples = ("2 x [Norm->Attn->+->Norm->MLP->+]", "Repeat([Norm->ShortConv->+->2 x [MLP->+]], times=2, turn_embedding=True)")

    def __init__(self, dim: int, layer: Branch, times: int, turn_embedding: bool = False):
        super().__init__()
        check_sizes(times=times)
        self.layer, self.times = layer, times
        self.turn_bias = nn.Parameter(torch.zeros(times, dim)) if turn_embedding else None

    def forward(self, x, **inputs):
        for turn in range(self.times):
            if self.turn_bias is not None:
                x = x + self.turn_bias[turn]
            x = self.layer(x, **inputs)
        return x


BLOCKS = {"Repeat": Repeat}
