"""Every block of the registry keeps the contract, fast or not, and the contract catches every kind of block that does not."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from errors import one_line_error

import fast
from config import ModelConfig
from fast import build
from modules.contract import CONFIG, WINDOW, ContractError, Trial, check_block
from modules.model_contract import try_out
from modules.registry import all_blocks, build_model

WITHOUT_KERNELS = partial(fast.use, kernels=False)
SWAPS = (WITHOUT_KERNELS,) if build.fingerprint() == "none" else (WITHOUT_KERNELS, fast.use)
BROKEN = replace(CONFIG, plugins=("broken_blocks",))

PROBLEMS = {
    "SeesTheFuture": "it sees the future: what comes from",
    "SeesTheNextToken": "it sees the future: what comes from",
    "SeesTheFutureOfItsStory": "it sees the future (with several stories in a row)",
    "SeesTheFutureInTraining": "it sees the future (in training)",
    "ForgetsItsCache": "with a cache, token by token, it gives another result than without",
    "ForgetsInChunks": "with a cache, in chunks, it gives another result",
    "KnowsNoStories": "stories of a row see each other: one that starts at 5 is not as alone: forward must ask for `story_start`",
    "LeaksOverStories": "stories of a row see each other: one that starts at 5 is not as alone (off by",
    "DropsGradientsOfItsInput": "no gradient reaches its input",
    "HasAnIdleWeight": "no gradient reaches 0.idle",
    "HasGradientsThatAreNotFinite": "the gradient of its input is not finite in torch.float32",
    "OverflowsInBfloat16": "its output is not finite in torch.bfloat16",
    "DropsAToken": "it makes (2, 70, 24) of (2, 71, 24): keep the shape",
    "DividesByTheLengthLessOne": "it is not finite for a single token",
    "HasAWrongShapeComment": "the comment says (B, D, T), that is (2, 24, 71), but y is (2, 71, 24)",
    "DrawsInEval": "it draws random numbers in eval: draw them only where self.training",
    "KeepsState": "it keeps something from call to call: in eval, only `cache` and `shared` may change",
    "ReadsTheTargets": "its output depends on `targets`, which are not there in eval: only its loss may",
    "AddsALossInEval": "it adds a loss in eval, too: add it only where self.training",
    "AddsALossWithAxes": "its loss 'size' is tensor(",
    "HidesItsWeights": "`steps` of HidesItsWeights is a plain list, so what is in it is neither trained nor saved: make it an",
    "HasUnsavedNumbers": "saved and loaded again it gives another result: keep weights as nn.Parameter",
    "ReturnsFloat64": "it makes torch.float64 of torch.float32: keep the dtype, as by .type_as(x)",
    "ReturnsATuple": "its forward returns a tuple: return the tensor x alone",
    "ForgetsSuper": "before Module.__init__() call (broken_blocks.py, line ",
    "ChangesItsInput": "it changes its input in place",
    "LooksAtOtherRows": "a row gives another result in a batch than alone",
    "NeedsRope": "TypeError: 'NoneType' object is not subscriptable",
    "NeedsAnOption": "NeedsAnOption needs 'height', which is no field of the config",
    "ReportsNoNumber": "report() says 'share': nan",
    "CountsNegativeFlops": "flops_per_token(71) is -1.0",
    "NeedsAMemory": "it fails where memory is None",
    "DoesNotReadItsMemory": "no gradient reaches the memory",
    "IsFastButWrong": "a faster class gives other numbers (with several stories in a row)",
    "HasOtherFastGradients": "a faster class has other gradients (off by",
    "Undocumented": "it has no docstring",
    "Bare": "it is no LoggingModule",
    "HasExamplesWithoutItself": "it does not stand in 'MLP'",
    "HasOneExample": "examples='HasOneExample': give a tuple of layer strings, such as ('HasOneExample',)",
}
SOUND = ("Mean", "TakesNoCache", "DropsItself", "Open", "Close", "ReadsMemory", "LooksBothWays")


@pytest.mark.parametrize("name", all_blocks(CONFIG))
def test_every_block_keeps_the_contract_under_every_swap(name, capsys):
    check_block(name, swaps=SWAPS)
    assert capsys.readouterr().err == ""  # no shape comment that cannot be checked


OTHER = replace(CONFIG, positions="none", norm="LayerNorm", norm_bias=True, linear_bias=True, qk_norm=True, gated=False)


@pytest.mark.parametrize(
    "name, config, layer",
    [
        ("Attn", OTHER, None), ("MLP", OTHER, None), ("Norm", OTHER, None), ("ValueAttn", OTHER, None),
        ("Attn", CONFIG, "Attn(window=5)"), ("ShortConv", CONFIG, "Norm->ShortConv(width=9)->+"),
    ],
)  # fmt: skip
def test_the_contract_holds_in_other_configs_too(name, config, layer):
    check_block(name, config, layer, swaps=SWAPS)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_broken_promise_is_one_line_that_names_the_block(name):
    random_state = torch.get_rng_state()
    start = f"the block {name!r} breaks the contract: "
    one_line_error(lambda: check_block(name, BROKEN, swaps=SWAPS), start, PROBLEMS[name], error=ContractError)
    assert torch.get_rng_state().equal(random_state)


@pytest.mark.parametrize("name", SOUND)
def test_sound_blocks_pass(name):
    check_block(name, BROKEN, swaps=SWAPS)


def test_every_block_of_the_broken_plugin_is_tried():
    assert {*PROBLEMS, *SOUND} == all_blocks(BROKEN).keys() - all_blocks(CONFIG).keys()


RECURRENT = ("CEMA", "DeltaNet", "GatedDeltaNet", "LinearAttn", "Mamba", "Mamba2", "RGLRU", "TimestepNorm")


@pytest.mark.parametrize("name", RECURRENT)
def test_a_window_has_no_effect_on_a_recurrence(name):
    trial = Trial(name, CONFIG)
    assert trial.run(trial.inputs, window=WINDOW).equal(trial.run(trial.inputs))


def test_what_cannot_be_checked_is_an_error():
    one_line_error(lambda: check_block("Mena", BROKEN), "no block is called 'Mena'", "Did you mean 'Mean'?")
    one_line_error(lambda: check_block("MLP", ModelConfig(max_seq_len=64)), "max_seq_len=64", "at least 71")
    one_line_error(lambda: check_block("MLP", layer="Norm->Attn"), "'MLP'", "it does not stand in", error=ContractError)


def model_of(*layers):
    return build_model(replace(BROKEN, num_layers=len(layers), layers=layers), 50)


@pytest.mark.parametrize("name, where", [
    ("SeesTheFuture", ""), ("SeesTheNextToken", ""), ("SeesTheFutureInTraining", " (in training)"),
    ("SeesTheFutureOfItsStory", " (with several stories in a row)"), ("LooksBothWays", ""),
])  # fmt: skip
def test_a_block_that_sees_the_future_stops_the_training(name, where, capsys):
    leaky = model_of("Norm->Mean->+", f"Norm->{name}->+->Norm->MLP->+")
    one_line_error(lambda: try_out(leaky), f"the model 'GPT' sees the future{where} in its block {name!r}: ", "causal = False")
    assert capsys.readouterr().err == ""


def test_sound_blocks_and_layers_are_tried_out_in_silence(capsys):
    sound, random_state = model_of("Norm->Mean->+->Norm->MLP->+", "Norm->MLP->|", "Mean", "MLP->+->Norm"), torch.get_rng_state()
    try_out(sound)
    assert torch.get_rng_state().equal(random_state) and capsys.readouterr().err == ""


def test_a_missing_skip_is_warned_of(capsys):
    try_out(build_model(replace(CONFIG, layers="Norm->Attn->+->Norm->MLP"), 50))
    assert capsys.readouterr().err.count("no + after MLP") == 1


def test_a_model_that_cannot_be_run_is_one_line():
    broken = model_of("Norm->MLP->+", "Norm->DropsAToken->+")
    one_line_error(lambda: try_out(broken), "the block 'DropsAToken' makes (3, 22, 24) of (3, 23, 24): keep the shape")


def test_the_docs_list_every_block():
    page = (Path(__file__).resolve().parent.parent / "docs" / "config.md").read_text(encoding="utf-8")
    assert [name for name in all_blocks(CONFIG) if f"`{name}`" not in page] == []
