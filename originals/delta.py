"""Families of published models with the gated delta rule (Qwen3-Next, Qwen3.5); originals/attention.py explains the tables."""

import torch
from torch import Tensor

from config import PRE_NORM, ModelConfig
from originals import attention
from originals.attention import EXPERTS, GEMMA_ENDS, LLAMA_MLP, Family, Table, Transform, block, plus_one
from originals.recurrent import partial_rope, rotated_channels, short_conv

QWEN_DELTA: Table = {
    "1.conv.weight": ("linear_attn.conv1d.weight", short_conv),
    "1.step_bias": "linear_attn.dt_bias",
    "1.log_rate": "linear_attn.A_log",
    "1.norm.weight": "linear_attn.norm.weight",
    "1.w_out.weight": "linear_attn.out_proj.weight",
}
QWEN35_DELTA = QWEN_DELTA | {
    "1.w_qkv.weight": "linear_attn.in_proj_qkv.weight",
    "1.w_gate.weight": "linear_attn.in_proj_z.weight",
    "1.w_beta.weight": "linear_attn.in_proj_b.weight",
    "1.w_step.weight": "linear_attn.in_proj_a.weight",
}
QWEN_NORMS: Table = {
    "0.weight": ("input_layernorm.weight", plus_one),
    "2.weight": ("post_attention_layernorm.weight", plus_one),
}
QWEN_MOE: Table = EXPERTS | {
    "3.shared_mlp.w_gate.weight": "mlp.shared_expert.gate_proj.weight",
    "3.shared_mlp.w_in.weight": "mlp.shared_expert.up_proj.weight",
    "3.shared_mlp.w_out.weight": "mlp.shared_expert.down_proj.weight",
    "3.w_shared_gate.weight": "mlp.shared_expert_gate.weight",
}


def rows_of_heads(num_heads: int, sizes: list[int], *groups: int) -> Transform:
    """Select groups of rows, each for all heads, from a matrix that holds groups of these sizes head by head."""

    def select(weight: Tensor) -> Tensor:
        split = weight.unflatten(0, (num_heads, -1)).split(sizes, dim=1)
        return torch.cat([split[group].flatten(0, 1) for group in groups])

    return select


def qwen_attention(theirs) -> Table:
    """Gated attention; their query matrix holds the rows of each head's queries, then those of its gate."""
    heads, head_dim = theirs.num_attention_heads, theirs.head_dim
    rope = partial_rope(head_dim, rotated_channels(theirs))
    return {
        "1.w_q.weight": ("self_attn.q_proj.weight", rows_of_heads(heads, [head_dim, head_dim], 0), rope),
        "1.w_gate.weight": ("self_attn.q_proj.weight", rows_of_heads(heads, [head_dim, head_dim], 1)),
        "1.w_k.weight": ("self_attn.k_proj.weight", rope),
        "1.w_v.weight": "self_attn.v_proj.weight",
        "1.w_out.weight": "self_attn.o_proj.weight",
        "1.q_norm.weight": ("self_attn.q_norm.weight", plus_one, rope),
        "1.k_norm.weight": ("self_attn.k_norm.weight", plus_one, rope),
    }


def qwen3_next_delta(theirs) -> Table:
    """One matrix holds, by key head, the rows of its queries, keys, values and gates."""
    heads, shared_by = theirs.linear_num_key_heads, theirs.linear_num_value_heads // theirs.linear_num_key_heads
    keys, values = theirs.linear_key_head_dim, theirs.linear_value_head_dim * shared_by
    qkvz, ba = [keys, keys, values, values], [shared_by, shared_by]
    return QWEN_DELTA | {
        "1.w_qkv.weight": ("linear_attn.in_proj_qkvz.weight", rows_of_heads(heads, qkvz, 0, 1, 2)),
        "1.w_gate.weight": ("linear_attn.in_proj_qkvz.weight", rows_of_heads(heads, qkvz, 3)),
        "1.w_beta.weight": ("linear_attn.in_proj_ba.weight", rows_of_heads(heads, ba, 0)),
        "1.w_step.weight": ("linear_attn.in_proj_ba.weight", rows_of_heads(heads, ba, 1)),
    }


def qwen35_layer(theirs, depth: int) -> Table:
    mixer = QWEN35_DELTA if theirs.layer_types[depth] == "linear_attention" else qwen_attention(theirs)
    return QWEN_NORMS | mixer | LLAMA_MLP


def qwen3_next_layer(theirs, depth: int) -> Table:
    mixer = qwen3_next_delta(theirs) if theirs.layer_types[depth] == "linear_attention" else qwen_attention(theirs)
    return QWEN_NORMS | mixer | (LLAMA_MLP if is_dense(theirs, depth) else QWEN_MOE)


def is_dense(theirs, depth: int) -> bool:
    has_experts = theirs.num_experts > 0 and (depth + 1) % theirs.decoder_sparse_step == 0
    return depth in theirs.mlp_only_layers or not has_experts


def qwen_config(theirs, mlps: list[str]) -> ModelConfig:
    """Layers of gated delta rule or gated attention; `mlps` has the MLP or MoE of each layer."""
    attention.require_same(theirs, hidden_act="silu")
    v_heads, width = theirs.linear_num_value_heads, theirs.linear_conv_kernel_dim
    delta = block(
        "GatedDeltaNet", num_heads=theirs.linear_num_key_heads, head_dim=theirs.linear_key_head_dim, v_heads=v_heads,
        v_dim=theirs.linear_value_head_dim, conv_width=None if width == 4 else width,
    )  # fmt: skip
    scaling = attention.rope_scaling(theirs, theirs.rope_parameters)
    gated = block("GatedAttn", rope_share=rotated_channels(theirs) / theirs.head_dim, rope_scaling=scaling)
    mixers = {"linear_attention": delta, "full_attention": gated}
    mixers = [mixers[kind] for kind in attention.layer_kinds(theirs, *mixers)]
    layers = [PRE_NORM.replace("Attn", mixer).replace("MLP", mlp) for mixer, mlp in zip(mixers, mlps, strict=True)]
    theta = attention.rope_theta(theirs, theirs.rope_parameters)
    return attention.llama_config(theirs, layers=attention.tiled(layers), qk_norm=True, rope_theta=theta)


def qwen35_config(theirs) -> ModelConfig:
    return qwen_config(theirs, ["MLP"] * theirs.num_hidden_layers)


def qwen3_next_config(theirs) -> ModelConfig:
    width, shared_width = theirs.moe_intermediate_size, theirs.shared_expert_intermediate_size
    dense = [is_dense(theirs, depth) for depth in range(theirs.num_hidden_layers)]
    if all(dense):
        return qwen_config(theirs, ["MLP"] * len(dense))
    cure = f"it must be a multiple of moe_intermediate_size={width}, the width of an expert"
    fits = width and shared_width and shared_width % width == 0
    attention.require(fits, theirs, "shared_expert_intermediate_size", cure)
    experts = block(
        "MoE", mlp_dim=theirs.moe_intermediate_size, num_experts=theirs.num_experts,
        top_k=theirs.num_experts_per_tok, shared_experts=shared_width // width, shared_gate=True,
        renormalise=theirs.norm_topk_prob, balance_loss=theirs.router_aux_loss_coef,
    )  # fmt: skip
    return qwen_config(theirs, ["MLP" if plain else experts for plain in dense])


FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(qwen3_next_config, GEMMA_ENDS, qwen3_next_layer),
    "qwen3_5_text": Family(qwen35_config, GEMMA_ENDS, qwen35_layer),
}
