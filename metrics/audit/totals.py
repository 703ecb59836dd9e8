"""Checks of models with story_nats: the probabilities of all stories together do not exceed 1.

A total over all stories cannot be computed. What can: the total over the shortest stories, which is at most 1; for an exact loss
the total over all next tokens, which is 1; and the mean loss on stories drawn from a known distribution, which is at least the
entropy of that distribution (Gibbs' inequality), for a bound as well. That is a coarse test, as a model is not made for such
stories: on storyworld its own entropy is the finer one (memory.py).
"""

import math
from collections import Counter, defaultdict
from itertools import chain, pairwise

import torch
from torch import Tensor, nn

from metrics.audit.subject import Subject
from metrics.scores import scoring, story_nats

MAX_VOCABULARY = 4096  # tokens whose probabilities are summed
NUM_TOKENS = 16  # of a sum for an upper bound, which may take long
REPEATS = 8  # of an upper bound, which may be drawn
SIGMAS = 3.0  # standard errors by which the mean of these is raised before it is judged
CLOSE = 0.01  # difference of a total from 1 that is rounding
NUM_STARTS = 3  # starts of stories whose next tokens are summed
LONGEST_START = 32  # tokens
NUM_COUNTED = 300  # stories whose pairs of tokens are counted
NUM_DRAWN = 64  # stories of the known distribution
LONGEST_STORY = 32  # tokens
SMOOTHING = 0.05  # how often each pair of tokens is counted in addition
ALPHA = 1e-4  # chance that an honest model fails on the known distribution


def whole_nats(model: nn.Module, stories: list[list[int]], seed: int = 0) -> Tensor:
    """Nats of each story.  (stories,)"""
    with scoring(model, seed):
        return story_nats(model, stories, seed=seed)


def probabilities(subject: Subject, stories: list[list[int]]) -> Tensor:
    """Probabilities of stories; those of an upper bound are as low as the scatter of its draws allows.  (stories,)"""
    model = subject.copy()
    if not subject.model.is_bound:
        return (-whole_nats(model, stories)).exp()
    draws = torch.empty(REPEATS, len(stories), dtype=torch.float64)
    for seed, row in enumerate(draws):
        row[:] = whole_nats(model, stories, seed)
    mean = draws.mean(dim=0)
    usable = draws[:, mean.isfinite()]
    scatter = ((usable - usable.mean(dim=0)).square().sum() / usable.square().sum().clamp(min=1e-9)).sqrt().item()
    return (-mean * (1 + SIGMAS * scatter / REPEATS**0.5)).exp()


def likely_tokens(subject: Subject, most: int) -> list[int]:
    """All tokens of the vocabulary, or of a larger one those that start the stories and are frequent in them; eos comes first."""
    first = Counter(ids[1] for ids in subject.tokenised).most_common(most // 2)
    anywhere = Counter(token for ids in subject.tokenised for token in ids[1:]).most_common()
    others = range(subject.model.vocab_size) if subject.model.vocab_size <= most else []
    tokens = dict.fromkeys([subject.tokenizer.eos_id, *(token for token, _ in first + anywhere), *others])
    return list(tokens)[: max(most, len(others))]


def check_shortest(subject: Subject) -> tuple[str, str | None]:
    """The probabilities of the stories of no, one and two tokens: the length of a story is not free."""
    bos, eos = subject.tokenizer.bos_id, subject.tokenizer.eos_id
    tokens = likely_tokens(subject, NUM_TOKENS if subject.model.is_bound else MAX_VOCABULARY)[1:]
    stories = [[bos, eos], *([bos, token, eos] for token in tokens)]
    stories += [[bos, one, other, eos] for one in tokens[:NUM_TOKENS] for other in tokens[:NUM_TOKENS]]
    total = probabilities(subject, stories).sum().item()
    how = f"the {len(stories):,} shortest stories: probabilities of {total:.4g} in all"
    if total <= 1 + CLOSE:
        return how, None
    return how, f"that is more than 1: the probabilities of {subject.name} are not normalised, or it knows the length of a story"


def check_next(subject: Subject) -> tuple[str, str | None]:
    """The probabilities of all next tokens after bos and after the starts of stories; only an exact loss has them."""
    if subject.model.is_bound:
        return "an upper bound has no probabilities of next tokens to sum", None
    model, totals = subject.copy(), []
    tokens = likely_tokens(subject, MAX_VOCABULARY)
    for number, ids in enumerate(subject.tokenised[:NUM_STARTS]):
        start = ids[: subject.random.randint(2, LONGEST_START)][: len(ids) - 1] if number else ids[:1]
        nats = whole_nats(model, [start, *([*start, token] for token in tokens)])
        totals.append((nats[0] - nats[1:]).exp().sum().item())
    how = f"{len(tokens):,} next tokens after {len(totals)} starts: {min(totals):.3f} to {max(totals):.3f} in all"
    if not max(totals) <= 1 + CLOSE:  # NaN is a problem, too
        return how, f"that is more than 1: the probabilities of {subject.name} are not normalised, or it does not score eos"
    if min(totals) < 1 - CLOSE and len(tokens) == subject.model.vocab_size:
        return how, "that is less than 1: set is_bound = True if the losses are upper bounds"
    return how, None


def check_source(subject: Subject) -> tuple[str, str | None]:
    """Stories drawn from pairs of tokens: no model is better on them than what they are drawn from."""
    from scipy.stats import ttest_1samp

    source = Pairs(subject)
    stories = [source.draw() for _ in range(NUM_DRAWN)]
    entropy = torch.tensor([source.nats(ids) for ids in stories], dtype=torch.float64)
    excess = (whole_nats(subject.copy(), stories) - entropy) / torch.tensor([len(ids) - 1 for ids in stories])
    how = f"{NUM_DRAWN} stories drawn from a bigram model: {excess.mean():+.3f} nats per token over its entropy"
    if ttest_1samp(excess.numpy(), 0, alternative="less").pvalue < ALPHA:
        return how, f"that is below the entropy, which no probabilities can be: those of {subject.name} are not normalised"
    return how, None


class Pairs:
    """A known distribution of stories: a bigram model of the tokens of a sample, smoothed, with stories of limited length."""

    def __init__(self, subject: Subject):
        self.random, self.bos, self.eos = subject.random, subject.tokenizer.bos_id, subject.tokenizer.eos_id
        self.longest = min(LONGEST_STORY, subject.model.config.max_seq_len)
        encoded = subject.tokenizer.encode_batch(subject.stories[:NUM_COUNTED], bos=True, eos=True)
        counts: dict[int, Counter] = defaultdict(Counter)
        for one, other in chain.from_iterable(map(pairwise, encoded)):
            counts[one][other] += 1
        self.tokens = sorted({token for ids in encoded for token in ids[1:]})
        self.weights = {one: [counts[one][other] + SMOOTHING for other in self.tokens] for one in [self.bos, *self.tokens]}
        self.position = {token: position for position, token in enumerate(self.tokens)}

    def draw(self) -> list[int]:
        """A story, from bos to eos, which comes at the longest length at the latest."""
        ids = [self.bos]
        while len(ids) < self.longest and (len(ids) == 1 or ids[-1] != self.eos):
            ids += self.random.choices(self.tokens, self.weights[ids[-1]])
        return ids if ids[-1] == self.eos else [*ids, self.eos]

    def nats(self, ids: list[int]) -> float:
        """The exact nats of a story that was drawn."""
        scored = ids[1 : self.longest]
        return sum(math.log(sum(self.weights[one]) / self.weights[one][self.position[other]])
                   for one, other in zip(ids, scored, strict=False))  # fmt: skip


TOTAL_CHECKS = {"shortest": check_shortest, "next": check_next, "source": check_source}
