"""Promises of presets.py: the sizes that they are said to have, the shapes that were published, and that they train."""

import functools
import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from errors import one_line_error

import fast
from config import from_json, to_json
from data.dataset import load_data
from inference import generate
from modules.registry import build_model
from originals.load import FAMILIES
from runs.presets import PRESETS, preset
from tokenizer import load_tokenizer
from training.optim import build_optimizers, step_optimizers

ROOT = Path(__file__).parents[1]
VOCAB_SIZE = 1027  # bpe_tokenizer_1024 with bos, eos and pad


def num_parameters(name: str, vocab_size: int = VOCAB_SIZE) -> int:
    return sum(weight.numel() for weight in build_model(preset(name).model, vocab_size).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    for config in PRESETS[name]:
        assert from_json(type(config), to_json(config)) == config


def test_the_presets_that_are_promised_are_there():
    assert set(PRESETS) == {
        "quick", "0.5m_short_and_thick", "0.5m_5foot11_and_skinnyfat", "0.5m_tall_and_skinny", "1m", "2m", "5m", "speedrun",
        "gpt2_like", "llama3_like", "qwen3_like", "gemma1_like", "gemma2_like", "gemma3_like",
        "grok_like", "mixtral_like", "deepseek_like", "arctic_like",
        "mamba_like", "mamba2_like", "mamba2_hybrid_like", "griffin_like", "megalodon_like", "gated_deltanet_like",
        "qwen3.5_like",
    }  # fmt: skip


def test_the_three_shapes_of_half_a_million_have_the_same_size():
    sizes = [num_parameters(name) for name in PRESETS if name.startswith("0.5m")]
    assert len(sizes) == 3
    assert max(sizes) <= 1.05 * min(sizes)
    assert all(0.45e6 <= size <= 0.55e6 for size in sizes)


@pytest.mark.parametrize("name, millions", [("1m", 1), ("2m", 2), ("5m", 5)])
def test_presets_are_as_large_as_they_are_called(name, millions):
    assert num_parameters(name) == pytest.approx(millions * 1e6, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "mamba_like", "mamba2_like", "mamba2_hybrid_like", "griffin_like", "megalodon_like", "gated_deltanet_like",
        "qwen3.5_like",
    ],
)  # fmt: skip
def test_presets_with_a_recurrence_have_the_parameters_of_1m(name):
    assert num_parameters(name) == pytest.approx(num_parameters("1m"), rel=0.05)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.endswith("_like")])
def test_published_models_are_scaled_down_to_about_a_million(name):
    assert 0.8e6 <= num_parameters(name) <= 1.5e6


def test_the_docs_list_every_preset_with_its_size():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \| (\d+) \| (\d+) \| (\d+) / (\d+) \|", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(PRESETS)
    for name, *numbers in rows:
        model, train_config = preset(name)
        size = num_parameters(name, load_tokenizer(train_config.tokenizer).vocab_size)
        shape = [model.dim, model.num_layers, model.num_heads, model.num_kv_heads]
        assert [int(number.replace(",", "")) for number in numbers] == [size, *shape], name


def test_an_unknown_preset_suggests_the_nearest():
    one_line_error(lambda: preset("llama_like"), "'llama_like'", "Did you mean 'llama3_like'?", "gpt2_like")
    one_line_error(lambda: preset(""), "''", "gpt2_like")


def test_importing_presets_needs_no_torch():
    code = "import sys, runs.presets; print({'torch', 'numpy', 'pandas', 'matplotlib'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()" and done.stderr == ""


def scaled(name: str, **their_fields) -> dict:
    """The fields of their config that say how large a model is, with the numbers of our preset."""
    model = preset(name).model
    return {
        "vocab_size": VOCAB_SIZE, "hidden_size": model.dim, "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.block_values()["head_dim"], "intermediate_size": model.block_values()["mlp_dim"],
        "max_position_embeddings": model.max_seq_len, **their_fields,
    }  # fmt: skip


NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LONG_WAVES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
PUBLISHED = {  # what the config.json of the published model says, where that is not about its size or the default of its family
    "gpt2_like": ("gpt2", {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 512, **NO_DROPOUT}),
    "llama3_like": (
        "llama", scaled("llama3_like", rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    ),
    "qwen3_like": ("qwen3", scaled("qwen3_like", tie_word_embeddings=True, **LONG_WAVES)),
    "gemma1_like": ("gemma", scaled("gemma1_like")),
    "gemma2_like": ("gemma2", scaled("gemma2_like", query_pre_attn_scalar=108 // 4, sliding_window=256)),
    "gemma3_like": ("gemma3_text", scaled("gemma3_like", query_pre_attn_scalar=24, sliding_window=64)),
    "mixtral_like": ("mixtral", scaled("mixtral_like", **LONG_WAVES)),
    "deepseek_like": (
        "deepseek_v3",
        scaled("deepseek_like", qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, q_lora_rank=48, kv_lora_rank=32)
        | {"moe_intermediate_size": 48, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "head_dim": 8},
    ),
    "mamba_like": ("mamba", scaled("mamba_like")),
    "mamba2_like": ("mamba2", scaled("mamba2_like", num_heads=5, state_size=32, n_groups=1, tie_word_embeddings=True)),
    "griffin_like": (
        "recurrent_gemma", scaled("griffin_like", intermediate_size=6 * 112, attention_window_size=128, logits_soft_cap=30.0)
    ),
    "qwen3.5_like": (
        "qwen3_5_text",
        scaled("qwen3.5_like", linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=32)
        | {"tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_model_but_for_its_size(name):
    """Their config with our sizes, read as originals.py reads it, whose models are compared with theirs elsewhere."""
    from transformers import AutoConfig

    family, fields = PUBLISHED[name]
    read = FAMILIES[family].config(AutoConfig.for_model(family, **fields))
    assert read.block_values() == preset(name).model.block_values()


@pytest.fixture(scope="module")
def storyworld(tmp_path_factory):
    """A tokenizer of that name, and 300 stories of the storyworld in rows of T + 1 of its tokens."""

    @functools.cache
    def load(tokenizer_name: str, T: int):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("BASEGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
            tokenizer = load_tokenizer(tokenizer_name)
            return tokenizer, load_data("storyworld:300", tokenizer, T, packing="packed", max_stories=None)

    return load


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_trains_and_generates(name, storyworld):
    """One tile of its layers, 25 steps of two rows of 32 tokens, with its optimizer."""
    model_config, train_config = preset(name)
    model_config = replace(model_config, num_layers=len(model_config.layers) if isinstance(model_config.layers, tuple) else 1)
    tokenizer, data = storyworld(train_config.tokenizer, 32)
    torch.manual_seed(0)
    model = build_model(model_config, tokenizer.vocab_size).train()
    fast.use(model, kernels=False, loss_chunk=train_config.loss_chunk)
    optimizers = build_optimizers(model, train_config)
    losses = []
    for step in range(25):
        batch = data.batch(2 * step, 2, seed=0)
        _, loss = model(batch.inputs, batch.targets, story_ids=batch.story_ids)
        loss.backward()
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = group["lr_scale"] * train_config.lr_max * min(1, (step + 1) / 10)
        step_optimizers(model, optimizers)
        losses.append(loss.item())
    assert losses[0] > math.log(tokenizer.vocab_size) - 1
    assert sum(losses[-5:]) / 5 < losses[0] - 1.3

    story = generate(model, tokenizer, "Once", max_new_tokens=12, temperature=0.0)
    assert story.startswith("Once") and len(story) > len("Once")
    assert story == generate(model, tokenizer, "Once", max_new_tokens=12, temperature=0.0, use_cache=False)
