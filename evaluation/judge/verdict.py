"""The questions for a judge about the stories of several models, and its verdict: grades, preferences, reliability.

Story n of each model continues prompt n % len(prompts), so that models are compared prompt by prompt. All intervals are over
prompts: several stories of a prompt, or several answers about them, count as one.
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from evaluation.judge.prompts import CRITERIA, WORDS, Prompt, comparison_question, grade_question
from evaluation.statistics import CONFIDENCE
from metrics.proportion import proportion_interval

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
    """A mean or a share with its interval; NaN if there is none."""

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
    p: float  # of the sign test
    pairs: int  # of models, for which p and the interval of the share are corrected (Bonferroni)


def questions(prompts: list[Prompt], stories: dict[str, list[str]], repeat: float, seed: int):
    """List the questions to ask: {Grading or Pairing: (question, seed)}.

    stories: completions by model.  repeat: share of the stories that are judged a second time, with another seed. Every pair of
    models is shown in both orders; two equal stories are not compared.
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
    """The verdict of the answers to `questions`. Missing answers are ignored."""

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

        A prompt is won by the model that wins more of its stories. The p-value is that of the sign test.
        """
        balance: dict[int, int] = defaultdict(int)
        for number in self.numbers:
            if (verdict := self.verdict(first, second, number)) is not None:
                balance[number % len(self.prompts)] += verdict
        if not balance:
            return None
        outcomes = Counter(np.sign(list(balance.values())).tolist())
        won, lost, pairs = outcomes[1], outcomes[-1], len(self.pairs)
        share = mean_share([1] * won + [0] * lost, 1 - (1 - CONFIDENCE) / pairs)
        p = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        return Preference(first, second, won, lost, outcomes[0], share, min(1.0, p * pairs), pairs)

    def share_over_prompts(self, hits: Iterable[tuple[int, float]]) -> Estimate:
        """The mean over prompts of the share of hits, given as (story number, hit or share of hits)."""
        groups = defaultdict(list)
        for number, hit in hits:
            groups[number % len(self.prompts)].append(hit)
        return mean_share([np.mean(group) for group in groups.values()])

    def shown_first(self) -> Estimate:
        """How often the judge picks the story that is shown first, if it picks one: half of the time if order does not matter."""
        picks = ((asked.number, answer["better"]) for asked, answer in self.answers.items()
                 if isinstance(asked, Pairing) and not asked.again)  # fmt: skip
        return self.share_over_prompts((number, better == "1") for number, better in picks if better != "tie")

    def same_in_both_orders(self) -> Estimate:
        """How often the judge gives the same verdict on two stories in both orders."""
        scores = ((number, self.scores(*pair, number)) for pair in self.pairs for number in self.numbers)
        return self.share_over_prompts((number, both[0] == both[1]) for number, both in scores if both is not None)

    def verdicts_twice(self) -> np.ndarray:
        """(pairs of stories compared twice, 3): story number, first and second verdict."""
        rows = [(number, self.verdict(*pair, number), self.verdict(*pair, number, again=True))
                for pair in self.pairs for number in self.numbers
                if self.stories[pair[0]][number] != self.stories[pair[1]][number]]  # fmt: skip
        return np.array([row for row in rows if None not in row], dtype=int).reshape(-1, 3)

    def grades_twice(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the stories graded twice the numbers (stories,), and the first and the second grades (stories, 4) each."""
        rows = [(asked.number, *([given[criterion] for criterion in CRITERIA] for given in (before, answer)))
                for asked, answer in self.answers.items() if isinstance(asked, Grading) and asked.again
                and (before := self.answers.get(Grading(asked.name, asked.number)))]  # fmt: skip
        numbers, first, second = zip(*rows, strict=True) if rows else ((), (), ())
        return np.array(numbers, int), *(np.array(grades).reshape(-1, len(CRITERIA)) for grades in (first, second))


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of the values that are not NaN, with Student's interval unless all are equal."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    mean = values.mean().item() if len(values) else math.nan
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean, math.nan, math.nan)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(CONFIDENCE)
    return Estimate(mean, low.item(), high.item())


def mean_share(shares: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The mean of shares, one of each prompt, with its Clopper-Pearson interval."""
    if not len(shares):
        return Estimate(math.nan, math.nan, math.nan)
    return Estimate(float(np.mean(shares)), *proportion_interval(sum(shares), len(shares), confidence))


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
