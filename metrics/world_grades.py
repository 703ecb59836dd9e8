"""Storyworld grades the samples of a model: which are valid stories, and which kind of error comes first in the others.

    python -m evaluation grade my_run another --num_samples 200

Samples are drawn without a prompt at temperature 1, so that they show what the model has learned. A sample that is not a story
of the world is graded by its first sentence that no story could have there:
    who      a wrong or unknown name, kind of animal or character, or a wrong pronoun for one
    what     a wrong thing, food, colour, game or action, or a wrong pronoun or verb form for one
    where    a wrong place, spot, sight, landmark, land or day of the week
    why      a wrong purpose of a thing, wrong like or lesson of a character, wrong moral
    end      the story stops early, for example because the context is full
    grammar  a sentence that no plot has there whatever the facts: unknown words, or known ones in the wrong place; also a wrong
             fact in a sentence that then continues as none does
Of two contradicting facts the later one is wrong: a dog that becomes a cat is "who" if it is called a cat, and "what" if it is
only given cream.
"""

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from config import stories_of
from data.cache import say
from data.storyworld.world import WORLDS, score, sentence_spans, stories
from inference import generate, load_model
from metrics.proportion import proportion_interval
from runs.folder import Run, group_members
from runs.tables import FrameTable, show
from tokenizer import normalise

KINDS = ("who", "what", "where", "why", "end", "grammar")
BROKEN = tuple(f"broken_{kind}" for kind in KINDS)
COLUMNS = ("accepted", "sentences_right", *BROKEN)  # of log_data.csv
BATCH_SIZE = 64  # samples generated at once


@dataclass(frozen=True)
class Grades:
    """Grades of a set of samples."""

    samples: int
    sentences_right: float  # share of sentences before the first error, averaged over samples
    broken: dict[str, int]  # for each of KINDS the number of samples whose first error is of that kind
    examples: dict[str, str]  # by kind, the error of the first such sample

    @property
    def accepted(self) -> int:
        """Number of samples that are stories of the world."""
        return self.samples - sum(self.broken.values())

    @property
    def columns(self) -> dict[str, float]:
        """The grades as shares, by COLUMNS, for a row of the log."""
        broken = (self.broken[kind] / self.samples for kind in KINDS)
        return dict(zip(COLUMNS, (self.accepted / self.samples, self.sentences_right, *broken), strict=True))


def is_world(data: str) -> bool:
    """Whether a source is one of the worlds, with or without :COUNT, or a DATA plugin that changes the rows of one."""
    return stories_of(data).split(":")[0] in WORLDS


def as_told(text: str) -> str:
    """Normalise a text to the style of the world: plain quotes and dashes, single spaces, no blank lines.

    Tokenizers differ in the spaces around words.
    """
    lines = (" ".join(line.split()) for line in normalise(text).split("\n"))
    return "\n".join(line for line in lines if line)


def keeps_stories(tokenizer, num_stories: int = 20) -> bool:
    """Whether stories of the world survive encoding and decoding, up to `as_told`."""
    texts = list(stories("train", num_stories))
    return all(as_told(tokenizer.decode(ids)) == text for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True))


def check_tokenizer(tokenizer):
    """Raise ValueError if a tokenizer changes the stories of the world, so that even a perfect model would be graded as wrong."""
    if not keeps_stories(tokenizer):
        raise ValueError(
            f"{tokenizer.name} does not keep the stories of the world as they are, so that none could be accepted: "
            "to have samples graded, take a tokenizer that keeps capitals and punctuation, such as bpe_tokenizer_1024"
        )


def grade_texts(texts: Iterable[str]) -> Grades:
    """Grade texts, at least one, after normalising them by `as_told`."""
    broken, examples, right = Counter(dict.fromkeys(KINDS, 0)), {}, []
    for text in map(as_told, texts):
        result = score(text)
        if result.fact is None:
            right.append(1.0)
        else:
            broken[result.fact] += 1
            examples.setdefault(result.fact, result.error)
            right.append(result.index / max(1, len(sentence_spans(text))))
    return Grades(len(right), fmean(right), dict(broken), examples)


def write_samples(model, tokenizer, num_samples: int, temperature: float = 1.0, seed: int = 0) -> list[str]:
    """Generate stories without a prompt; story i is drawn with seed + i, whatever the batch."""
    samples = []
    for start in range(0, num_samples, BATCH_SIZE):
        prompts = [""] * min(BATCH_SIZE, num_samples - start)
        samples += generate(model, tokenizer, prompts, temperature=temperature, seed=seed + start)
    return samples


def grade_model(model, tokenizer, num_samples: int, temperature: float = 1.0, seed: int = 0) -> Grades:
    """Grade samples of a model. Leaves the global random state alone."""
    return grade_texts(write_samples(model, tokenizer, num_samples, temperature, seed))


def grade_run(name: str, num_samples: int = 200, temperature: float = 1.0, seed: int = 0) -> Grades:
    """Grade the best weights of a run. Raises ValueError if it was not trained on storyworld."""
    data = Run(name).load("model.pth", {"data"})["data"]
    if not is_world(data):
        raise ValueError(f"the run {name!r} was trained on {data}: the world can only grade models of its own stories. "
                         f"Train one with --train.data storyworld")  # fmt: skip
    model, tokenizer = load_model(name)
    check_tokenizer(tokenizer)
    return grade_model(model, tokenizer, num_samples, temperature, seed)


def grade_table(grades: dict[str, Grades]):
    """Tabulate grades: a pandas DataFrame with a row per run, the acceptance rate with its 95% interval and the first errors."""
    import pandas as pd

    rows = {}
    for name, graded in grades.items():
        low, high = proportion_interval(graded.accepted, graded.samples)
        columns = graded.columns
        rows[name] = {"samples": graded.samples, "accepted": columns.pop("accepted"), "95% from": low, "to": high, **columns}
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table.rename(columns=lambda column: column.removeprefix("broken_").replace("_", " "))


def main(arguments):
    """Run the command `grade`."""
    options = arguments.num_samples, arguments.temperature, arguments.seed
    grades = {}
    for name in dict.fromkeys(itertools.chain(*map(group_members, arguments.names))):
        say(f"{name}: writing and grading {arguments.num_samples} samples")
        grades[name] = grade_run(name, *options)
    show("{:,} samples each, at temperature {:g}, seed {}; shares, by first error\n".format(*options),
         FrameTable(grade_table(grades), number=".3f"))  # fmt: skip
    for name, graded in grades.items():
        show(f"\n{name}", *(f"  {kind:8}{line}" for kind, line in sorted(graded.examples.items())))
