"""The families of published models with a recurrence that become ours; see originals_families.py, which says how to read it."""

import torch
from torch import Tensor

from config import ModelConfig
from originals.attention import (
    GEMMA_ENDS,
    Family,
    Table,
    Transform,
    activation,
    block,
    plus_one,
    require,
    require_same,
    tiled,
)  # fmt: skip

RECURRENT_GEMMA_ENDS = GEMMA_ENDS | {"norm.weight": ("model.final_norm.weight", plus_one)}


def rope_of_a_share(head_dim: int, turned: int) -> Transform:
    """RecurrentGemma turns channels k and k + turned / 2 of the first `turned` of a head, ours k and k + head_dim / 2."""
    still = (head_dim - turned) // 2
    first, second, rest = torch.arange(head_dim).split([turned // 2, turned // 2, head_dim - turned])
    order = torch.cat([first, rest[:still], second, rest[still:]])
    return lambda weight: weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def short_conv(weight: Tensor) -> Tensor:
    """torch's Conv1d keeps (channels, 1, width), the last for the token itself; ours (width, channels), and adds that token."""
    weight = weight[:, 0].flip(1).T.clone()
    weight[0] -= 1
    return weight


def negative(weight: Tensor) -> Tensor:
    """RecurrentGemma's parameter of the decay is -Λ of the paper."""
    return -weight


def flat(weight: Tensor) -> Tensor:
    return weight.flatten()


def turned_channels(theirs) -> int:
    rope = theirs.rope_parameters
    require(rope["rope_type"] == "default", theirs, "rope_parameters", "RoPE is not stretched")
    return int(theirs.head_dim * rope.get("partial_rotary_factor", 1.0))


def recurrent_gemma_config(theirs) -> ModelConfig:
    """Their config names no context: it is the 8192 tokens that the published models were trained on (arXiv 2404.07839)."""
    require_same(theirs, attention_bias=False, attention_dropout=0.0)
    dim, heads = theirs.hidden_size, theirs.num_attention_heads
    recurrent = block(
        "RGLRU", width=None if theirs.lru_width == dim else theirs.lru_width,
        conv_width=None if theirs.conv1d_width == 4 else theirs.conv1d_width,
    )  # fmt: skip
    attention = block(
        "RopeAttn", window=theirs.attention_window_size, rope_share=turned_channels(theirs) / theirs.head_dim, linear_bias=False,
        out_bias=True,
    )  # fmt: skip
    mixers = {"linear_attention": recurrent, "sliding_attention": attention}
    return ModelConfig(
        dim=dim, num_layers=theirs.num_hidden_layers, num_heads=heads, num_kv_heads=theirs.num_key_value_heads,
        max_seq_len=getattr(theirs, "max_position_embeddings", 8192), rope_theta=float(theirs.rope_parameters["rope_theta"]),
        norm_eps=theirs.rms_norm_eps, mlp_dim=theirs.intermediate_size // 2, linear_bias=True,
        activation=activation(theirs, "hidden_activation"), logit_soft_cap=theirs.logits_soft_cap,
        embedding_scale=torch.tensor(dim**0.5, dtype=torch.bfloat16).item(),  # which they keep in this format
        tied_embeddings=theirs.tie_word_embeddings,
        layers=tiled([f"Norm->{mixers[kind]}->+->Norm->MLP->+" for kind in theirs.layers_block_type]),
    )  # fmt: skip


def recurrent_gemma_layer(theirs, depth: int) -> Table:
    if theirs.layers_block_type[depth] == "sliding_attention":
        turned = rope_of_a_share(theirs.head_dim, turned_channels(theirs))
        mixer: Table = {
            "1.w_q.weight": ("temporal_block.q_proj.weight", turned),
            "1.w_k.weight": ("temporal_block.k_proj.weight", turned),
            "1.w_v.weight": "temporal_block.v_proj.weight",
            "1.w_out.weight": "temporal_block.o_proj.weight",
            "1.w_out.bias": "temporal_block.o_proj.bias",
        }
    else:
        mixer = {
            "1.w_gate.weight": "temporal_block.linear_y.weight",
            "1.w_gate.bias": "temporal_block.linear_y.bias",
            "1.w_in.weight": "temporal_block.linear_x.weight",
            "1.w_in.bias": "temporal_block.linear_x.bias",
            "1.conv.weight": ("temporal_block.conv_1d.weight", short_conv),
            "1.conv.bias": "temporal_block.conv_1d.bias",
            "1.w_remember": "temporal_block.rg_lru.recurrent_gate_weight",
            "1.remember_bias": ("temporal_block.rg_lru.recurrent_gate_bias", flat),
            "1.w_admit": "temporal_block.rg_lru.input_gate_weight",
            "1.admit_bias": ("temporal_block.rg_lru.input_gate_bias", flat),
            "1.forgetting": ("temporal_block.rg_lru.recurrent_param", negative),
            "1.w_out.weight": "temporal_block.linear_out.weight",
            "1.w_out.bias": "temporal_block.linear_out.bias",
        }
    return mixer | {
        "0.weight": ("temporal_pre_norm.weight", plus_one),
        "2.weight": ("channel_pre_norm.weight", plus_one),
        "3.w_gate.weight": "mlp_block.gate_proj.weight",
        "3.w_gate.bias": "mlp_block.gate_proj.bias",
        "3.w_in.weight": "mlp_block.up_proj.weight",
        "3.w_in.bias": "mlp_block.up_proj.bias",
        "3.w_out.weight": "mlp_block.down_proj.weight",
        "3.w_out.bias": "mlp_block.down_proj.bias",
    }


FAMILIES: dict[str, Family] = {
    "recurrent_gemma": Family(recurrent_gemma_config, RECURRENT_GEMMA_ENDS, recurrent_gemma_layer),
}
