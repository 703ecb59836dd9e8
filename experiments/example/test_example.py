"""Promises of this experiment: its blocks keep the contract and compute what the paper says, and its presets train."""

import math
from dataclasses import replace

import pytest
import torch

from experiments.example.blocks import BLOCKS, ForgettingAttn
from experiments.example.config import PRESETS
from inference import generate, load_model
from modules.contract import CONFIG, check_block
from train import train


@pytest.mark.parametrize("name", BLOCKS)
def test_the_blocks_keep_the_contract(name):
    check_block(name, replace(CONFIG, plugins=("experiments.example.blocks",)))


@torch.no_grad()
def test_the_attention_is_that_of_the_paper():
    torch.manual_seed(0)
    block, x = ForgettingAttn(dim=6, num_heads=1, num_kv_heads=1, head_dim=4), torch.randn(1, 5, 6)
    for weight in block.parameters():
        torch.nn.init.normal_(weight)
    q, k, v, gates = block.w_q(x)[0], block.w_k(x)[0], block.w_v(x)[0], block.w_forget(x)[0].sigmoid()
    for i in range(5):
        scores = [q[i] @ k[j] / math.sqrt(4) + gates[j + 1 : i + 1].log().sum() for j in range(i + 1)]
        expected = block.w_out(torch.stack(scores).softmax(dim=0) @ v[: i + 1])
        torch.testing.assert_close(block(x)[0, i], expected)


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_and_load_again(name, make_config):
    model_config = replace(PRESETS[name].model, max_seq_len=64)
    *_, last = train(model_config, make_config(max_steps=3, eval_every=3), "quick")
    assert math.isfinite(last.validation_loss)
    model, tokenizer = load_model("quick")
    assert model.config == model_config
    assert generate(model, tokenizer, "Tom", max_new_tokens=5).startswith("Tom")
