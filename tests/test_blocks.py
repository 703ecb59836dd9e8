"""Every block of the menu keeps the contract, and the contract catches every kind of block that does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from errors import one_line_error

from config import ModelConfig
from model import GPT
from modules.contract import CONFIG, ContractError, check_block, try_out
from modules.registry import block_menu

BROKEN = replace(CONFIG, plugins=("broken_blocks",))

PROBLEMS = {
    "SeesTheFuture": "it sees the future: what comes from",
    "SeesTheNextToken": "it sees the future: what comes from",
    "SeesTheFutureOfItsStory": "it sees the future (with several stories in a row)",
    "SeesTheFutureInTraining": "it sees the future (in training)",
    "TakesNoCache": "with a cache, token by token, it gives another result than without: a block that mixes tokens takes `cache`",
    "ForgetsItsCache": "with a cache, token by token, it gives another result than without (off by",
    "ForgetsInChunks": "with a cache, in chunks, it gives another result",
    "KnowsNoStories": "stories of a row see each other: one that begins at 5 is not as alone: forward must ask for `first`",
    "LeaksOverStories": "stories of a row see each other: one that begins at 5 is not as alone (off by",
    "DropsGradientsOfItsInput": "no gradient reaches its input",
    "HasAnIdleWeight": "no gradient reaches 0.idle",
    "HasGradientsThatAreNotFinite": "the gradient of its input is not finite in torch.float32",
    "OverflowsInBfloat16": "its output is not finite in torch.bfloat16",
    "DropsAToken": "it makes (2, 70, 24) of (2, 71, 24): keep the shape",
    "DividesByTheLengthLessOne": "it is not finite for a single token",
    "HasAWrongShapeComment": "the comment says (B, D, T), that is (2, 24, 71), but y is (2, 71, 24)",
    "DrawsInEval": "it is not deterministic in eval",
    "ChangesItsInput": "it changes its input in place",
    "LooksAtOtherRows": "a row gives another result in a batch than alone",
    "NeedsRope": "TypeError: 'NoneType' object is not subscriptable",
    "NeedsAnOption": "NeedsAnOption needs 'height', which is no field of the config",
    "ReportsNothing": "report() says 'share': nan",
    "CountsNoWork": "flops_per_token(71) is -1.0",
    "DoesNotReadItsMemory": "no gradient reaches the memory",
    "HasItsOwnSoftmax": "attention='sdpa' gives other numbers than 'plain'",
    "Undocumented": "it has no docstring",
    "Bare": "it is no LoggingModule",
    "HasExamplesWithoutItself": "it does not stand in 'MLP'",
    "HasOneExample": "examples='HasOneExample': give a tuple of layer strings, such as ('HasOneExample',)",
}
SOUND = ("Mean", "Open", "Close", "ReadsMemory", "LooksBothWays")


@pytest.mark.parametrize("name", block_menu(CONFIG))
def test_every_block_of_the_menu_keeps_the_contract(name):
    check_block(name)


def test_the_blocks_keep_it_in_other_configs_too():
    other = replace(CONFIG, positions="none", norm="LayerNorm", norm_bias=True, linear_bias=True, qk_norm=True, gated=False)
    for name in ("Attn", "MLP", "Norm", "ValueAttn"):
        check_block(name, other)
    check_block("Attn", layer="Attn(window=5)")
    check_block("ShortConv", layer="Norm->ShortConv(width=9)->+")


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_broken_promise_is_told_in_one_line_that_names_the_block(name):
    before = torch.get_rng_state()
    told = f"the block {name!r} breaks the contract: "
    one_line_error(lambda: check_block(name, BROKEN), told, PROBLEMS[name], error=ContractError)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("name", SOUND)
def test_sound_blocks_pass(name):
    check_block(name, BROKEN)


def test_every_block_of_the_broken_plugin_is_tried():
    assert {*PROBLEMS, *SOUND} == block_menu(BROKEN).keys() - block_menu(CONFIG).keys()


def test_what_cannot_be_checked():
    one_line_error(lambda: check_block("Mena", BROKEN), "no block is called 'Mena'", "Did you mean 'Mean'?")
    one_line_error(lambda: check_block("MLP", ModelConfig(max_seq_len=64)), "max_seq_len=64", "at least 71")
    one_line_error(lambda: check_block("MLP", layer="Norm->Attn"), "'MLP'", "it does not stand in", error=ContractError)


def layered(*strings):
    return GPT(replace(BROKEN, num_layers=len(strings), layers=strings), 50)


@pytest.mark.parametrize("name", ["SeesTheFuture", "SeesTheFutureInTraining", "SeesTheNextToken"])
def test_what_a_block_must_not_see_is_told_before_it_is_trained(name, capsys):
    try_out(layered(f"Norm->{name}->+->Norm->MLP->+", f"Norm->{name}->+"))
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"warning: the block {name!r} breaks the contract: it sees the future" in told[0]


def test_sound_blocks_and_layers_are_tried_out_in_silence(capsys):
    sound, random = layered("Norm->Mean->+->Norm->MLP->+", "Norm->MLP->|", "Mean", "MLP->+->Norm"), torch.get_rng_state()
    try_out(sound)
    assert torch.get_rng_state().equal(random) and capsys.readouterr().err == ""


def test_a_skip_that_is_missing_is_told(capsys):
    try_out(GPT(replace(CONFIG, layers="Norm->Attn->+->Norm->MLP"), 50))
    assert capsys.readouterr().err.count("no + behind MLP") == 1


def test_a_model_that_cannot_be_run_is_told_in_one_line():
    broken = layered("Norm->MLP->+", "Norm->DropsAToken->+")
    one_line_error(lambda: try_out(broken), "it fails in DropsAToken (model.py, line ", "size of tensor", "contract.check_block")


def test_the_docs_list_every_block():
    page = (Path(__file__).resolve().parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
    assert [name for name in block_menu(CONFIG) if f"`{name}`" not in page] == []
