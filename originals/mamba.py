"""Families of Mamba and Mamba-2; originals/attention.py explains the tables."""

import math

from torch import Tensor

from config import ModelConfig
from originals.attention import Family, Table, Transform, block, part, require, require_same, unless
from originals.recurrent import short_conv

MAMBA_ENDS: Table = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
MAMBA: Table = {
    "0.weight": "norm.weight",
    "1.w_in.weight": ("mixer.in_proj.weight", part(0, 2)),
    "1.w_gate.weight": ("mixer.in_proj.weight", part(1, 2)),
    "1.conv.weight": ("mixer.conv1d.weight", short_conv),
    "1.conv.bias": "mixer.conv1d.bias",
    "1.w_select.weight": "mixer.x_proj.weight",
    "1.w_step.weight": "mixer.dt_proj.weight",
    "1.w_step.bias": "mixer.dt_proj.bias",
    "1.log_rates": ("mixer.A_log", Tensor.flatten),
    "1.skip": "mixer.D",
    "1.w_out.weight": "mixer.out_proj.weight",
}
MAMBA_BIASES: Table = {
    "1.w_in.bias": ("mixer.in_proj.bias", part(0, 2)),
    "1.w_gate.bias": ("mixer.in_proj.bias", part(1, 2)),
    "1.w_out.bias": "mixer.out_proj.bias",
}
CONTEXT = 2048  # of the training of the published models; their configs have none


def rows(start: int, end: int) -> Transform:
    return lambda weight: weight[start:end]


def mamba_config(theirs) -> ModelConfig:
    step_rank = unless(math.ceil(theirs.hidden_size / 16), theirs.time_step_rank)
    mixer = block("Mamba", state_dim=unless(16, theirs.state_size), step_rank=step_rank, **common_options(theirs))
    return one_block_config(theirs, mixer, linear_bias=theirs.use_bias)


def mamba2_config(theirs) -> ModelConfig:
    limits = tuple(theirs.time_step_limit) == (0.0, math.inf)
    require(limits, theirs, "time_step_limit", "step sizes are not limited, which is (0.0, inf)")
    require_same(theirs, use_bias=False)
    state_dim, groups = unless(32, theirs.state_size), unless(1, theirs.n_groups)
    mixer = block("Mamba2", state_dim=state_dim, groups=groups, **common_options(theirs))
    return one_block_config(theirs, mixer, head_dim=theirs.head_dim)


def common_options(theirs) -> dict[str, int | None]:
    return {"expand": unless(2, theirs.expand), "conv_width": unless(4, theirs.conv_kernel)}


def one_block_config(theirs, mixer: str, **differences) -> ModelConfig:
    """Layers of a norm and a mixer. Without attention the number of heads does not matter."""
    require_same(theirs, hidden_act="silu", use_conv_bias=True)
    return ModelConfig(
        dim=theirs.hidden_size, num_layers=theirs.num_hidden_layers, layers=f"Norm->{mixer}->+", num_heads=1, num_kv_heads=1,
        max_seq_len=getattr(theirs, "max_position_embeddings", CONTEXT), positions="none",
        norm_eps=theirs.layer_norm_epsilon, tied_embeddings=theirs.tie_word_embeddings,
        **differences,
    )  # fmt: skip


def mamba_layer(theirs, depth: int) -> Table:
    return MAMBA | (MAMBA_BIASES if theirs.use_bias else {})


def mamba2_layer(theirs, depth: int) -> Table:
    """Their in_proj holds the rows of the gate, of the input of the convolution, and of the step sizes."""
    gate = theirs.num_heads * theirs.head_dim
    end = 2 * gate + 2 * theirs.n_groups * theirs.state_size
    return {
        "0.weight": "norm.weight",
        "1.w_gate.weight": ("mixer.in_proj.weight", rows(0, gate)),
        "1.w_in.weight": ("mixer.in_proj.weight", rows(gate, end)),
        "1.w_step.weight": ("mixer.in_proj.weight", rows(end, end + theirs.num_heads)),
        "1.w_step.bias": "mixer.dt_bias",
        "1.conv.weight": ("mixer.conv1d.weight", short_conv),
        "1.conv.bias": "mixer.conv1d.bias",
        "1.log_rates": "mixer.A_log",
        "1.skip": "mixer.D",
        "1.norm_weight": "mixer.norm.weight",
        "1.w_out.weight": "mixer.out_proj.weight",
    }


FAMILIES: dict[str, Family] = {
    "mamba": Family(mamba_config, MAMBA_ENDS, mamba_layer, layers="backbone.layers"),
    "mamba2": Family(mamba2_config, MAMBA_ENDS, mamba2_layer, layers="backbone.layers"),
}
