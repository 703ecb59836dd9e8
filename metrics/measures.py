"""Loss by position and word class, calibration, and repetition.

    python -m evaluation measures my_run another

B batch, T time, V vocabulary.
"""

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from data.cache import say
from inference import generate, load_model
from metrics.scores import predictions, scoring
from metrics.story_losses import label, validation_stories
from metrics.world_floor import floor_of
from metrics.world_grades import is_world
from model import GPT, IGNORE
from runs.folder import Run
from runs.tables import FrameTable, show

FUNCTION = """
a an the this that these those and or but so if because while when then than as of to in on at by for from with into out up
down over under about after before behind through off again not no nor i you he she it we they me him her us them my your his
its our their mine yours hers ours theirs who whom whose which what where why how is am are was were be been being do does
did done have has had having will would can could shall should may might must there here very too just also all some any each
every both either neither one's let's don't didn't doesn't can't couldn't won't wouldn't isn't aren't wasn't weren't it's i'm
you're he's she's we're they're that's i'll you'll he'll she'll we'll they'll
"""
NUMBERS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million first second third
"""
FUNCTION_WORDS, NUMBER_WORDS = frozenset(FUNCTION.split()), frozenset(NUMBERS.split())
PIECES = re.compile(r"\w+(?:['’]\w+)*|\s+|[^\w\s]")
SENTENCE_ENDS = frozenset(".!?\"“”:")


@dataclass(frozen=True)
class TokenScores:
    """Scores of every predicted token, in no particular order: arrays (tokens,)."""

    story: np.ndarray  # index of its story
    position: np.ndarray  # 1 for the first token after bos
    nats: np.ndarray
    confidence: np.ndarray  # probability of the most likely token
    correct: np.ndarray  # whether that is the true token


def token_scores(model: GPT, tokenizer, stories: list[str]) -> TokenScores:
    """Score every token of whole stories, with the windows of `evaluate`. Mode and random state stay as they are.

    Raises ValueError for a model without logits.
    """
    columns = []
    with scoring(model):
        for batch, logits, targets in predictions(model, tokenizer, tokenizer.encode_batch(stories, bos=True, eos=True)):
            log_probs = logits.double().log_softmax(dim=-1)  # (B, T, V)
            best, prediction = log_probs.max(dim=-1)
            nats = -log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            story = torch.tensor([piece.story for piece in batch], device=targets.device)[:, None].expand_as(targets)
            start = torch.tensor([piece.start for piece in batch], device=targets.device)[:, None]
            position = start + 1 + torch.arange(targets.shape[1], device=targets.device)
            scored = targets != IGNORE
            columns.append([column[scored].cpu() for column in (story, position, nats, best.exp(), prediction == targets)])
    return TokenScores(*(torch.cat(column).numpy() for column in zip(*columns, strict=True)))


def loss_by_position(scores: TokenScores) -> pd.DataFrame:
    """Nats per token at positions 1, 2 to 3, 4 to 7, and so on: how much longer context helps."""
    octave = np.floor(np.log2(scores.position)).astype(int)
    rows = {
        f"{2**power} to {2 ** (power + 1) - 1}": {"tokens": (octave == power).sum(), "loss": scores.nats[octave == power].mean()}
        for power in np.unique(octave)
    }
    return pd.DataFrame.from_dict(rows, orient="index")


def word_classes(text: str, names: frozenset[str]) -> list[tuple[str, str]]:
    """Split a text into pieces, each with its class: function, content, name, number, punctuation or space."""
    pieces = []
    for piece in PIECES.findall(text):
        word = piece.lower().replace("’", "'")
        if piece.isspace():
            pieces.append((piece, "space"))
        elif not piece[0].isalnum() and piece[0] != "_":
            pieces.append((piece, "punctuation"))
        elif word[0].isdigit() or word in NUMBER_WORDS:
            pieces.append((piece, "number"))
        elif word in FUNCTION_WORDS:
            pieces.append((piece, "function"))
        else:
            pieces.append((piece, "name" if re.split("['’]", piece)[0] in names else "content"))
    return pieces


def names_in(stories: list[str]) -> frozenset[str]:
    """Collect the words that are capitalised within a sentence."""
    names = set()
    for story in stories:
        inside = False
        for piece in PIECES.findall(story):
            if piece.isspace():
                inside = inside and "\n" not in piece
            elif piece in SENTENCE_ENDS:
                inside = False
            else:
                if inside and piece[0].isupper() and piece.lower() not in FUNCTION_WORDS:
                    names.add(re.split("['’]", piece)[0])
                inside = inside or piece[0].isalnum()
    return frozenset(names)


def token_classes(tokenizer, text: str, names: frozenset[str]) -> list[str]:
    """Class of each token of a story after bos: that of the word that holds its first letter, "end" for eos."""
    tokens = tokenizer.tokens(text)
    by_letter = [kind for piece, kind in word_classes("".join(tokens), names) for _ in piece]
    classes, at = [], 0
    for token in tokens:
        letter = at + len(token) - len(token.lstrip())
        at += len(token)
        classes.append(by_letter[letter] if letter < at else "space")
    return [*classes, "end"]


def loss_by_word_class(scores: TokenScores, tokenizer, stories: list[str]) -> pd.DataFrame:
    """Nats per token and share of the total loss, by word class."""
    names = names_in(stories)
    classes = [token_classes(tokenizer, story, names) for story in stories]
    kinds = [classes[story][position - 1] for story, position in zip(scores.story, scores.position, strict=True)]
    frame = pd.DataFrame({"class": kinds, "nats": scores.nats}).groupby("class")["nats"].agg(["size", "mean", "sum"])
    frame["share of loss"] = frame.pop("sum") / scores.nats.sum()
    return frame.rename(columns={"size": "tokens", "mean": "loss"})


def calibration(scores: TokenScores, bins: int = 15) -> tuple[float, pd.DataFrame]:
    """Expected calibration error of the most likely token, and a table by bin of confidence (arXiv 1706.04599, eq. 3).

    The error is 0 if 70% of all predictions with a confidence of 70% are right, and likewise for any other confidence.
    """
    number = np.minimum((scores.confidence * bins).astype(int), bins - 1)
    frame = pd.DataFrame({"bin": number, "confidence": scores.confidence, "accuracy": scores.correct})
    table = frame.groupby("bin").agg(tokens=("bin", "size"), confidence=("confidence", "mean"), accuracy=("accuracy", "mean"))
    error = ((table["confidence"] - table["accuracy"]).abs() * table["tokens"]).sum() / len(frame)
    return float(error), table


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+(?:['’]\w+)*", text.lower())
    return list(zip(*(words[at:] for at in range(n)), strict=False))


def distinct(texts: list[str], n: int) -> float:
    """Share of distinct n-grams of words over all texts (distinct-n, arXiv 1510.03055, section 5.3). NaN if there are none."""
    grams = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else float("nan")


def repetition(texts: list[str], n: int = 4) -> float:
    """Share of n-grams of words that repeat an earlier one of the same text. NaN if there are none."""
    counts = [Counter(ngrams(text, n)) for text in texts]
    total = sum(map(Counter.total, counts))
    return 1 - sum(map(len, counts)) / total if total else float("nan")


def main(arguments):
    """Run the command `measures`."""
    for name in arguments.names:
        model, tokenizer = load_model(name)
        data, stories = validation_stories(Run(name).data, arguments.data_if_missing, model.config.plugins)
        data, stories = label(Run(name), data, stories), stories[: arguments.num_stories]
        say(f"{name}: scoring {len(stories)} stories and writing {arguments.num_samples}")
        scores = token_scores(model, tokenizer, stories)
        error, _ = calibration(scores)
        samples = generate(model, tokenizer, [""] * arguments.num_samples)
        show(f"\n{name} on {len(stories)} stories of {data}\n", FrameTable(loss_by_position(scores), ",.3f"), "",
             FrameTable(loss_by_word_class(scores, tokenizer, stories), ",.3f"), f"\ncalibration error {error:.4f}",
             f"{len(samples)} samples: {repetition(samples):.1%} of 4-grams repeated, "
             + ", ".join(f"distinct-{n} {distinct(samples, n):.3f}" for n in (1, 2, 3)))  # fmt: skip
        if is_world(data) and (floor := floor_of(stories, tokenizer, data)):
            loss, num_bytes = scores.nats.mean(), sum(len(story.encode()) for story in stories)
            bits = scores.nats.sum() / num_bytes / math.log(2)
            show(f"loss {loss:.4f} nats per token, {loss - floor.nats_per_token:.4f} over the entropy of the world, "
                 f"{floor.nats_per_token:.4f}; {bits:.4f} bits per byte, {bits - floor.bits_per_byte:.4f} over "
                 f"{floor.bits_per_byte:.4f}")  # fmt: skip
