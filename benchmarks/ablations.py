"""Named ablations of a preset, for worth.py --ablate.

An ablation is a list of changes "group.field=value": the group is model or train, the value a Python literal or a string without
quotes. no_TRICK turns a trick off, TRICK turns it on.
"""

import ast
from collections.abc import Iterable
from dataclasses import fields, replace

from config import did_you_mean
from runs.presets import PRESETS, Preset


def layers(*replaced: tuple[str, str]) -> str:
    """Change the speedrun's layer strings by replacing substrings: (old, new) pairs."""
    strings = PRESETS["speedrun"].model.layers
    for old, new in replaced:
        strings = tuple(string.replace(old, new) for string in strings)
    return f"model.layers={strings!r}"


VALUES = "ValueAttn(residual=False, embedding=True)"

ABLATIONS: dict[str, list[str]] = {
    # tricks of the speedrun
    "AdamW": ["train.optimizer=AdamW", "train.lr_max=0.004", "train.betas=(0.9, 0.95)"],
    "no_embedding_decay": ["train.embedding_decay=0.0"],
    "weight_decay_of_0.1": ["train.weight_decay=0.1"],
    "learning_rate_of_0.02": ["train.lr_max=0.02"],
    "no_weight_averaging": ["train.ema_decay=None"],
    "no_qk_norm": ["model.qk_norm=False"],
    "SwiGLU": ["model.activation=SiLU", "model.gated=True"],
    "GELU": ["model.activation=GELU"],
    "no_zero_init": ["model.zero_init=False"],
    "tied": ["model.tied_embeddings=True"],
    "no_pairs": [layers(("Bigram(size=1536)->", ""))],
    "no_short_convolution": [layers(("->ShortConv(width=2)", ""))],
    "no_embedding_shortcut": [layers(("Shortcut->|->", ""))],
    "no_value_embedding": [layers((VALUES, "Attn"))],
    "no_story_mask": ["train.mask_stories=False"],
    "heads_of_32": ["model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=32"],
    "vocabulary_of_1024": ["train.tokenizer=bpe_tokenizer_1024"],
    "torch_alone": ["train.fast=False"],
    "no_chunked_loss": ["train.loss_chunk=None"],
    "AdamW_betas_of_0.9_0.95": ["train.betas=(0.9, 0.95)"],
    "batches_of_8": ["train.batch_size=8", "train.batch_size_start=None"],
    "batches_of_32": ["train.batch_size=32", "train.batch_size_start=None"],
    "growing_batches": ["train.batch_size=32", "train.batch_size_start=8"],
    # tricks that it does not use
    "logit_soft_cap": ["model.logit_soft_cap=15.0"],
    "value_residual": [layers(("->Attn", "->ValueAttn"), (VALUES, "ValueAttn(residual=True, embedding=True)"))],
    "convolutions_in_each_layer": [
        layers(
            ("Norm->Attn", "Norm->ShortConv->Attn"), (f"Norm->{VALUES}", f"Norm->ShortConv->{VALUES}"),
            ("Norm->MLP", "Norm->ShortConv->MLP"),
        )
    ],
    "sandwich_norm": [
        "model.zero_init=False",
        layers(("Attn->+", "Attn->Norm->+"), (f"{VALUES}->+", f"{VALUES}->Norm->+"), ("MLP->+", "MLP->Norm->+")),
    ],
    "Muon_momentum_of_0.9": ["train.muon_momentum=0.9"],
    "growing_window": ["train.window_start=32"],
    "cosine": ["train.schedule=cosine"],
    "wsd": ["train.schedule=wsd"],
    "no_weight_decay": ["train.weight_decay=0.0"],
    "no_clipping": ["train.grad_clip=None"],
}  # fmt: skip

# AdamW over learning rate and decay, to compare Muon with a tuned AdamW
ADAMW = {
    f"AdamW_{rate}_decay_{decay}": [
        "train.optimizer=AdamW", "train.betas=(0.9, 0.95)", f"train.lr_max={rate}", f"train.weight_decay={decay}",
        f"train.embedding_decay={decay}",
    ]
    for rate in (0.002, 0.004, 0.008, 0.016) for decay in (0.01, 0.1, 0.5)
}  # fmt: skip


def chosen_ablations(names: Iterable[str]) -> dict[str, list[str]]:
    """Look up ablations by name; "all" gives ABLATIONS, "tune_AdamW" gives ADAMW. Raises ValueError for an unknown name."""
    groups = {"all": ABLATIONS, "tune_AdamW": ADAMW} | {name: {name: change} for name, change in (ABLATIONS | ADAMW).items()}
    for name in names:
        if name not in groups:
            raise ValueError(f"no ablation is called {name!r}.{did_you_mean(name, groups)} There are: {', '.join(groups)}")
    return {key: change for name in names for key, change in groups[name].items()}


def changed(preset: Preset, changes: list[str] | tuple[str, ...]) -> Preset:
    """Apply changes such as ["model.dim=64", "train.dtype=bfloat16"] to a preset. Raises ValueError for an invalid one."""
    values = {"model": {}, "train": {}}
    for change in changes:
        where, equals, text = change.partition("=")
        group, _, name = where.partition(".")
        if group not in values or not equals:
            raise ValueError(f"{change!r} is not a change: write group.field=value with the group model or train")
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
