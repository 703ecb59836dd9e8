"""What an audit tests, and the result of a check.  T time, V vocabulary."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from metrics.scores import MAX_LOGITS, predictions, scores_itself, scoring
from model import IGNORE

UNFINISHED = "could not be finished"
BATCH_SIZE = 8
TOLERANCE = 1e-3  # nats per token that two scores of the same tokens may differ by: above rounding, below any verdict
SIGMAS = 5.0  # standard errors that the scores of a model that draws random numbers may differ by


@dataclass(frozen=True)
class Check:
    """The result of a check; a problem is one line with the cause and the cure."""

    name: str
    how: str
    problem: str | None = None

    def __str__(self) -> str:
        return f"{'FAIL' if self.problem else 'ok':4}  {self.name:8}  {self.how}" + (f". {self.problem}" if self.problem else "")


class Subject:
    """A model with a sample of stories, as token ids that fit into its context."""

    def __init__(self, model: nn.Module, tokenizer, stories: list[str], num_stories: int):
        self.model, self.tokenizer, self.stories = model, tokenizer, stories
        self.random = random.Random(0)
        self.name = type(model).__name__
        self.sample = self.random.sample(stories, min(num_stories, len(stories)))
        longest = min(model.config.max_seq_len, max(16, 8 * MAX_LOGITS // (len(self.sample) * model.vocab_size)))
        encoded = tokenizer.encode_batch(self.sample, bos=True, eos=True)
        self.tokenised = [ids[: longest + 1] for ids in encoded if len(ids) > 2]

    def copy(self) -> nn.Module:
        """A copy that nothing has been scored with; it shares the training data that a memory is made from."""
        source = getattr(self.model, "memory_source", None)
        return copy.deepcopy(self.model, {id(source): source}).eval()

    @cached_property
    def draws(self) -> bool:
        """Whether scores may depend on random numbers: a bound may be drawn, and a model with logits is tried with two seeds."""
        if scores_itself(self.model):
            return self.model.is_bound
        one, other = (token_nats(self, self.copy(), self.tokenised[:4], seed=seed) for seed in (0, 1))
        return not torch.cat(one).equal(torch.cat(other))

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) - 1 for ids in self.tokenised)


def token_nats(
    subject: Subject, model: nn.Module, tokenised: list[list[int]], scored: list[list[int]] | None = None,
    batch_size: int = BATCH_SIZE, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The nats of each token after bos, as `evaluate` scores them; scored: other tokens to look up, at most as many."""
    expected = [torch.tensor(ids[1:]) for ids in scored or tokenised]
    nats = [torch.full(ids.shape, math.nan, dtype=torch.float64) for ids in expected]
    with scoring(model, seed):
        for batch, logits, targets in predictions(model, subject.tokenizer, tokenised, batch_size):
            for piece, row, is_scored in zip(batch, logits.cpu(), (targets != IGNORE).cpu(), strict=True):
                ids = expected[piece.story]
                columns = is_scored.nonzero()[:, 0]
                columns = columns[piece.start + columns < len(ids)]
                places = piece.start + columns
                log_probs = row[columns].double().log_softmax(dim=-1)
                nats[piece.story][places] = -log_probs.gather(-1, ids[places, None])[:, 0]
    return nats


def run_check(name: str, check: Callable[[Subject], tuple[str, str | None]], subject: Subject) -> Check:
    """Run a check, which returns how it checked and the problem or None. Code of a model that fails is a problem, too."""
    try:
        return Check(name, *check(subject))
    except Exception as error:  # a model is a reader's own code: anything may be wrong in it
        problem = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        return Check(name, UNFINISHED, " ".join(problem.split()))


def differ(ours: Tensor, expected: Tensor, draws: bool) -> str | None:
    """How far two scores of the same things, in nats per token, are apart on average; None if they agree.

    The scores of a model that draws random numbers agree if their means do.
    """
    difference = ours.double() - expected.double()
    apart = difference.mean().abs() if draws else difference.abs().mean()
    noise = SIGMAS * difference.std() / len(difference) ** 0.5 if draws else 0.0
    return None if apart <= TOLERANCE + noise else f"{apart:.2g} nats per token"  # NaN is a difference, too

