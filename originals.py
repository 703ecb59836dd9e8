"""Published models in ours: the config and the weights of a `transformers` model, so that ours computes the same.

    model = load_original("openai-community/gpt2")
    print(generate(model, load_tokenizer("hf:openai-community/gpt2"), "Once upon a time"))

One table a family says which weight of theirs is which of ours. In the layer tables "1.w_q.weight" is the second block
of the layer string. Behind their name stands what is done to the weight, where it is not taken as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from config import PRE_NORM, SANDWICH_NORM, Layers, ModelConfig, did_you_mean, divisors
from model import GPT

Transform = Callable[[Tensor], Tensor]
Table = dict[str, str | tuple[str | Transform, ...]]  # our name: theirs, or (theirs, transforms in their order)


def transposed(weight: Tensor) -> Tensor:
    """GPT-2 keeps its matrices as (in, out), torch's Linear as (out, in)."""
    return weight.T


def plus_one(weight: Tensor) -> Tensor:
    """Gemma's norms multiply by 1 + weight, ours by the weight."""
    return weight + 1


def part(index: int, parts: int, dim: int = 0) -> Transform:
    """One of several matrices that are kept as one."""
    return lambda weight: weight.chunk(parts, dim=dim)[index]


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

GPT2_ENDS: Table = {
    "embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}
GPT2: Table = {
    "0.weight": "ln_1.weight",
    "0.bias": "ln_1.bias",
    "1.w_q.weight": ("attn.c_attn.weight", transposed, part(0, 3)),
    "1.w_k.weight": ("attn.c_attn.weight", transposed, part(1, 3)),
    "1.w_v.weight": ("attn.c_attn.weight", transposed, part(2, 3)),
    "1.w_q.bias": ("attn.c_attn.bias", part(0, 3)),
    "1.w_k.bias": ("attn.c_attn.bias", part(1, 3)),
    "1.w_v.bias": ("attn.c_attn.bias", part(2, 3)),
    "1.w_out.weight": ("attn.c_proj.weight", transposed),
    "1.w_out.bias": "attn.c_proj.bias",
    "2.weight": "ln_2.weight",
    "2.bias": "ln_2.bias",
    "3.w_in.weight": ("mlp.c_fc.weight", transposed),
    "3.w_in.bias": "mlp.c_fc.bias",
    "3.w_out.weight": ("mlp.c_proj.weight", transposed),
    "3.w_out.bias": "mlp.c_proj.bias",
}

ACTIVATIONS = {"silu": "SiLU", "gelu_pytorch_tanh": "GELU", "gelu_new": "GELU", "relu": "ReLU", "relu2": "ReLU2"}


def require(condition: Any, theirs, name: str, cure: str):
    """Raises ValueError that names a field of their config which ours cannot follow."""
    if not condition:
        raise ValueError(f"{name}={getattr(theirs, name)!r} of this {theirs.model_type} is not in our model: {cure}")


def require_same(theirs, **expected):
    """Fields of their config that must have one value, since ours does the same in every model."""
    for name, value in expected.items():
        require(getattr(theirs, name, value) in (value, None), theirs, name, f"only {value!r} is")


def activation(theirs, name: str = "hidden_act") -> str:
    require(getattr(theirs, name) in ACTIVATIONS, theirs, name, f"there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[getattr(theirs, name)]


def rope_theta(theirs, parameters: dict | None = None) -> float:
    parameters = theirs.rope_parameters if parameters is None else parameters
    plain = parameters["rope_type"] == "default" and parameters.get("partial_rotary_factor") in (None, 1)
    require(plain, theirs, "rope_parameters", "RoPE is not stretched and turns all channels")
    return float(parameters["rope_theta"])


def gated_mlp_dim(theirs, name: str = "intermediate_size") -> int:
    """The mlp_dim that makes a gated MLP so wide."""
    require(getattr(theirs, name) % 8 == 0, theirs, name, "a gated MLP is a multiple of 8 wide")
    return getattr(theirs, name) * 3 // 2


def block(name: str, **options) -> str:
    """'Attn(window=64)': the step of a layer string, with those options that are not None."""
    given = ", ".join(f"{option}={value!r}" for option, value in options.items() if value is not None)
    return f"{name}({given})" if given else name


def windows(theirs) -> list[int | None]:
    """How far back a token sees at every depth; None is all of it."""
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    return [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]


def query_scale(theirs) -> float | None:
    return None if theirs.query_pre_attn_scalar == theirs.head_dim else theirs.query_pre_attn_scalar**-0.5


def tiled(layers: list[str]) -> Layers:
    """The shortest tile that gives these layers when it is repeated: a string where all are alike, or else a tuple."""
    length = next(length for length in divisors(len(layers)) if layers[:length] * (len(layers) // length) == layers)
    return layers[0] if length == 1 else tuple(layers[:length])


def llama_config(theirs, **differences) -> ModelConfig:
    """Their config as ours, with PRE_NORM layers unless the differences say otherwise."""
    require_same(theirs, attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    same = {
        "dim": theirs.hidden_size,
        "num_layers": theirs.num_hidden_layers,
        "num_heads": theirs.num_attention_heads,
        "num_kv_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
        "max_seq_len": theirs.max_position_embeddings,
        "norm_eps": theirs.rms_norm_eps,
        "tied_embeddings": theirs.tie_word_embeddings,
    }
    if "rope_theta" not in differences:
        same["rope_theta"] = rope_theta(theirs)
    if "activation" not in differences:
        same["activation"] = activation(theirs)
    if "mlp_dim" not in differences:
        same["mlp_dim"] = gated_mlp_dim(theirs)
    return ModelConfig(**same | differences)


def qwen3_config(theirs) -> ModelConfig:
    layers = [PRE_NORM.replace("Attn", block("Attn", window=window)) for window in windows(theirs)]
    return llama_config(theirs, layers=tiled(layers), qk_norm=True)


def gemma_config(theirs, **differences) -> ModelConfig:
    require(not theirs.use_bidirectional_attention, theirs, "use_bidirectional_attention", "a token sees none behind it")
    name = "hidden_act" if theirs.model_type == "gemma" else "hidden_activation"
    return llama_config(theirs, activation=activation(theirs, name), embedding_scale="sqrt(dim)", **differences)


def gemma2_config(theirs, **differences) -> ModelConfig:
    scale = query_scale(theirs)
    layers = [SANDWICH_NORM.replace("Attn", block("Attn", window=window, query_scale=scale)) for window in windows(theirs)]
    caps = {"attention_soft_cap": theirs.attn_logit_softcapping, "logit_soft_cap": theirs.final_logit_softcapping}
    return gemma_config(theirs, **{"layers": tiled(layers)} | caps | differences)


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
    """How the models of one model_type become ours."""

    config: Callable[[Any], ModelConfig]  # theirs to ours; raises ValueError for what our model cannot express
    ends: Table
    layer: Callable[[Any, int], Table]  # their config and the depth of a layer to its table
    layers: str = "model.layers"  # what their names of layers begin with


FAMILIES: dict[str, Family] = {
    "llama": Family(llama_config, ENDS, lambda theirs, depth: LLAMA),
    "qwen3": Family(qwen3_config, ENDS, lambda theirs, depth: QWEN3),
    "gpt2": Family(gpt2_config, GPT2_ENDS, lambda theirs, depth: GPT2, layers="transformer.h"),
    "gemma": Family(gemma_config, GEMMA_ENDS, lambda theirs, depth: GEMMA),
    "gemma2": Family(gemma2_config, GEMMA_ENDS, lambda theirs, depth: GEMMA2),
}


def load_original(original: str | nn.Module | dict[str, Tensor], family: str | None = None, config=None) -> GPT:
    """Our model with the weights of a published one, in float32: it gives the same logits.

    original: the name of a model on the Hugging Face hub or the path of a folder that holds one, both of which
    `transformers` reads; a causal language model of `transformers`; or a state dict of one, together with its config
    (of `transformers`, or the dict that its config.json holds). family: a key of FAMILIES; None is what the config says.

    Raises ImportError where `transformers` is needed and is not installed, and ValueError for a family that is not in
    FAMILIES, for a config that asks for what our model does not have, and for names and shapes of weights that do not fit.
    """
    if isinstance(original, str):
        config = read("AutoConfig", original)
    elif isinstance(original, nn.Module):
        config = original.config
    elif config is None:
        raise ValueError("a state dict alone does not say what model it is of: give its config, too")
    elif isinstance(config, dict):
        config = transformers().AutoConfig.for_model(**config)
    family = config.model_type if family is None else family
    if family not in FAMILIES:
        raise ValueError(f"no family is called {family!r}.{did_you_mean(family, FAMILIES)} There are: {', '.join(FAMILIES)}")
    model_config = FAMILIES[family].config(config)  # which may refuse it, before anything large is loaded
    if isinstance(original, str):
        original = read("AutoModelForCausalLM", original, dtype=torch.float32)
    weights = original.state_dict() if isinstance(original, nn.Module) else original
    model = GPT(model_config, config.vocab_size)
    ours = convert(weights, family, config)
    for name, weight in model.state_dict().items():
        if weight.shape != ours[name].shape:
            raise ValueError(
                f"the weight for {name} has the shape {tuple(ours[name].shape)}, but the config makes it {tuple(weight.shape)}: "
                "give the config that belongs to these weights"
            )
    model.load_state_dict(ours)
    return model.eval()


def name_table(family: str, theirs) -> Table:
    """Every weight of ours: where it comes from in a model of that family with that config."""
    known = FAMILIES[family]
    table = dict(known.ends)
    for depth in range(theirs.num_hidden_layers):
        for name, source in known.layer(theirs, depth).items():
            first, *transforms = (source,) if isinstance(source, str) else source
            table[f"layers.{depth}.branches.0.blocks.{name}"] = (f"{known.layers}.{depth}.{first}", *transforms)
    return table


def convert(weights: dict[str, Tensor], family: str, theirs) -> dict[str, Tensor]:
    """Their weights under our names, in our shapes, in float32; a tied head is the embedding once more.

    Raises ValueError for a name that is missing or unknown. It is linear but for Gemma's norms.
    """
    sources = {ours: (source,) if isinstance(source, str) else source for ours, source in name_table(family, theirs).items()}
    head = sources["head.weight"][0]
    if theirs.tie_word_embeddings:
        sources["head.weight"] = sources["embedding.weight"]
        embedding = sources["head.weight"][0]
        if head in weights and embedding in weights and not torch.equal(weights[head], weights[embedding]):
            raise ValueError(f"{head!r} is not {embedding!r}, but the config says tie_word_embeddings: give the right config")
    wanted = {name for name, *_ in sources.values()}
    unknown = sorted(weights.keys() - wanted - {head})
    for fault, names in (("lack", sorted(wanted - weights.keys())), ("hold an unknown", unknown)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(f"the weights {fault} {names[0]!r}{more}: a {family} with this config holds others")
    converted = {}
    for ours, (name, *transforms) in sources.items():
        weight = weights[name].detach().float()
        for transform in transforms:
            weight = transform(weight)
        converted[ours] = weight.contiguous()
    return converted


def transformers():
    """The package, which is no requirement of ours. Raises ImportError with the cure where it is not there."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("published models are read by transformers: pip install transformers") from error
    return transformers


def read(kind: str, name: str, **options):
    """What transformers' class of that kind reads under that name. Raises ValueError with the reason where it cannot."""
    auto = getattr(transformers(), kind)
    try:
        return auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"transformers cannot read {name!r}: {reason}") from error
