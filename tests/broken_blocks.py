"""A plugin of blocks that each break the contract in one way, and of some that keep it in an unusual way.

B batch, T time, S time including cached tokens, D model dim.
"""

import torch
import torch.nn.functional as F
from torch import nn

import fast
from model import Attention, causal_attention, causal_mask, linear
from tools import LoggingModule


class Mean(LoggingModule):
    """x plus a learned share of the mean of the story so far.  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int):
        super().__init__()
        self.share = nn.Parameter(torch.ones(dim))

    def forward(self, x, *, story_start=None, cache=None):
        B, T, D = x.shape
        x_and_past = torch.cat([cache["past"] if cache else x[:, :0], x], dim=1)
        S = x_and_past.shape[1]
        if cache is not None:
            cache["past"] = x_and_past
        mask = causal_mask(T, S, story_start).view(-1, T, S).float()
        mean = mask @ x_and_past / mask.sum(dim=-1, keepdim=True)  # (B, T, D)
        return x + self.share * mean


class SeesTheFuture(Mean):
    """The mean of the whole row."""

    def forward(self, x, *, story_start=None, cache=None):
        return x + self.share * x.mean(dim=1, keepdim=True)


class SeesTheNextToken(Mean):
    """By its number alone."""

    def forward(self, x, *, tokens, story_start=None, cache=None):
        return self.share * x + F.pad(tokens[:, 1:], (0, 1))[..., None]


class SeesTheFutureOfItsStory(Mean):
    """Only where stories share a row."""

    def forward(self, x, *, story_start=None, cache=None):
        if story_start is None:
            return super().forward(x, cache=cache)
        is_last_story = story_start == story_start[:, -1:]
        return x + self.share * torch.where(is_last_story[..., None], x[:, -1:], 0.0)


class SeesTheFutureInTraining(Mean):
    """Like a norm over batch and time."""

    def forward(self, x, *, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y - y.mean(dim=(0, 1)) if self.training else y


class TakesNoCache(Mean):
    """It cannot know earlier tokens."""

    def forward(self, x, *, story_start=None):
        return super().forward(x, story_start=story_start)


class ForgetsItsCache(Mean):
    """It takes a cache and leaves it empty."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start)


class ForgetsInChunks(Mean):
    """It caches the first token of a chunk, which is right for chunks of one token only."""

    def forward(self, x, *, story_start=None, cache=None):
        last = cache["last"] if cache else torch.zeros_like(x[:, :1])
        if cache is not None:
            cache["last"] = x[:, :1]
        previous = torch.cat([last, x[:, :-1]], dim=1)
        if story_start is not None:
            previous = previous * (torch.arange(x.shape[1]) > story_start)[..., None]
        return self.share * x + previous


class KnowsNoStories(Mean):
    """It does not take story_start."""

    def forward(self, x, *, cache=None):
        return super().forward(x, cache=cache)


class LeaksOverStories(Mean):
    """It takes story_start and ignores it."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, cache=cache)


class DropsGradientsOfItsInput(Mean):
    """The weights have gradients."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x.detach(), story_start=story_start, cache=cache)


class HasAnIdleWeight(Mean):
    """Nothing uses it."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.idle = nn.Parameter(torch.ones(dim))


class HasGradientsThatAreNotFinite(Mean):
    """The gradient of a square root at zero."""

    def forward(self, x, *, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y + (x - x).square().sum(dim=-1, keepdim=True).sqrt()


class OverflowsInBfloat16(Mean):
    """Like one that converts to a narrower format."""

    def forward(self, x, *, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y * torch.inf if torch.is_autocast_enabled("cpu") else y


class DropsAToken(Mean):
    """The last."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache)[:, :-1]


class DividesByTheLengthLessOne(Mean):
    """Which is zero for a single token."""

    def forward(self, x, *, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y if cache is not None else y + 0.0 * y / (x.shape[1] - 1)


class HasAWrongShapeComment(Mean):
    """A typo."""

    def forward(self, x, *, story_start=None, cache=None):
        B, T, D = x.shape
        y = super().forward(x, story_start=story_start, cache=cache)  # (B, D, T)
        return y


class DrawsInEval(Mean):
    """Noise in every mode."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache) + torch.randn_like(x)


class KeepsState(Mean):
    """From call to call."""

    def forward(self, x, *, story_start=None, cache=None):
        last, self.last = getattr(self, "last", 1.0), x.detach().mean()
        return super().forward(x, story_start=story_start, cache=cache) * last


class ReadsTheTargets(Mean):
    """Which are not there in eval."""

    def forward(self, x, *, targets=None, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y if targets is None else y + targets[..., None]


class AddsALossInEval(Mean):
    """Not only where it trains."""

    def forward(self, x, *, shared, story_start=None, cache=None):
        shared["losses"]["size"] += x.square().mean()
        return super().forward(x, story_start=story_start, cache=cache)


class AddsALossWithAxes(Mean):
    """It forgets the mean."""

    def forward(self, x, *, shared, story_start=None, cache=None):
        if self.training:
            shared["losses"]["size"] += x.square()
        return super().forward(x, story_start=story_start, cache=cache)


class DropsItself(Mean):
    """In training, half of the time.  (B, T, D) -> (B, T, D)"""

    def forward(self, x, *, story_start=None, cache=None):
        return x if self.training and torch.rand(()) < 0.5 else super().forward(x, story_start=story_start, cache=cache)


class HidesItsWeights(Mean):
    """In a Python list."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.steps = [linear(dim, dim)]

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(self.steps[0](x), story_start=story_start, cache=cache)


class HasUnsavedNumbers(Mean):
    """Random ones, which the next model has not."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.phases = torch.randn(dim)

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x * self.phases, story_start=story_start, cache=cache)


class ReturnsFloat64(Mean):
    """By a constant."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache) * torch.ones(x.shape[-1], dtype=torch.float64)


class ReturnsATuple(Mean):
    """As a recurrence of torch."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache), None


class ForgetsSuper(Mean):
    """In its __init__."""

    def __init__(self, dim: int):
        self.w_out = linear(dim, dim)


class ChangesItsInput(Mean):
    """In place."""

    def forward(self, x, *, story_start=None, cache=None):
        doubled = x.mul_(2.0) if not x.requires_grad else 2.0 * x
        return super().forward(doubled, story_start=story_start, cache=cache)


class LooksAtOtherRows(Mean):
    """Like batch norm."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x - x.mean(dim=0), story_start=story_start, cache=cache)


class NeedsRope(Mean):
    """Which not every config has."""

    def forward(self, x, *, rope, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache) * rope[0].shape[-1]


class NeedsAnOption(Mean):
    """One without a default."""

    def __init__(self, dim: int, height: int):
        super().__init__(dim)


class ReportsNoNumber(Mean):
    """NaN is not finite."""

    def report(self) -> dict[str, float]:
        return {"share": float("nan")}


class CountsNegativeFlops(Mean):
    """Fewer than none."""

    def flops_per_token(self, T: int) -> float:
        return -1.0


class NeedsAMemory(Mean):
    """It reads a memory that is not always there."""

    def forward(self, x, *, memory, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache) + memory.mean(dim=1, keepdim=True)


class DoesNotReadItsMemory(Mean):
    """It takes the memory and ignores it."""

    def forward(self, x, *, memory, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache)


class Undocumented(Mean):
    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start, cache=cache)


class Bare(nn.Module):
    """Not a LoggingModule."""


class HasExamplesWithoutItself(Mean):
    """Only of another block."""

    examples = ("MLP",)


class HasOneExample(Mean):
    """Not as a tuple."""

    examples = "HasOneExample"


class IsFastButWrong(Attention):
    """Attention that is registered with a fast function that ignores the stories of a row."""


class HasOtherFastGradients(Attention):
    """Attention that is registered with a fast function whose values have no gradient."""


def ignore_stories(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0):
    return causal_attention(q, k, v, None, window, soft_cap, dropout)


def detach_values(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0):
    return causal_attention(q, k, v.detach(), story_start, window, soft_cap, dropout)


for kernels in (True, False):
    fast.register(IsFastButWrong, kernels=kernels, causal_attention=ignore_stories)
    fast.register(HasOtherFastGradients, kernels=kernels, causal_attention=detach_values)


class Open(LoggingModule):
    """Double the channels and leave x for Close; it needs one after it.  (B, T, D) -> (B, T, 2 D)"""

    examples = ("Open->MLP(dim=48)->Close",)

    def forward(self, x, *, shared):
        shared["open"] = x
        return torch.cat([x, x], dim=-1)


class Close(LoggingModule):
    """Add what Open left.  (B, T, 2 D) -> (B, T, D)"""

    examples = Open.examples

    def __init__(self, dim: int):
        super().__init__()
        self.w_out = linear(2 * dim, dim)

    def forward(self, x, *, shared):
        return shared["open"] + self.w_out(x)


class ReadsMemory(Mean):
    """Add the mean of the memory.  (B, T, D) -> (B, T, D)"""

    def forward(self, x, *, memory, story_start=None, cache=None):
        y = super().forward(x, story_start=story_start, cache=cache)
        return y if memory is None else y + memory.mean(dim=1, keepdim=True)


class LooksBothWays(Mean):
    """The mean of the whole story.  (B, T, D) -> (B, T, D)"""

    causal = False

    def forward(self, x, *, story_start=None):
        B, T, D = x.shape
        story_start = torch.zeros(B, T) if story_start is None else story_start
        same_story = (story_start[:, :, None] == story_start[:, None, :]).to(x.dtype)  # (B, T, T)
        return x + self.share * (same_story @ x) / same_story.sum(dim=-1, keepdim=True)


BLOCKS = {
    block.__name__: block
    for block in (Open, Close, *Mean.__subclasses__(), Mean, Bare, IsFastButWrong, HasOtherFastGradients)
}  # fmt: skip
