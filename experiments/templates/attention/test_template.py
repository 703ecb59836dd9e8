"""What this experiment promises: its blocks keep the contract, and its presets train, load and write."""

from dataclasses import replace

import pytest

from experiments.templates.attention.blocks import BLOCKS
from experiments.templates.attention.config import PLUGINS, PRESETS
from inference import generate, load_model
from modules.contract import CONFIG, check_block
from train import train


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_keep_the_contract(name):
    check_block(name, replace(CONFIG, plugins=PLUGINS))


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_load_and_write(name, make_config):
    model_config = replace(PRESETS[name].model, max_seq_len=64)
    list(train(model_config, make_config(max_steps=3), "quick"))
    model, tokenizer = load_model("quick")
    story = generate(model, tokenizer, "Tom", max_new_tokens=5)
    assert story == generate(model, tokenizer, "Tom", max_new_tokens=5, use_cache=False)
