"""Check whether a model knows the validation stories by heart, or beats the entropy of the storyworld.

Two things give a memory away: validation stories are more probable than others of their kind, and they lose more by a changed
word, as the memory no longer finds them. Both are tested against reference stories: new ones of the same storyworld, or else
stories of the training set, which an honest model knows better than the validation stories, if anything. The chance of a false
alarm is ALPHA in all, by one-sided Welch tests.
"""

import itertools
import random
from collections import Counter
from zlib import crc32

import torch

from config import stories_of
from data.dataset import story_hash
from data.sources import Source
from data.storyworld.world import VALIDATION_SHARE, WORLDS, code_length, tell
from metrics.audit.subject import Subject
from metrics.scores import evaluate, next_token_scores, scores_itself, scoring, story_nats

ALPHA = 0.001  # chance that an honest model fails
NUM_TESTS = 3
NUM_STORIES = 100  # at least, of either kind
LEAST_STORIES = 20
MARGIN = 0.25  # share by which a validation split of its own may be easier than the training stories


def reference_stories(source: Source, validation: list[str], count: int, seed: str) -> list[str]:
    """New stories of a storyworld, or else the first stories of the training set. None of them is a validation story.

    seed: of the new stories, such as a digest of the weights: a model cannot have learned what follows from its weights.
    """
    held_out = set(map(story_hash, validation))
    if (world := stories_of(source.name)) in WORLDS:
        generator = random.Random(f"{world} {seed}")
        texts = (tell(generator, world)[0] for _ in itertools.count())
        stories = (text for text in texts if crc32(text.encode()) % VALIDATION_SHARE == 0)  # as those for validation
        stories = itertools.islice(stories, 50 * count)  # of a small world, few are new
    else:
        stories = source.stories("train", Counter())
    return list(itertools.islice((story for story in stories if story_hash(story) not in held_out), count))


def check_memory(subject: Subject, reference: list[str], world: str | None, same_source: bool) -> tuple[str, str | None]:
    """Validation stories are no better than reference stories, and lose no more by a changed word."""
    from scipy.stats import ttest_1samp, ttest_ind

    most = max(NUM_STORIES, len(subject.sample))
    stories, reference = (subject.random.sample(texts, min(most, len(texts))) for texts in (subject.stories, reference))
    known = "new stories of the world" if world else "training stories"
    if min(len(stories), len(reference)) < LEAST_STORIES:
        return f"not tested: {len(stories)} validation stories and {len(reference)} {known} are too few", None
    how = f"{len(stories)} validation stories and {len(reference)} {known}, as they are and with a changed word"
    (level, rise), (other_level, other_rise) = (level_and_rise(subject, texts, world) for texts in (stories, reference))
    alpha = ALPHA / NUM_TESTS
    allowed = 0.0 if world or same_source else MARGIN * other_level.mean()
    if ttest_ind(level, other_level - allowed, equal_var=False, alternative="less").pvalue < alpha:
        unit = "nats per story over the entropy" if world else "bits per byte"
        return how, (f"{subject.name} scores validation stories better than {known} ({level.mean():.3f} to "
                     f"{other_level.mean():.3f} {unit}): it knows them by heart")  # fmt: skip
    if ttest_ind(rise, other_rise, equal_var=False, alternative="greater").pvalue < alpha:
        return how, (f"a changed word costs {rise.mean():.1f} nats in validation stories and {other_rise.mean():.1f} in {known}: "
                     f"{subject.name} knows validation stories by heart")  # fmt: skip
    if world and ttest_1samp(other_level, 0, alternative="less").pvalue < alpha:
        return how, (f"{subject.name} is {-other_level.mean():.1f} nats per story better than the world itself, which no model "
                     "can be: its probabilities are not normalised, or it sees what it predicts")  # fmt: skip
    return how, None


def level_and_rise(subject: Subject, stories: list[str], world: str | None):
    """Of each story: bits per byte, or the excess over the world's entropy in nats; and what a changed word costs, in nats."""
    score = evaluate(subject.copy(), subject.tokenizer, stories)
    level = score.story_nats / score.story_bytes / torch.tensor(2.0).log()
    if world:
        level = score.story_nats - torch.tensor([code_length([story], world) for story in stories], dtype=torch.float64)
    changed = subject.tokenizer.encode_batch(stories, bos=True, eos=True)
    for ids, other in zip(changed, [*changed[1:], changed[0]], strict=True):
        position = min(len(ids), len(other)) // 8 + 1
        ids[position] = other[-2 - position] if len(other) > position + 2 else ids[position]
    return level.numpy(), (nats_of(subject, changed) - score.story_nats).numpy()


def nats_of(subject: Subject, tokenised: list[list[int]]):
    model = subject.copy()
    with scoring(model):
        if scores_itself(model):
            return story_nats(model, tokenised)
        return next_token_scores(model, subject.tokenizer, tokenised, 32, ())[0]
