"""The storyworld grades what models write: which samples are stories of it, and which kind of fact broke in the others.

    python -m evaluation grade my_run another --num_samples 200

A model writes from nothing, at temperature 1, so that the samples are what it has learned. A sample that is no story of the world
is graded by the first sentence that differs from all that could be told there:
    who      a name, a kind of animal or a character other than what was told, or than the world knows; a wrong "he", too
    what     a thing, food, colour, game or deed other than that; a wrong "it" or "was" for it, too
    where    a place, a spot in it or a sight of it, a landmark, a land, a day of the week
    why      what a thing is for, what one likes to do or learns to do, the moral
    end      the story stops before its end, as where the context is full
    grammar  no plot for such a hero has such a sentence there, whatever the facts: words that the world does not know, or that it
             says elsewhere; also where a fact is wrong first, and the sentence then goes on as none does
Of two facts that contradict each other the later one is blamed, as that is where the reader notices: a cat that was a dog before
is "who" if it is called a cat, and "what" if it is only given cream.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from data.storyworld.world import score, sentence_spans, stories
from inference import generate, load_model
from runs.folder import Run, group_members
from tokenizer import normalise

WORLD = "storyworld"
KINDS = ("who", "what", "where", "why", "end", "grammar")
BROKEN = tuple(f"broken_{kind}" for kind in KINDS)
COLUMNS = ("accepted", "sentences_right", *BROKEN)  # of log_data.csv
CONFIDENCE = 0.95
BATCH_SIZE = 64  # samples that are written together


@dataclass(frozen=True)
class Grades:
    """What the world says of some samples."""

    samples: int
    sentences_right: float  # the share of a sample's sentences that stand before the first that broke: the mean over all samples
    broken: dict[str, int]  # for each of KINDS, in how many samples it was the first to break
    examples: dict[str, str]  # for the kinds that broke, what was wrong with the first such sample

    @property
    def accepted(self) -> int:
        """How many are stories of the world."""
        return self.samples - sum(self.broken.values())

    @property
    def columns(self) -> dict[str, float]:
        """The numbers of a row of the log, by COLUMNS: shares of the samples, but for sentences_right."""
        broken = (self.broken[kind] / self.samples for kind in KINDS)
        return dict(zip(COLUMNS, (self.accepted / self.samples, self.sentences_right, *broken), strict=True))


def interval(accepted: int, samples: int) -> tuple[float, float]:
    """The 95% interval of the share that the world would accept of endlessly many samples (Clopper and Pearson 1934)."""
    from scipy.stats import binomtest

    low, high = binomtest(accepted, samples).proportion_ci(CONFIDENCE, method="exact")
    return float(low), float(high)


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


def check_tokenizer(tokenizer):
    """Raises ValueError where a tokenizer changes the stories, so that the world would blame the model for it."""
    if not keeps_stories(tokenizer):
        raise ValueError(
            f"{tokenizer.name} does not keep the stories of the world as they are, so that none could be accepted: "
            "to have samples graded, take a tokenizer that keeps capitals and punctuation, such as bpe_tokenizer_1024"
        )


def grade_texts(texts: Iterable[str]) -> Grades:
    """What the world says of texts, at least one, each taken as it would be told."""
    broken, examples, right = Counter(dict.fromkeys(KINDS, 0)), {}, []
    for text in map(as_told, texts):
        found = score(text)
        if found.fact is None:
            right.append(1.0)
        else:
            broken[found.fact] += 1
            examples.setdefault(found.fact, found.error)
            right.append(found.index / max(1, len(sentence_spans(text))))
    return Grades(len(right), fmean(right), dict(broken), examples)


def write_samples(model, tokenizer, num_samples: int, temperature: float = 1.0, seed: int = 0) -> list[str]:
    """Stories that a model writes from nothing; story i is drawn with seed + i, whatever else is written with it."""
    written = []
    for first in range(0, num_samples, BATCH_SIZE):
        prompts = [""] * min(BATCH_SIZE, num_samples - first)
        written += generate(model, tokenizer, prompts, temperature=temperature, seed=seed + first)
    return written


def grade_model(model, tokenizer, num_samples: int, temperature: float = 1.0, seed: int = 0) -> Grades:
    """Let a model write, and the world grade it. Touches no random numbers but its own."""
    return grade_texts(write_samples(model, tokenizer, num_samples, temperature, seed))


def grade_run(name: str, num_samples: int = 200, temperature: float = 1.0, seed: int = 0) -> Grades:
    """The grades of the best weights of a run. Raises ValueError where it was not trained on storyworld."""
    data = Run(name).load("model.pth", {"data"})["data"]
    if not is_world(data):
        raise ValueError(f"the run {name!r} was trained on {data}: the world can only grade models of its own stories. "
                         f"Train one with --train.data {WORLD}")  # fmt: skip
    model, tokenizer = load_model(name)
    check_tokenizer(tokenizer)
    return grade_model(model, tokenizer, num_samples, temperature, seed)


def grade_table(grades: dict[str, Grades]):
    """A pandas DataFrame with a row for each run: the share that is accepted with its 95% interval, and what broke first."""
    import pandas as pd

    rows = {}
    for name, given in grades.items():
        low, high = interval(given.accepted, given.samples)
        columns = given.columns
        rows[name] = {"samples": given.samples, "accepted": columns.pop("accepted"), "95% from": low, "to": high, **columns}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename(columns=lambda column: column.removeprefix("broken_").replace("_", " "))


def main(words: list[str]):
    """The command line. A mistake ends the program with one line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation grade", description="The share of samples that are stories of the storyworld, and what broke."
    )
    parser.add_argument("names", nargs="+", help="runs, or groups of seeds, that were trained on storyworld")
    parser.add_argument("--num_samples", type=int, default=200, help="stories that each of them writes")
    parser.add_argument("--temperature", type=float, default=1.0, help="1 draws from what the model has learned")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other samples")
    arguments = parser.parse_args(words)
    options = arguments.num_samples, arguments.temperature, arguments.seed
    try:
        if arguments.num_samples < 1:
            raise ValueError("--num_samples must be at least 1")
        members = dict.fromkeys(member for name in arguments.names for member in group_members(name))
        grades = {name: grade_run(name, *options) for name in members}
        print("{:,} samples each, at temperature {:g}, seed {}; shares, with what broke first\n".format(*options))
        print(grade_table(grades).to_string(float_format="{:.3f}".format))
        for name, given in grades.items():
            print(f"\n{name}" + "".join(f"\n  {kind:8}{line}" for kind, line in sorted(given.examples.items())))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
