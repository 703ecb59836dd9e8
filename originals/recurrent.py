"""The family of RecurrentGemma (Griffin); originals/attention.py explains the tables."""

import torch
from torch import Tensor

from config import ModelConfig
from originals import attention
from originals.attention import GEMMA_ENDS, Family, Table, Transform, block, plus_one

RECURRENT_GEMMA_ENDS = GEMMA_ENDS | {"norm.weight": ("model.final_norm.weight", plus_one)}


def partial_rope(head_dim: int, rotated: int) -> Transform:
    """Reorder the channels of each head: their RoPE pairs channels (k, k + rotated / 2), ours (k, k + head_dim / 2)."""
    half = (head_dim - rotated) // 2
    low, high, plain = torch.arange(head_dim).split([rotated // 2, rotated // 2, head_dim - rotated])
    order = torch.cat([low, plain[:half], high, plain[half:]])
    return lambda weight: weight.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)


def short_conv(weight: Tensor) -> Tensor:
    """Convert (channels, 1, width), the current token last, to (width, channels), the current token first, with a skip around."""
    weight = weight[:, 0].flip(1).T.clone()
    weight[0] -= 1
    return weight


def rotated_channels(theirs) -> int:
    share = theirs.rope_parameters.get("partial_rotary_factor", 1.0)
    rotated = int(theirs.head_dim * share)
    cure = f"it makes {rotated} of {theirs.head_dim} channels rotate, but RoPE rotates pairs"
    attention.require(0 <= share <= 1 and rotated % 2 == 0, theirs, "rope_parameters", cure)
    return rotated


def recurrent_gemma_config(theirs) -> ModelConfig:
    """Their config has no context length: 8192 is that of the published models' training (arXiv 2404.07839)."""
    attention.require_same(theirs, attention_bias=False, attention_dropout=0.0, hidden_activation="gelu_pytorch_tanh")
    dim, heads = theirs.hidden_size, theirs.num_attention_heads
    recurrent = block(
        "RGLRU", width=None if theirs.lru_width == dim else theirs.lru_width,
        conv_width=None if theirs.conv1d_width == 4 else theirs.conv1d_width,
    )  # fmt: skip
    local_attention = block(
        "RopeAttn", window=theirs.attention_window_size, rope_share=rotated_channels(theirs) / theirs.head_dim, linear_bias=False,
        out_bias=True, rope_scaling=attention.rope_scaling(theirs, theirs.rope_parameters),
    )  # fmt: skip
    mixers = {"linear_attention": recurrent, "sliding_attention": local_attention}
    return ModelConfig(
        dim=dim, num_layers=theirs.num_hidden_layers, num_heads=heads, num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        max_seq_len=getattr(theirs, "max_position_embeddings", 8192),
        rope_theta=attention.rope_theta(theirs, theirs.rope_parameters),
        norm_eps=theirs.rms_norm_eps, mlp_dim=theirs.intermediate_size // 2, linear_bias=True,
        activation="GELU", logit_soft_cap=theirs.logits_soft_cap,
        embedding_scale=torch.tensor(dim**0.5, dtype=torch.bfloat16).item(),  # rounded as theirs
        tied_embeddings=theirs.tie_word_embeddings,
        layers=attention.tiled([f"Norm->{mixers[kind]}->+->Norm->MLP->+" for kind in theirs.layers_block_type]),
    )  # fmt: skip


def recurrent_gemma_layer(theirs, depth: int) -> Table:
    if theirs.layers_block_type[depth] == "sliding_attention":
        rope = partial_rope(theirs.head_dim, rotated_channels(theirs))
        mixer: Table = {
            "1.w_q.weight": ("temporal_block.q_proj.weight", rope),
            "1.w_k.weight": ("temporal_block.k_proj.weight", rope),
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
            "1.remember_bias": ("temporal_block.rg_lru.recurrent_gate_bias", Tensor.flatten),
            "1.w_admit": "temporal_block.rg_lru.input_gate_weight",
            "1.admit_bias": ("temporal_block.rg_lru.input_gate_bias", Tensor.flatten),
            "1.forgetting": ("temporal_block.rg_lru.recurrent_param", Tensor.neg),  # theirs is -Λ of the paper
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
