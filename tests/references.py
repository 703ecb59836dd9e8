"""Reference models: the same architectures in `transformers`, with our weights.

A weight of theirs that gets none of ours raises in `load`.
"""

import torch
from torch import nn

from config import ModelConfig
from model import GPT, MLP


def llama_names(model: GPT) -> dict[str, torch.Tensor]:
    """Our weights by Llama's names. The blocks of `Norm->Attn->+->Norm->MLP->+` are norm, attention, norm, mlp."""
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        norm_1, attention, norm_2, mlp = layer.branches[0].blocks
        weights |= attention_and_mlp(f"model.layers.{i}", attention, mlp)
        weights |= {
            f"model.layers.{i}.input_layernorm.weight": norm_1.weight,
            f"model.layers.{i}.post_attention_layernorm.weight": norm_2.weight,
        }
    return weights


def attention_and_mlp(layer: str, attention: nn.Module, mlp: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{layer}.self_attn.q_proj.weight": attention.w_q.weight,
        f"{layer}.self_attn.k_proj.weight": attention.w_k.weight,
        f"{layer}.self_attn.v_proj.weight": attention.w_v.weight,
        f"{layer}.self_attn.o_proj.weight": attention.w_out.weight,
        f"{layer}.mlp.gate_proj.weight": mlp.w_gate.weight,
        f"{layer}.mlp.up_proj.weight": mlp.w_in.weight,
        f"{layer}.mlp.down_proj.weight": mlp.w_out.weight,
    }


def llama(model: GPT) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    reference = LlamaForCausalLM(LlamaConfig(**sizes(model), tie_word_embeddings=model.config.tied_embeddings))
    return load(reference, llama_names(model))


def gemma(model: GPT) -> nn.Module:
    """Gemma's norms multiply by 1 + weight, ours by the weight."""
    from transformers import GemmaConfig, GemmaForCausalLM

    reference = GemmaForCausalLM(GemmaConfig(**sizes(model), hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True))
    return load(reference, {name: less_one(name, weight) for name, weight in llama_names(model).items()})


def gemma2(model: GPT) -> nn.Module:
    """Norms before and after attention and MLP, and soft caps: the blocks are norm, attention, norm, norm, mlp, norm."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **sizes(model), hidden_activation="gelu_pytorch_tanh", tie_word_embeddings=True, attn_implementation="eager",
        attn_logit_softcapping=model.config.attention_soft_cap, final_logit_softcapping=model.config.logit_soft_cap,
        query_pre_attn_scalar=model.config.block_values()["head_dim"], sliding_window=model.config.max_seq_len,
    )  # fmt: skip
    weights = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.norm.weight,
        "lm_head.weight": model.head.weight,
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    for i, layer in enumerate(model.layers):
        norm_1, attention, norm_2, norm_3, mlp, norm_4 = layer.branches[0].blocks
        weights |= attention_and_mlp(f"model.layers.{i}", attention, mlp)
        for name, norm in zip(norms, (norm_1, norm_2, norm_3, norm_4), strict=True):
            weights[f"model.layers.{i}.{name}_layernorm.weight"] = norm.weight
    return load(Gemma2ForCausalLM(config), {name: less_one(name, weight) for name, weight in weights.items()})


def less_one(name: str, weight: torch.Tensor) -> torch.Tensor:
    return weight - 1 if "norm" in name else weight


def sizes(model: GPT) -> dict:
    config: ModelConfig = model.config
    mlp = next(module for module in model.modules() if isinstance(module, MLP))
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": mlp.w_in.out_features,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.block_values()["head_dim"],
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip


def gpt2(model: GPT) -> nn.Module:
    """GPT-2 keeps q, k and v in one matrix, and its matrices transposed (Conv1D)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    reference = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.vocab_size, n_embd=config.dim, n_layer=config.num_layers, n_head=config.num_heads,
            n_positions=config.max_seq_len, n_inner=config.mlp_dim, layer_norm_epsilon=config.norm_eps,
            activation_function="gelu_new", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    weights = {
        "transformer.wte.weight": model.embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "transformer.ln_f.bias": model.norm.bias,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        norm_1, attention, norm_2, mlp = layer.branches[0].blocks
        qkv = (attention.w_q, attention.w_k, attention.w_v)
        weights |= {
            f"transformer.h.{i}.ln_1.weight": norm_1.weight,
            f"transformer.h.{i}.ln_1.bias": norm_1.bias,
            f"transformer.h.{i}.attn.c_attn.weight": torch.cat([linear.weight for linear in qkv]).T,
            f"transformer.h.{i}.attn.c_attn.bias": torch.cat([linear.bias for linear in qkv]),
            f"transformer.h.{i}.attn.c_proj.weight": attention.w_out.weight.T,
            f"transformer.h.{i}.attn.c_proj.bias": attention.w_out.bias,
            f"transformer.h.{i}.ln_2.weight": norm_2.weight,
            f"transformer.h.{i}.ln_2.bias": norm_2.bias,
            f"transformer.h.{i}.mlp.c_fc.weight": mlp.w_in.weight.T,
            f"transformer.h.{i}.mlp.c_fc.bias": mlp.w_in.bias,
            f"transformer.h.{i}.mlp.c_proj.weight": mlp.w_out.weight.T,
            f"transformer.h.{i}.mlp.c_proj.bias": mlp.w_out.bias,
        }
    return load(reference, weights)


def load(reference: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    reference.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()}, strict=True)
    return reference.eval()
