"""The exact entropy of storyworld, a lower bound of the loss; a loss is best read as its excess over it.

The world knows the probability of each of its stories, so the bound is exact for the very stories that a run is scored on: it is
the loss of a perfect model of the world. In the long run no model can be better.
"""

import functools
import math
from collections import Counter
from dataclasses import dataclass

from config import stories_of
from data.cache import say
from data.dataset import choose_validation, fingerprint
from data.sources import open_source
from data.storyworld.world import code_length
from inference import load_run_tokenizer
from metrics.world_grades import is_world, keeps_stories
from runs.folder import Run


@dataclass(frozen=True)
class Floor:
    """Entropy of stories of the world, end of story included."""

    nats_per_token: float
    bits_per_byte: float


def world_floor(name: str) -> Floor | None:
    """Entropy of the validation stories that a run was scored on during training; None for other data than storyworld.

    Also None, with a printed reason, if the world has changed since or the tokenizer does not preserve its stories.
    """
    run = Run(name)
    source = run.train_config.data
    saved = run.load("model.pth", {"data", "validation_stories", "validation_fingerprint"})
    if not is_world(saved["data"]):
        return None
    stories = validation_of(stories_of(saved["data"] if source == "auto" else source))[: saved["validation_stories"]]
    if fingerprint(stories) != saved["validation_fingerprint"]:
        say(f"the storyworld has changed since the run {name!r} was trained: the entropy of its stories is not known any more")
        return None
    return floor_of(stories, load_run_tokenizer(name), saved["data"])


def floor_of(stories: list[str], tokenizer, data: str) -> Floor | None:
    """Entropy of stories of a world; None, with a printed reason, if the tokenizer does not preserve them.

    Raises ValueError for a story that is not of the world.
    """
    if not keeps_stories(tokenizer):
        say(f"{tokenizer.name} does not keep the stories of the world as they are: their entropy in its tokens is not known")
        return None
    nats = sum(nats_of(story, stories_of(data).split(":")[0]) for story in stories)
    num_tokens = sum(map(len, tokenizer.encode_batch(stories, eos=True)))
    return Floor(nats / num_tokens, nats / math.log(2) / sum(len(story.encode()) for story in stories))


@functools.cache
def nats_of(story: str, world: str) -> float:
    return code_length([story], world)


@functools.cache
def validation_of(source: str) -> list[str]:
    """The validation stories of a world, which take two seconds to generate."""
    return choose_validation(open_source(source), Counter())
