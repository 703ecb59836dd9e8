"""Does a model write with a cache what it writes without?  B batch, T time."""

import itertools
from functools import partial
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from model import Cache
from modules.blame import blame, blocks_of, first_difference, record_calls, takes_cache
from modules.contract import ContractError
from modules.model_trial import B, ModelTrial, errors_of, is_causal
from modules.registry import takes

CHUNKS = (7, 1, 1, 30, 2)  # a sequence in uneven pieces, again and again


class Inexact(NamedTuple):
    """Why a cache is not used."""

    reason: str
    is_optional: bool  # since a block says so, by taking none


INEXACT: WeakKeyDictionary[nn.Module, Inexact | None] = WeakKeyDictionary()  # of all models that were checked


def cache_is_exact(model: nn.Module) -> bool:
    """Whether a model that reads token by token, with a cache, predicts what it predicts at once. Checked once per model."""
    return find_inexact_cache(model) is None


def find_inexact_cache(model: nn.Module) -> Inexact | None:
    """Why the model must not use a cache; None if it may."""
    if model not in INEXACT:
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            try:
                trial = ModelTrial(model)
                with errors_of(trial, " with a cache"):
                    INEXACT[model] = compare_cache(trial)
            except ContractError as error:
                INEXACT[model] = Inexact(str(error), is_optional=False)
    return INEXACT[model]


def compare_cache(trial: ModelTrial) -> Inexact | None:
    """Compare reading token by token and in chunks with reading at once."""
    model = trial.evaluated
    if not takes(model, "cache"):
        return Inexact(f"{trial.name} takes no `cache`", is_optional=True)
    if not is_causal(model):
        return Inexact(f"{trial.name} is not causal", is_optional=True)
    for how, lengths in {"token by token": [1] * trial.short, "in chunks": uneven(trial.long), "at once": [trial.long]}.items():
        tokens, cache = trial.tokens(B, sum(lengths)), Cache()
        expected = record_calls(model, [partial(trial.run, model, tokens)])
        ours = record_calls(model, [partial(trial.run, model, piece, cache=cache) for piece in tokens.split(lengths, dim=1)])
        fault = first_difference(model, expected, ours, sum(lengths))
        if fault is not None:
            block, names = blame(fault, model), blocks_of(model)
            if block in names and not takes_cache(block):
                return Inexact(f"the block {names[block]!r} takes no `cache`, so token by token it misses the earlier ones", True)
            place = trial.place(fault, model)
            return Inexact(f"{trial.name} gives another result{place} with a cache, {how}, than without", is_optional=False)
    return None


def uneven(T: int) -> list[int]:
    """Lengths of pieces that add up to T.

    >>> uneven(20)
    [7, 1, 1, 11]
    """
    ends = itertools.takewhile(lambda end: end < T, itertools.accumulate(itertools.cycle(CHUNKS)))
    return [end - start for start, end in itertools.pairwise([0, *ends, T])]
