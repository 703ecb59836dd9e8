"""Every mistake that somebody makes in a plugin ends in one line that names the cause: before training, or as a warning."""

from dataclasses import replace

import mistakes.blocks
import mistakes.models
import pytest
import torch
from errors import one_line_error

from conftest import MODEL
from modules.contract import CONFIG, ContractError, check_block
from modules.model_contract import check_model, try_out
from modules.registry import build_model
from runs.execution import ExecutionPlan
from train import train
from training import plan

STOPPED = {  # steps of a layer string: what the error says
    "ForgetsSuper": "before Module.__init__() call (blocks.py, line …, in ForgetsSuper.__init__). Write super().__init__()",
    "TakesTheConfig": "the __init__ of TakesTheConfig takes the config, which a block is not given: name the values",
    "MisspellsInInit": "'torch.nn' has no attribute 'Liner' (blocks.py, line …, in MisspellsInInit.__init__)",
    "NeedsAnOption": "NeedsAnOption needs 'height', which is no field of the config: write NeedsAnOption(height=...)",
    "NeedsAnOption(heigth=3)": "NeedsAnOption has no option 'heigth'. Did you mean 'height'?",
    "NeedsAnOption(height='a')": "NeedsAnOption(height='a'): it must be int",
    "RejectsItsOption(share=7)": "layers='Norm->»RejectsItsOption(share=7)«->+': share=7: give a number from 0 to 1",
    "RejectsItsOption(share)": "the step 'RejectsItsOption(share)' cannot be read. Write Name, Name(option=value)",
    "RejectItsOption": "no block is called 'RejectItsOption'. Did you mean 'RejectsItsOption'?",
    "HidesModulesInAList": "`steps` of HidesModulesInAList is a plain list, so what is in it is neither trained nor saved",
    "HidesModulesInADict": "`parts` of HidesModulesInADict is a plain dict, so what is in it is neither trained nor saved",
    "HasAPlainTensor": "`gain` of HasAPlainTensor is a plain Tensor, so what is in it is neither trained nor saved",
    "HasRandomNumbersThatAreNotSaved": "saved and loaded again it gives another result: keep weights as nn.Parameter",
    "HasNoForward": "the block 'HasNoForward' has no forward: give it one, such as def forward(self, x)",
    "AsksForAMask": "the forward of AsksForAMask asks for 'mask', but a layer supplies only rope, ",
    "MisspellsAnInput": "names 'story_starts', which no layer supplies. Did you mean 'story_start'?",
    "ReturnsNothing": "the block 'ReturnsNothing' returns a NoneType: return the tensor x alone",
    "ReturnsATuple": "the block 'ReturnsATuple' returns a tuple: return the tensor x alone",
    "ChangesTheWidth": "it fails in its block 'ChangesTheWidth': RuntimeError: The size of tensor a (16) must match",
    "DropsAToken": "the block 'DropsAToken' makes (3, 22, 16) of (3, 23, 16): keep the shape",
    "SwapsTheAxes": "the block 'SwapsTheAxes' makes (3, 16, 23) of (3, 23, 16): keep the shape",
    "ReturnsFloat64": "the block 'ReturnsFloat64' makes torch.float64 of torch.float32: keep the dtype",
    "ReturnsBfloat16": "the block 'ReturnsBfloat16' makes torch.bfloat16 of torch.float32: keep the dtype",
    "MultipliesFloat64": "in MultipliesFloat64.forward). Keep the dtype of x",
    "MultipliesBfloat16": "in MultipliesBfloat16.forward). Keep the dtype of x",
    "MisspellsInForward": "has no attribute 'w_oot' (blocks.py, line …, in MisspellsInForward.forward)",
    "ViewsATransposedTensor": "in ViewsATransposedTensor.forward). Write .reshape(...)",
    "HasAFixedLength": "in HasAFixedLength.forward). Any number of tokens up to max_seq_len must fit",
    "AddsAListOfLosses": "has no attribute 'append' (blocks.py, line …, in AddsAListOfLosses.forward)",
    "AddsALossWithAxes": "the loss 'size' of the model 'GPT' has the shape (3, 23, 16): take its mean",
    "LooksUpIgnoredTargets": "An embedding has no row for this token or target, such as IGNORE, which is -100",
    "IsNotFinite": "the block 'IsNotFinite' makes numbers that are not finite",
    "ChangesItsInput": "the block 'ChangesItsInput' changes its input in place",
    "ScalesItsInput": "the block 'ScalesItsInput' changes its input in place",
    "ChangesWhatTheGradientNeeds": "the block 'ChangesWhatTheGradientNeeds' breaks the contract: RuntimeError: one of",
    "KeepsAGraph": "the block 'KeepsAGraph' breaks the contract: it keeps something from call to call",
    "KeepsState": "gives another result in its block 'KeepsState' after it has read something else: keep nothing",
    "DropsInEval": "draws random numbers in eval in its block 'DropsInEval': draw them only where self.training",
    "AttendsToAll": "sees the future in its block 'AttendsToAll'",
    "RollsTheWrongWay": "sees the future in its block 'RollsTheWrongWay'",
    "NormalisesOverTime": "sees the future in its block 'NormalisesOverTime'",
    "RunsBothWays": "sees the future in its block 'RunsBothWays'",
    "NormalisesOverTheBatch": "sees the future (in training) in its block 'NormalisesOverTheBatch'",
    "SubtractsTheMeanOfTheBatch": "mixes the rows of a batch in its block 'SubtractsTheMeanOfTheBatch'",
    "ReadsTheTargets": "reads its targets in its block 'ReadsTheTargets': in training, others change its logits",
}
WARNED = {
    "HasAnIdleWeight": "no gradient reaches layers.0.branches.0.blocks.1.idle",
    "CountsInEval": "changes its buffer layers.0.branches.0.blocks.1.calls in eval",
    "KnowsNoStories": "see each other in its block 'KnowsNoStories': its forward must ask for `story_start`",
    "IgnoresStories": "lets the stories of a row see each other in its block 'IgnoresStories'",
    "TakesNoCache": "the block 'TakesNoCache' takes no `cache`, so token by token it misses the earlier ones",
    "ForgetsItsCache": "another result in its block 'ForgetsItsCache' with a cache, token by token, than without",
}
SOUND = ("DropsItselfAtRandom", "TakesItsInputsByPosition", "PassesItsInputsOn(scale=3.0)", "HasTextInParentheses")

STOPPED_MODELS = {
    "TakesDim": "takes (dim, vocab_size), but a model is given (config, vocab_size)",
    "TakesOnlyTheVocabulary": "takes (vocab_size), but a model is given (config, vocab_size)",
    "MisspellsInInit": "cannot be built: AttributeError: 'ModelConfig' object has no attribute 'dims' (models.py, line …",
    "TakesNoBlocks": "takes no `blocks`, so those of modules/ and of plugins would be unknown to it: write def __init__(",
    "KeepsBlocksForItself": "does not pass `blocks` on: write def __init__(self, config, vocab_size, blocks, ...) and super()",
    "HasOption": "no model is called 'HasOption'. Did you mean 'HasOptions'?",
    "HasOptions(time=3)": "HasOptions has no option 'time'. Did you mean 'times'?",
    "HasOptions(times='a')": "HasOptions(times='a'): it must be int",
    "HasOptions(times=0)": "times=0: give a whole number of at least 1",
    "HasNoForward": "the model 'HasNoForward' has no forward: give it def forward(self, tokens, targets=None)",
    "HasNoWeights": "Nothing in it learns: keep weights as nn.Parameter",
    "TakesNoStories": "does not accept story_ids, so the stories of a row would see each other: take --train.packing padded",
    "NeedsTargets": "missing 1 required positional argument: 'targets'. Generation has no targets: write targets=None",
    "ReturnsLogitsOnly": "returns a Tensor: return (logits, loss)",
    "ReturnsADict": "returns a dict: return (logits, loss)",
    "ReturnsTheLossFirst": "returns (loss, logits): return (logits, loss), in this order",
    "HasNoLoss": "the loss of the model 'HasNoLoss' is None with targets: return a tensor",
    "HasALossWithAxes": "the loss of the model 'HasALossWithAxes' has the shape (69,): take its mean",
    "DetachesItsLoss": "Nothing in it learns: keep weights as nn.Parameter, do not detach the loss",
    "HasFewerLogits": "are (3, 23, 100): they must be (B, T, vocab_size), here (3, 23, 131)",
    "PredictsOnlyTheLast": "are (3, 1, 131): they must be (B, T, vocab_size), here (3, 23, 131)",
    "ReturnsFloat64": "the logits of the model 'ReturnsFloat64' are torch.float64: make them float32",
    "NeedsTheFullContext": "in NeedsTheFullContext.logits). Any number of tokens up to max_seq_len must fit",
    "CannotIgnore": "in CannotIgnore.loss). Leave targets that are IGNORE out",
    "SeesTheFuture": "the model 'SeesTheFuture' sees the future: tokens from position 1 on change earlier logits",
    "ReadsTheNextToken": "sees the future: tokens from position 1 on change earlier logits. Mask them; or if that is meant",
    "SeesALittleOfTheFuture": "the logits of a token have a gradient to the embeddings of later ones",
    "AddsItsTargets": "reads its targets: in eval, others change its logits",
    "KeepsItsState": "gives another result after it has read something else",
    "KeepsTheGraph": "It uses a tensor of the previous step: keep that as tensor.detach()",
    "MixesRows": "the model 'MixesRows' mixes the rows of a batch: each must give what it gives alone",
    "DropsInEval": "draws random numbers in eval: draw them only where self.training",
    "CannotBeScored": "has causal = False, so its logits do not score it: give it story_nats(stories)",
    "MayBeABound": "has story_nats, but no is_bound: set it to True for an upper bound, False for exact losses",
}
WARNED_MODELS = {
    "HasAnIdleHead": "no gradient reaches other_head.weight, other_head.bias",
    "ReturnsProbabilities": "are probabilities: return them as they are before the softmax",
    "SumsItsLoss": "is a sum over the targets: return their mean",
    "ScoresPadding": "scores targets that are IGNORE, such as padding",
    "ShiftsTheTargetsAgain": "targets are the next tokens already, so do not shift them again",
    "LosesLessThanItsLogits": "of the cross-entropy of its logits: it must not know more than they do",
    "MixesStories": "lets the stories of a row see each other",
    "HasAWrongCache": "gives another result with a cache, token by token, than without",
}
SOUND_MODELS = ("IsNotCausal", "DrawsInTraining", "HasOptions(times=3)")


def with_block(step: str):
    return replace(MODEL, layers=f"Norm->{step}->+", plugins=("mistakes.blocks",))


def with_model(name: str):
    layers = "Norm->MoE->+" if name == "KeepsBlocksForItself" else MODEL.layers
    return replace(MODEL, model=name, layers=layers, plugins=("mistakes.models",))


def stops_training(make, words, make_config, capsys):
    """With this error alone, and before anything is written."""
    one_line_error(lambda: next(train(make(), make_config(), "stopped")), *words.split("…"))
    assert capsys.readouterr().err == ""


def lines_before_training(config, capsys) -> list[str]:
    try_out(build_model(config, 128))
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("step", STOPPED)
def test_a_block_is_stopped_in_one_line(step, make_config, capsys):
    stops_training(lambda: with_block(step), STOPPED[step], make_config, capsys)


@pytest.mark.parametrize("name", STOPPED_MODELS)
def test_a_model_is_stopped_in_one_line(name, make_config, capsys):
    stops_training(lambda: with_model(name), STOPPED_MODELS[name], make_config, capsys)


@pytest.mark.parametrize("step", WARNED)
def test_a_block_is_warned_of_in_one_line(step, capsys):
    (line,) = lines_before_training(with_block(step), capsys)
    assert WARNED[step] in line


@pytest.mark.parametrize("name", WARNED_MODELS)
def test_a_model_is_warned_of_in_one_line(name, capsys):
    (line,) = lines_before_training(with_model(name), capsys)
    assert WARNED_MODELS[name] in line


def test_what_is_no_mistake_raises_no_alarm(capsys):
    for config in (*map(with_block, SOUND), *map(with_model, SOUND_MODELS)):
        check_model(config, 128)
        assert lines_before_training(config, capsys) == []


@pytest.mark.parametrize("name", ["DropsItselfAtRandom", "PassesItsInputsOn", "HasTextInParentheses"])
def test_what_is_no_mistake_keeps_the_contract(name, capsys):
    check_block(name, replace(CONFIG, plugins=("mistakes.blocks",)))
    assert ("the comment (a matrix, learned) cannot be checked" in capsys.readouterr().err) == (name == "HasTextInParentheses")


def test_random_numbers_in_training_are_no_difference_between_plans(make_config):
    model, config = build_model(with_model("DrawsInTraining"), 128), make_config(dtype="float32", fast=False)
    assert plan.difference(model, config, ExecutionPlan("float32", False, 4, 1, False), torch.device("cpu")) == ""


def test_every_mistake_is_tried():
    blocks, models = ({entry.split("(")[0] for table in tables for entry in table} for tables in (
        (STOPPED, WARNED, SOUND), (STOPPED_MODELS, WARNED_MODELS, SOUND_MODELS),
    ))  # fmt: skip
    assert (blocks - {"RejectItsOption"}, models - {"HasOption"}) == ({*mistakes.blocks.BLOCKS}, {*mistakes.models.MODELS})


@pytest.mark.parametrize("words, expected", [
    (("--model.layers", "Norm->ForgetsSuper->+"), "error: the model 'GPT' cannot be built: AttributeError"),
    (("--model.layers", "Norm->AttendsToAll->+"), "error: the model 'GPT' sees the future in its block 'AttendsToAll'"),
    (("--model.layers", "Norm->IsNotFinite->+"), "error: the block 'IsNotFinite' makes numbers that are not finite"),
    (("--model.layers", "Norm-MLP->+"), "layers='»Norm-MLP«->+': the step 'Norm-MLP' cannot be read"),
    (("--model.model", "Looped(times=)"), "model='Looped(times=)' cannot be read: write Name or Name(option=value)"),
])  # fmt: skip
def test_the_terminal_shows_one_line(words, expected, script, corpus):
    options = ("--name", "x", "--train.data", corpus, "--train.max_minutes", "0.01")
    code, printed = script("--model.plugins", "mistakes.blocks", *options, *words)
    assert code and "Traceback" not in printed and expected in " ".join(printed.replace("│", " ").split())


def test_a_model_that_its_config_does_not_build_is_named():
    model = build_model(replace(MODEL, model="HasOptions", plugins=("mistakes.models",)), 128)
    model.config = MODEL
    problem = "the model 'GPT' of its config is a GPT, but it is a HasOptions"
    one_line_error(lambda: check_model(model), problem, error=ContractError)
