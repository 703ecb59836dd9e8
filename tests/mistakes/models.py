"""Models, each with one mistake.  B batch, T time, D model dim, V vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, IGNORE


class Base(nn.Module):
    """A bigram model: an embedding, and a head."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, config.dim)
        self.head = nn.Linear(config.dim, vocab_size)

    def logits(self, tokens):
        return self.head(self.table(tokens))

    def forward(self, tokens, targets=None, *, story_ids=None):
        logits = self.logits(tokens)
        return logits, None if targets is None else self.loss(logits, targets)

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


# how a model is made


class TakesDim(Base):
    """Instead of the config."""

    def __init__(self, dim, vocab_size):
        super().__init__(dim, vocab_size)


class TakesOnlyTheVocabulary(Base):
    """And no config."""

    def __init__(self, vocab_size):
        super().__init__(vocab_size, vocab_size)


class MisspellsInInit(Base):
    """config.dims."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.trunk = nn.Linear(config.dims, config.dims)


class TakesNoBlocks(GPT):
    """So it knows those of model.py only."""

    def __init__(self, config, vocab_size, times: int = 2):
        super().__init__(config, vocab_size)


class KeepsBlocksForItself(GPT):
    """It does not pass them on."""

    def __init__(self, config, vocab_size, blocks):
        super().__init__(config, vocab_size)


class HasOptions(Base):
    """One, with a default."""

    def __init__(self, config, vocab_size, times: int = 2):
        super().__init__(config, vocab_size)
        if times < 1:
            raise ValueError(f"times={times}: give a whole number of at least 1")


class HasNoForward(nn.Module):
    """It only has weights."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)


class HasNoWeights(nn.Module):
    """Nothing to train."""

    def __init__(self, config, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size

    def forward(self, tokens, targets=None, *, story_ids=None):
        logits = F.one_hot(tokens, self.vocab_size).float()
        return logits, None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


class HasAnIdleHead(Base):
    """It has two heads, and uses one."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.other_head = nn.Linear(config.dim, vocab_size)


# what a forward takes and returns


class TakesNoStories(Base):
    """By **kwargs, which its base class does not have."""

    def forward(self, tokens, targets=None):
        return super().forward(tokens, targets)


class NeedsTargets(Base):
    """Generation has none."""

    def forward(self, tokens, targets, *, story_ids=None):
        return super().forward(tokens, targets)


class ReturnsLogitsOnly(Base):
    """And no loss."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        return self.logits(tokens)


class ReturnsADict(Base):
    """As transformers does."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        return dict(zip(("logits", "loss"), super().forward(tokens, targets), strict=True))


class ReturnsTheLossFirst(Base):
    """In the wrong order."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        return super().forward(tokens, targets)[::-1]


class HasNoLoss(Base):
    """None, with targets."""

    def loss(self, logits, targets):
        return None


class HasALossWithAxes(Base):
    """It forgets the mean."""

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")


class DetachesItsLoss(Base):
    """Nothing learns."""

    def loss(self, logits, targets):
        return super().loss(logits, targets).detach()


class HasFewerLogits(Base):
    """100 of 128."""

    def logits(self, tokens):
        return super().logits(tokens)[..., :100]


class PredictsOnlyTheLast(Base):
    """As generation needs."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        logits, loss = super().forward(tokens, targets)
        return logits if self.training else logits[:, -1:], loss


class ReturnsFloat64(Base):
    """Logits."""

    def logits(self, tokens):
        return super().logits(tokens).double()


class ReturnsProbabilities(Base):
    """Instead of logits."""

    def logits(self, tokens):
        return super().logits(tokens).softmax(dim=-1)


class NeedsTheFullContext(Base):
    """It adds positions of a fixed number."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.positions = nn.Parameter(torch.zeros(config.max_seq_len, config.dim))

    def logits(self, tokens):
        return self.head(self.table(tokens) + self.positions)


# losses


class SumsItsLoss(Base):
    """It depends on the number of targets."""

    def loss(self, logits, targets):
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


class ScoresPadding(Base):
    """As if it were token 0."""

    def loss(self, logits, targets):
        return super().loss(logits, targets.clamp(min=0))


class ShiftsTheTargetsAgain(Base):
    """They are the next tokens already."""

    def loss(self, logits, targets):
        return super().loss(logits[:, :-1], targets[:, 1:])


class LosesLessThanItsLogits(Base):
    """Its loss knows the targets."""

    def loss(self, logits, targets):
        return super().loss(logits + 3.0 * F.one_hot(targets.clamp(min=0), logits.shape[-1]), targets)


class CannotIgnore(Base):
    """-100 is no index."""

    def loss(self, logits, targets):
        return -logits.log_softmax(dim=-1).gather(-1, targets[..., None]).mean()


# what must not be seen


class SeesTheFuture(Base):
    """The sum of all tokens that come."""

    def logits(self, tokens):
        x = self.table(tokens)
        return self.head(x + x.flip(1).cumsum(1).flip(1))


class ReadsTheNextToken(Base):
    """A shift in the wrong direction: its target is in its input."""

    def logits(self, tokens):
        return self.head(self.table(tokens.roll(-1, dims=1)))


class SeesALittleOfTheFuture(Base):
    """Too little for its logits to show it, but not for its gradient."""

    def logits(self, tokens):
        x = self.table(tokens)
        return self.head(x + 3e-5 * x.roll(-1, dims=1))


class AddsItsTargets(Base):
    """If there are any."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        logits, loss = super().forward(tokens, targets)
        return logits if targets is None else logits + F.one_hot(targets.clamp(min=0), logits.shape[-1]), loss


class KeepsItsState(Base):
    """An average of what it has read, from row to row."""

    def __init__(self, config, vocab_size):
        super().__init__(config, vocab_size)
        self.average = torch.zeros(config.dim)

    def logits(self, tokens):
        x = self.table(tokens)
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=(0, 1))
        return self.head(x + self.average)


class KeepsTheGraph(Base):
    """Its state, with its gradient, from step to step."""

    def logits(self, tokens):
        x = self.table(tokens)
        last, self.last = getattr(self, "last", 0.0), x.mean(dim=(0, 1))
        return self.head(x + last) if self.training else self.head(x)


class MixesRows(Base):
    """It subtracts the mean of the batch."""

    def logits(self, tokens):
        x = self.table(tokens)
        return self.head(x - x.mean(dim=0))


class MixesStories(Base):
    """It takes story_ids, and does nothing with them."""

    def logits(self, tokens):
        return self.head(self.table(tokens).cumsum(dim=1))


class HasAWrongCache(Base):
    """It takes one, and keeps nothing in it."""

    def forward(self, tokens, targets=None, *, cache=None):
        return super().forward(tokens, targets)

    def logits(self, tokens):
        return self.head(self.table(tokens).cumsum(dim=1))


class DropsInEval(Base):
    """F.dropout without self.training."""

    def logits(self, tokens):
        return self.head(F.dropout(self.table(tokens), 0.1))


class CannotBeScored(SeesTheFuture):
    """It is not meant to be read from left to right, but has no likelihood."""

    causal = False


class MayBeABound(CannotBeScored):
    """It does not say whether its likelihood is one."""

    def story_nats(self, stories):
        return torch.zeros(len(stories))


# no mistakes


class IsNotCausal(CannotBeScored):
    """With a likelihood."""

    is_bound = False

    def story_nats(self, stories):
        return torch.zeros(len(stories))


class DrawsInTraining(Base):
    """Noise, an extra loss, and no logits; label smoothing."""

    def forward(self, tokens, targets=None, *, story_ids=None):
        x = self.table(tokens)
        if self.training:
            x = x + torch.randn_like(x) * torch.rand(())
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, label_smoothing=0.1)
        return None if self.training else logits, loss + 0.01 * x.square().mean()


MODELS = {
    name: value for name, value in list(globals().items())
    if isinstance(value, type) and value.__module__ == __name__ and name != "Base"
}  # fmt: skip
