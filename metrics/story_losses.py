"""What a trained model scores on every validation story, kept in the run folder: two models are then compared story by story.

story_losses.csv has a row for each story of the whole validation set: its digest, its bytes, its tokens, its summed loss in nats,
and how many of its tokens were among the 1, 5 and 10 that the model held most likely.  story_losses.json says what was scored:
the weights, the stories, the data and the code that the model was trained with.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

from data.dataset import choose_validation
from data.sources import open_source
from runs.code import digest
from runs.folder import Run

TOP_K = (1, 5, 10)
COLUMNS = ["story", "bytes", "tokens", "nats", *(f"top{k}" for k in TOP_K)]
NOT_ITS_OWN = "(not its own)"  # behind the name of data that a run was scored on, but not trained on


@dataclass(frozen=True)
class Scored:
    """What was scored, and on what."""

    weights: str  # digest of model.pth
    validation: str  # digest of the stories, equal where they are the same in the same order
    data: str  # the name of the source
    data_fingerprint: str | None  # of source, tokenizer, context and packing in training; None in runs older than this
    tokenizer: str  # its name
    code: dict[str, str] | None  # a digest of each file that had a say in the training; None in runs older than this
    parameters: int
    flops_per_token: float  # of training


def keep_losses(name: str, source_if_missing: str | None = None):
    """Score the best weights of a run on the whole validation set of its data, and keep what came out in its folder.

    Where the data are not here and source_if_missing is named, that is scored instead, which is said. Raises OSError without it.
    """
    from inference import load_model
    from metrics.cost import model_cost, num_parameters
    from metrics.scores import evaluate

    run = Run(name)
    model, tokenizer = load_model(name)
    data, stories = validation_stories(run.train_config.data, source_if_missing)
    score = evaluate(model, tokenizer, stories, top_k=TOP_K)
    saved = run.load("model.pth", {"data"})
    digests = [digest(story.encode(errors="surrogatepass")) for story in stories]
    columns = [score.story_bytes, score.story_tokens, score.story_nats, *(score.story_hits[k] for k in TOP_K)]
    rows = zip(digests, *(column.tolist() for column in columns), strict=True)
    run.save_log([dict(zip(COLUMNS, row, strict=True)) for row in rows], COLUMNS, "story_losses.csv")
    scored = Scored(
        weights=digest(run.path("model.pth").read_bytes()), validation=digest("".join(digests).encode()), data=data,
        data_fingerprint=saved.get("data_fingerprint"), tokenizer=tokenizer.name, code=saved.get("code"),
        parameters=num_parameters(model), flops_per_token=model_cost(model).training_flops,
    )  # fmt: skip
    run.save_text("story_losses.json", json.dumps(asdict(scored), indent=2) + "\n")


def validation_stories(source: str, source_if_missing: str | None) -> tuple[str, list[str]]:
    """The name of a source and its validation stories.

    Where it is not here, those of source_if_missing, with a line that says so; OSError without one.
    """
    try:
        opened = open_source(source)
        name = opened.name
    except OSError as error:  # no such file or folder, or no way to the hub
        if source_if_missing is None:
            raise
        opened = open_source(source_if_missing)
        name = f"{opened.name} {NOT_ITS_OWN}"
        print(f"{error}.\nRuns that were trained on {source!r} are scored on {opened.name} instead, which is not what they know.")
    return name, choose_validation(opened, Counter())


def read_losses(name: str):
    """The kept losses of a run: a pandas DataFrame with COLUMNS, and what was Scored. Needs no torch.

    Raises FileNotFoundError where there are none, ValueError where they are damaged or of other weights than those in the folder.
    """
    import pandas as pd

    run = Run(name)
    try:
        scored = Scored(**json.loads(run.path("story_losses.json").read_text(encoding="utf-8")))
        losses = pd.read_csv(run.path("story_losses.csv"), dtype={"story": str})
    except (ValueError, TypeError, pd.errors.EmptyDataError) as error:  # not JSON, no table, or another set of fields
        raise ValueError(f"the losses by story of the run {name!r} are damaged") from error
    whole = list(losses.columns) == COLUMNS and all(pd.api.types.is_numeric_dtype(losses[column]) for column in COLUMNS[1:])
    if not whole or digest("".join(losses["story"].astype(str)).encode()) != scored.validation:
        raise ValueError(f"the losses by story of the run {name!r} are damaged")
    if digest(run.path("model.pth").read_bytes()) != scored.weights:
        raise ValueError(f"the losses by story of the run {name!r} are of other weights than its model.pth")
    return losses, scored


def losses_of(name: str, source_if_missing: str | None = None, tell: Callable[[str], None] = print):
    """The losses of a run, as `read_losses`; scored anew where they are missing, damaged or old, and told."""
    Run(name).path("model.pth")
    try:
        return read_losses(name)
    except FileNotFoundError:
        tell(f"the run {name!r} has no losses by story: scoring it on its validation stories")
    except ValueError as error:
        tell(f"{error}: scoring it on its validation stories again")
    keep_losses(name, source_if_missing)
    return read_losses(name)
