"""Blocks, each with one mistake.  B batch, T time, D model dim."""

import torch
import torch.nn.functional as F
from torch import nn

from model import Attention, causal_mask
from tools import LoggingModule


class Base(LoggingModule):
    """One matrix."""

    def __init__(self, dim: int):
        super().__init__()
        self.w_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return self.w_out(x)


# how a block is made


class ForgetsSuper(LoggingModule):
    """Its __init__ does not call that of nn.Module."""

    def __init__(self, dim: int):
        self.w_out = nn.Linear(dim, dim)

    def forward(self, x):
        return self.w_out(x)


class TakesTheConfig(Base):
    """As a model does."""

    def __init__(self, config):
        super().__init__(config.dim)


class MisspellsInInit(Base):
    """nn.Liner."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.w_in = nn.Liner(dim, dim)


class NeedsAnOption(Base):
    """An option without a default."""

    def __init__(self, dim: int, height: int):
        super().__init__(dim)


class RejectsItsOption(Base):
    """With an error of its own."""

    def __init__(self, dim: int, share: float = 0.5):
        super().__init__(dim)
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: give a number from 0 to 1")


class HidesModulesInAList(Base):
    """A Python list, which torch does not look into."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.steps = [nn.Linear(dim, dim) for _ in range(2)]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return self.w_out(x)


class HidesModulesInADict(Base):
    """A Python dict."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.parts = {"gate": nn.Linear(dim, dim)}

    def forward(self, x):
        return self.w_out(x) * self.parts["gate"](x).sigmoid()


class HasAPlainTensor(Base):
    """A tensor that should be an nn.Parameter."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.gain = torch.ones(dim, requires_grad=True)

    def forward(self, x):
        return self.w_out(x) * self.gain


class HasRandomNumbersThatAreNotSaved(Base):
    """A tensor that should be a buffer."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.phases = torch.randn(dim)

    def forward(self, x):
        return self.w_out(x) * self.phases.cos()


class HasAnIdleWeight(Base):
    """Nothing uses it."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.idle = nn.Parameter(torch.ones(dim))


# what a forward takes and returns


class HasNoForward(LoggingModule):
    """It only has weights."""

    def __init__(self, dim: int):
        super().__init__()
        self.w_out = nn.Linear(dim, dim)


class AsksForAMask(Base):
    """No layer supplies it."""

    def forward(self, x, *, mask):
        return self.w_out(x)


class MisspellsAnInput(Base):
    """story_starts, which would always be None."""

    def forward(self, x, *, story_starts=None):
        return self.w_out(x)


class ReturnsNothing(Base):
    """It forgets to return."""

    def forward(self, x):
        self.w_out(x)


class ReturnsATuple(Base):
    """As nn.LSTM does."""

    def forward(self, x):
        return self.w_out(x), None


class ChangesTheWidth(Base):
    """8 channels."""

    def forward(self, x):
        return self.w_out(x)[..., :8]


class DropsAToken(Base):
    """The last."""

    def forward(self, x):
        return self.w_out(x)[:, :-1]


class SwapsTheAxes(Base):
    """(B, D, T)."""

    def forward(self, x):
        return self.w_out(x).transpose(1, 2)


class ReturnsFloat64(Base):
    """By a constant of float64."""

    def forward(self, x):
        return self.w_out(x) * torch.linspace(0, 1, x.shape[-1], dtype=torch.float64)


class ReturnsBfloat16(Base):
    """To save memory."""

    def forward(self, x):
        return self.w_out(x).to(torch.bfloat16)


class MultipliesFloat64(Base):
    """Before the matrix."""

    def forward(self, x):
        return self.w_out(x * torch.linspace(0, 1, x.shape[-1], dtype=torch.float64))


class MultipliesBfloat16(Base):
    """By a matrix of float32."""

    def forward(self, x):
        return self.w_out(x.to(torch.bfloat16))


class MisspellsInForward(Base):
    """self.w_oot."""

    def forward(self, x):
        return self.w_oot(x)


class ViewsATransposedTensor(Base):
    """Instead of .reshape."""

    def forward(self, x):
        B, T, D = x.shape
        heads = self.w_out(x).view(B, T, 4, -1).transpose(1, 2)
        return heads.view(B, T, D)


class HasAFixedLength(Base):
    """It reads sequences of max_seq_len only."""

    def __init__(self, dim: int, max_seq_len: int):
        super().__init__(dim)
        self.positions = nn.Parameter(torch.zeros(max_seq_len, dim))

    def forward(self, x):
        return self.w_out(x + self.positions)


class AddsAListOfLosses(Base):
    """As if a loss were a list."""

    def forward(self, x, *, shared):
        if self.training:
            shared["losses"].append(x.square().mean())
        return self.w_out(x)


class AddsALossWithAxes(Base):
    """It forgets the mean."""

    def forward(self, x, *, shared):
        if self.training:
            shared["losses"]["size"] += x.square()
        return self.w_out(x)


class LooksUpIgnoredTargets(Base):
    """-100 is no row of a table."""

    def __init__(self, dim: int, vocab_size: int = 128):
        super().__init__(dim)
        self.table = nn.Embedding(vocab_size, dim)

    def forward(self, x, *, targets=None, shared):
        if targets is not None:
            shared["losses"]["target"] += (self.table(targets) - x).square().mean()
        return self.w_out(x)


class IsNotFinite(Base):
    """The logarithm of a negative number."""

    def forward(self, x):
        return self.w_out(x).log()


# in-place changes, and state


class ChangesItsInput(Base):
    """x += ..."""

    def forward(self, x):
        x += self.w_out(x)
        return x


class ScalesItsInput(Base):
    """x.mul_, without a return of it."""

    def forward(self, x):
        x.mul_(0.5)
        return self.w_out(x)


class ChangesWhatTheGradientNeeds(Base):
    """The output of a sigmoid."""

    def forward(self, x):
        y = self.w_out(x).sigmoid()
        z = y.sigmoid()
        y += 1
        return y * z


class KeepsAGraph(Base):
    """A tensor of the last step, with its gradient."""

    def forward(self, x):
        last, self.last = getattr(self, "last", None), self.w_out(x).mean()
        return self.w_out(x) if last is None else self.w_out(x) * last


class KeepsState(Base):
    """In eval, a result depends on the calls before it."""

    def forward(self, x):
        last, self.last = getattr(self, "last", 1.0), x.detach().mean()
        return self.w_out(x) * last


class CountsInEval(Base):
    """In a buffer, which is then saved."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.w_out(x)


class DropsInEval(Base):
    """F.dropout without self.training."""

    def forward(self, x):
        return F.dropout(self.w_out(x), 0.1)


# what a token must not see


class AttendsToAll(Base):
    """It has no mask."""

    def forward(self, x):
        return (x @ x.transpose(1, 2)).softmax(dim=-1) @ self.w_out(x)


class RollsTheWrongWay(Base):
    """By -1 instead of 1."""

    def forward(self, x):
        return self.w_out(x + x.roll(-1, dims=1))


class NormalisesOverTime(Base):
    """A softmax over the wrong axis."""

    def forward(self, x):
        return self.w_out(x).softmax(dim=1)


class RunsBothWays(Base):
    """A bidirectional recurrence."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.recurrence = nn.GRU(dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, x):
        return self.w_out(self.recurrence(x)[0])


class NormalisesOverTheBatch(Base):
    """BatchNorm, which sees all positions of all rows in training."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x):
        return self.w_out(self.norm(x.transpose(1, 2)).transpose(1, 2))


class SubtractsTheMeanOfTheBatch(Base):
    """In eval, too."""

    def forward(self, x):
        return self.w_out(x - x.mean(dim=0))


class ReadsTheTargets(Base):
    """They are not there in eval."""

    def __init__(self, dim: int, vocab_size: int = 128):
        super().__init__(dim)
        self.table = nn.Embedding(vocab_size, dim)

    def forward(self, x, *, targets=None):
        return self.w_out(x if targets is None else x + self.table(targets.clamp(min=0)))


class KnowsNoStories(Base):
    """The sum of all tokens so far, those of other stories included."""

    def forward(self, x, *, cache=None):
        sums = x.cumsum(dim=1) + (cache["sum"] if cache else 0.0)
        if cache is not None:
            cache["sum"] = sums[:, -1:]
        return self.w_out(sums)


class IgnoresStories(KnowsNoStories):
    """It takes story_start, and does nothing with it."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, cache=cache)


class TakesNoCache(Base):
    """The mean of the story so far, of what it is given."""

    def forward(self, x, *, story_start=None):
        mask = causal_mask(x.shape[1], x.shape[1], story_start, device=x.device).view(-1, x.shape[1], x.shape[1]).float()
        return self.w_out(mask @ x / mask.sum(dim=-1, keepdim=True))


class ForgetsItsCache(TakesNoCache):
    """It takes a cache, and leaves it empty."""

    def forward(self, x, *, story_start=None, cache=None):
        return super().forward(x, story_start=story_start)


# no mistakes


class DropsItselfAtRandom(Base):
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382): in training, it is left out half of the time."""

    def forward(self, x):
        return x if self.training and torch.rand(()) < 0.5 else x + self.w_out(x)


class TakesItsInputsByPosition(Attention):
    """Instead of by keyword."""

    def forward(self, x, rope, story_start=None, window=None, cache=None):
        return super().forward(x, rope=rope, story_start=story_start, window=window, cache=cache)


class PassesItsInputsOn(Attention):
    """By **kwargs, so that it takes what its base class takes."""

    def __init__(self, *args, scale: float = 2.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = scale

    def forward(self, x, **inputs):
        return self.scale * super().forward(x, **inputs)


class HasTextInParentheses(Base):
    """A comment that looks like a shape."""

    def forward(self, x):
        y = self.w_out(x)  # (a matrix, learned)
        return y


BLOCKS = {
    name: value for name, value in list(globals().items())
    if isinstance(value, type) and value.__module__ == __name__ and name != "Base"
}  # fmt: skip
