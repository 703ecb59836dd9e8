"""Tiny models of transformers, of every family that originals/ loads, with random weights."""

import functools

import torch
from torch import nn

V = 98  # tokens
SIZES = {
    "vocab_size": V, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEEPSEEK = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    **ROPE, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
RECURRENT_GEMMA = SIZES | {
    "hidden_size": 32, "attention_window_size": 7, "intermediate_size": 50, "block_types": ["recurrent", "attention"],
}  # fmt: skip
ROPE_OF_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
QWEN_DELTA = SIZES | {
    **ROPE_OF_HALF, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 5,
}  # fmt: skip
MAMBA = {
    "vocab_size": V, "hidden_size": 36, "num_hidden_layers": 2, "state_size": 5, "expand": 2, "conv_kernel": 3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {  # with DeepSeek-V3's mscale, but of two different values
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0,
    "beta_slow": 0.5, "mscale": 1.0, "mscale_all_dim": 0.7,
}  # fmt: skip
ORIGINALS = {
    "llama": {**SIZES, **ROPE, "rms_norm_eps": 1e-5, "intermediate_size": 43},
    "llama_scaled": {**SIZES, "rope_parameters": LLAMA3},
    "mistral": {**SIZES, **ROPE, "sliding_window": 7},
    "gpt2": {
        "vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 44, **NO_DROPOUT,
        "bos_token_id": None, "eos_token_id": None,
    },
    "qwen3": {**SIZES, **ROPE, "tie_word_embeddings": True},
    "qwen3_windows": {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3_scaled": {
        **SIZES, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    },
    "gemma": {**SIZES, "num_key_value_heads": 1},
    "gemma3_text": {
        **SIZES, "num_hidden_layers": 6, "query_pre_attn_scalar": 8, "sliding_window": 6, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 4000.0},
        },
    },
    "gemma3_text_scaled": {
        **SIZES, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 9, "sliding_window": 6,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 4000.0, "factor": 8.0},
        },
    },
    "mixtral": {**SIZES, **ROPE, "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral_windows": {**SIZES, "sliding_window": 7},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_scaled": {
        **DEEPSEEK, "rope_parameters": YARN, "qk_rope_head_dim": 8, "n_group": 3, "topk_group": 2,
    },
    "qwen3_5_text": {**QWEN_DELTA, "tie_word_embeddings": True},
    "qwen3_next": {
        **QWEN_DELTA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0],
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_next_plain": {
        **QWEN_DELTA, "num_experts": 0, "layer_types": ["full_attention", "linear_attention"], "linear_conv_kernel_dim": 3,
        "linear_num_key_heads": 3, "linear_key_head_dim": 7,
    },
    "mamba": MAMBA,
    "mamba_wide": {
        **MAMBA, "expand": 3, "time_step_rank": 7, "conv_kernel": 4, "use_bias": True, "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
    },
    "mamba2": {**MAMBA, "num_heads": 6, "head_dim": 12, "n_groups": 1, "chunk_size": 16, "tie_word_embeddings": True},
    "mamba2_wide": {
        **MAMBA, "num_heads": 6, "head_dim": 18, "n_groups": 3, "chunk_size": 16, "expand": 3, "layer_norm_epsilon": 1e-3,
    },
    "recurrent_gemma": {**RECURRENT_GEMMA, **ROPE_OF_HALF},
    "recurrent_gemma_wide": {**RECURRENT_GEMMA, "lru_width": 48, "conv1d_width": 3, "tie_word_embeddings": False},
    "deepseek_v3_plain": {
        **DEEPSEEK, "rms_norm_eps": 1e-3, "q_lora_rank": None, "rope_interleave": False, "norm_topk_prob": False,
    },
    "gemma2": {
        **SIZES, "query_pre_attn_scalar": 9, "sliding_window": 6, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0,
    },
}  # fmt: skip


def their_config(name: str, **changes):
    from transformers import AutoConfig

    family = name.removesuffix("_windows").removesuffix("_plain").removesuffix("_wide").removesuffix("_scaled")
    return AutoConfig.for_model(family, **ORIGINALS[name] | changes)


@functools.cache
def original(name: str) -> nn.Module:
    return random_model(their_config(name))


def random_model(config) -> nn.Module:
    """A model of theirs with random weights: matrices large enough to matter, all else away from its initial value."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").float().eval()
    tables = {theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight}
    with torch.no_grad():
        for weight in (*theirs.parameters(), *(buffer for name, buffer in theirs.named_buffers() if "bias" in name)):
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight not in tables:
                weight.normal_(std=(3 * max(1, min(weight.shape[-2:]))) ** -0.5)
            else:
                weight.normal_(std=0.1)
    return theirs


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))
