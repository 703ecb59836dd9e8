"""The verdict: which run, or group of seeds, is better, by how much, and how sure that is.

    python -m evaluation compare A B C              # B and C against A, on all validation stories
    python -m evaluation compare A B --at flops     # when both had spent as many training FLOPs
    python -m evaluation compare A B --html report.html    # and a page of it that can be mailed

A name is a run, or a group of runs that differ in the seed (see train.py --seeds). Where both sides have several seeds the seed
is the unit: the interval says what other seeds would give. With one seed it says only what other stories would give.
"""

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from config import ModelConfig, TrainConfig
from evaluation.statistics import BITS, SIGNIFICANCE, Difference, holm, over_seeds, over_stories, seeds_needed
from metrics.story_losses import NOT_ITS_OWN, TOP_K, Scored, losses_of
from runs.folder import Run, group_members

AT = ("end", "parameters", "step", "tokens", "flops", "seconds")
SAME_SIZE = 0.05  # parameters that differ by less count as equal
SAME_BUDGET = 0.02  # and so do budgets


@dataclass(frozen=True)
class Member:
    """A run that is compared."""

    name: str
    config: TrainConfig
    architecture: ModelConfig
    scored: Scored
    losses: pd.DataFrame  # a row for each story, by its digest
    log: pd.DataFrame


@dataclass(frozen=True)
class Candidate:
    """What is compared: a run, or a group of runs with a seed each."""

    name: str
    members: tuple[Member, ...]  # by their seeds
    values: np.ndarray  # bits per byte of each

    @property
    def seeds(self) -> list[int]:
        return [member.config.seed for member in self.members]

    @property
    def parameters(self) -> int:
        return self.members[0].scored.parameters


@dataclass(frozen=True)
class Comparison:
    """What came out: a row for each candidate, a row for each difference, what to know of them, and the verdicts."""

    candidates: pd.DataFrame
    differences: pd.DataFrame
    notes: list[str]
    verdicts: list[str]
    groups: list[Candidate]  # what was compared, in the order of the names
    at: str

    def __str__(self) -> str:
        told = dict.fromkeys(("p", "p (Holm)"), told_p)
        tables = [frame.to_string(float_format="{:.4f}".format, formatters=told, na_rep="–")
                  for frame in (self.candidates, self.differences) if len(frame)]  # fmt: skip
        return "\n\n".join(["\n".join(lines) for lines in (self.notes, tables[:1], tables[1:], self.verdicts) if lines])


def told_p(p: float) -> str:
    return "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.2g}"


def compare(*names: str, at: str = "end", all_pairs: bool = False, data_if_missing: str | None = None) -> Comparison:
    """Compare runs or groups with the first of them, or each with each.

    at: "end" takes the best weights of each; "parameters" too, and refuses models of other sizes; "step", "tokens", "flops" and
    "seconds" compare when all had spent as much as the shortest. Raises ValueError or OSError with the cure.
    """
    if at not in AT:
        raise ValueError(f"at={at!r}: it must be one of {', '.join(AT)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError("name at least two runs or groups to compare, each once")
    notes: list[str] = []
    found = [gather(name, notes, data_if_missing) for name in names]
    candidates = [candidate for candidate in found if candidate.members]
    candidates, by_story = at_budget(candidates, at, notes) if candidates else ([], True)
    if at == "end" and len(candidates) > 1:
        notes += unequal(candidates)
    chosen = list(itertools.combinations(candidates, 2))
    pairs = [pair for pair in chosen if (all_pairs or pair[0] is candidates[0]) and comparable(*pair, at, notes)]
    rows = [row(one, other, difference_of(one, other, by_story)) for one, other in pairs]
    corrected = holm([row["p"] for row in rows])
    rows = [row | {"p (Holm)": p} for row, p in zip(rows, corrected, strict=True)]
    verdicts = [verdict(*pair, row, len(rows)) for pair, row in zip(pairs, rows, strict=True)]
    index = [f"{other.name} - {one.name}" for one, other in pairs]
    summary = pd.DataFrame({candidate.name: summary_of(candidate) for candidate in candidates}).T
    return Comparison(summary, pd.DataFrame(rows, index=index), notes, verdicts, candidates, at)


def gather(name: str, notes: list[str], data_if_missing: str | None) -> Candidate:
    """The runs of a name that can be compared; what is left out is noted."""

    def tell(line: str):
        print(line)  # before the minute that it takes
        notes.append(line)

    members: dict[int, Member] = {}
    for run in map(Run, group_members(name)):
        if run.diverged is not None:
            notes.append(f"{run.name} diverged and is left out: {run.diverged}")
            continue
        losses, scored = losses_of(run.name, data_if_missing, tell)
        if not np.isfinite(losses["nats"]).all():
            notes.append(f"{run.name} diverged and is left out: not all of its losses are finite")
            continue
        member = Member(run.name, run.train_config, run.model_config, scored, losses.set_index("story"), run.log())
        seed = member.config.seed
        if seed in members:
            notes.append(f"{run.name} has the seed of {members[seed].name} and is left out: it is no run of its own")
            continue
        members[seed] = member
        if scored.data.endswith(NOT_ITS_OWN):
            notes.append(f"{run.name} was scored on {scored.data}: it was trained on {member.config.data!r}, which is not here")
        if run.was_stopped():
            notes.append(f"{run.name} was stopped before its end: --resume goes on with it")
    ordered = tuple(members[seed] for seed in sorted(members))
    return Candidate(name, ordered, np.array([bits_per_byte(member.losses) for member in ordered]))


def bits_per_byte(losses: pd.DataFrame) -> float:
    return losses["nats"].sum() / losses["bytes"].sum() / np.log(2)


def at_budget(candidates: list[Candidate], at: str, notes: list[str]) -> tuple[list[Candidate], bool]:
    """The candidates as they were at equal cost, and whether that is what their losses by story say.

    Those are of the best weights of the whole run. Where runs have spent unequally, values are read off between two evaluations.
    """
    if at in ("end", "parameters"):
        return candidates, True
    if at == "flops":
        candidates = [replace(candidate, members=tuple(map(with_flops, candidate.members))) for candidate in candidates]
    members = [member for candidate in candidates for member in candidate.members]
    spent = [member.log[at].max() for member in members]
    budget = min(spent)
    if max(spent) <= (1 + SAME_BUDGET) * budget:
        notes.append(f"all runs have spent {budget:,.4g} {at}, within {SAME_BUDGET:.0%}: their best weights are compared")
        return candidates, True
    notes.append(f"compared at {budget:,.4g} {at}, by the curves of the log: no losses by story are kept there. Runs that went "
                 "on are read before their learning rate fell, which favours those that end there")  # fmt: skip
    read = [replace(candidate, values=np.array([read_off(member, at, budget) for member in candidate.members]))
            for candidate in candidates]  # fmt: skip
    scored_on = {min(member.config.eval_stories, len(member.losses)) for member in members}
    if len(scored_on) > 1:
        notes.append(f"the curves are of other validation stories: the first {' or '.join(map(str, sorted(scored_on)))}")
    return read, False


def with_flops(member: Member) -> Member:
    """Runs that are older than the column flops get it from their tokens."""
    if "flops" in member.log and member.log["flops"].notna().all():
        return member
    return replace(member, log=member.log.assign(flops=member.log["tokens"] * member.scored.flops_per_token))


def read_off(member: Member, at: str, budget: float) -> float:
    """The bits per byte when so much was spent, on the line between two evaluations."""
    curve = member.log.dropna(subset="bits_per_byte")
    if curve.empty or not curve[at].min() <= budget <= curve[at].max():
        raise ValueError(f"the run {member.name!r} was not evaluated around {budget:,.4g} {at}: lower --train.eval_every")
    return float(np.interp(budget, curve[at], curve["bits_per_byte"]))


def unequal(candidates: list[Candidate]) -> list[str]:
    """What some were given more of than others: a line for the size, one for the budget."""
    notes = []
    small, *_, large = sorted(candidates, key=lambda candidate: candidate.parameters)
    if large.parameters > (1 + SAME_SIZE) * small.parameters:
        sizes = f"{small.parameters:,} ({small.name}) to {large.parameters:,} parameters ({large.name})"
        notes.append(f"not all are of one size: {sizes}")
    budgets = {}
    for candidate in candidates:
        budgets.setdefault(budget_of(candidate.members[0].config), []).append(candidate.name)
    if len(budgets) > 1:
        some = [f"{budget} ({', '.join(names)})" for budget, names in itertools.islice(budgets.items(), 3)]
        told = ", ".join([*some, *["…"] * (len(budgets) > 3)])
        notes.append(f"not all were to be trained equally long: {told}. --at compares at equal cost")
    return notes


def budget_of(config: TrainConfig) -> str:
    steps = [f"{config.max_steps:,} steps"] if config.max_steps else []
    minutes = [f"{config.max_minutes:g} minutes"] if config.max_minutes else []
    return " or ".join(steps + minutes)


def comparable(one: Candidate, other: Candidate, at: str, notes: list[str]) -> bool:
    """Notes all that is not equal between two candidates. False where they must not be compared at all."""
    a, b = one.members[0], other.members[0]
    both = f"{one.name} and {other.name}"
    scored = {member.scored.validation for member in (*one.members, *other.members)}
    if len(scored) > 1:
        notes.append(f"{both} are not compared: they were scored on other validation stories ({a.scored.data}, {b.scored.data})")
        return False
    if at == "parameters" and abs(one.parameters - other.parameters) > SAME_SIZE * min(one.parameters, other.parameters):
        notes.append(f"{both} are not compared: {one.parameters:,} and {other.parameters:,} parameters are not equal within 5%")
        return False
    if a.scored.tokenizer != b.scored.tokenizer:
        tokenizers = f"{a.scored.tokenizer}, {b.scored.tokenizer}"
        notes.append(f"{both} have other tokenizers ({tokenizers}): bits per byte compare all the same")
    reading = [(m.config.tokenizer, m.config.packing, m.architecture.max_seq_len) for m in (a, b)]
    fingerprints = (a.scored.data_fingerprint, b.scored.data_fingerprint)
    same_data = None not in fingerprints and len(set(fingerprints)) == 1  # wherever they lay
    if a.config.max_stories != b.config.max_stories or (a.config.data != b.config.data and not same_data):
        notes.append(f"{both} were trained on other data: {a.config.data} and {b.config.data}, "
                     f"the first {a.config.max_stories} and {b.config.max_stories} stories")  # fmt: skip
    elif None in fingerprints:
        notes.append(f"{both}: whether they were trained on the same data is not known, as one is older than the note of it")
    elif reading[0] == reading[1] and not same_data:
        notes.append(f"{both} were trained on other data, though both call them {a.config.data}")
    notes += [line for line in [other_code(both, one, other), other_threads(both, a, b, at)] if line]
    if a.architecture == b.architecture and a.config == b.config:
        notes.append(f"{both} are the same config with the same seed: what differs is no seed, but rounding or the code")
    return True


def other_code(both: str, one: Candidate, other: Candidate) -> str | None:
    codes = [member.scored.code for member in (*one.members, *other.members)]
    if None in codes:
        return f"{both}: whether the same code trained them is not known, as one is older than the note of it"
    core = sorted({name for code in codes for name in code if is_core(name) or all(name in code for code in codes)})
    changed = [name for name in core if len({code.get(name) for code in codes}) > 1]
    shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more files" if len(changed) > 5 else "")
    return f"{both} were trained with other code: {shown}" if changed else None


def is_core(name: str) -> bool:
    """Whether a digest belongs to a file of ours; that of a plugin bears the name of a module, which other runs need not have."""
    return name.endswith((".py", ".cpp", ".h"))


def other_threads(both: str, a: Member, b: Member, at: str) -> str | None:
    if at != "seconds" or a.config.threads == b.config.threads:
        return None
    return f"{both} had {a.config.threads} and {b.config.threads} threads: their seconds are not worth the same"


def difference_of(one: Candidate, other: Candidate, by_story: bool) -> tuple[Difference, str]:
    """other - one, and what its interval is over: seeds where both have several, else stories, or nothing."""
    if len(one.values) > 1 and len(other.values) > 1:
        paired = one.seeds == other.seeds
        return over_seeds(one.values, other.values, paired), "seeds, paired" if paired else "seeds"
    if not by_story:
        nan = float("nan")
        return Difference(other.values.mean() - one.values.mean(), nan, nan, nan), "nothing"
    nats = [np.mean([member.losses["nats"] for member in candidate.members], axis=0) for candidate in (one, other)]
    return over_stories(*nats, one.members[0].losses["bytes"]), "stories"


def row(one: Candidate, other: Candidate, result: tuple[Difference, str]) -> dict:
    difference, over = result
    return {
        "difference": float(difference.mean), "95% from": float(difference.low), "to": float(difference.high),
        "p": float(difference.p), "over": over, "seeds": f"{len(other.values)} and {len(one.values)}",
    }  # fmt: skip


def verdict(one: Candidate, other: Candidate, row: dict, comparisons: int) -> str:
    """One sentence that may be believed."""
    better, worse = (other, one) if row["difference"] < 0 else (one, other)
    by = f"{abs(row['difference']):.4f}"
    if row["over"] == "nothing":
        return (f"{better.name} is ahead of {worse.name} by {by} {BITS}, which may be luck: one seed alone has no interval here. "
                "Train three or more (--seeds 3)")  # fmt: skip
    if np.isnan(row["p"]):
        return f"{better.name} is ahead of {worse.name} by {by} {BITS} in every seed alike: there is no spread to judge it by"
    p = row["p (Holm)"]
    counts = sorted({len(one.values), len(other.values)})
    seeds = " and ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")
    told = f"{by} ± {(row['to'] - row['95% from']) / 2:.4f} {BITS}"
    chance = f"p {'' if p < 0.001 else '= '}{told_p(p)}" + f", corrected for {comparisons} comparisons" * (comparisons > 1)
    alone = ". The interval is from the stories alone; another seed may say otherwise" if row["over"] == "stories" else ""
    if p <= SIGNIFICANCE:
        return f"{better.name} is better than {worse.name} by {told} ({seeds}, {chance}){alone}"
    more = ""
    if row["over"] != "stories":
        needed = seeds_needed(one.values, other.values, row["over"] == "seeds, paired", SIGNIFICANCE / comparisons)
        more = max(1, needed - min(counts)) if needed is not None else None
        more = ("; even 1,000 seeds would hardly tell" if more is None
                else f"; about {more} more seed{'s' * (more > 1)} would tell")  # fmt: skip
    return f"{one.name} and {other.name} are not distinguishable{more} (a difference of {told}, {seeds}, {chance}){alone}"


def summary_of(candidate: Candidate) -> dict:
    logs = [member.log for member in candidate.members]
    return {
        "seeds": len(candidate.values), BITS: candidate.values.mean(),
        "deviation of seeds": candidate.values.std(ddof=1) if len(candidate.values) > 1 else float("nan"),
        "parameters": f"{candidate.parameters:,}", "steps": f"{np.mean([log['step'].max() for log in logs]):,.0f}",
        "tokens": f"{np.mean([log['tokens'].max() for log in logs]):,.0f}",
        "minutes": f"{np.mean([log['seconds'].max() for log in logs]) / 60:.1f}",
        **{f"top-{k}": f"{np.mean([m.losses[f'top{k}'].sum() / m.losses['tokens'].sum() for m in candidate.members]):.1%}"
           for k in TOP_K},
    }  # fmt: skip
