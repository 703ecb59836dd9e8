"""Checks of any model, by calls of `evaluate`: a score depends on its story alone, and scoring leaves no trace."""

import hashlib

import torch
from torch import Tensor, nn

from metrics.audit.subject import Subject, differ
from metrics.scores import evaluate

BATCH_SIZES = (3, 32)


def story_losses(subject: Subject, model: nn.Module, stories: list[str], batch_size: int = 32) -> Tensor:
    """Nats per token of each story.  (stories,)"""
    score = evaluate(model, subject.tokenizer, stories, batch_size)
    return score.story_nats / score.story_tokens


def check_rows(subject: Subject) -> tuple[str, str | None]:
    """A story has the same score alone, and in batches of any size with any other stories."""
    alone = story_losses(subject, subject.copy(), subject.sample, batch_size=1)
    together = [story_losses(subject, subject.copy(), subject.sample, batch_size) for batch_size in BATCH_SIZES]
    apart = next(filter(None, (differ(losses, alone, subject.draws) for losses in together)), None)
    how = f"{len(subject.sample)} stories alone, and in batches of {BATCH_SIZES[0]} and {BATCH_SIZES[1]}"
    cause = f"{subject.name} scores a story otherwise in a batch than alone (off by {apart}): no row may depend on another"
    return how, apart and cause


def check_order(subject: Subject) -> tuple[str, str | None]:
    """Stories have the same score again, and in another order."""
    stories = sorted(subject.sample, key=len)
    model, other = subject.copy(), subject.copy()
    first, again = (torch.cat([story_losses(subject, model, [story]) for story in stories]) for _ in range(2))
    reverse = torch.cat([story_losses(subject, other, [story]) for story in reversed(stories)]).flip(0)
    apart = differ(again, first, subject.draws) or differ(reverse, first, subject.draws)
    how = f"{len(stories)} stories one by one, again, and in the reverse order"
    cause = f"{subject.name} scores a story otherwise after others (off by {apart}): keep nothing from call to call in eval"
    return how, apart and cause


def check_weights(subject: Subject) -> tuple[str, str | None]:
    """Scoring changes no parameter and no buffer."""
    model = subject.copy()
    before = fingerprint(model)
    evaluate(model, subject.tokenizer, subject.sample)
    after = fingerprint(model)
    changed = [name for name in before | after if before.get(name) != after.get(name)]
    how = f"{len(before)} parameters and buffers before and after scoring"
    return how, f"scoring changes {', '.join(changed[:3])}: learn and count only where self.training" if changed else None


def fingerprint(model: nn.Module) -> dict[str, str]:
    """A digest of every parameter and buffer of a model by name."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
            for name, tensor in tensors if tensor.numel()}  # fmt: skip


CALL_CHECKS = {"rows": check_rows, "order": check_order, "weights": check_weights}
