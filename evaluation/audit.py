"""Audit runs: whether their scores can be right, whatever the code of the model does.

    python -m evaluation audit my_run another --num_stories 200

Prints a line for each check, with what was compared and the problem, and exits with 1 if one failed. A run whose audit failed is
left out of comparisons. Models and tokenizers of plugins are audited on fewer stories whenever they are scored.
"""

import itertools
import sys
from collections import Counter

import numpy as np

from data.cache import say
from data.dataset import choose_validation
from inference import load_model
from metrics.audit import Check
from metrics.scores import evaluate
from metrics.story_losses import audit_run, available_source, losses_of, problems_of, save_audit
from runs.code import digest
from runs.folder import Run, group_members
from runs.tables import show

CLOSE = 1e-3  # nats per token that saved losses may be off, as by another machine


def audit_saved(name: str, num_stories: int, source_if_missing: str | None = None) -> list[Check]:
    """Audit the model of a run, and its saved losses, and record the problems with these."""
    losses, _ = losses_of(name, source_if_missing, say)
    model, tokenizer = load_model(name)
    source = available_source(Run(name).data, source_if_missing, model.config.plugins)
    stories = choose_validation(source, Counter())
    checks = audit_run(name, model, tokenizer, source, stories, num_stories=num_stories)
    checks.append(check_saved(losses, model, tokenizer, stories, num_stories))
    save_audit(name, problems_of(checks))
    return checks


def check_saved(losses, model, tokenizer, stories: list[str], num_stories: int) -> Check:
    """The saved losses are those of all validation stories by this model: a DataFrame as in story_losses.csv."""
    how = f"{len(losses):,} saved losses of {len(stories):,} validation stories"
    if losses["story"].tolist() != [digest(story.encode(errors="surrogatepass")) for story in stories]:
        return Check("saved", how, "story_losses.csv is not of all validation stories in their order: delete it, to score again")
    rows = np.random.default_rng(0).permutation(len(stories))[:num_stories]
    score = evaluate(model, tokenizer, [stories[row] for row in rows])
    how += f"; {len(rows)} of them scored again"
    for column, ours in (("bytes", score.story_bytes), ("tokens", score.story_tokens), ("nats", score.story_nats)):
        off = np.abs(losses[column].to_numpy()[rows] - ours.numpy()) / score.story_tokens.numpy()
        noise = 1.0 if score.is_bound and column == "nats" else CLOSE  # a bound may be drawn
        if not off.mean() <= noise:
            problem = f"the column {column} of story_losses.csv is not that of the model: delete it, to score again"
            return Check("saved", how, problem)
    return Check("saved", how)


def main(arguments):
    """Run the command `audit`."""
    failed = []
    for name in itertools.chain(*map(group_members, arguments.names)):
        say(f"{name}: auditing on {arguments.num_stories} stories")
        checks = audit_saved(name, arguments.num_stories, arguments.data_if_missing)
        problems = problems_of(checks)
        passed = f"all {len(checks)} checks passed" if not problems else f"{len(problems)} of {len(checks)} checks failed"
        show(*map(str, checks), f"{name}: {passed}\n")
        failed += [name] * bool(problems)
    if failed:
        sys.exit(1)
