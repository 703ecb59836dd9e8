"""What a judge is to be asked about stories, and what its answers say: grades, preferences, and how far it can be trusted.

Stories are numbered: story n of each model goes on from prompt n % len(prompts), so that models are compared prompt by prompt.
All intervals are of 95%, over prompts, of which several stories count as one.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from evaluation.judge.prompts import CRITERIA, WORDS, Prompt, comparison_question, grade_question

FOR_THE_FIRST = {"1": 1, "2": -1, "tie": 0}  # what an answer says for the story that stood first


@dataclass(frozen=True)
class Grading:
    """The judge grades a story of one model; again: for the second time, to see whether it agrees with itself."""

    name: str
    number: int
    again: bool = False


@dataclass(frozen=True)
class Comparison:
    """The judge reads a story of each of two models, in this order, and says which one is better."""

    first: str
    second: str
    number: int
    again: bool = False


@dataclass(frozen=True)
class Estimate:
    """A mean or a share of so many, and its 95% interval; nan where there is none."""

    value: float
    low: float
    high: float
    count: int

    def __format__(self, style: str) -> str:
        if math.isnan(self.value):
            return "–"
        if math.isnan(self.low):
            return f"{self.value:{style}}"
        return f"{self.value:{style}} ({self.low:{style}} to {self.high:{style}})"


@dataclass(frozen=True)
class Preference:
    """On how many prompts the first of two models was preferred, the second, neither; share: of the first among the decided."""

    first: str
    second: str
    won: int
    lost: int
    tied: int
    share: Estimate
    p: float  # of the sign test, by Bonferroni for all pairs of models


def questions(prompts: list[Prompt], stories: dict[str, list[str]], repeat: float, seed: int):
    """All that is to be asked: {Grading or Comparison: (question, seed)}.

    stories: what each model has written behind the prompts.  repeat: the share of stories that are judged a second time, with
    another seed. Two stories that are the same need no judge. Every other pair is shown in both orders.
    """
    count = len(next(iter(stories.values())))
    twice = set(random.Random(seed).sample(range(count), math.ceil(repeat * count)))
    asked = {}
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        for again in (False, True)[: 1 + (number in twice)]:
            for name, told in stories.items():
                asked[Grading(name, number, again)] = grade_question(prompt, told[number]), seed + again
            for pair in combinations(stories, 2):
                for first, second in (pair, pair[::-1]):
                    if stories[first][number] != stories[second][number]:
                        question = comparison_question(prompt, stories[first][number], stories[second][number])
                        asked[Comparison(first, second, number, again)] = question, seed + again
    return asked


class Judgement:
    """What the answers to `questions` say. Answers may be missing: what they would have told is left out, and counted nowhere."""

    def __init__(self, prompts: list[Prompt], stories: dict[str, list[str]], answers: dict):
        self.prompts, self.stories, self.answers = prompts, stories, answers
        self.names = list(stories)
        self.numbers = range(len(stories[self.names[0]]))

    def grades(self, criterion: str) -> np.ndarray:
        """(models, prompts): the mean grade of a model's stories of each prompt, nan where there is none."""
        grades = [[[] for _ in self.prompts] for _ in self.names]
        for asked, answer in self.answers.items():
            if isinstance(asked, Grading) and not asked.again and criterion in answer:
                grades[self.names.index(asked.name)][asked.number % len(self.prompts)].append(answer[criterion])
        return means(grades)

    def words_used(self) -> np.ndarray:
        """(models, prompts): the share of the demanded words that the stories hold, found by search and not by the judge."""
        shares = [[[] for _ in self.prompts] for _ in self.names]
        for model, name in enumerate(self.names):
            for number in self.numbers:
                place = number % len(self.prompts)
                if self.prompts[place].words:
                    shares[model][place].append(self.prompts[place].share_of_words(self.stories[name][number]))
        return means(shares)

    def table(self):
        """A pandas DataFrame of text: a row for each criterion, a column for each model and for the difference of each pair."""
        import pandas as pd

        rows = {criterion: self.grades(criterion) for criterion in (*CRITERIA, WORDS)}
        rows["all four"] = np.mean([rows[criterion] for criterion in CRITERIA], axis=0)
        rows["share of words used"] = self.words_used()
        rows = {label: values for label, values in rows.items() if not np.isnan(values).all()}
        columns = {name: [f"{mean_of(values[model]):.2f}" for values in rows.values()] for model, name in enumerate(self.names)}
        for (one, first), (other, second) in combinations(enumerate(self.names), 2):
            columns[f"{first} - {second}"] = [f"{mean_of(values[one] - values[other]):+.2f}" for values in rows.values()]
        return pd.DataFrame(columns, index=list(rows))

    def verdict(self, first: str, second: str, number: int, again: bool = False) -> int | None:
        """1 where the first model's story is better in both orders, -1 where the second's, else 0; None without an answer."""
        if self.stories[first][number] == self.stories[second][number]:
            return 0
        answers = [self.answers.get(Comparison(*order, number, again)) for order in ((first, second), (second, first))]
        if None in answers:
            return None
        forward, backward = (FOR_THE_FIRST[answer["better"]] for answer in answers)
        return forward if forward == -backward else 0

    def preference(self, first: str, second: str) -> Preference | None:
        """Which of two models the judge prefers; None where it compared none of their stories.

        A prompt goes to the model that won more of its stories. The share of the decided prompts has Wilson's interval, and the
        sign test's p-value.
        """
        balance: dict[int, int] = {}
        for number in self.numbers:
            if (verdict := self.verdict(first, second, number)) is not None:
                place = number % len(self.prompts)
                balance[place] = balance.get(place, 0) + verdict
        if not balance:
            return None
        outcome = Counter(np.sign(list(balance.values())).tolist())
        decided = outcome[1] + outcome[-1]
        p = stats.binomtest(outcome[1], decided).pvalue if decided else 1.0
        p = min(1.0, p * math.comb(len(self.names), 2))
        return Preference(first, second, outcome[1], outcome[-1], outcome[0], share_of(outcome[1], decided), p)

    def shown_first(self) -> Estimate:
        """How often the judge took the story that stood first, where it took one: half of the time if order does not matter."""
        compared = [asked for asked in self.answers if isinstance(asked, Comparison) and not asked.again]
        taken = Counter(self.answers[asked]["better"] for asked in compared)
        return share_of(taken["1"], taken["1"] + taken["2"])

    def same_in_both_orders(self) -> Estimate:
        """How often the judge said the same of two stories in both orders."""
        same = []
        for pair in combinations(self.names, 2):
            for number in self.numbers:
                answers = [self.answers.get(Comparison(*order, number)) for order in (pair, pair[::-1])]
                if None not in answers:
                    same.append(FOR_THE_FIRST[answers[0]["better"]] == -FOR_THE_FIRST[answers[1]["better"]])
        return share_of(sum(same), len(same))

    def verdicts_twice(self) -> tuple[list[int], list[int]]:
        """The verdicts on pairs that were compared twice: those of the first time and those of the second."""
        first, second = [], []
        for pair in combinations(self.names, 2):
            for number in self.numbers:
                if self.stories[pair[0]][number] == self.stories[pair[1]][number]:
                    continue
                verdicts = self.verdict(*pair, number), self.verdict(*pair, number, again=True)
                if None not in verdicts:
                    first.append(verdicts[0])
                    second.append(verdicts[1])
        return first, second

    def grades_twice(self) -> tuple[np.ndarray, np.ndarray]:
        """(graded twice, 4) each: the grades of stories that were graded twice, the first time and the second."""
        first, second = [], []
        for asked, answer in self.answers.items():
            if isinstance(asked, Grading) and asked.again and (before := self.answers.get(Grading(asked.name, asked.number))):
                first.append([before[criterion] for criterion in CRITERIA])
                second.append([answer[criterion] for criterion in CRITERIA])
        return np.array(first).reshape(-1, len(CRITERIA)), np.array(second).reshape(-1, len(CRITERIA))


def means(values: list[list[list[float]]]) -> np.ndarray:
    return np.array([[np.mean(some) if some else math.nan for some in row] for row in values])


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of what is no nan, and the interval of Student's t, for which there must be two."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    mean = values.mean().item()
    if len(values) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, len(values))  # t has no interval where nothing varies
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return Estimate(mean, low.item(), high.item(), len(values))


def share_of(hits: int, count: int) -> Estimate:
    """hits / count and the interval of Wilson."""
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    low, high = stats.binomtest(hits, count).proportion_ci(0.95, method="wilson")
    return Estimate(hits / count, low, high, count)


def different(one, other) -> float:
    return float(one != other)


def squared(one: float, other: float) -> float:
    return float((one - other) ** 2)


def cohens_kappa(first: Sequence, second: Sequence, distance: Callable = different) -> float:
    """How far two ratings of the same things agree beyond chance: 1 always, 0 as chance would have it.

    One minus the mean distance, over that of all ratings of the first with all of the second (Cohen 1960; with `squared`, the
    weighted kappa of Cohen 1968). nan where all ratings are the same, for then chance agrees always.
    """
    by_chance = sum(distance(one, other) for one in first for other in second) / max(1, len(first)) ** 2
    if by_chance == 0:
        return math.nan
    return 1 - sum(distance(one, other) for one, other in zip(first, second, strict=True)) / len(first) / by_chance
