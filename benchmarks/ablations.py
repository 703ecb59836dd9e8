"""Named changes of a preset, which time_to_loss.py --ablate compares with the preset itself.

A change is a list of "group.field=value": the group is model or train, the value is written as in Python, a string without
quotes. One that turns a trick off is named no_TRICK, one that turns it on is named by the trick.
"""

import ast
from dataclasses import fields, replace

from config import Preset, did_you_mean

ABLATIONS: dict[str, list[str]] = {
    "AdamW": ["train.optimizer=AdamW"],
    "no_zero_init": ["model.zero_init=False"],
    "no_weight_averaging": ["train.weight_averaging=None"],
    "no_growing_batch": ["train.batch_size_start=None"],
    "no_growing_window": ["train.window_start=None"],
    "no_story_mask": ["train.mask_stories=False"],
    "padded": ["train.packing=padded"],
    "no_warmup": ["train.warmup_steps=0"],
    "untied": ["model.tied_embeddings=False"],
    "qk_norm": ["model.qk_norm=True"],
    "logit_soft_cap": ["model.logit_soft_cap=15.0"],
    "ReLU2": ["model.activation=ReLU2", "model.gated=False"],
    "float32": ["train.dtype=float32"],
    "not_compiled": ["train.compile=False"],
    "sdpa": ["model.attention=sdpa"],
}


def changed(preset: Preset, changes: list[str] | tuple[str, ...]) -> Preset:
    """The preset with these changes: ["model.dim=64", "train.dtype=bfloat16"]. Raises ValueError that names what cannot be."""
    values = {"model": {}, "train": {}}
    for change in changes:
        where, equals, text = change.partition("=")
        group, _, name = where.partition(".")
        if group not in values or not equals:
            raise ValueError(f"{change!r} is no change: write group.field=value with the group model or train")
        names = [field.name for field in fields(getattr(preset, group))]
        if name not in names:
            raise ValueError(f"{change!r}: {group} has no field {name!r}.{did_you_mean(name, names)}")
        values[group][name] = read_value(text)
    return Preset(replace(preset.model, **values["model"]), replace(preset.train, **values["train"]))


def read_value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a string without quotes
        return text
