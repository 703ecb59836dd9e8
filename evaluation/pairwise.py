"""The verdict on two runs or groups of seeds: paired or not, the row of the table, and the sentence.

The configs decide on pairing, before any loss is looked at. A verdict needs two seeds on both sides.
"""

from dataclasses import dataclass, fields

import numpy as np
import pandas as pd

from config import ModelConfig, TrainConfig
from evaluation import statistics
from evaluation.statistics import BITS, SEED_DEVIATION, SIGNIFICANCE, Correction, Difference
from metrics.story_losses import Scored
from runs.looks import MAX_SEEDS, seeds_at_first_look

SAME_WEIGHTS = {  # fields that change no random first weight
    "rope_theta", "norm", "norm_affine", "norm_bias", "norm_eps", "activation", "qk_norm", "attention_soft_cap", "logit_soft_cap",
    "logit_scale", "embedding_scale", "dropout",
}  # fmt: skip
DATA_ORDER = {"tokenizer", "max_stories", "packing", "batch_size", "batch_size_start", "data_seed"}  # fields that change batches


@dataclass(frozen=True)
class Member:
    """One run of a candidate."""

    name: str
    config: TrainConfig  # with a portable name of the data
    architecture: ModelConfig
    scored: Scored
    losses: pd.DataFrame  # a row for each story, by its digest
    log: pd.DataFrame


@dataclass(frozen=True)
class Candidate:
    """A run, or a group of runs with different seeds."""

    name: str
    members: tuple[Member, ...]  # sorted by seed
    values: np.ndarray  # (members,) bits per byte

    @property
    def seeds(self) -> list[int]:
        return [member.config.seed for member in self.members]

    @property
    def parameters(self) -> int:
        return self.members[0].scored.parameters

    @property
    def is_bound(self) -> bool:
        return any(member.scored.is_bound for member in self.members)


def format_p(p: float) -> str:
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def differing_fields(a, b, names: set[str]) -> list[str]:
    return [field.name for field in fields(a) if field.name in names and getattr(a, field.name) != getattr(b, field.name)]


def pairing(one: Candidate, other: Candidate) -> tuple[list[int], str]:
    """The seeds to pair, none for Welch's test, and the reason.

    Pairing pays where the losses of a seed are correlated by more than 0.5, as by the same first weights and the same batches.
    """
    a, b = one.members[0], other.members[0]
    weights = differing_fields(a.architecture, b.architecture, {field.name for field in fields(ModelConfig)} - SAME_WEIGHTS)
    if weights:
        return [], f"as their first weights differ ({', '.join(weights)})"
    data = {member.scored.data_fingerprint or member.config.data for member in (a, b)}
    batches = ["data"] * (len(data) > 1) + differing_fields(a.config, b.config, DATA_ORDER)
    if batches:
        return [], f"as their batches differ ({', '.join(batches)})"
    shared = sorted(set(one.seeds) & set(other.seeds))
    if len(shared) < min(len(one.seeds), len(other.seeds)):
        return [], "as they have different seeds"
    return shared, "as runs of a seed have the same first weights and batches"


def by_seeds(one: Candidate, other: Candidate, comparisons: int, notes: list[str]) -> tuple[dict, str]:
    """Compare two groups of seeds: the row of the table, and the verdict."""
    pairs, reason = pairing(one, other)
    notes.append(f"{one.name} and {other.name} are {'paired by seed' if pairs else 'not paired (Welch)'}, {reason}")
    a, b = (np.array([candidate.values[candidate.seeds.index(seed)] for seed in pairs or candidate.seeds])
            for candidate in (one, other))  # fmt: skip
    correction = Correction(comparisons, first_look(one, other, notes))
    difference = statistics.over_seeds(a, b, bool(pairs), 1 - correction.level)
    p, p_corrected = float(difference.p), correction.p(float(difference.p))
    too_many = correction.first_look is not None and min(len(a), len(b)) > MAX_SEEDS
    if too_many:
        difference, p_corrected = Difference(difference.mean, *[np.nan] * 3), np.nan
    row = row_of(one, other, difference, p, p_corrected, "seeds, paired" if pairs else "seeds")
    if too_many:
        return row, (f"no verdict on {one.name} and {other.name}: seeds were added after a first look, and the test is valid up "
                     f"to {MAX_SEEDS} of each. Train two new groups")  # fmt: skip

    better, worse = (other, one) if difference.mean < 0 else (one, other)
    by = f"{abs(difference.mean):.4f}"
    if np.isnan(p):
        return row, f"{better.name} is ahead of {worse.name} by {by} {BITS} in every seed alike: without variance, no verdict"
    reasons = [f"{comparisons} comparisons"] * (comparisons > 1) + ["repeated looks"] * (correction.first_look is not None)
    evidence = f"{' and '.join(map(str, sorted({len(a), len(b)})))} seeds, p {'' if p_corrected < 0.001 else '= '}"
    evidence += format_p(p_corrected) + (f", corrected for {' and '.join(reasons)}" if reasons else "")
    amount = f"{by} ± {difference.margin:.4f} {BITS}"
    if p_corrected <= SIGNIFICANCE and worse.is_bound:
        score = "upper bound" if better.is_bound else "loss"
        return row, (f"no verdict on {one.name} and {other.name}: the {score} of {better.name} is lower than the upper bound of "
                     f"{worse.name} by {amount} ({evidence}), which may be better than its bound")  # fmt: skip
    if p_corrected <= SIGNIFICANCE and better.is_bound:
        return row, f"{better.name} is better than {worse.name} by {amount} at least, as its loss is an upper bound ({evidence})"
    if p_corrected <= SIGNIFICANCE:
        return row, f"{better.name} is better than {worse.name} by {amount} ({evidence})"
    more = more_seeds(a, b, bool(pairs), correction)
    return row, f"{one.name} and {other.name} are not distinguishable{more} (a difference of {amount}, {evidence})"


def first_look(one: Candidate, other: Candidate, notes: list[str]) -> int | None:
    """Record this look, or return the number of seeds at the first one if seeds were added since."""
    try:
        return seeds_at_first_look({group.name: {member.name: member.scored.weights for member in group.members}
                                    for group in (one, other)})  # fmt: skip
    except OSError as error:
        notes.append(f"{error}: if seeds are added, the next verdict will not allow for this look")
        return None


def more_seeds(values_a, values_b, paired: bool, correction: Correction) -> str:
    """How many seeds a verdict would take, as a half sentence: the 80% interval, as far as these seeds determine it."""
    seeds = min(len(values_a), len(values_b))
    if seeds >= MAX_SEEDS or np.array_equal(values_a, values_b):
        return ""
    later = Correction(correction.comparisons, correction.first_look or seeds)
    low, high = statistics.seeds_needed(values_a, values_b, paired, later.level)
    if low is None:
        return f"; even {MAX_SEEDS} seeds of each would hardly do"
    low, high = max(1, low - seeds), high and max(1, high - seeds)
    if high is None and low == 1:
        return "; how many more seeds a verdict would take can't be said"
    amount = f"at least {low}" if high is None else f"{low} to {high}" if low < high else f"{low}"
    return f"; a verdict would take {amount} more seed{'s' * (amount != '1')} of each"


def by_stories(one: Candidate, other: Candidate, comparisons: int, has_losses: bool) -> tuple[dict, str]:
    """Compare where one side has a single seed: a row with an interval over stories, if possible, and why there is no verdict."""
    difference, interval = Difference(other.values.mean() - one.values.mean(), *[np.nan] * 3), ""
    if has_losses:
        nats = [np.mean([member.losses["nats"] for member in candidate.members], axis=0) for candidate in (one, other)]
        num_bytes, others = (candidate.members[0].losses["bytes"] for candidate in (one, other))
        nats[1] *= num_bytes.sum() / others.sum()  # a tokenizer may lose a trace of the text
        difference = statistics.over_stories(*nats, num_bytes, 1 - SIGNIFICANCE / comparisons)
        interval = f", 95% interval {difference.low:+.4f} to {difference.high:+.4f} over stories, not over seeds"
    effect = abs(float(difference.mean)) / (2**0.5 * SEED_DEVIATION)
    needed = statistics.seeds_for(effect, Correction(comparisons).level, freedom=2, most=1000)
    single = [candidate.name for candidate in (one, other) if len(candidate.values) == 1]
    who = "each is" if len(single) == 2 else f"{single[0]} is"
    verdict = (
        f"no verdict on {one.name} and {other.name}, as {who} a single seed: {other.name} - {one.name} = {difference.mean:+.4f} "
        f"{BITS}{interval}. A verdict on a difference of this size takes {needed or 'over 1,000'} seeds of each, if they deviate "
        f"by {SEED_DEVIATION:.3f} as in the 0.5m runs of trained_models"
    )
    return row_of(one, other, difference, np.nan, np.nan, "stories" if has_losses else "nothing"), verdict


def row_of(one: Candidate, other: Candidate, difference: Difference, p: float, p_corrected: float, over: str) -> dict:
    return {"difference": float(difference.mean), "95% from": float(difference.low), "to": float(difference.high), "p": p,
            "p (corrected)": p_corrected, "over": over, "seeds": f"{len(other.values)} and {len(one.values)}"}  # fmt: skip
