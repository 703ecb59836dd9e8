"""A plugin of blocks that break the contract, each in one way, and of some that keep it in an unusual one.

B batch, T time, D model dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, linear
from tools import LoggingModule


class Mean(LoggingModule):
    """x plus a learned share of the mean of what was so far.  (B, T, D) → (B, T, D)"""

    def __init__(self, dim: int):
        super().__init__()
        self.share = nn.Parameter(torch.ones(dim))

    def forward(self, x, *, first=None, cache=None):
        B, T, D = x.shape
        past = cache["past"] if cache else x[:, :0]
        seen = torch.cat([past, x], dim=1)
        S = seen.shape[1]
        if cache is not None:
            cache["past"] = seen
        looks = torch.ones(T, S).tril(S - T).expand(B, T, S)
        if first is not None:
            looks = looks * (torch.arange(S) >= first[..., None])
        mean = looks @ seen / looks.sum(dim=-1, keepdim=True)  # (B, T, D)
        return x + self.share * mean


class SeesTheFuture(Mean):
    """The mean of all."""

    def forward(self, x, *, first=None, cache=None):
        return x + self.share * x.mean(dim=1, keepdim=True)


class SeesTheNextToken(Mean):
    """By its number alone."""

    def forward(self, x, *, tokens, first=None, cache=None):
        return self.share * x + F.pad(tokens[:, 1:], (0, 1))[..., None]


class SeesTheFutureOfItsStory(Mean):
    """Only where stories share a row."""

    def forward(self, x, *, first=None, cache=None):
        if first is None:
            return super().forward(x, cache=cache)
        return x + self.share * torch.where(first[..., None] == first[:, -1:, None], x[:, -1:], 0.0)


class SeesTheFutureInTraining(Mean):
    """As a norm over the batch's time does."""

    def forward(self, x, *, first=None, cache=None):
        y = super().forward(x, first=first, cache=cache)
        return y - y.mean(dim=(0, 1)) if self.training else y


class TakesNoCache(Mean):
    """It cannot know what was."""

    def forward(self, x, *, first=None):
        return super().forward(x, first=first)


class ForgetsItsCache(Mean):
    """It keeps nothing."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first)


class ForgetsInChunks(Mean):
    """It keeps the last token alone, which is enough where nothing but single tokens come."""

    def forward(self, x, *, first=None, cache=None):
        before = cache["last"] if cache else torch.zeros_like(x[:, :1])
        if cache is not None:
            cache["last"] = x[:, :1]
        previous = torch.cat([before, x[:, :-1]], dim=1)
        if first is not None:
            previous = previous * (torch.arange(x.shape[1]) > first)[..., None]
        return self.share * x + previous


class KnowsNoStories(Mean):
    """It does not ask for first."""

    def forward(self, x, *, cache=None):
        return super().forward(x, cache=cache)


class LeaksOverStories(Mean):
    """It asks for first, and does not heed it."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, cache=cache)


class DropsGradientsOfItsInput(Mean):
    """The weights get theirs."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x.detach(), first=first, cache=cache)


class HasAnIdleWeight(Mean):
    """It takes part in nothing."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.idle = nn.Parameter(torch.ones(dim))


class HasGradientsThatAreNotFinite(Mean):
    """The root of zero has none."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, cache=cache) + (x - x).square().sum(dim=-1, keepdim=True).sqrt()


class OverflowsInBfloat16(Mean):
    """As one that converts to a narrow format does."""

    def forward(self, x, *, first=None, cache=None):
        y = super().forward(x, first=first, cache=cache)
        return y * torch.inf if torch.is_autocast_enabled("cpu") else y


class DropsAToken(Mean):
    """The last."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, cache=cache)[:, :-1]


class DividesByTheLengthLessOne(Mean):
    """Nothing is left for one token."""

    def forward(self, x, *, first=None, cache=None):
        y = super().forward(x, first=first, cache=cache)
        return y if cache is not None else y + 0.0 * y / (x.shape[1] - 1)


class HasAWrongShapeComment(Mean):
    """A slip of the pen."""

    def forward(self, x, *, first=None, cache=None):
        B, T, D = x.shape
        y = super().forward(x, first=first, cache=cache)  # (B, D, T)
        return y


class DrawsInEval(Mean):
    """Noise for all."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, cache=cache) + torch.randn_like(x)


class ChangesItsInput(Mean):
    """In place."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x.mul_(2.0) if not x.requires_grad else 2.0 * x, first=first, cache=cache)


class LooksAtOtherRows(Mean):
    """As a norm over the batch does."""

    def forward(self, x, *, first=None, cache=None):
        return super().forward(x - x.mean(dim=0), first=first, cache=cache)


class NeedsRope(Mean):
    """Which not every config has."""

    def forward(self, x, *, rope, first=None, cache=None):
        return super().forward(x, first=first, cache=cache) * rope[0].shape[-1]


class NeedsAnOption(Mean):
    """One without a default."""

    def __init__(self, dim: int, height: int):
        super().__init__(dim)


class ReportsNothing(Mean):
    """That is a number."""

    def report(self) -> dict[str, float]:
        return {"share": float("nan")}


class CountsNoWork(Mean):
    """But less."""

    def flops_per_token(self, T: int) -> float:
        return -1.0


class DoesNotReadItsMemory(Mean):
    """Though it asks for it."""

    def forward(self, x, *, memory, first=None, cache=None):
        return super().forward(x, first=first, cache=cache)


class Undocumented(Mean):
    def forward(self, x, *, first=None, cache=None):
        return super().forward(x, first=first, cache=cache)


class Bare(nn.Module):
    """No LoggingModule."""


class HasExamplesWithoutItself(Mean):
    """Of others alone."""

    examples = ("MLP",)


class HasOneExample(Mean):
    """Not as a tuple."""

    examples = "HasOneExample"


class Open(LoggingModule):
    """Doubles the channels and leaves x for Close, so that it makes sense only with one behind it.  (B, T, D) → (B, T, 2 D)"""

    examples = ("Open->MLP(dim=48)->Close",)

    def forward(self, x, *, shared):
        shared["open"] = x
        return torch.cat([x, x], dim=-1)


class Close(LoggingModule):
    """Adds what Open left.  (B, T, 2 D) → (B, T, D)"""

    examples = Open.examples

    def __init__(self, dim: int):
        super().__init__()
        self.w_out = linear(2 * dim, dim)

    def forward(self, x, *, shared):
        return shared["open"] + self.w_out(x)


class HasItsOwnSoftmax(Attention):
    """Which the fused implementations do not know."""

    def softmax(self, scores):
        return scores.sigmoid()


class ReadsMemory(Mean):
    """Adds the mean of the memory.  (B, T, D) → (B, T, D)"""

    def forward(self, x, *, memory, first=None, cache=None):
        return super().forward(x, first=first, cache=cache) + memory.mean(dim=1, keepdim=True)


class LooksBothWays(Mean):
    """The mean of the whole story.  (B, T, D) → (B, T, D)"""

    causal = False

    def forward(self, x, *, first=None):
        B, T, D = x.shape
        first = torch.zeros(B, T) if first is None else first
        same = (first[:, :, None] == first[:, None, :]).to(x.dtype)  # (B, T, T)
        return x + self.share * (same @ x) / same.sum(dim=-1, keepdim=True)


BLOCKS = {made.__name__: made for made in (Open, Close, *Mean.__subclasses__(), Mean, Bare, HasItsOwnSoftmax)}
