"""The questions for a judge about the stories of several models, and what its answers say: grades, preferences, reliability.

Story n of each model continues prompt n % len(prompts), so that models are compared prompt by prompt. All intervals are 95% and
over prompts: several stories of a prompt count as one.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from evaluation.judge.prompts import CRITERIA, WORDS, Prompt, comparison_question, grade_question
from evaluation.statistics import CONFIDENCE

SCORES = {"1": 1, "2": -1, "tie": 0}  # of the story shown first, by the judge's answer


@dataclass(frozen=True)
class Grading:
    """The judge grades one story; again: for the second time, to measure its agreement with itself."""

    name: str
    number: int
    again: bool = False


@dataclass(frozen=True)
class Pairing:
    """The judge reads a story of each of two models, in this order, and picks the better one."""

    first: str
    second: str
    number: int
    again: bool = False


@dataclass(frozen=True)
class Estimate:
    """A mean or a share with its 95% interval; NaN if there is none."""

    value: float
    low: float
    high: float

    def __format__(self, style: str) -> str:
        if math.isnan(self.value):
            return "–"
        if math.isnan(self.low):
            return f"{self.value:{style}}"
        return f"{self.value:{style}} ({self.low:{style}} to {self.high:{style}})"


@dataclass(frozen=True)
class Preference:
    """How many prompts the first model won, lost and tied against the second."""

    first: str
    second: str
    won: int
    lost: int
    tied: int
    share: Estimate  # won / (won + lost)
    p: float  # of the sign test, with Bonferroni's correction for all pairs of models


def questions(prompts: list[Prompt], stories: dict[str, list[str]], repeat: float, seed: int):
    """All questions to ask: {Grading or Pairing: (question, seed)}.

    stories: completions by model.  repeat: share of the stories that are judged a second time, with another seed. Every pair of
    models is shown in both orders; two equal stories are not shown.
    """
    count = len(next(iter(stories.values())))
    repeated = set(random.Random(seed).sample(range(count), math.ceil(repeat * count)))
    asked = {}
    for number in range(count):
        prompt = prompts[number % len(prompts)]
        for again in (False, True)[: 1 + (number in repeated)]:
            for name, completions in stories.items():
                asked[Grading(name, number, again)] = grade_question(prompt, completions[number]), seed + again
            for pair in combinations(stories, 2):
                for first, second in (pair, pair[::-1]):
                    if stories[first][number] != stories[second][number]:
                        question = comparison_question(prompt, stories[first][number], stories[second][number])
                        asked[Pairing(first, second, number, again)] = question, seed + again
    return asked


class Judgement:
    """What the answers to `questions` say. Missing answers are left out of every number."""

    def __init__(self, prompts: list[Prompt], stories: dict[str, list[str]], answers: dict):
        self.prompts, self.stories, self.answers = prompts, stories, answers
        self.names = list(stories)
        self.numbers = range(len(stories[self.names[0]]))
        self.pairs = list(combinations(self.names, 2))

    def mean_by_prompt(self, values: dict[tuple[str, int], float]) -> np.ndarray:
        """(models, prompts): means of the values by (name, story number); NaN where there is none."""
        groups = [[[] for _ in self.prompts] for _ in self.names]
        for (name, number), value in values.items():
            groups[self.names.index(name)][number % len(self.prompts)].append(value)
        return np.array([[np.mean(group) if group else math.nan for group in row] for row in groups])

    def grades(self, criterion: str) -> np.ndarray:
        """(models, prompts): mean grades."""
        return self.mean_by_prompt({(asked.name, asked.number): answer[criterion] for asked, answer in self.answers.items()
                                    if isinstance(asked, Grading) and not asked.again and criterion in answer})  # fmt: skip

    def words_used(self) -> np.ndarray:
        """(models, prompts): shares of the required words that the stories contain, by text search."""
        prompts = {number: self.prompts[number % len(self.prompts)] for number in self.numbers}
        return self.mean_by_prompt({(name, number): prompt.share_of_words(self.stories[name][number])
                                    for name in self.names for number, prompt in prompts.items() if prompt.words})  # fmt: skip

    def table(self):
        """A pandas DataFrame of text: a row for each criterion, a column for each model and for each pairwise difference."""
        import pandas as pd

        rows = {criterion: self.grades(criterion) for criterion in (*CRITERIA, WORDS)}
        rows["all four"] = np.mean([rows[criterion] for criterion in CRITERIA], axis=0)
        rows["share of words used"] = self.words_used()
        rows = {label: values for label, values in rows.items() if not np.isnan(values).all()}
        columns = {name: [f"{mean_of(values[model]):.2f}" for values in rows.values()] for model, name in enumerate(self.names)}
        for (one, first), (other, second) in combinations(enumerate(self.names), 2):
            columns[f"{first} - {second}"] = [f"{mean_of(values[one] - values[other]):+.2f}" for values in rows.values()]
        return pd.DataFrame(columns, index=list(rows))

    def scores(self, first: str, second: str, number: int, again: bool = False) -> tuple[int, int] | None:
        """The score of the first model's story in each order; None if an answer is missing."""
        answers = [self.answers.get(Pairing(*order, number, again)) for order in ((first, second), (second, first))]
        return None if None in answers else (SCORES[answers[0]["better"]], -SCORES[answers[1]["better"]])

    def verdict(self, first: str, second: str, number: int, again: bool = False) -> int | None:
        """1 if the first model's story is better in both orders, -1 if the second's is, else 0; None if an answer is missing."""
        if self.stories[first][number] == self.stories[second][number]:
            return 0
        scores = self.scores(first, second, number, again)
        return scores and (scores[0] if scores[0] == scores[1] else 0)

    def preference(self, first: str, second: str) -> Preference | None:
        """Which of two models the judge prefers; None if it compared none of their stories.

        A prompt is won by the model that wins more of its stories. The interval is Wilson's, the p-value the sign test's.
        """
        balance: dict[int, int] = {}
        for number in self.numbers:
            if (verdict := self.verdict(first, second, number)) is not None:
                prompt = number % len(self.prompts)
                balance[prompt] = balance.get(prompt, 0) + verdict
        if not balance:
            return None
        outcomes = Counter(np.sign(list(balance.values())).tolist())
        decided = outcomes[1] + outcomes[-1]
        p = stats.binomtest(outcomes[1], decided).pvalue if decided else 1.0
        p = min(1.0, p * len(self.pairs))
        return Preference(first, second, outcomes[1], outcomes[-1], outcomes[0], share_of(outcomes[1], decided), p)

    def shown_first(self) -> Estimate:
        """How often the judge picks the story that is shown first, if it picks one: half of the time if order does not matter."""
        compared = [asked for asked in self.answers if isinstance(asked, Pairing) and not asked.again]
        picked = Counter(self.answers[asked]["better"] for asked in compared)
        return share_of(picked["1"], picked["1"] + picked["2"])

    def same_in_both_orders(self) -> Estimate:
        """How often the judge says the same of two stories in both orders."""
        scores = [scores for pair in self.pairs for number in self.numbers if (scores := self.scores(*pair, number)) is not None]
        return share_of(sum(forward == backward for forward, backward in scores), len(scores))

    def verdicts_twice(self) -> tuple[list[int], list[int]]:
        """The verdicts on pairs that were compared twice: the first and the second ones."""
        first, second = [], []
        for one, other in self.pairs:
            for number in self.numbers:
                verdicts = self.verdict(one, other, number), self.verdict(one, other, number, again=True)
                if self.stories[one][number] != self.stories[other][number] and None not in verdicts:
                    first.append(verdicts[0])
                    second.append(verdicts[1])
        return first, second

    def grades_twice(self) -> tuple[np.ndarray, np.ndarray]:
        """(stories graded twice, 4) each: the first and the second grades."""
        first, second = [], []
        for asked, answer in self.answers.items():
            if isinstance(asked, Grading) and asked.again and (before := self.answers.get(Grading(asked.name, asked.number))):
                first.append([before[criterion] for criterion in CRITERIA])
                second.append([answer[criterion] for criterion in CRITERIA])
        return np.array(first).reshape(-1, len(CRITERIA)), np.array(second).reshape(-1, len(CRITERIA))


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of the values that are not NaN, with Student's interval if there are two."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    mean = values.mean().item() if len(values) else math.nan
    if len(values) < 2:
        return Estimate(mean, math.nan, math.nan)
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean)  # scipy has no interval without variance
    low, high = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Estimate(mean, low.item(), high.item())


def share_of(hits: int, count: int) -> Estimate:
    """hits / count with Wilson's interval."""
    if count == 0:
        return Estimate(math.nan, math.nan, math.nan)
    low, high = stats.binomtest(hits, count).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(hits / count, low, high)


def cohens_kappa(first: Sequence, second: Sequence, squared: bool = False) -> float:
    """Agreement of two ratings of the same things beyond chance: 1 always, 0 by chance; NaN if all ratings are the same.

    One minus the mean distance, over the mean distance of all pairs of ratings (Cohen 1960). Squared distances give the weighted
    kappa (Cohen 1968); else all different ratings are equally far apart.

    >>> cohens_kappa([1, 1, 0, 0], [1, 0, 0, 0])
    0.5
    """
    first, second = np.asarray(first, float), np.asarray(second, float)

    def distance(one, other) -> float:
        return ((one - other) ** 2 if squared else one != other).sum().item()

    by_chance = distance(first[:, None], second) / max(1, len(first)) ** 2
    return 1 - distance(first, second) / len(first) / by_chance if by_chance else math.nan
