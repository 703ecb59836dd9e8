"""Checks of models with logits: each token is predicted from the tokens before it in its story, and from nothing else.

B batch, T time, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from metrics.audit.subject import Subject, differ, token_nats
from metrics.scores import predictions, scoring

NUM_PREFIXES = 32


def sums(nats: list[Tensor]) -> Tensor:
    """Nats per token of each story.  (stories,)"""
    return torch.stack([story.sum() / len(story) for story in nats])


def check_logits(subject: Subject) -> tuple[str, str | None]:
    """Logits of the right shape have a softmax."""
    model, wrong = subject.copy(), 0
    with scoring(model):
        for _, logits, _ in predictions(model, subject.tokenizer, subject.tokenised):
            highest = logits.max(dim=-1).values  # NaN if one of them is
            wrong += int((~highest.isfinite()).sum())
    how = f"{subject.num_tokens:,} positions: one finite logit at least, no NaN, no +inf, for each of {model.vocab_size:,} tokens"
    return how, f"{wrong:,} positions have logits without a softmax: give finite numbers" if wrong else None


def check_future(subject: Subject) -> tuple[str, str | None]:
    """Other tokens from a random place on change nothing before it."""
    others = [token for ids in subject.tokenised for token in ids[1:-1]]

    def change(ids: list[int], cut: int) -> list[int]:
        return ids[:cut] + subject.random.choices(others, k=len(ids) - cut)

    problem = compare_prefixes(subject, change)
    how = f"{len(subject.tokenised)} stories with other tokens from a random place on: what is before keeps its probability"
    return how, problem and f"{subject.name} sees the future: later tokens change the probability of earlier ones{problem}"


def check_length(subject: Subject) -> tuple[str, str | None]:
    """A story that is cut or that goes on has the same probabilities so far."""

    def cut(ids: list[int], end: int) -> list[int]:
        return [*ids[:end], subject.tokenizer.eos_id]

    problem = compare_prefixes(subject, cut)
    how = f"{len(subject.tokenised)} stories cut at a random place: what is before keeps its probability"
    cause = f"{subject.name} sees how long a story or its batch is, or the padding after it{problem}"
    return how, problem and cause


def compare_prefixes(subject: Subject, change: Callable[[list[int], int], list[int]]) -> str | None:
    """Change stories from a random place on; how far the probabilities of the tokens up to there are off, or None."""
    cuts = [subject.random.randint(1, len(ids) - 1) for ids in subject.tokenised]
    changed = [change(ids, cut) for ids, cut in zip(subject.tokenised, cuts, strict=True)]
    prefixes = [ids[: cut + 1] for ids, cut in zip(subject.tokenised, cuts, strict=True)]
    expected = token_nats(subject, subject.copy(), subject.tokenised, prefixes)
    ours = token_nats(subject, subject.copy(), changed, prefixes)
    last = [torch.stack([story[-1] for story in nats]) for nats in (ours, expected)]
    apart = differ(*last, subject.draws) or differ(sums(ours), sums(expected), subject.draws)
    return f" (off by {apart}). Predict each token from those before it alone" if apart else None


def check_prefix(subject: Subject) -> tuple[str, str | None]:
    """The score of a token is that of a new copy of the model which is shown the tokens before it, and nothing else."""
    chosen = [(story, subject.random.randint(1, len(ids) - 1)) for story, ids in enumerate(subject.tokenised)]
    chosen += [(story, len(subject.tokenised[story]) - 1) for story, _ in chosen]
    chosen = subject.random.sample(chosen, min(NUM_PREFIXES, len(chosen)))
    together = token_nats(subject, subject.copy(), subject.tokenised)
    expected = torch.stack([together[story][end - 1] for story, end in chosen])
    ours = torch.stack([last_nats(subject, subject.tokenised[story][: end + 1]) for story, end in chosen])
    problem = differ(ours, expected, subject.draws)
    how = f"{len(chosen)} tokens, ends of stories among them, each by a new copy that is shown the tokens before it alone"
    cause = f"{subject.name} scores tokens otherwise if it is shown only those before them (off by {problem})"
    return how, problem and cause


def last_nats(subject: Subject, ids: list[int]) -> Tensor:
    """Nats of the last of some tokens, by a new copy of the model that is given only those before it."""
    return token_nats(subject, subject.copy(), [[*ids[:-1], subject.tokenizer.eos_id]], [ids])[0][-1]


TOKEN_CHECKS = {"logits": check_logits, "future": check_future, "length": check_length, "prefix": check_prefix}
