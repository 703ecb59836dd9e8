"""Every field of their configs, moved alone: our model has the logits of the original, or refuses the config in one line."""

import dataclasses
from types import NoneType
from typing import get_args

import pytest
import torch
from published import LLAMA3, YARN, random_model, some_tokens, their_config

from config import StepError
from originals.load import FAMILIES, convert_config, load_original

BASES = (
    "llama_scaled", "mistral", "gpt2", "qwen3_windows", "gemma", "gemma2", "gemma3_text_scaled", "mixtral_windows",
    "deepseek_v3_scaled", "qwen3_5_text", "qwen3_next", "mamba_wide", "mamba2_wide", "recurrent_gemma_wide",
)  # fmt: skip
TOKENS = some_tokens(1, 24)  # more than a window holds, and than the context before RoPE was scaled
SCALED = {**LLAMA3, **YARN, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}  # what RoPE of any type asks for


def other_values(value, annotation=None) -> list:
    """Values to move a field to, by a rule for its type."""
    from transformers.activations import ACT2FN
    from transformers.configuration_utils import ALLOWED_LAYER_TYPES
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if isinstance(value, bool):
        others = [not value]
    elif isinstance(value, int):
        others = [0, value // 2, value + 1, 2 * value]
    elif isinstance(value, float):
        others = [2 * value + 0.25]
    elif isinstance(value, str):
        others = next((list(names) for names in (ACT2FN, ALLOWED_LAYER_TYPES) if value in names), ["other"])
    elif isinstance(value, dict):
        others = [value | {key: other} for key in value for other in other_values(value[key])]
        if "rope_type" in value:
            others += [value | SCALED | {"rope_type": kind} for kind in ROPE_INIT_FUNCTIONS]
    elif isinstance(value, list | tuple):
        others = [value[::-1], value[:-1], *([other, *value[1:]] for first in value[:1] for other in other_values(first))]
    else:
        samples = {bool: True, int: 3, float: 0.5, str: "other", list[int]: [0], list[str]: ["other"]}
        others = [samples[kind] for kind in get_args(annotation) if kind in samples]
    return others + [None] * (value is not None and NoneType in get_args(annotation))


def changes(name: str) -> list[tuple[str, object]]:
    """Fields and values; the fields that all configs share, such as id2label, are moved in the first family alone."""
    from transformers import PreTrainedConfig

    config = their_config(name)
    shared = {field.name for field in dataclasses.fields(PreTrainedConfig)} if name != BASES[0] else set()
    annotations = {field.name: field.type for field in dataclasses.fields(config)}
    fields = sorted((annotations.keys() | config.to_dict().keys()) - shared - {"model_type"})
    return [(field, value) for field in fields for value in other_values(getattr(config, field), annotations.get(field))]


@torch.no_grad()
def outcome(name: str, field: str, value) -> str:
    """How our model of a changed config compares with the original: no original, refused, equal, or a fault."""
    try:
        config = their_config(name, **{field: value})
    except Exception:
        return "no original"
    refusal = None
    try:
        convert_config(config.model_type, config)
    except Exception as error:
        refusal = error
    if refusal is None or not is_clean(refusal):
        try:
            theirs = random_model(config)
            expected = theirs(TOKENS, use_cache=False, return_dict=True).logits
        except Exception:
            return "no original"
    if refusal is None:
        try:
            logits = load_original(theirs)(TOKENS)[0]
        except Exception as error:
            refusal = error
    if refusal is not None:
        return "refused" if is_clean(refusal) else f"{type(refusal).__name__}: {refusal}"
    difference = (logits - expected).abs().max().item()
    return "equal" if difference < 1e-4 else f"the logits differ by {difference}"


def is_clean(error: Exception) -> bool:
    return type(error) in (ValueError, StepError) and "\n" not in str(error)


def test_the_fields_of_every_family_are_moved():
    assert {their_config(name).model_type for name in BASES} == FAMILIES.keys()


@pytest.mark.parametrize("name", BASES)
def test_a_field_acts_as_in_the_original_or_is_refused(name):
    outcomes = [(field, value, outcome(name, field, value)) for field, value in changes(name)]
    assert [(*change, result) for *change, result in outcomes if result not in ("no original", "refused", "equal")] == []
    results = [result for *_, result in outcomes]
    assert results.count("equal") > 20 and results.count("refused") > 8
