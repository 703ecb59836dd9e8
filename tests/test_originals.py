"""Promises of originals.py: with their weights ours is theirs, in logits, gradients and stories; what does not fit is named."""

import sys

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from published import ORIGINALS, YARN, V, original, random_model, some_tokens, their_config
from torch import nn

from inference import Sampling, generate_tokens
from originals.load import FAMILIES, convert, convert_config, load_original


def num_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


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


@torch.no_grad()
def test_of_a_model_that_reads_images_the_language_model_is_loaded(tmp_path):
    from transformers import AutoConfig

    tokens = some_tokens(1, 40)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    images = {"vision_config": {**vision, "patch_size": 14, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4}
    for family, text, more in (("gemma3", "gemma3_text_scaled", images), ("qwen3_5", "qwen3_5_text", {})):
        theirs = random_model(AutoConfig.for_model(family, text_config=ORIGINALS[text], tie_word_embeddings=True, **more))
        theirs.save_pretrained(tmp_path / family)
        for original_model in (theirs, str(tmp_path / family)):
            model = load_original(original_model)
            torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=0)


def test_the_old_names_of_scaled_rope_are_read():
    new = {"rope_parameters": YARN | {"rope_theta": 1e4}}
    old = {"rope_theta": 1e4, "rope_scaling": {"type" if name == "rope_type" else name: YARN[name] for name in YARN}}
    del old["rope_scaling"]["rope_theta"]
    one, other = (their_config("deepseek_v3_scaled", **{"rope_parameters": None} | names) for names in (old, new))
    assert convert_config("deepseek_v3", one) == convert_config("deepseek_v3", other)


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
    missing = {name: weight for name, weight in weights.items() if "layers.1" not in name}
    one_line_error(lambda: load_original(missing, config=config), "lack 'model.layers.1.", "and 8 more", "llama")
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


ODD = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.7}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    "name, changes, word",
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("llama", {"rope_parameters": DYNAMIC}, "rope_type may be default, linear, llama3, yarn"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ("llama", {"per_layer_config": {1: {"num_key_value_heads": 4}}}, "per_layer_config="),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ("qwen3_scaled", {"rope_parameters": YARN | {"truncate": False}}, "truncate=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"attn_pdrop": 0.1}, "attn_pdrop=0.1"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("deepseek_v3", {"n_shared_experts": 0}, "n_shared_experts=0"),
        ("deepseek_v3", {"head_dim": 8}, "head_dim=8"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("recurrent_gemma", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("recurrent_gemma", {"rope_parameters": ODD}, "5 of 8 channels"),
        ("qwen3_next", {"rope_parameters": ODD}, "11 of 16 channels"),
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
