"""The storyworld grades what models write: which samples are stories of it, and which kind of fact broke in the others.

    python evaluation.py grade my_run another --num_samples 200

A model writes from nothing, at temperature 1, so that the samples are what it has learned. A sample that differs from every story
of the world is graded by the first sentence in which it does:
    who      a name, a kind of animal or a character other than what was told, or than the world knows; a wrong "he", too
    what     a thing, food, colour, game or deed other than that; a wrong "it" or "was" for it, too
    where    a place, a spot in it or a sight of it, a landmark, a land, a day of the week
    why      what a thing is for, what one likes to do or learns to do, the moral
    end      it stops before its end, or the context is full
    grammar  the world has no such sentence at this point of any plot: words it does not know, or that it says elsewhere
Of two facts that contradict each other the later one is blamed, as that is where the reader notices.
"""

from storyworld import stories
from tokenizer import normalise

WORLD = "storyworld"


def is_world(data: str) -> bool:
    """Whether a source is the storyworld, by its name: storyworld or storyworld:COUNT."""
    return data.split(":")[0] == WORLD


def as_told(text: str) -> str:
    """A text in the characters of the world: plain quotes and dashes, one space between words, none at the ends of lines.

    Tokenizers differ in what they put around words; the world tells its stories in one way.
    """
    lines = (" ".join(line.split()) for line in normalise(text).split("\n"))
    return "\n".join(line for line in lines if line)


def keeps_stories(tokenizer, num_stories: int = 20) -> bool:
    """Whether stories of the world are the same after encoding and decoding, up to `as_told`."""
    told = list(stories("train", num_stories))
    return all(as_told(tokenizer.decode(ids)) == story for story, ids in zip(told, tokenizer.encode_batch(told), strict=True))
