"""Audit: whether the scores of a model can be right, whatever its code does.

    python -m evaluation audit my_run

subject.py   Subject, Check: what is audited, and the result of a check
text.py      check_text: the bytes that a tokenizer gives back
calls.py     CALL_CHECKS: the score of a story depends on nothing else, and leaves no trace
tokens.py    TOKEN_CHECKS: models with logits: the future, the length, and prefixes alone
totals.py    TOTAL_CHECKS: models with story_nats: the probabilities of all stories do not exceed 1
memory.py    check_memory, reference_stories: whether a model knows the validation stories by heart
"""

from functools import partial

from metrics.audit.calls import CALL_CHECKS
from metrics.audit.memory import check_memory, reference_stories
from metrics.audit.subject import UNFINISHED, Check, Subject, run_check
from metrics.audit.text import check_text
from metrics.audit.tokens import TOKEN_CHECKS
from metrics.audit.totals import TOTAL_CHECKS
from metrics.scores import scores_itself

__all__ = ["Check", "audit", "reference_stories"]

NUM_STORIES = 24  # of each check


def audit(
    model, tokenizer, stories: list[str], reference: list[str] | None = None, *, world: str | None = None,
    same_source: bool = False, num_stories: int = NUM_STORIES,
) -> list[Check]:  # fmt: skip
    """Test on a sample of stories whether the scores of a model can be right. Model and random state stay as they are.

    Parameters
    ----------
    model, tokenizer : nn.Module, Tokenizer
        What is scored. A copy of the model is tested.
    stories : list of str
        Validation stories.
    reference : list of str, optional
        Stories of the same kind that the model must not score worse than the validation stories, see `reference_stories`. Without
        them memory of the validation stories is not tested.
    world : str, optional
        The storyworld that the stories are of.
    same_source : bool, default False
        Whether reference and validation stories are drawn from the same distribution, not from a split of their own each.
    num_stories : int, default 24
        Stories of each check; memory takes at least 100.

    Returns
    -------
    list of Check
        What was checked and how, and the problem if a check failed.

    Examples
    --------
    >>> [check.name for check in audit(*load_model("my_run"), stories) if check.problem]  # doctest: +SKIP
    []
    """
    try:
        checks = TOTAL_CHECKS if scores_itself(model) else TOKEN_CHECKS
    except ValueError as error:
        return [Check("model", "story_nats, is_bound and causal", str(error))]
    subject = Subject(model, tokenizer, stories, num_stories)
    checks = {"text": check_text, **checks, **CALL_CHECKS}
    if reference is not None:
        checks["memory"] = partial(check_memory, reference=reference, world=world, same_source=same_source)
    results = []
    for name, check in checks.items():
        results.append(run_check(name, check, subject))
        if results[-1].how == UNFINISHED or (name == "logits" and results[-1].problem):  # the others would say the same
            break
    return results
