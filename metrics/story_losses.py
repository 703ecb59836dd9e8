"""Losses of a trained model by validation story, saved in the run folder, so that models can be compared story by story.

story_losses.csv has a row for each story of the whole validation set: its digest, the bytes that the tokenizer gives back, its
tokens, summed loss in nats, and how many of its tokens were among the 1, 5 and 10 most likely.  story_losses.json says what was
scored: the weights, the stories, and the data and code of the training; whether the losses are upper bounds; and the problems
that the audit of a model or tokenizer of a plugin found.
"""

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from config import stories_of
from data.dataset import MAX_LOST, choose_validation, fingerprint
from data.sources import Source, open_source, portable_name
from runs.code import digest
from runs.folder import Run

TOP_K = (1, 5, 10)
COLUMNS = ["story", "bytes", "tokens", "nats", *(f"top{k}" for k in TOP_K)]
NOT_ITS_OWN = "(not its own)"  # marks data that a run was scored on, but not trained on


@dataclass(frozen=True)
class Scored:
    """What was scored, and on which data."""

    weights: str  # digest of model.pth
    validation: str  # digest of the stories in their order
    data: str  # the name of the source
    training_stories: int | None  # of the training; None in old runs
    data_fingerprint: str | None  # of source, tokenizer, context and packing in training; None in old runs
    tokenizer: str  # its name
    lost: float  # share of the bytes of the stories that the tokenizer does not give back
    code: dict[str, str] | None  # digest of each file that affected the training; None in old runs
    parameters: int
    flops_per_token: float  # of training
    is_bound: bool = False  # the losses are upper bounds
    audit: list[str] | None = None  # the problems that an audit found; None: there was none


def save_losses(name: str, source_if_missing: str | None = None):
    """Score the best weights of a run on its whole validation set, and save the losses in its folder.

    A model or tokenizer of a plugin is audited; its problems are printed and saved. If the data of the run are not available,
    source_if_missing is scored instead, which is printed; OSError is raised without one.
    """
    from inference import load_model
    from metrics.cost import model_cost, num_parameters
    from metrics.scores import evaluate

    run = Run(name)
    model, tokenizer = load_model(name)
    source = available_source(run.data, source_if_missing, run.model_config.plugins)
    data, stories = source.name, choose_validation(source, Counter())
    score = evaluate(model, tokenizer, stories, top_k=TOP_K)
    problems = None
    if run.model_config.plugins or type(tokenizer).__module__ != "tokenizer":
        problems = problems_of(audit_run(name, model, tokenizer, source, stories))
        for problem in problems:
            print(f"the audit of {name} failed: {problem}")
    saved = run.load("model.pth", {"data"})
    digests = [digest(story.encode(errors="surrogatepass")) for story in stories]
    columns = [column.tolist() for column in (score.story_bytes, score.story_tokens, score.story_nats)]
    columns += [score.story_hits[k].tolist() if score.story_hits else [None] * len(stories) for k in TOP_K]
    rows = zip(digests, *columns, strict=True)
    run.save_log([dict(zip(COLUMNS, row, strict=True)) for row in rows], COLUMNS, "story_losses.csv")
    scored = Scored(
        weights=digest(run.path("model.pth").read_bytes()), validation=digest("".join(digests).encode()),
        data=label(run, data, stories), training_stories=saved.get("training_stories"),
        data_fingerprint=saved.get("data_fingerprint"), tokenizer=tokenizer.name,
        lost=1 - int(score.story_bytes.sum()) / sum(len(story.encode(errors="replace")) for story in stories),
        code=saved.get("code"), parameters=num_parameters(model), flops_per_token=model_cost(model).training_flops,
        is_bound=score.is_bound, audit=problems,
    )  # fmt: skip
    run.save_text("story_losses.json", json.dumps(asdict(scored), indent=2) + "\n")


def audit_run(name: str, model, tokenizer, source: Source, stories: list[str], **options) -> list:
    """Audit the model of a run on the validation stories of a source: a list of Check. Options as in `metrics.audit.audit`."""
    from metrics.audit import audit, reference_stories
    from metrics.world_grades import is_world

    weights = digest(Run(name).path("model.pth").read_bytes())
    reference = reference_stories(source, stories, max(100, options.get("num_stories", 0)), seed=weights)
    world = stories_of(source.name) if is_world(source.name) else None
    is_held_out = "validation" not in source.splits
    return audit(model, tokenizer, stories, reference, world=world, same_source=is_held_out, **options)


def problems_of(checks: list) -> list[str]:
    """The problems of failed checks, each with the name of the check."""
    return [f"{check.name}: {check.problem}" for check in checks if check.problem]


def save_audit(name: str, problems: list[str]):
    """Record the problems that an audit found with the losses of a run."""
    _, scored = read_losses(name)
    Run(name).save_text("story_losses.json", json.dumps(asdict(replace(scored, audit=problems)), indent=2) + "\n")


def validation_stories(
    source: str, source_if_missing: str | None, plugins: tuple[str, ...] = ()
) -> tuple[str, list[str]]:
    """Return the name of a source and its validation stories, or those of source_if_missing if it is not available.

    The source may be DATA of the plugins. Raises OSError if neither is available.
    """
    opened = available_source(source, source_if_missing, plugins)
    return opened.name, choose_validation(opened, Counter())


def available_source(source: str, source_if_missing: str | None, plugins: tuple[str, ...] = ()) -> Source:
    """Open a source, or source_if_missing if it is not available, which is printed. Raises OSError if neither is."""
    try:
        from modules.data_plugins import open_data  # which imports torch

        return open_data(source, plugins)
    except OSError as error:  # no such file or folder, or no connection to the hub
        if source_if_missing is None:
            raise type(error)(f"{error}. To score on other stories, give data_if_missing, such as auto") from error
        opened = open_source(source_if_missing)
        print(f"{error}.\nRuns that were trained on {portable_name(source)} are scored on {opened.name} instead.")
        return opened


def label(run: Run, data: str, stories: list[str]) -> str:
    """The name of the data that a run is scored on, marked if these are not the validation stories of its training.

    The fingerprint of the stories decides, not where they are stored or what they are called.
    """
    saved = run.load("model.pth", {"validation_stories", "validation_fingerprint"})
    is_own = fingerprint(stories[: saved["validation_stories"]]) == saved["validation_fingerprint"]
    return data if is_own else f"{data} {NOT_ITS_OWN}"


def read_losses(name: str):
    """Read the saved losses of a run, without torch: a pandas DataFrame with COLUMNS, and Scored.

    Raises FileNotFoundError if there are none, ValueError if they are damaged or belong to other weights.
    """
    import pandas as pd

    run = Run(name)
    try:
        scored = Scored(**json.loads(run.read("story_losses.json")))
        losses = pd.read_csv(io.BytesIO(run.read("story_losses.csv")), dtype={"story": str})
    except (ValueError, TypeError, pd.errors.EmptyDataError) as error:  # not JSON, not a table, or other fields
        raise ValueError(f"the losses by story of the run {name!r} are damaged or of an older version") from error
    complete = list(losses.columns) == COLUMNS and all(pd.api.types.is_numeric_dtype(losses[column]) for column in COLUMNS[1:])
    if not complete or digest("".join(losses["story"].astype(str)).encode()) != scored.validation:
        raise ValueError(f"the losses by story of the run {name!r} are damaged")
    if digest(run.read("model.pth")) != scored.weights:
        raise ValueError(f"the losses by story of the run {name!r} are of other weights than its model.pth")
    return losses, scored


def data_of(losses, scored: Scored) -> str:
    """The data by name, size and digest: 'tinystories (15,939 stories; 3,000 for validation, digest 10f8fa6a81eceb20)'.

    A sample and the whole of a data set bear the same name; size and digest tell them apart.
    """
    training = "" if scored.training_stories is None else f"{scored.training_stories:,} stories; "
    return f"{scored.data} ({training}{len(losses):,} for validation, digest {scored.validation})"


def why_left_out(name: str, scored: Scored) -> str | None:
    """Why the bits per byte of a run are not to be compared: a failed audit, or a lossy tokenizer; None if they are."""
    if scored.audit:
        more = f" and {len(scored.audit) - 1} more" if len(scored.audit) > 1 else ""
        return f"{name} is left out, as its audit failed: {scored.audit[0]}{more}. See python -m evaluation audit {name}"
    if scored.lost <= MAX_LOST:
        return None
    return (f"{name} is left out: its tokenizer {scored.tokenizer} loses {scored.lost:.1%} of the text, so its bits per byte do "
            "not compare. Train with one that keeps the text, such as --train.tokenizer hf:openai-community/gpt2")  # fmt: skip


def losses_of(name: str, source_if_missing: str | None = None, tell: Callable[[str], None] = print):
    """Read the losses of a run; score it again if they are missing, damaged or outdated, and say so."""
    Run(name).path("model.pth")
    try:
        return read_losses(name)
    except FileNotFoundError:
        tell(f"the run {name!r} has no losses by story: scoring it on its validation stories")
    except ValueError as error:
        tell(f"{error}: scoring it on its validation stories again")
    save_losses(name, source_if_missing)
    return read_losses(name)
