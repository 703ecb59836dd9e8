"""Promises of config.py: what goes in comes back, and what cannot be says so in one line."""

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from errors import one_line_error

from config import PRE_NORM, SANDWICH_NORM, ModelConfig, TrainConfig, from_json, layer_steps, to_json

PARALLEL = [PRE_NORM, "Norm->MLP(mlp_dim=64)->+"]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(layers=SANDWICH_NORM),
        ModelConfig(layers=PARALLEL),
        ModelConfig(layers=(PRE_NORM,)),
        ModelConfig(layers=(PRE_NORM, PARALLEL), plugins=("one.two", "three")),
        ModelConfig(layers="MLP(activation='ReLU', gated=False)->+", embedding_scale="sqrt(dim)", head_dim=10),
        ModelConfig(norm_eps=1 / 3, rope_theta=12345.678901234567, embedding_scale=2, dropout=0.1),
        TrainConfig(data="Märchen/日本.txt", betas=(0.1, 0.2), eps=1e-30, max_minutes=None, max_steps=77, grad_clip=None),
    ],
)
def test_json_brings_back_every_value_and_its_type(config):
    again = from_json(type(config), to_json(config))
    assert again == config
    for field in fields(config):
        assert type(getattr(again, field.name)) is type(getattr(config, field.name))
    assert isinstance(json.loads(to_json(config)), dict)


def with_key(config, **changes):
    return json.dumps(json.loads(to_json(config)) | changes)


def without_key(config, key):
    return json.dumps({name: value for name, value in json.loads(to_json(config)).items() if name != key})


@pytest.mark.parametrize(
    "config_class, text, words",
    [
        (ModelConfig, with_key(ModelConfig(), num_layer=3), ["no field 'num_layer'", "'num_layers'"]),
        (ModelConfig, with_key(ModelConfig(), zzz=3), ["no field 'zzz'"]),
        (ModelConfig, without_key(ModelConfig(), "rope_theta"), ["'rope_theta'", "missing", '"rope_theta": 10000.0,']),
        (TrainConfig, without_key(TrainConfig(), "betas"), ["'betas'", "missing"]),
        (ModelConfig, to_json(TrainConfig()), ["no field"]),
        (ModelConfig, to_json(ModelConfig())[:40], ["not JSON"]),
        (ModelConfig, "", ["not JSON"]),
        (ModelConfig, "[1, 2]", ["object"]),
        (ModelConfig, '"dim"', ["object"]),
        (ModelConfig, "null", ["object"]),
        (ModelConfig, with_key(ModelConfig(), dim="128"), ["dim='128'", "int"]),
        (ModelConfig, with_key(ModelConfig(), dim=True), ["dim=True", "int"]),
        (ModelConfig, with_key(ModelConfig(), dropout=NAN), ["dropout=nan"]),
        (ModelConfig, with_key(ModelConfig(), plugins=None), ["plugins=None"]),
        (ModelConfig, with_key(ModelConfig(), plugins="mine"), ["plugins='mine'"]),
        (ModelConfig, with_key(ModelConfig(), layers={"tile": 5}), ["layers="]),
        (ModelConfig, with_key(ModelConfig(), layers={"tile": PRE_NORM}), ["layers="]),
        (ModelConfig, with_key(ModelConfig(), layers={"tile": [PRE_NORM], "more": 1}), ["layers="]),
        (ModelConfig, with_key(ModelConfig(), layers=[[PRE_NORM]]), ["layers="]),
        (TrainConfig, with_key(TrainConfig(), betas=5), ["betas=5"]),
        (TrainConfig, with_key(TrainConfig(), betas=[0.9]), ["betas=(0.9,)"]),
    ],
)  # fmt: skip
def test_foreign_json_is_named(config_class, text, words):
    one_line_error(lambda: from_json(config_class, text), *words)


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"dim": 0}, ["dim=0", "at least 1"]),
        ({"dim": 12.0}, ["dim=12.0", "int"]),
        ({"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ({"num_heads": -4}, ["num_heads=-4", "at least 1"]),
        ({"num_kv_heads": 0}, ["num_kv_heads=0", "at least 1"]),
        ({"num_kv_heads": 3}, ["num_kv_heads=3", "num_heads=4", "[1, 2, 4]"]),
        ({"num_kv_heads": 8}, ["num_kv_heads=8", "num_heads=4", "[1, 2, 4]"]),
        ({"dim": 130}, ["num_heads=4", "dim=130", "[1, 2, 5, 10, 13, 26, 65, 130]", "head_dim"]),
        ({"head_dim": 0}, ["head_dim=0", "None"]),
        ({"head_dim": 33}, ["positions='rope'", "33", "even"]),
        ({"dim": 60}, ["positions='rope'", "15", "even"]),
        ({"mlp_dim": -1}, ["mlp_dim=-1", "positive"]),
        ({"max_seq_len": 0}, ["max_seq_len=0", "at least 1"]),
        ({"positions": "rotary"}, ["positions='rotary'", "rope, learned, sinusoidal, none"]),
        ({"positions": "sinusoidal", "dim": 33, "num_heads": 3, "num_kv_heads": 1}, ["positions='sinusoidal'", "33", "even"]),
        ({"rope_theta": 0.0}, ["rope_theta=0.0", "positive"]),
        ({"rope_theta": INF}, ["rope_theta=inf", "finite"]),
        ({"norm": "RmsNorm"}, ["norm='RmsNorm'", "Did you mean 'RMSNorm'"]),
        ({"norm_eps": 0.0}, ["norm_eps=0.0", "positive"]),
        ({"norm_eps": NAN}, ["norm_eps=nan", "finite"]),
        ({"norm_affine": False, "norm_bias": True}, ["norm_bias=True", "norm_affine=True"]),
        ({"norm_affine": "no"}, ["norm_affine='no'", "bool"]),
        ({"activation": "gelu"}, ["activation='gelu'", "SiLU, GELU, ReLU, ReLU2"]),
        ({"gated": 1}, ["gated=1", "bool"]),
        ({"attention_soft_cap": 0.0}, ["attention_soft_cap=0.0", "None"]),
        ({"logit_soft_cap": -30.0}, ["logit_soft_cap=-30.0", "None"]),
        ({"logit_scale": 0.0}, ["logit_scale=0.0", "positive"]),
        ({"embedding_scale": "sqrt"}, ["embedding_scale='sqrt'", "sqrt(dim)"]),
        ({"embedding_scale": 0.0}, ["embedding_scale=0.0", "positive"]),
        ({"dropout": 1.0}, ["dropout=1.0", "below 1"]),
        ({"dropout": -0.1}, ["dropout=-0.1", "below 1"]),
        ({"dropout": True}, ["dropout=True"]),
        ({"plugins": ["a"]}, ["plugins=['a']", "tuple"]),
        ({"plugins": "a"}, ["plugins='a'", "tuple"]),
        ({"layers": ""}, ["layers='»«'"]),
        ({"layers": []}, ["layers=[]", "at least one"]),
        ({"layers": ()}, ["layers=()", "at least one"]),
        ({"layers": (PRE_NORM, [])}, ["layers=", "at least one"]),
        ({"layers": 7}, ["layers=7"]),
        ({"layers": [PRE_NORM, "Norm->"]}, ["layers='Norm->»«'", "empty step"]),
        ({"layers": (PRE_NORM, PRE_NORM, PRE_NORM)}, ["num_layers=2", "multiple of 3"]),
    ],
)  # fmt: skip
def test_impossible_models_are_named(knobs, words):
    one_line_error(lambda: ModelConfig(**knobs), *words)


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"batch_size": 0}, ["batch_size=0", "at least 1"]),
        ({"batch_size": 16.0}, ["batch_size=16.0", "int"]),
        ({"batch_size": 16, "micro_batch_size": 5}, ["micro_batch_size=5", "batch_size=16", "[1, 2, 4, 8, 16]"]),
        ({"batch_size": 16, "micro_batch_size": 0}, ["micro_batch_size=0", "batch_size=16"]),
        ({"batch_size": 16, "micro_batch_size": 32}, ["micro_batch_size=32", "batch_size=16"]),
        ({"max_steps": None, "max_minutes": None}, ["max_steps=None", "max_minutes"]),
        ({"max_steps": 0}, ["max_steps=0", "positive"]),
        ({"max_minutes": -1.0}, ["max_minutes=-1.0", "positive"]),
        ({"max_minutes": INF}, ["max_minutes=inf", "finite"]),
        ({"max_steps": 40}, ["max_steps=40", "warmup_steps", "50"]),
        ({"max_steps": 100, "final_flat_steps": 60}, ["max_steps=100", "final_flat_steps", "110"]),
        ({"eval_every": 0}, ["eval_every=0", "at least 1"]),
        ({"eval_stories": 199}, ["eval_stories=199", "200"]),
        ({"checkpoint_every": 0}, ["checkpoint_every=0", "at least 1"]),
        ({"optimizer": "Lion(betas=(0.9"}, ["optimizer='Lion(betas=(0.9' cannot be read: write Name or Name(option=value)"]),
        ({"loss": "z loss"}, ["loss='z loss' cannot be read"]),
        ({"betas": (0.9, 1.0)}, ["betas=(0.9, 1.0)", "below 1"]),
        ({"betas": (0.9,)}, ["betas=(0.9,)"]),
        ({"eps": 0.0}, ["eps=0.0", "positive"]),
        ({"weight_decay": -0.1}, ["weight_decay=-0.1", "at least 0"]),
        ({"grad_clip": 0.0}, ["grad_clip=0.0", "None"]),
        ({"lr_max": 0.0}, ["lr_max=0.0", "positive"]),
        ({"lr_max": NAN}, ["lr_max=nan", "finite"]),
        ({"lr_min": 0.1}, ["lr_min=0.1", "lr_max=0.004"]),
        ({"lr_init": 0.1}, ["lr_init=0.1", "lr_max=0.004"]),
        ({"lr_init": -0.1}, ["lr_init=-0.1", "at least 0"]),
        ({"warmup_steps": -1}, ["warmup_steps=-1", "at least 0"]),
        ({"final_flat_steps": -1}, ["final_flat_steps=-1", "at least 0"]),
        ({"schedule": "wsd(0.3)"}, ["schedule='wsd(0.3)' cannot be read"]),
        ({"schedule": "constant", "final_flat_steps": 5}, ["final_flat_steps=5", "constant schedule"]),
        ({"num_restarts": -1}, ["num_restarts=-1", "at least 0"]),
        ({"restart_mult": 0.0}, ["restart_mult=0.0", "positive"]),
        ({"seed": -1}, ["seed=-1", "from 0 to 9223372036854775807"]),
        ({"seed": 2**63}, ["seed=9223372036854775808", "from 0 to 9223372036854775807"]),
        ({"data_seed": 2**63}, ["data_seed=9223372036854775808", "from 0 to 9223372036854775807, or None"]),
        ({"dtype": "bf16"}, ["dtype='bf16'", "bfloat16"]),
        ({"packing": "pack"}, ["packing='pack'", "Did you mean 'packed'"]),
        ({"compile": 1}, ["compile=1", "bool", "auto"]),
        ({"fast": "kernel"}, ["fast='kernel'", "bool", "auto"]),
        ({"fast": None}, ["fast=None", "bool", "auto"]),
        ({"ema_decay": 1.0}, ["ema_decay=1.0", "between 0 and 1", "None"]),
        ({"ema_decay": 0.0}, ["ema_decay=0.0", "between 0 and 1", "None"]),
    ],
)  # fmt: skip
def test_impossible_trainings_are_named(knobs, words):
    one_line_error(lambda: TrainConfig(**knobs), *words)


def test_layer_steps():
    assert layer_steps("Norm->Attn(window=64)->+") == [("Norm", {}), ("Attn", {"window": 64}), ("+", {})]
    assert layer_steps(" Norm -> | -> MLP( a=-1.5, b=None , c='x', d=(1, [True])) -> + ") == [
        ("Norm", {}), ("|", {}), ("MLP", {"a": -1.5, "b": None, "c": "x", "d": (1, [True])}), ("+", {}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "layer, word",
    [
        ("Norm->->+", "'Norm->»«->+': an empty step"),
        ("Norm->Attn(64)->+", "'Attn(64)'"),
        ("Norm->Attn(window=size)->+", "'Attn(window=size)'"),
        ("Norm->Attn(window=64->+", "'Attn(window=64'"),
        ("Norm->Attn(**{'window': 64})->+", "Attn(**"),
        ("Norm->Attn(window=64, window=32)->+", "'Attn(window=64, window=32)'"),
        ("Norm->a.b->+", "'a.b'"),
        ("Norm->3->+", "'3'"),
        ("Norm->MLP+MLP->+", "'MLP+MLP'"),
        ("Norm->MLP()()->+", "'MLP()()'"),
        ("Norm>MLP>+", "'Norm>MLP>+'"),
        ("+->MLP", "'»+«->MLP': this + has nothing to add"),
        ("Norm->MLP->+->+", "'Norm->MLP->+->»+«': this + has nothing to add"),
        ("|", "no block"),
        ("|->+", "'|->»+«': this + has nothing"),
    ],
)
def test_layer_steps_names_what_it_cannot_read(layer, word):
    one_line_error(lambda: layer_steps(layer), "layers=", word)
    one_line_error(lambda: ModelConfig(layers=layer), "layers=", word)


def test_a_tuple_of_layers_tiles_the_depth():
    assert ModelConfig(num_layers=4, layers=("MLP->+", PARALLEL)).depth_layers == ["MLP->+", PARALLEL] * 2
    assert ModelConfig(num_layers=3, layers=PARALLEL).depth_layers == [PARALLEL] * 3
    assert ModelConfig(num_layers=2).depth_layers == [PRE_NORM] * 2


def test_a_block_may_ask_for_every_field_and_gets_a_number_where_it_is_none():
    values = ModelConfig(dim=96, num_heads=6).block_values()
    assert set(values) == {field.name for field in fields(ModelConfig)}
    assert (values["head_dim"], values["mlp_dim"]) == (16, 256)
    values = ModelConfig(dim=96, num_heads=5, num_kv_heads=1, head_dim=10, mlp_dim=7, dropout=0.25).block_values()
    assert (values["head_dim"], values["mlp_dim"], values["dropout"]) == (10, 7, 0.25)


def test_options_of_a_layer_string_win_over_the_fields():
    config = ModelConfig(dim=96, num_heads=6)
    assert config.block_values({"gated": False})["mlp_dim"] == 4 * 96
    assert config.block_values({"mlp_dim": 50, "window": 3}) == config.block_values() | {"mlp_dim": 50, "window": 3}


@pytest.mark.parametrize("dim", [1, 3, 32, 96, 100, 128, 256])
def test_a_gated_mlp_has_the_parameters_of_an_ungated_one(dim):
    """Three matrices of 8/3 dim are two of 4 dim, up to the rounding to a multiple of 8."""
    config = ModelConfig(dim=dim, num_heads=1, num_kv_heads=1, positions="none")
    width, ungated = config.block_values()["mlp_dim"], replace(config, gated=False).block_values()["mlp_dim"]
    assert ungated == 4 * dim and width % 8 == 0 and (abs(3 * width - 2 * ungated) <= 3 * 4 or width == 8)
    assert replace(config, mlp_dim=24).block_values()["mlp_dim"] == 24


def test_configs_are_frozen_and_hashable():
    for config in (ModelConfig(), TrainConfig()):
        with pytest.raises(FrozenInstanceError):
            config.dim = 3
        assert hash(config) == hash(replace(config))
    assert len({ModelConfig(), ModelConfig(), ModelConfig(dim=64), ModelConfig(layers=(PRE_NORM, SANDWICH_NORM))}) == 3


def test_importing_config_needs_no_torch():
    code = "import sys, config; print([name for name in ('torch', 'numpy', 'pandas', 'matplotlib') if name in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""
