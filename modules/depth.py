"""Layers that are skipped: by some training steps, or by some tokens.

B batch, T time, D model dim, N selected tokens of a row.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Branch, Cache, linear
from modules.checks import check_adds
from tools import LoggingModule


class StochasticDepth(LoggingModule):
    """Skip a layer with residual connections at random in training.  (B, T, D) -> (B, T, D)

    Huang et al. 2016, arXiv 1603.09382, section 3: a training step runs the layer with probability `keep`, for the whole batch,
    which saves its time; in evaluation what the layer adds to x is multiplied by `keep`.
    """

    examples = ("StochasticDepth([Norm->Attn->+->Norm->MLP->+])",)

    def __init__(self, layer: Branch, keep: float = 0.8):
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: give a probability above 0, at most 1")
        check_adds(layer)
        self.layer, self.dropout = layer, 1.0 - keep

    def forward(self, x, **inputs):
        if self.training and torch.rand(()) < self.dropout:
            return x
        y = self.layer(x, **inputs)
        return y if self.training else x + (1 - self.dropout) * (y - x)


class MixtureOfDepths(LoggingModule):
    """Run a layer with residual connections for a share of the tokens, which a router selects.  (B, T, D) -> (B, T, D)

    Raposo et al. 2024, arXiv 2404.02258, section 3: the selected tokens are a sequence of their own, in which the layer attends.
    What it adds to them is multiplied by the router's weight, here a sigmoid of the score; the other tokens stay as they are.

    The paper selects the scores above a percentile of their sequence (equation 1), which depends on later tokens. Here the
    threshold is a moving average of this percentile in training, so that the block is causal, and `share` holds on average.
    Rows run one by one, as they differ in the number of selected tokens. Blocks in the layer share values with each other alone.
    """

    RATE = 0.1  # of the moving average, per step

    examples = ("MixtureOfDepths([Norm->Attn->+->Norm->MLP->+])", "MixtureOfDepths([Norm->ShortConv->+->MLP->+], share=0.3)")

    def __init__(self, dim: int, layer: Branch, share: float = 0.5):
        super().__init__()
        if not 0 < share < 1:
            raise ValueError(f"share={share}: give a share of the tokens between 0 and 1")
        check_adds(layer)
        self.layer, self.share = layer, share
        self.w_router = linear(dim, 1)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("percentile", torch.zeros(()), persistent=False)  # of the scores in the last training step
        self.register_buffer("counts", torch.zeros(2), persistent=False)  # of selected tokens and of all, since the last report

    def forward(self, x, *, shared, cache=None, **inputs):
        B, T, D = x.shape
        with torch.autocast(x.device.type, enabled=False):
            scores = self.w_router(x.float())[..., 0]  # (B, T)
        selected = scores > self.threshold
        if self.training:
            self.observe(scores, selected)
        caches = None if cache is None else cache.of(self)
        rows = []
        for row in range(B):
            positions = selected[row].nonzero()[:, 0]
            N = len(positions)
            y = x[row]  # (T, D)
            if N:
                given = inputs_of_row(row, positions, selected[row], **inputs)
                given["cache"] = None if caches is None else caches.setdefault(row, Cache())
                update = self.update(x[row : row + 1, positions], shared, given, B)  # (1, N, D)
                weights = scores[row, positions].sigmoid()  # (N)
                y = y.index_add(0, positions, (weights[:, None] * update[0]).type_as(y))
            rows.append(y)
        return torch.stack(rows)

    def update(self, x, shared, given, B) -> Tensor:
        """What the layer adds to the selected tokens of a row; its losses become the mean over all rows.  (1, N, D)"""
        own = {"losses": defaultdict(float)}
        y = self.layer(x, shared=own, **given)
        if given["cache"] is not None:
            given["cache"].turns.clear()
        for name, loss in own["losses"].items():
            shared["losses"][name] += loss / B
        return y - x

    @torch.no_grad()
    def observe(self, scores, selected):
        """Note the percentile and the number of selected tokens."""
        self.percentile.copy_(scores.quantile(1 - self.share))
        self.counts[0] += selected.sum()
        self.counts[1] += selected.numel()

    @torch.no_grad()
    def after_step(self):
        self.threshold.lerp_(self.percentile, self.RATE)

    def report(self) -> dict[str, float]:
        """The share of tokens that have been selected in training since the last report; empty if no token was read."""
        selected, total = self.counts.tolist()
        self.counts.zero_()
        return {"selected": selected / total} if total else {}


def inputs_of_row(
    row: int, positions: Tensor, selected: Tensor, *, rope=None, story_start=None, window=None, tokens=None, targets=None,
    memory=None,
) -> dict:  # fmt: skip
    """The inputs of a layer for the selected tokens of a row: their positions (N), and selected (T)."""

    def of_row(values):
        """(B, T) -> (1, N)"""
        return None if values is None else values[row, positions][None]

    num_before = F.pad(selected.cumsum(dim=0), (1, 0))  # of the selected tokens before each position
    return {
        "rope": rope and tuple(table[:, positions] for table in rope),
        "story_start": None if story_start is None else num_before[of_row(story_start)],
        "window": window,
        "tokens": of_row(tokens),
        "targets": of_row(targets),
        "memory": None if memory is None else memory[row : row + 1],
    }


BLOCKS = {"StochasticDepth": StochasticDepth, "MixtureOfDepths": MixtureOfDepths}
