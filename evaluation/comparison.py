"""The verdict: which run or group of seeds is better, by how much, and how certain that is.

    python -m evaluation compare A B C              # B and C against A, on all validation stories
    python -m evaluation compare A B --at flops     # at equal training FLOPs
    python -m evaluation compare A B --html report.html    # and write a self-contained report

A name is a run, or a group of runs that differ in the seed (train.py --seeds). A verdict needs several seeds on both sides: the
seed is the unit, and the interval covers the choice of seeds. One seed gets an interval over validation stories, and no verdict.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from rich.text import Text

from config import TrainConfig
from data.cache import in_notebook_words
from data.sources import portable_name
from evaluation.pairwise import Candidate, Member, by_seeds, by_stories, format_p
from evaluation.statistics import BITS
from metrics.story_losses import NOT_ITS_OWN, TOP_K, data_of, losses_of, why_left_out
from runs.execution import different_execution
from runs.folder import Run, group_members
from runs.tables import BOUND, FrameTable, marked, paragraphs, plain

AT = ("end", "parameters", "step", "tokens", "flops", "seconds")
SAME_SIZE = 0.05  # relative difference in parameters that counts as equal
SAME_BUDGET = 0.02  # relative difference in what was spent that counts as equal


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: tables, caveats and one verdict per pair."""

    candidates: pd.DataFrame  # a row for each candidate
    differences: pd.DataFrame  # a row for each pair
    notes: list[str]  # every mismatch, and every run that was left out
    verdicts: list[str]
    groups: list[Candidate]  # in the order of the names
    at: str

    def __rich_console__(self, console, options) -> Iterator:
        formats = dict.fromkeys(("p", "p (corrected)"), format_p)
        tables = [[FrameTable(frame, formats=formats)] for frame in (self.candidates, self.differences) if len(frame)]
        notes, verdicts = [Text(note, "yellow") for note in self.notes], [Text(verdict, "bold") for verdict in self.verdicts]
        yield from paragraphs(notes, *tables, verdicts)

    def __str__(self) -> str:
        return plain(self)

    def as_markdown(self) -> str:
        """The verdicts, quoted, and the notes below them."""
        notes = [f"- {in_notebook_words(note)}" for note in self.notes]
        return "\n\n".join([*(f"> **{verdict}.**" for verdict in self.verdicts), "\n".join(notes)])


def compare(*names: str, at: str = "end", all_pairs: bool = False, data_if_missing: str | None = None) -> Comparison:
    """Compare runs, or groups of seeds, with the first of them.

    Parameters
    ----------
    *names : str
        Two or more runs or groups in trained_models/.
    at : {"end", "parameters", "step", "tokens", "flops", "seconds"}, default "end"
        "end" compares the best weights of each; "parameters" does too, but only models of equal size. The others compare at
        equal cost, that of the shortest run.
    all_pairs : bool, default False
        Compare every pair instead of each with the first.
    data_if_missing : str, optional
        Data to score a run on that has no losses by story yet, if its own data are not available.

    Returns
    -------
    Comparison
        Tables, notes and verdicts; `print` shows all of them.

    Raises
    ------
    ValueError, OSError
        One line with the cure: an unknown name, a damaged run, a run that was not evaluated at the budget.

    Examples
    --------
    >>> compare("0.5m_short_and_thick", "0.5m_tall_and_skinny").verdicts[0]  # doctest: +SKIP
    '0.5m_short_and_thick is better than 0.5m_tall_and_skinny by 0.1066 ± 0.0455 bits per byte (3 seeds, p = 0.009)'
    """
    if at not in AT:
        raise ValueError(f"at={at!r}: it must be one of {', '.join(AT)}")
    if len(set(names)) < len(names) or len(names) < 2:
        raise ValueError("name at least two runs or groups to compare, each once")
    notes: list[str] = []
    gathered = [gather(name, notes, data_if_missing) for name in names]
    candidates = [candidate for candidate in gathered if candidate.members]
    candidates, by_story = at_budget(candidates, at, notes) if candidates else ([], True)
    if at == "end" and len(candidates) > 1:
        notes += unequal(candidates)
    notes += upper_bounds(candidates)
    notes += older_minutes(candidates, at)
    pairs = [pair for pair in itertools.combinations(candidates, 2)
             if (all_pairs or pair[0] is candidates[0]) and comparable(*pair, at, notes)]  # fmt: skip
    have_seeds = [min(len(one.values), len(other.values)) > 1 for one, other in pairs]
    rows, verdicts = [], []
    for pair, has_seeds in zip(pairs, have_seeds, strict=True):
        comparisons = have_seeds.count(has_seeds)
        row, verdict = by_seeds(*pair, comparisons, notes) if has_seeds else by_stories(*pair, comparisons, by_story)
        rows.append(row)
        verdicts.append(verdict)
    index = [f"{other.name} - {one.name}" for one, other in pairs]
    summary = pd.DataFrame({candidate.name: summary_of(candidate) for candidate in candidates}).T
    return Comparison(summary, pd.DataFrame(rows, index=index), notes, verdicts, candidates, at)


def gather(name: str, notes: list[str], data_if_missing: str | None) -> Candidate:
    """Load the runs of a name; note those that are left out, and why."""

    def report(line: str):
        print(line)  # at once, as scoring a run takes a minute
        notes.append(line)

    members: dict[int, Member] = {}
    for run in map(Run, group_members(name)):
        if run.diverged is not None:
            notes.append(f"{run.name} diverged and is left out: {run.diverged}")
            continue
        losses, scored = losses_of(run.name, data_if_missing, report)
        if not np.isfinite(losses["nats"]).all():
            notes.append(f"{run.name} diverged and is left out: not all of its losses are finite")
            continue
        if problem := why_left_out(run.name, scored):
            notes.append(problem)
            continue
        if scored.audit is None and run.model_config.plugins:
            notes.append(f"{run.name} has plugins and was not audited yet: python -m evaluation audit {run.name}")
        trace = f"{scored.tokenizer} loses {scored.lost:.2%} of the text, which is not counted as predicted"
        notes += [trace] * (scored.lost > 0 and trace not in notes)
        config = replace(run.train_config, data=portable_name(run.train_config.data))
        member = Member(run.name, config, run.model_config, scored, losses.set_index("story"), run.log())
        seed = member.config.seed
        if seed in members:
            notes.append(f"{run.name} has the same seed as {members[seed].name} and is left out: a seed counts once")
            continue
        members[seed] = member
        if scored.data.endswith(NOT_ITS_OWN):
            notes.append(f"{run.name} was scored on {scored.data}: its validation stories during training, on "
                         f"{trained_on(member)}, were others")  # fmt: skip
        if run.was_stopped():
            notes.append(f"{run.name} was stopped early: --resume continues it")
    ordered = tuple(members[seed] for seed in sorted(members))
    notes += different_execution(f"the seeds of {name}", *([Run(member.name)] for member in ordered))
    return Candidate(name, ordered, np.array([bits_per_byte(member.losses) for member in ordered]))


def bits_per_byte(losses: pd.DataFrame) -> float:
    return losses["nats"].sum() / losses["bytes"].sum() / np.log(2)


def at_budget(candidates: list[Candidate], at: str, notes: list[str]) -> tuple[list[Candidate], bool]:
    """Give the candidates their values at equal cost, and whether their losses by story are of that point.

    Losses by story belong to the best weights of the whole run. If the runs have not spent the same, values are interpolated
    between two evaluations.
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
    notes.append(f"compared at {budget:,.4g} {at}, by the curves of the log, as there are no losses by story at that point. "
                 "Longer runs are read before their learning rate has decayed, which favours those that end there")  # fmt: skip
    stories = {min(member.config.eval_stories, len(member.losses)) for member in members}
    if len(stories) > 1:
        notes.append(f"the curves are of different validation stories: the first {' or '.join(map(str, sorted(stories)))}")
    return [replace(candidate, values=np.array([interpolate(member, at, budget) for member in candidate.members]))
            for candidate in candidates], False  # fmt: skip


def with_flops(member: Member) -> Member:
    """Add the column flops to the log of a run that predates it."""
    if "flops" in member.log and member.log["flops"].notna().all():
        return member
    return replace(member, log=member.log.assign(flops=member.log["tokens"] * member.scored.flops_per_token))


def interpolate(member: Member, at: str, budget: float) -> float:
    """Bits per byte at a budget, on the line between two evaluations."""
    curve = member.log.dropna(subset="bits_per_byte")
    if curve.empty or not curve[at].min() <= budget <= curve[at].max():
        raise ValueError(f"the run {member.name!r} was not evaluated around {budget:,.4g} {at}: lower --train.eval_every")
    return float(np.interp(budget, curve[at], curve["bits_per_byte"]))


def unequal(candidates: list[Candidate]) -> list[str]:
    """Note different sizes and different budgets, one line each."""
    notes = []
    small, *_, large = sorted(candidates, key=lambda candidate: candidate.parameters)
    if large.parameters > (1 + SAME_SIZE) * small.parameters:
        notes.append(f"different sizes: {small.parameters:,} ({small.name}) to {large.parameters:,} parameters ({large.name})")
    budgets = {}
    for candidate in candidates:
        budgets.setdefault(budget_of(candidate.members[0].config), []).append(candidate.name)
    if len(budgets) > 1:
        listed = [f"{budget} ({', '.join(names)})" for budget, names in itertools.islice(budgets.items(), 3)]
        listed += ["…"] * (len(budgets) > 3)
        notes.append(f"different training budgets: {', '.join(listed)}. --at compares at equal cost")
    return notes


def upper_bounds(candidates: list[Candidate]) -> list[str]:
    """Note what a comparison of upper bounds can show."""
    bounds = [candidate.name for candidate in candidates if candidate.is_bound]
    if not bounds:
        return []
    return [f"{BOUND.strip()} marks an upper bound, as of {', '.join(bounds)}, which may be better than it looks: a bound below "
            "a loss is truly better, and one above it proves nothing"]  # fmt: skip


def budget_of(config: TrainConfig) -> str:
    steps = [f"{config.max_steps:,} steps"] if config.max_steps else []
    minutes = [f"{config.max_minutes:g} minutes"] if config.max_minutes else []
    return " or ".join(steps + minutes)


def comparable(one: Candidate, other: Candidate, at: str, notes: list[str]) -> bool:
    """Note every mismatch between two candidates; False if they must not be compared at all."""
    a, b = one.members[0], other.members[0]
    both = f"{one.name} and {other.name}"
    if len({member.scored.validation for member in (*one.members, *other.members)}) > 1:
        notes.append(f"{both} are not compared: scored on different validation stories, those of "
                     f"{data_of(a.losses, a.scored)} and of {data_of(b.losses, b.scored)}. Train both on the same")  # fmt: skip
        return False
    if at == "parameters" and abs(one.parameters - other.parameters) > SAME_SIZE * min(one.parameters, other.parameters):
        notes.append(f"{both} are not compared: {one.parameters:,} and {other.parameters:,} parameters are not equal within 5%")
        return False
    if a.scored.tokenizer != b.scored.tokenizer:
        tokenizers = f"{a.scored.tokenizer}, {b.scored.tokenizer}"
        notes.append(f"{both} have different tokenizers ({tokenizers}): bits per byte count only what both give back")
    reading = [(m.config.tokenizer, m.config.packing, m.config.max_stories, m.architecture.max_seq_len) for m in (a, b)]
    fingerprints = (a.scored.data_fingerprint, b.scored.data_fingerprint)
    same_data = None not in fingerprints and len(set(fingerprints)) == 1  # wherever they are stored
    if not same_data and trained_on(a) != trained_on(b):
        notes.append(f"{both} were trained on different data: {trained_on(a)} and {trained_on(b)}")
    elif None in fingerprints:
        notes.append(f"{both}: whether they were trained on the same data is not known, as one run predates that record")
    elif reading[0] == reading[1] and not same_data:
        notes.append(f"{both} may have been trained on different data: both are {trained_on(a)}, with other fingerprints")
    notes += [line for line in [different_code(both, one, other)] if line]
    notes += different_execution(both, *([Run(member.name) for member in candidate.members] for candidate in (one, other)))
    if a.architecture == b.architecture and a.config == b.config:
        notes.append(f"{both} are the same config with the same seed: only rounding or the code can differ")
    elif a.architecture == b.architecture and a.config == replace(
        b.config, seed=a.config.seed, data_seed=a.config.data_seed, data=a.config.data if same_data else b.config.data
    ):
        notes.append(f"{both} differ in nothing but the seed: any difference between them is luck")
    return True


def trained_on(member: Member) -> str:
    """The training data by name and size: 'tinystories (15,939 stories)'."""
    stories, most = member.scored.training_stories, member.config.max_stories
    size = f"{stories:,} stories" if stories else f"the first {most:,} stories" if most else "all stories"
    return f"{member.config.data} ({size})"


def different_code(both: str, one: Candidate, other: Candidate) -> str | None:
    """Name the files of ours that differ; a plugin, named by its module, counts only if every run has it."""
    codes = [member.scored.code for member in (*one.members, *other.members)]
    if None in codes:
        return f"{both}: whether the same code trained them is not known, as one run predates that record"
    names = {name for code in codes for name in code}
    core = sorted(name for name in names if name.endswith((".py", ".cpp", ".h")) or all(name in code for code in codes))
    changed = [name for name in core if len({code.get(name) for code in codes}) > 1]
    shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more files" if len(changed) > 5 else "")
    return f"{both} were trained with different code: {shown}" if changed else None


def older_minutes(candidates: list[Candidate], at: str) -> list[str]:
    """Note the runs of older versions if seconds are compared, or if only some of the runs with a budget in minutes are older."""
    members = [member for candidate in candidates for member in candidate.members if at == "seconds" or member.config.max_minutes]
    older = [member.name for member in members if Run(member.name).seconds_include_overhead()]
    if not older or (at != "seconds" and len(older) == len(members)):
        return []
    return [f"the seconds and minutes of {', '.join(older)} include compiling, measuring the machine and evaluating, which older "
            "versions counted as training"]  # fmt: skip


def summary_of(candidate: Candidate) -> dict:
    def mean_of(column: str) -> float:
        return np.mean([member.log[column].max() for member in candidate.members])

    return {
        "seeds": len(candidate.values), BITS: marked(candidate.values.mean(), candidate.is_bound),
        "deviation of seeds": candidate.values.std(ddof=1) if len(candidate.values) > 1 else float("nan"),
        "parameters": f"{candidate.parameters:,}", "steps": f"{mean_of('step'):,.0f}", "tokens": f"{mean_of('tokens'):,.0f}",
        "minutes": f"{mean_of('seconds') / 60:.1f}",
        **{f"top-{k}": top_share(candidate, k) for k in TOP_K},
    }  # fmt: skip


def top_share(candidate: Candidate, k: int) -> str | None:
    """Share of the tokens that were among the k most likely; None for a model that gives no probabilities of tokens."""
    if candidate.members[0].losses[f"top{k}"].isna().any():
        return None
    return f"{np.mean([m.losses[f'top{k}'].sum() / m.losses['tokens'].sum() for m in candidate.members]):.1%}"
