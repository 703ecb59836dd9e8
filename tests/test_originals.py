"""Promises of originals.py: with their weights ours is theirs, in logits, gradients and stories; what does not fit is named."""

import functools
import sys

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from torch import nn

from inference import Sampling, generate_tokens
from originals.load import FAMILIES, convert, load_original

V = 98
SIZES = {
    "vocab_size": V, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEEPSEEK = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    **ROPE, "num_hidden_layers": 3, "first_k_dense_replace": 1, "num_key_value_heads": 4,
    "q_lora_rank": 12, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2,
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.5,
}  # fmt: skip
RECURRENT_GEMMA = SIZES | {"hidden_size": 32, "attention_window_size": 7, "intermediate_size": 50}
ROPE_OF_HALF = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}}
QWEN_DELTA = SIZES | {
    **ROPE_OF_HALF, "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 8, "linear_value_head_dim": 5,
}  # fmt: skip
MAMBA = {
    "vocab_size": V, "hidden_size": 36, "num_hidden_layers": 3, "state_size": 5, "expand": 2, "conv_kernel": 3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ORIGINALS = {
    "llama": {**SIZES, **ROPE, "rms_norm_eps": 1e-5, "intermediate_size": 43},
    "mistral": {**SIZES, **ROPE, "sliding_window": 7},
    "gpt2": {
        "vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 44, **NO_DROPOUT,
        "bos_token_id": None, "eos_token_id": None,
    },
    "qwen3": {**SIZES, **ROPE, "tie_word_embeddings": True},
    "qwen3_windows": {**SIZES, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "gemma": {**SIZES, "num_key_value_heads": 1},
    "gemma3_text": {
        **SIZES, "num_hidden_layers": 6, "query_pre_attn_scalar": 8, "sliding_window": 6, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "default", "rope_theta": 4000.0},
        },
    },
    "mixtral": {**SIZES, **ROPE, "num_local_experts": 5, "num_experts_per_tok": 2},
    "mixtral_windows": {**SIZES, "num_hidden_layers": 2, "sliding_window": 7},
    "deepseek_v3": DEEPSEEK,
    "qwen3_5_text": {**QWEN_DELTA, "tie_word_embeddings": True},
    "qwen3_next": {
        **QWEN_DELTA, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1],
        "shared_expert_intermediate_size": 32,
    },
    "qwen3_next_plain": {
        **QWEN_DELTA, "num_experts": 0, "layer_types": ["full_attention", "linear_attention"] * 2, "linear_conv_kernel_dim": 3,
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

    family = name.removesuffix("_windows").removesuffix("_plain").removesuffix("_wide")
    return AutoConfig.for_model(family, **ORIGINALS[name] | changes)


@functools.cache
def original(name: str) -> nn.Module:
    """A model of theirs with random weights: matrices large enough to matter, all else away from where it begins."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(their_config(name), attn_implementation="eager").eval()
    tables = {theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight}
    with torch.no_grad():
        for weight in (*theirs.parameters(), *(buffer for name, buffer in theirs.named_buffers() if "bias" in name)):
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif weight not in tables:
                weight.normal_(std=(3 * min(weight.shape[-2:])) ** -0.5)
            else:
                weight.normal_(std=0.1)
    return theirs


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def some_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ORIGINALS)
@torch.no_grad()
def test_a_batch_has_the_logits_of_the_original(name):
    theirs, tokens = original(name), some_tokens(3, 40)
    model = load_original(theirs)
    expected = theirs(tokens).logits
    assert expected.std() > 0.1  # so that 1e-4 says something
    torch.testing.assert_close(model(tokens)[0], expected, atol=1e-4, rtol=0)
    assert num_parameters(model) == num_parameters(theirs)

    stories = torch.tensor([[0] * 23 + [1] * 17])
    packed, _ = model(tokens[:1], story_ids=stories)
    torch.testing.assert_close(packed[:, 23:], theirs(tokens[:1, 23:]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_parameter_has_the_gradient_of_the_original(name):
    theirs, tokens = original(name), some_tokens(3, 41)
    model = load_original(theirs)
    _, loss = model(tokens[:, :-1], tokens[:, 1:])
    expected_loss = F.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    loss.backward()
    theirs.zero_grad()
    expected_loss.backward()

    zeros = {weight_name: torch.zeros_like(weight) for weight_name, weight in theirs.state_dict().items()}
    their_gradients = zeros | {w: weight.grad for w, weight in theirs.named_parameters(remove_duplicate=False)}
    linear, shift = (convert(weights, theirs.config.model_type, theirs.config) for weights in (their_gradients, zeros))
    for ours, weight in model.named_parameters():
        expected = linear[ours] - shift[ours]
        assert expected.any(), ours
        nearly = 1e-3 * expected.abs().max().item() + 1e-7  # a bias of the keys changes nothing: its gradient is rounding
        torch.testing.assert_close(weight.grad, expected, atol=nearly, rtol=0, msg=lambda text, name=ours: f"{name}: {text}")


@pytest.mark.parametrize("name", ORIGINALS)
def test_from_the_cache_it_writes_what_the_original_writes(name):
    theirs, prompts = original(name), some_tokens(3, 10)
    expected = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=25)
    model = load_original(theirs)
    drawn = generate_tokens(model, prompts.tolist(), eos_id=-1, max_new_tokens=[25] * 3, sampling=Sampling(temperature=0), seed=0)
    assert torch.tensor(list(drawn)).T.tolist() == expected[:, 10:].tolist()


def test_a_folder_and_a_state_dict_are_read_as_the_model_itself(tmp_path):
    for name in ("gemma2", "gpt2"):
        theirs = original(name)
        theirs.save_pretrained(tmp_path / name)
        expected = load_original(theirs).state_dict()
        read = load_original(str(tmp_path / name))
        without_type = {field: value for field, value in theirs.config.to_dict().items() if field != "model_type"}
        named = load_original(theirs.state_dict(), name, without_type)
        assert read.config == named.config == load_original(theirs).config
        for model in (read, named):
            for weight, value in model.state_dict().items():
                assert torch.equal(value, expected[weight]), weight


def test_a_tied_head_may_be_left_out_of_the_weights():
    theirs = original("gemma2")
    weights = {name: weight for name, weight in theirs.state_dict().items() if name != "lm_head.weight"}
    model = load_original(weights, config=theirs.config)
    assert model.head.weight is model.embedding.weight
    weights["lm_head.weight"] = torch.zeros(V, 36)
    one_line_error(lambda: load_original(weights, config=theirs.config), "'lm_head.weight'", "tie_word_embeddings")


def test_weights_that_do_not_fit_are_named():
    theirs = original("llama")
    weights, config = theirs.state_dict(), theirs.config
    missing = {name: weight for name, weight in weights.items() if "layers.2" not in name}
    one_line_error(lambda: load_original(missing, config=config), "lack 'model.layers.2.", "and 8 more", "llama")
    unknown = weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    one_line_error(lambda: load_original(unknown, config=config), "unknown 'model.layers.0.self_attn.q_proj.bias'")
    one_line_error(lambda: load_original(original("gpt2").state_dict(), config=config), "lack 'model.embed_tokens.weight'")
    other = their_config("llama", num_key_value_heads=4)
    one_line_error(lambda: load_original(weights, config=other), "w_k.weight", "(16, 36)", "(32, 36)")


def test_a_model_that_cannot_be_read_or_is_of_no_family_is_named(tmp_path):
    one_line_error(lambda: load_original(str(tmp_path / "nothing")), "nothing", "cannot read")
    one_line_error(lambda: load_original({}), "config")
    one_line_error(lambda: load_original({}, config={"model_type": "opt"}), "'opt'", *FAMILIES)
    one_line_error(lambda: load_original({}, config={}), "None", *FAMILIES)
    one_line_error(lambda: load_original({}, "lama", config={}), "'lama'", "Did you mean 'llama'?")
    one_line_error(lambda: load_original({}, "llama", their_config("mistral")), "family='llama'", "'mistral'")


LONGER = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "name, changes, word",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": LONGER}, "rope_parameters="),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop=0.1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("deepseek_v3", {"n_group": 3}, "topk_group=1"),
        ("qwen3_next", {"shared_expert_intermediate_size": 24}, "shared_expert_intermediate_size=24"),
        ("qwen3_5_text", {"hidden_act": "relu"}, "hidden_act='relu'"),
        ("mamba", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
        ("mamba2", {"use_bias": True}, "use_bias=True"),
        ("mamba2", {"time_step_limit": (0.0, 0.1)}, "time_step_limit=(0.0, 0.1)"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_what_our_model_cannot_express_is_refused(name, changes, word):
    one_line_error(lambda: load_original({}, config=their_config(name, **changes)), word, "not in our model")


def test_without_transformers_the_cure_is_told(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "4.57.1")
    one_line_error(lambda: load_original("some/name"), "4.57.1", "transformers>=5", error=ImportError)
    monkeypatch.setitem(sys.modules, "transformers", None)
    one_line_error(lambda: load_original("some/name"), "pip install transformers", error=ImportError)
