"""fast.use gives the numbers of the plain model, accelerates registered classes only, and leaves everything else as it was."""

import copy
import inspect
from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from errors import one_line_error
from own_variants import SigmoidAttn, sigmoid_attention
from test_model import EVERY_MODEL, TINY, VARIANTS, build, some_tokens
from torch import nn

import fast
from config import TrainConfig
from fast import blocks, ops
from fast import build as fast_build
from inference import load_model
from metrics.scores import evaluate
from model import IGNORE, Attention, Cache
from runs.execution import ExecutionPlan
from train import train
from training.configure import configure_for_training
from training.plan import compile_parts, difference

needs_compiler = pytest.mark.skipif(fast_build.fingerprint() == "none", reason="there is no C++ compiler")
each_kernels = pytest.mark.parametrize(
    "kernels", [False, pytest.param(True, marks=needs_compiler)], ids=["PyTorch alone", "kernels"]
)
STORY_IDS = torch.tensor([[0] * 8 + [1] * 12] * 3)


def loss_and_gradients(model, dtype="float32", window=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and all gradients, flattened, of a training step on packed stories with some ignored targets."""
    tokens = some_tokens(3, 21)
    targets = tokens[:, 1:].masked_fill(some_tokens(3, 20, seed=2) < 20, IGNORE)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        _, loss = model(tokens[:, :-1], targets, story_ids=STORY_IDS, window=window)
    loss.backward()
    return loss.detach(), torch.cat([weight.grad.flatten() for weight in model.parameters()])


def assert_near(results, expected, tolerance: float):
    for ours, theirs in zip(results, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@each_kernels
@pytest.mark.parametrize("name", ["0.5m_short_and_thick", "gpt2_like", "gemma1_like", "gemma2_like", "grok_like", "modules"])
def test_a_fast_model_has_the_same_logits_loss_and_gradients(name, kernels):
    model, tokens = build(EVERY_MODEL[name]).train(), some_tokens(3, 20)
    with torch.no_grad():
        logits, _ = model(tokens, story_ids=STORY_IDS)
    expected = loss_and_gradients(model)
    fast.use(model, kernels, loss_chunk=7)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, story_ids=STORY_IDS)[0], logits, atol=1e-4, rtol=1e-4)
        cache = Cache()  # a few tokens at a time, as in generation
        pieces = [model(piece, cache=cache)[0] for piece in tokens.split(7, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens)[0], atol=1e-4, rtol=1e-4)
    assert_near(loss_and_gradients(model), expected, 1e-4)


@needs_compiler
@pytest.mark.parametrize("name", ["0.5m_short_and_thick", "gpt2_like", "gemma1_like", "griffin_like", "megalodon_like",
                                  "gated_deltanet_like", "speedrun", "modules"])  # fmt: skip
def test_a_fast_model_in_bfloat16_is_near_the_plain_one(name):
    model = build(replace(EVERY_MODEL[name], max_seq_len=96))
    plan = ExecutionPlan("bfloat16", True, 2, torch.get_num_threads(), compile=False)
    assert difference(model, TrainConfig(loss_chunk=16), plan, torch.device("cpu")) == ""


@each_kernels
@pytest.mark.parametrize(
    "variant, dtype, checkpointing, loss_chunk, is_compiled",
    [
        ("modules", "float32", True, None, False), ("modules", "float32", False, 7, False),
        ("modules", "float32", True, 64, False), ("soft_caps", "float32", True, None, False),
        ("soft_caps", "float32", False, 7, False), ("modules", "float32", False, None, True),
        ("modules", "bfloat16", True, 7, False), ("rope", "bfloat16", True, 7, True),
        ("soft_caps", "float32", True, 7, True),
    ],
)  # fmt: skip
def test_fast_goes_with_checkpointing_chunks_compile_and_autocast(
    variant, dtype, checkpointing, loss_chunk, is_compiled, kernels, monkeypatch
):
    model = build(VARIANTS[variant]).train()
    expected = loss_and_gradients(model, window=6)
    configure_for_training(model, TrainConfig(gradient_checkpointing=checkpointing))
    fast.use(model, kernels, loss_chunk)
    if is_compiled:  # traced, but without a compiler
        torch._dynamo.reset()
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
        compile_parts(model)
    assert_near(loss_and_gradients(model, dtype, window=6), expected, 1e-4 if dtype == "float32" else 0.03)


@each_kernels
@pytest.mark.parametrize("config", [TINY, VARIANTS["qk_norm"], VARIANTS["modules"]])
def test_a_fast_model_is_traced_without_a_graph_break(config, kernels):
    model, tokens = build(config), some_tokens(2, 20)
    fast.use(model, kernels)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), model(tokens, tokens), atol=1e-4, rtol=1e-4)


@needs_compiler
def test_kernels_run_in_float32_and_bfloat16_but_not_compiled(monkeypatch):
    model, tokens = build(replace(TINY, layers="Shortcut->|->Norm->ShortConv->MLP->+")).train(), some_tokens(2, 20)
    fast.use(model, loss_chunk=16)
    calls, library = [], fast_build.build()
    monkeypatch.setattr(ops, "build", lambda: calls.append("a kernel") or library)
    model(tokens, tokens)[1].backward()
    in_a_step = 2 * 2 * 4 + 2 + 3  # forward and backward of both layers' blocks and of the last norm; three chunks of the loss
    assert len(calls) == in_a_step
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens)[1].backward()
    assert len(calls) == 2 * in_a_step
    calls.clear()
    with torch.autocast("cpu", torch.float16):
        model(tokens, tokens)[1].backward()
    torch._dynamo.reset()
    torch.compile(model.layers[0], backend="eager", fullgraph=True)(torch.randn(2, 20, 24), shared={}, story_start=None)
    model.double()(tokens, tokens)[1].backward()
    assert not calls


@each_kernels
@torch.no_grad()
def test_a_fast_model_in_float64_is_as_exact(kernels):
    model, tokens = build(TINY).double(), some_tokens(2, 20)
    model.rope_cos, model.rope_sin = model.rope_cos.double(), model.rope_sin.double()
    x = {}
    model.norm.register_forward_hook(lambda module, inputs, output: x.update(last=output))
    model(tokens)
    expected = x["last"]
    fast.use(model, kernels)
    model(tokens)
    torch.testing.assert_close(x["last"], expected, atol=1e-12, rtol=1e-12)


# a model of none but subclasses that nobody has registered, and of classes that no fast one replaces
OWN = replace(
    TINY, norm="LayerNorm", plugins=("own_variants",), max_seq_len=48, layers=(
        "SquareNorm->SigmoidAttn(window=6)->+->Norm->SineMLP->+", "Norm->SigmoidMethod->+->SquareNorm->SineMLP(gated=False)->+",
    ),
)  # fmt: skip


@each_kernels
@pytest.mark.parametrize("model", ["GPT", "ShyGPT"])
def test_an_unregistered_subclass_is_never_accelerated(model, kernels):
    """Bit for bit, in training and in eval."""
    plain = build(replace(OWN, model=model)).train()
    swapped = copy.deepcopy(plain)
    fast.use(swapped, kernels)
    for results in zip(loss_and_gradients(plain, window=9), loss_and_gradients(swapped, window=9), strict=True):
        assert torch.equal(*results)
    tokens = some_tokens(3, 20)
    assert torch.equal(plain.eval()(tokens)[0], swapped.eval()(tokens)[0])


@needs_compiler
def test_a_run_of_unregistered_subclasses_is_never_accelerated(make_config, stories, monkeypatch):
    """Bit for bit, in training, after loading, and in an evaluation."""
    records, weights = [], []
    for is_fast in (False, True):
        train_config = make_config(max_steps=3, eval_every=3, fast=is_fast, loss_chunk=None)
        *_, last = train(OWN, train_config, f"fast_{is_fast}")
        records.append((last.train_loss, last.validation_loss))
        model, tokenizer = load_model(f"fast_{is_fast}")
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert records[0] == records[1] and torch.equal(*weights)

    assert not fast.is_used(model)
    with monkeypatch.context() as patch:
        patch.setattr(fast_build, "fingerprint", lambda: "none")
        expected = evaluate(model, tokenizer, stories[:20]).story_nats
    monkeypatch.setattr(blocks, "MANY_STORIES", 1)
    assert torch.equal(evaluate(model, tokenizer, stories[:20]).story_nats, expected)
    tokens = torch.arange(40)[None]
    logits, _ = model(tokens)
    fast.use(model)
    assert torch.equal(model(tokens)[0], logits)


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(blocks, "SWAPS", {kernels: dict(swaps) for kernels, swaps in blocks.SWAPS.items()})
    monkeypatch.setattr(blocks, "PLAIN", dict(blocks.PLAIN))


@each_kernels
def test_a_registered_subclass_is_accelerated(kernels, registry):
    calls = []

    def faster(*arguments):
        calls.append(arguments)
        return sigmoid_attention(*arguments)

    fast.register(SigmoidAttn, kernels=kernels, causal_attention=faster)
    model, tokens = build(OWN), some_tokens(2, 20)
    expected, _ = model(tokens)
    fast.use(model, kernels)
    assert torch.equal(model(tokens)[0], expected) and len(calls) == 1
    block = model.layers[0].branches[0].blocks[1]
    assert isinstance(block, SigmoidAttn) and type(block).__name__ == "SigmoidAttn"
    fast.use(model, not kernels) if fast_build.fingerprint() != "none" else fast.undo(model)
    model(tokens)
    assert type(block) is SigmoidAttn and len(calls) == 1


def test_a_function_that_a_block_does_not_have_is_named():
    one_line_error(lambda: fast.register(Attention, causal_atention=sigmoid_attention), "Attention", "'causal_atention'",
                   "Did you mean 'causal_attention'?")  # fmt: skip


def fast_functions() -> list:
    """Each function of a registered block, and the one that replaces it."""
    return [
        pytest.param(getattr(block, name), function.__func__, id=f"{block.__name__}.{name}-{kernels}")
        for kernels, swaps in blocks.SWAPS.items()
        for block, fast_class in swaps.items()
        for name, function in vars(fast_class).items() if isinstance(function, staticmethod)
    ]  # fmt: skip


@pytest.mark.parametrize("plain, faster", fast_functions())
def test_a_fast_function_has_the_signature_of_the_plain_one(plain, faster):
    ours, theirs = (inspect.signature(function).parameters for function in (faster, plain))
    assert [(p.name, p.default) for p in ours.values()] == [(p.name, p.default) for p in theirs.values()]


def classes(model) -> list[type]:
    return [type(module) for module in model.modules()]


@each_kernels
def test_use_and_undo_change_classes_only_and_are_idempotent(kernels):
    model, tokens, calls = build(VARIANTS["modules"]), some_tokens(2, 20), []
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: calls.append(module))
    expected, _ = model(tokens)
    plain_calls, plain_classes, weights = [*calls], classes(model), dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def assert_unchanged():
        assert model.state_dict().keys() == state.keys()
        assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items())
        assert all(weight is weights[name] for name, weight in model.named_parameters())
        calls.clear()
        torch.testing.assert_close(model(tokens)[0], expected, atol=1e-4, rtol=1e-4)
        assert calls == plain_calls

    fast.use(model, kernels)
    once = classes(model)
    assert fast.is_used(model) and once != plain_classes
    assert_unchanged()
    fast.use(model, kernels)
    assert classes(model) == once
    assert classes(copy.deepcopy(model)) == once
    with pytest.raises(RuntimeError, match="stop"), fast.undone(model):
        assert classes(model) == plain_classes
        raise RuntimeError("stop")
    assert classes(model) == once
    for _ in range(2):
        fast.undo(model)
        assert classes(model) == plain_classes and not fast.is_used(model)
        assert_unchanged()


@needs_compiler
def test_the_last_use_counts():
    model = build(VARIANTS["modules"])
    fast.use(model, kernels=False)
    without_kernels = classes(model)
    fast.use(model)
    assert classes(model) != without_kernels
    fast.use(model, kernels=False)
    assert classes(model) == without_kernels


@each_kernels
def test_logits_are_left_out_only_where_the_loss_is_chunked(kernels):
    model, tokens = build(TINY), some_tokens(2, 20)
    for loss_chunk, is_training, targets in ((7, True, tokens), (7, True, None), (7, False, tokens), (None, True, tokens)):
        fast.use(model.train(is_training), kernels, loss_chunk)
        logits, loss = model(tokens, targets)
        assert (logits is None) == (loss_chunk is not None and is_training and targets is not None)
        assert (loss is None) == (targets is None)


def test_an_evaluation_leaves_a_model_as_it_was(monkeypatch, tiny_run, stories):
    """Plain, or with the fast classes that its training has chosen; that kernels cannot be built is said."""
    model, tokenizer = load_model(tiny_run)
    monkeypatch.setattr(blocks, "MANY_STORIES", 1)
    for use in (fast.undo, partial(fast.use, kernels=False)):
        use(model)
        before, inside = classes(model), []
        hook = model.register_forward_hook(lambda module, inputs, output, inside=inside: inside.append(classes(module)))
        evaluate(model, tokenizer, stories[:5])
        hook.remove()
        assert classes(model) == before
        is_left_alone = use is not fast.undo or fast_build.fingerprint() == "none"
        assert all((during == before) == is_left_alone for during in inside)


def test_an_evaluation_without_a_compiler_says_so_and_is_plain(monkeypatch, capsys, tiny_run, stories):
    model, tokenizer = load_model(tiny_run)
    expected = evaluate(model, tokenizer, stories[:5]).story_nats
    monkeypatch.setattr(blocks, "MANY_STORIES", 1)
    monkeypatch.setattr(fast_build, "fingerprint", lambda: "some")

    def fail():
        raise fast.BuildError("the compiler is broken")

    monkeypatch.setattr(fast_build, "build", fail)
    assert torch.equal(evaluate(model, tokenizer, stories[:5]).story_nats, expected)
    assert "the compiler is broken" in capsys.readouterr().err
