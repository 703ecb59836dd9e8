"""Convert configs and weight names of published attention models, by family; helpers for all families.

A table maps our weight names to theirs, followed by the transforms of the weight, if any. In the tables of layers "1.w_q.weight"
is the weight `w_q` of the second block of the layer string. `theirs` is always a config of transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from config import PRE_NORM, SANDWICH_NORM, Layers, ModelConfig, divisors
from modules.rope import SCALINGS

Transform = Callable[[Tensor], Tensor]
Table = dict[str, str | tuple[str | Transform, ...]]  # our name: theirs, or (theirs, transforms in their order)


def plus_one(weight: Tensor) -> Tensor:
    """Gemma's norms multiply by 1 + weight, ours by the weight."""
    return weight + 1


def part(index: int, parts: int, dim: int = 0) -> Transform:
    """Take one of several matrices that are stored as one."""
    return lambda weight: weight.chunk(parts, dim=dim)[index]


def rope_halves(rope_dim: int, rows: int) -> Transform:
    """Reorder the last rope_dim rows of each head: DeepSeek's RoPE pairs channels (2 k, 2 k + 1), ours (k, k + rope_dim / 2)."""

    def reorder(weight: Tensor) -> Tensor:
        plain, rotated = weight.view(-1, rows, weight.shape[-1]).split([rows - rope_dim, rope_dim], dim=1)
        return torch.cat([plain, rotated[:, 0::2], rotated[:, 1::2]], dim=1).flatten(0, 1)

    return reorder


ENDS: Table = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
GEMMA_ENDS = ENDS | {"norm.weight": ("model.norm.weight", plus_one)}

LLAMA_ATTENTION: Table = {
    "0.weight": "input_layernorm.weight",
    "1.w_q.weight": "self_attn.q_proj.weight",
    "1.w_k.weight": "self_attn.k_proj.weight",
    "1.w_v.weight": "self_attn.v_proj.weight",
    "1.w_out.weight": "self_attn.o_proj.weight",
    "2.weight": "post_attention_layernorm.weight",
}
LLAMA_MLP: Table = {
    "3.w_gate.weight": "mlp.gate_proj.weight",
    "3.w_in.weight": "mlp.up_proj.weight",
    "3.w_out.weight": "mlp.down_proj.weight",
}
LLAMA = LLAMA_ATTENTION | LLAMA_MLP

QWEN3 = LLAMA | {
    "1.q_norm.weight": "self_attn.q_norm.weight",
    "1.k_norm.weight": "self_attn.k_norm.weight",
}

GEMMA = LLAMA | {
    "0.weight": ("input_layernorm.weight", plus_one),
    "2.weight": ("post_attention_layernorm.weight", plus_one),
}

GEMMA2: Table = {
    "0.weight": ("input_layernorm.weight", plus_one),
    "1.w_q.weight": "self_attn.q_proj.weight",
    "1.w_k.weight": "self_attn.k_proj.weight",
    "1.w_v.weight": "self_attn.v_proj.weight",
    "1.w_out.weight": "self_attn.o_proj.weight",
    "2.weight": ("post_attention_layernorm.weight", plus_one),
    "3.weight": ("pre_feedforward_layernorm.weight", plus_one),
    "4.w_gate.weight": "mlp.gate_proj.weight",
    "4.w_in.weight": "mlp.up_proj.weight",
    "4.w_out.weight": "mlp.down_proj.weight",
    "5.weight": ("post_feedforward_layernorm.weight", plus_one),
}

GEMMA3 = GEMMA2 | {
    "1.q_norm.weight": ("self_attn.q_norm.weight", plus_one),
    "1.k_norm.weight": ("self_attn.k_norm.weight", plus_one),
}

EXPERTS: Table = {
    "3.w_router.weight": "mlp.gate.weight",
    "3.experts.w_gate.weight": ("mlp.experts.gate_up_proj", part(0, 2, dim=1)),
    "3.experts.w_in.weight": ("mlp.experts.gate_up_proj", part(1, 2, dim=1)),
    "3.experts.w_out.weight": "mlp.experts.down_proj",
}
MIXTRAL = LLAMA_ATTENTION | EXPERTS

DEEPSEEK_MOE: Table = EXPERTS | {
    "3.selection_bias": "mlp.gate.e_score_correction_bias",
    "3.shared_mlp.w_gate.weight": "mlp.shared_experts.gate_proj.weight",
    "3.shared_mlp.w_in.weight": "mlp.shared_experts.up_proj.weight",
    "3.shared_mlp.w_out.weight": "mlp.shared_experts.down_proj.weight",
}

GPT2_ENDS: Table = {
    "embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
GPT2: Table = {  # which stores matrices as (in, out), torch's Linear as (out, in)
    "0.weight": "ln_1.weight",
    "0.bias": "ln_1.bias",
    "1.w_q.weight": ("attn.c_attn.weight", Tensor.t, part(0, 3)),
    "1.w_k.weight": ("attn.c_attn.weight", Tensor.t, part(1, 3)),
    "1.w_v.weight": ("attn.c_attn.weight", Tensor.t, part(2, 3)),
    "1.w_q.bias": ("attn.c_attn.bias", part(0, 3)),
    "1.w_k.bias": ("attn.c_attn.bias", part(1, 3)),
    "1.w_v.bias": ("attn.c_attn.bias", part(2, 3)),
    "1.w_out.weight": ("attn.c_proj.weight", Tensor.t),
    "1.w_out.bias": "attn.c_proj.bias",
    "2.weight": "ln_2.weight",
    "2.bias": "ln_2.bias",
    "3.w_in.weight": ("mlp.c_fc.weight", Tensor.t),
    "3.w_in.bias": "mlp.c_fc.bias",
    "3.w_out.weight": ("mlp.c_proj.weight", Tensor.t),
    "3.w_out.bias": "mlp.c_proj.bias",
}


def deepseek_attention(theirs) -> Table:
    """Multi-head latent attention, with or without low-rank queries."""

    def with_rope(name: str, plain_rows: int) -> tuple:
        rope_dim = theirs.qk_rope_head_dim
        return (name, rope_halves(rope_dim, plain_rows + rope_dim)) if theirs.rope_interleave else (name,)

    if theirs.q_lora_rank is None:
        w_q: Table = {"1.w_q.weight": with_rope("self_attn.q_proj.weight", theirs.qk_nope_head_dim)}
    else:
        w_q = {
            "1.w_q_down.weight": "self_attn.q_a_proj.weight",
            "1.q_norm.weight": "self_attn.q_a_layernorm.weight",
            "1.w_q_up.weight": with_rope("self_attn.q_b_proj.weight", theirs.qk_nope_head_dim),
        }
    return w_q | {
        "0.weight": "input_layernorm.weight",
        "1.w_kv_down.weight": with_rope("self_attn.kv_a_proj_with_mqa.weight", theirs.kv_lora_rank),
        "1.kv_norm.weight": "self_attn.kv_a_layernorm.weight",
        "1.w_kv_up.weight": "self_attn.kv_b_proj.weight",
        "1.w_out.weight": "self_attn.o_proj.weight",
        "2.weight": "post_attention_layernorm.weight",
    }


ACTIVATIONS = {"silu": "SiLU", "gelu_pytorch_tanh": "GELU", "gelu_new": "GELU", "relu": "ReLU", "relu2": "ReLU2"}


def require(condition: Any, theirs, name: str, cure: str):
    """Raise ValueError if our model does not support the value of a field of their config."""
    if not condition:
        raise ValueError(f"{name}={getattr(theirs, name)!r} of this {theirs.model_type} is not in our model: {cure}")


def require_same(theirs, **expected):
    """Require fixed values of fields, where our model has no option; a missing field or None is accepted, too."""
    for name, value in expected.items():
        require(getattr(theirs, name, value) in (value, None), theirs, name, f"only {value!r} is")


def activation(theirs, name: str = "hidden_act") -> str:
    require(getattr(theirs, name) in ACTIVATIONS, theirs, name, f"there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[getattr(theirs, name)]


def whole_rope(theirs, parameters: dict | None = None) -> dict:
    """Their rope_parameters, or those of a kind of layer, of a model that rotates all channels."""
    parameters = theirs.rope_parameters if parameters is None else parameters
    require(parameters.get("partial_rotary_factor") in (None, 1), theirs, "rope_parameters", "RoPE rotates all channels")
    return parameters


def rope_theta(theirs, parameters: dict) -> float:
    theta = parameters["rope_theta"]
    require(isinstance(theta, int | float) and theta > 1, theirs, "rope_parameters", "rope_theta is a number above 1")
    return float(theta)


def rope_scaling(theirs, parameters: dict) -> dict | None:
    """Convert their rope_parameters to the option rope_scaling of a block; None is RoPE that is not scaled."""
    kind = parameters["rope_type"]
    require(kind in ("default", *SCALINGS), theirs, "rope_parameters", f"rope_type may be default, {', '.join(SCALINGS)}")
    if kind == "default":
        return None
    options = parameters | {"original_max_seq_len": parameters.get("original_max_position_embeddings")}
    if kind == "yarn":
        require(parameters.get("truncate", True), theirs, "rope_parameters", "YaRN rounds the ends of its blend, truncate=True")
        if parameters["factor"] is None:
            options["factor"] = theirs.max_position_embeddings / options["original_max_seq_len"]
        options |= {name: parameters.get(name) or value for name, value in (("beta_fast", 32.0), ("beta_slow", 1.0))}
        if parameters.get("attention_factor") is None:
            scales = parameters.get("mscale"), parameters.get("mscale_all_dim")
            scale, scale_all = scales if all(scales) else (1.0, 0.0)
            options["attention_factor"] = yarn_scale(options["factor"], scale) / yarn_scale(options["factor"], scale_all)
    return {"type": kind} | {name: options.get(name) for name in SCALINGS[kind]}


def yarn_scale(factor: float, scale: float) -> float:
    """Factor of queries and keys in a context that is longer by a factor (arXiv 2309.00071, section 3.4, where scale is 1)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def block(name: str, **options) -> str:
    """Format a step of a layer string, such as Attn(window=64); options that are None are left out."""
    text = ", ".join(f"{option}={value!r}" for option, value in options.items() if value is not None)
    return f"{name}({text})" if text else name


def unless(default, value):
    """None if the value is our default, so that the step is written without it."""
    return None if value == default else value


def attention(theirs, parameters: dict | None = None, **options) -> str:
    """Format the step of an attention block: Attn, or RopeAttn if its RoPE is scaled or has its own rope_theta."""
    scaling = rope_scaling(theirs, whole_rope(theirs, parameters))
    is_plain = scaling is None and "rope_theta" not in options
    return block("Attn" if is_plain else "RopeAttn", **options, rope_scaling=scaling)


def layer_kinds(theirs, *known: str) -> list[str]:
    require(set(theirs.layer_types) <= set(known), theirs, "layer_types", f"a layer may be {' or '.join(known)}")
    return theirs.layer_types


def windowed(theirs, layer: str, **options) -> Layers:
    """Layers of one string, in which some of their attention blocks have a window."""
    windows = {"sliding_attention": theirs.sliding_window, "full_attention": None}
    kinds = layer_kinds(theirs, *windows)
    return tiled([layer.replace("Attn", attention(theirs, window=windows[kind], **options)) for kind in kinds])


def query_scale(theirs) -> float | None:
    return None if theirs.query_pre_attn_scalar == theirs.head_dim else theirs.query_pre_attn_scalar**-0.5


def tiled(layers: list[str]) -> Layers:
    """The shortest tile that gives these layers when repeated: a string if all are equal, otherwise a tuple."""
    length = next(length for length in divisors(len(layers)) if layers[:length] * (len(layers) // length) == layers)
    return layers[0] if length == 1 else tuple(layers[:length])


def llama_config(theirs, **differences) -> ModelConfig:
    """Convert a config with Llama's field names; `differences` take precedence."""
    require_same(theirs, attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    values = {
        "dim": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "max_seq_len": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "mlp_dim": theirs.intermediate_size,
        "tied_embeddings": theirs.tie_word_embeddings,
    }
    if "rope_theta" not in differences:
        values["rope_theta"] = rope_theta(theirs, whole_rope(theirs))
    if "activation" not in differences:
        values["activation"] = activation(theirs)
    if "layers" not in differences:
        values["layers"] = PRE_NORM.replace("Attn", attention(theirs))
    return ModelConfig(**values | differences)


def mistral_config(theirs) -> ModelConfig:
    return llama_config(theirs, layers=PRE_NORM.replace("Attn", attention(theirs, window=theirs.sliding_window)))


def qwen3_config(theirs) -> ModelConfig:
    return llama_config(theirs, layers=windowed(theirs, PRE_NORM), qk_norm=True)


def gemma_config(theirs, **differences) -> ModelConfig:
    require(not theirs.use_bidirectional_attention, theirs, "use_bidirectional_attention", "attention is causal")
    name = "hidden_act" if theirs.model_type == "gemma" else "hidden_activation"
    return llama_config(theirs, activation=activation(theirs, name), embedding_scale="sqrt(dim)", **differences)


def gemma2_config(theirs) -> ModelConfig:
    layers = windowed(theirs, SANDWICH_NORM, query_scale=query_scale(theirs))
    caps = {"attention_soft_cap": theirs.attn_logit_softcapping, "logit_soft_cap": theirs.final_logit_softcapping}
    return gemma_config(theirs, layers=layers, **caps)


def gemma3_config(theirs) -> ModelConfig:
    """Layers with a window and layers without have different RoPE parameters."""
    require_same(theirs, attn_logit_softcapping=None)  # which transformers ignores
    kinds = layer_kinds(theirs, "sliding_attention", "full_attention")
    local, everywhere = (theirs.rope_parameters[kind] for kind in ("sliding_attention", "full_attention"))
    scale = query_scale(theirs)
    blocks = {
        "sliding_attention": attention(theirs, local, window=theirs.sliding_window, query_scale=scale),
        "full_attention": attention(theirs, everywhere, rope_theta=rope_theta(theirs, everywhere), query_scale=scale),
    }
    return gemma_config(
        theirs, layers=tiled([SANDWICH_NORM.replace("Attn", blocks[kind]) for kind in kinds]), qk_norm=True,
        rope_theta=rope_theta(theirs, local), logit_soft_cap=theirs.final_logit_softcapping,
    )  # fmt: skip


def mixtral_config(theirs) -> ModelConfig:
    """The weight of the balance loss stays at our default."""
    require(not theirs.router_jitter_noise, theirs, "router_jitter_noise", "noise is added to the router's logits, not to tokens")
    experts = block("MoE", num_experts=theirs.num_local_experts, top_k=theirs.num_experts_per_tok)
    layer = PRE_NORM.replace("Attn", attention(theirs, window=theirs.sliding_window)).replace("MLP", experts)
    return llama_config(theirs, layers=layer)


def deepseek_config(theirs) -> ModelConfig:
    """Balance loss and bias rate, which their config lacks, are those of arXiv 2412.19437, section 4.2."""
    require(theirs.n_shared_experts, theirs, "n_shared_experts", "there is at least one")
    rope_dim, parameters = theirs.qk_rope_head_dim, whole_rope(theirs)
    require(theirs.head_dim == rope_dim, theirs, "head_dim", f"it must equal qk_rope_head_dim={rope_dim}")
    scaling, scale_all, scale = rope_scaling(theirs, parameters), parameters.get("mscale_all_dim"), None
    if scaling and scale_all:  # their YaRN also scales the channels without RoPE
        scale = (theirs.qk_nope_head_dim + rope_dim) ** -0.5 * yarn_scale(scaling["factor"], scale_all) ** 2
    latent = block(
        "LatentAttn", q_rank=theirs.q_lora_rank, kv_rank=theirs.kv_lora_rank, rope_dim=rope_dim, v_dim=theirs.v_head_dim,
        norm_eps=None if theirs.rms_norm_eps == 1e-6 else 1e-6,  # of the norms inside
        query_scale=scale, rope_scaling=scaling,
    )  # fmt: skip
    dense = PRE_NORM.replace("Attn", latent)
    experts = block(
        "MoE", mlp_dim=theirs.moe_intermediate_size, num_experts=theirs.n_routed_experts,
        top_k=theirs.num_experts_per_tok, shared_experts=theirs.n_shared_experts, scores="sigmoid",
        renormalise=bool(theirs.norm_topk_prob), routed_scale=theirs.routed_scaling_factor, balance_loss=0.0001, bias_rate=0.001,
        groups=unless(1, theirs.n_group), top_groups=unless(1, theirs.topk_group),
    )  # fmt: skip
    layers = [dense if is_dense(theirs, depth) else dense.replace("MLP", experts) for depth in range(theirs.num_hidden_layers)]
    return llama_config(theirs, layers=tiled(layers), head_dim=theirs.qk_nope_head_dim)


def is_dense(theirs, depth: int) -> bool:
    return depth < theirs.first_k_dense_replace


def deepseek_layer(theirs, depth: int) -> Table:
    return deepseek_attention(theirs) | (LLAMA_MLP if is_dense(theirs, depth) else DEEPSEEK_MOE)


def gpt2_config(theirs) -> ModelConfig:
    require_same(theirs, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for name in ("embd_pdrop", "attn_pdrop"):
        require(getattr(theirs, name) == theirs.resid_pdrop, theirs, name, f"it must equal resid_pdrop={theirs.resid_pdrop}")
    return ModelConfig(
        dim=theirs.n_embd, num_layers=theirs.n_layer, num_heads=theirs.n_head, num_kv_heads=theirs.n_head,
        max_seq_len=theirs.n_positions, positions="learned", norm="LayerNorm", norm_bias=True, norm_eps=theirs.layer_norm_epsilon,
        mlp_dim=theirs.n_inner, activation=activation(theirs, "activation_function"), gated=False, linear_bias=True,
        tied_embeddings=theirs.tie_word_embeddings, dropout=float(theirs.resid_pdrop),
    )  # fmt: skip


@dataclass(frozen=True)
class Family:
    """How to convert the models of one model_type."""

    config: Callable[[Any], ModelConfig]  # convert a config; raises ValueError if our model does not support it
    ends: Table  # embeddings, last norm, head
    layer: Callable[[Any, int], Table]  # table of a layer, from their config and its depth
    layers: str = "model.layers"  # prefix of their layer names


FAMILIES: dict[str, Family] = {
    "llama": Family(llama_config, ENDS, lambda theirs, depth: LLAMA),
    "mistral": Family(mistral_config, ENDS, lambda theirs, depth: LLAMA),
    "qwen3": Family(qwen3_config, ENDS, lambda theirs, depth: QWEN3),
    "gpt2": Family(gpt2_config, GPT2_ENDS, lambda theirs, depth: GPT2, layers="transformer.h"),
    "gemma": Family(gemma_config, GEMMA_ENDS, lambda theirs, depth: GEMMA),
    "gemma2": Family(gemma2_config, GEMMA_ENDS, lambda theirs, depth: GEMMA2),
    "gemma3_text": Family(gemma3_config, GEMMA_ENDS, lambda theirs, depth: GEMMA3),
    "mixtral": Family(mixtral_config, ENDS, lambda theirs, depth: MIXTRAL),
    "deepseek_v3": Family(deepseek_config, ENDS, deepseek_layer),
}
