"""The kernels give what the formulas in float64 give, for any layout and number of threads; or say why they cannot."""

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error
from test_model import EVERY_MODEL, TINY, VARIANTS, build, some_tokens

import model
from config import TrainConfig
from fast import loss as losses
from fast import ops as kernels
from modules.convolution import ShortConv
from training import autotune as probe

pytestmark = pytest.mark.skipif(kernels.fingerprint() == "none", reason="there is no C++ compiler")


def projections(B, H, G, T, K):
    """q, k, v and the gradient of the output, as a model has them: transposed, and with a gradient."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(B, T, heads, K).transpose(1, 2) for heads in (H, G, G, H))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def first_seen(kind, B, T):
    """Where the story of each token begins, or its window; None where it sees all tokens before it."""
    times = torch.arange(T).expand(B, T)
    if kind == "stories":  # a token begins a story with a chance of 1 in 40
        torch.manual_seed(1)
        return (times * (torch.rand(B, T) < 1 / 40)).cummax(dim=1).values
    return None if kind == "causal" else (times - 50).clamp(min=0).int()


def reference(q, k, v, first=None):
    """Scores, softmax and weighted sum in float64."""
    B, H, T, K = q.shape
    q, k, v = q.double(), *(x.double().repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    times = torch.arange(T)
    seen = (times <= times[:, None]) & (times >= (0 if first is None else first[:, None, :, None]))
    return (q @ k.mT / math.sqrt(K)).masked_fill(~seen, -math.inf).softmax(dim=-1) @ v


def output_and_gradients(attention, q, k, v, d_out, first=None):
    out = attention(q, k, v, first)
    return out, *torch.autograd.grad(out, (q, k, v), d_out.type_as(out))


def assert_near(ours, expected, **tolerance):
    for got, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@pytest.mark.parametrize("kind", ["causal", "stories", "window"])
@pytest.mark.parametrize(
    "B, H, G, T, K",
    [(2, 2, 1, 1, 16), (2, 3, 3, 7, 8), (2, 4, 2, 64, 32), (3, 4, 1, 100, 40), (2, 4, 2, 256, 32), (1, 2, 2, 300, 64),
     (2, 8, 2, 300, 16), (1, 1, 1, 256, 128)],
)  # fmt: skip
def test_as_in_float64(B, H, G, T, K, kind):
    inputs, first = projections(B, H, G, T, K), first_seen(kind, B, T)
    assert_near(output_and_gradients(kernels.attention, *inputs, first), output_and_gradients(reference, *inputs, first))


def test_sharp_weights():
    """Scores of several hundred neither overflow nor lose the largest."""
    q, k, v, d_out = projections(2, 2, 1, 100, 32)
    inputs = (q.detach() * 100).requires_grad_(), k, v, d_out
    ours, expected = output_and_gradients(kernels.attention, *inputs), output_and_gradients(reference, *inputs)
    assert_near(ours, expected, rtol=1e-3, atol=1e-3)


def test_any_layout():
    q, k, v, d_out = (x.detach() for x in projections(2, 4, 2, 70, 16))
    layouts = [q.contiguous(), k.mT.contiguous().mT, v[:1].expand(2, -1, -1, -1), torch.ones(()).expand_as(d_out)]
    inputs = [x.requires_grad_() for x in layouts[:3]] + layouts[3:]
    assert_near(output_and_gradients(kernels.attention, *inputs), output_and_gradients(reference, *inputs))


def test_output_needs_no_copy():
    q, k, v, d_out = projections(2, 4, 2, 10, 16)
    assert kernels.attention(q, k, v).transpose(1, 2).is_contiguous()


def test_threads_give_the_same_bits():
    inputs, first, results = projections(1, 4, 2, 300, 32), first_seen("stories", 1, 300), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(output_and_gradients(kernels.attention, *inputs, first))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


def test_nan_is_not_hidden():
    q, k, v, d_out = projections(1, 2, 1, 40, 16)
    with torch.no_grad():
        k[0, 0, 20] = math.nan
    out = kernels.attention(q, k, v)
    assert out[:, :, :20].isfinite().all() and out[:, :, 20:].isnan().all()


def test_compiled_without_a_graph_break():
    inputs, first = projections(2, 4, 2, 30, 16), first_seen("stories", 2, 30)
    compiled = torch.compile(kernels.attention, fullgraph=True, backend="aot_eager")
    for seen in (None, first):
        assert_near(output_and_gradients(compiled, *inputs, seen), output_and_gradients(kernels.attention, *inputs, seen))


def test_operators_keep_their_promises():
    """That nothing is changed in place, and that shapes and strides are foretold."""
    q, k, v, d_out = (x.detach() for x in projections(2, 4, 2, 30, 16))
    for first in (None, first_seen("stories", 2, 30).int()):
        out, lse = torch.ops.basegpt.attention(q, k, v, first)
        torch.library.opcheck(torch.ops.basegpt.attention.default, (q, k, v, first))
        torch.library.opcheck(torch.ops.basegpt.attention_backward.default, (d_out, q, k, v, first, out, lse))


def test_under_autocast():
    """bfloat16 in, bfloat16 out, and float32 between."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in projections(2, 4, 2, 30, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = output_and_gradients(kernels.attention, *inputs)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    assert_near(ours, output_and_gradients(reference, *inputs), rtol=1e-2, atol=1e-2)


def short_conv(x, weight, bias, first):
    """That of modules/, with this weight and bias."""
    block = ShortConv(*reversed(weight.shape), bias=bias is not None)
    return torch.func.functional_call(block, {"weight": weight, "bias": bias}, (x,), {"first": first})


def as_projected(B, H, T, K):
    """(B, H, T, K), in memory (B, T, H, K)."""
    return torch.randn(B, T, H, K).transpose(1, 2)


def operations():
    """Each operation as ours, as a formula, and inputs of all sizes; a gradient is asked of those that are floats."""
    torch.manual_seed(0)
    for x in (torch.randn(7, 3), torch.randn(2, 50, 129), as_projected(2, 3, 33, 40), torch.randn(5, 70, 31).mT):
        for weight in ((), (torch.randn(x.shape[-1]),)):
            ours, formula = (
                lambda x, weight=None, by=by: by(x, x.shape[-1:], weight, 1e-3) for by in (kernels.rms_norm, F.rms_norm)
            )
            yield "rms_norm", ours, formula, (x, *weight)
    for B, H, T, K in ((2, 3, 33, 40), (1, 1, 1, 2), (3, 2, 70, 6)):
        rope = torch.randn(1, T, K // 2), torch.randn(1, T, K // 2)
        ours, formula = (lambda x, by=by, rope=rope: by(x, rope) for by in (kernels.apply_rope, model.apply_rope))
        yield "apply_rope", ours, formula, (as_projected(B, H, T, K),)
    for B, T, D, width in ((2, 100, 24, 4), (3, 2, 17, 4), (1, 1, 5, 2), (2, 60, 33, 1)):
        for first in (None, first_seen("stories", B, T)):
            for bias in (None, torch.randn(D)):
                yield "short_conv", kernels.short_conv, short_conv, (torch.randn(B, T, D), torch.randn(width, D), bias, first)
    for name in kernels.ACTIVATIONS:
        for shape in ((2, 5, 24), (3, 999)):
            ours = partial(kernels.activate, name)
            formula = model.MLP(8, 8, name).activate
            x = torch.randn(shape) * torch.tensor(10.0).pow(torch.randint(-2, 3, shape))
            yield name, ours, formula, (x,)
            yield name, ours, formula, (x, torch.randn(shape))
    for make, shape in ((torch.randn, (2, 30, 24)), (as_projected, (2, 3, 5, 7))):
        inputs = make(*shape), make(*shape), torch.randn(2)
        yield "weighted_sum", kernels.weighted_sum, lambda x, y, weights: weights[0] * x + weights[1] * y, inputs


def values_and_gradients(operation, inputs, expanded=False):
    inputs = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    out = operation(*inputs)
    torch.manual_seed(1)
    d_out = torch.ones(()).expand(out.shape) if expanded else torch.randn(out.shape)
    return out, *torch.autograd.grad(out, [x for x in inputs if x is not None and x.requires_grad], d_out.to(out.dtype))


@pytest.mark.parametrize("expanded", [False, True], ids=["", "the gradient is one number, expanded"])
def test_operations_as_in_float64(expanded):
    for name, ours, formula, inputs in operations():
        in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        found, wanted = values_and_gradients(ours, inputs, expanded), values_and_gradients(formula, in_float64, expanded)
        for one, other in zip(found, wanted, strict=True):
            assert one.shape == other.shape and one.dtype == torch.float32
            assert (one.double() - other).abs().max() <= 5e-6 * other.abs().max(), (name, inputs[0].shape)


def test_operations_under_autocast():
    """What goes through memory is bfloat16, what is learned and what is computed is float32."""
    learned = {"rms_norm": 1, "short_conv": 1, "weighted_sum": 2}  # from which input on
    for name, ours, formula, inputs in operations():
        halves = [x.bfloat16() if x is not None and i < learned.get(name, 9) else x for i, x in enumerate(inputs)]
        in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in halves]
        with torch.autocast("cpu", torch.bfloat16):
            found = values_and_gradients(ours, halves)
        for place, (one, other) in enumerate(zip(found, values_and_gradients(formula, in_float64), strict=True)):
            assert one.dtype == (torch.float32 if place > learned.get(name, 9) else torch.bfloat16), (name, place)
            assert (one.double() - other).norm() <= 3e-2 * other.norm(), (name, place, inputs[0].shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_what_the_next_product_reads(dtype):
    x = torch.randn(2, 30, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, d_x = values_and_gradients(lambda x: kernels.rms_norm(x, (24,), None, 1e-3, torch.bfloat16), (x,))
    assert out.dtype == torch.bfloat16 and d_x.dtype == dtype
    assert (out.double() - F.rms_norm(x.double(), (24,), None, 1e-3)).norm() < 1e-2 * out.double().norm()


def test_bfloat16_is_rounded_as_by_torch():
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.3e38, 1.00390625, 1.01171875])
    x, weight = torch.cat([torch.randn(10_000), special]).bfloat16(), torch.tensor([[0.1234]])
    ours, wanted = kernels.short_conv(x[None, :, None], weight).flatten(), (x.float() * (1 + weight[0])).bfloat16()
    torch.testing.assert_close(ours, wanted, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V, soft_cap", [(98, None), (2048, 15.0), (3, 0.5)])
def test_cross_entropy(V, soft_cap, dtype):
    torch.manual_seed(0)
    logits, targets = (torch.randn(70, V) * 20).to(dtype), torch.randint(V, (70,))
    targets[::3] = losses.IGNORE
    expected = logits.double().requires_grad_()
    loss = F.cross_entropy(model.soft_cap(expected, soft_cap), targets, reduction="sum", ignore_index=losses.IGNORE)
    loss.backward()
    for cross_entropy_ in (losses.cross_entropy_, kernels.cross_entropy_):
        ours = logits.to(dtype if cross_entropy_ is kernels.cross_entropy_ else torch.float32, copy=True)
        torch.testing.assert_close(cross_entropy_(ours, targets, soft_cap).double(), loss.detach(), atol=0, rtol=1e-5)
        torch.testing.assert_close(ours.double(), expected.grad, atol=1e-5, rtol=1e-4 if ours.dtype == torch.float32 else 5e-3)


def test_not_a_number_stays_one():
    for name, ours, _, (x, *others) in operations():
        x[(0,) * x.ndim] = math.nan
        assert ours(x, *others).isnan().any(), name
    logits = torch.randn(2, 50)
    logits[0, 3] = math.nan
    assert kernels.cross_entropy_(logits, torch.tensor([1, 1]), 15.0).isnan()


def test_threads_give_the_same_bits_in_all_operations():
    def everything():
        results = [value for _, ours, _, inputs in operations() for value in values_and_gradients(ours, inputs)]
        logits = torch.randn(70, 98)
        return [*results, kernels.cross_entropy_(logits, torch.arange(70), 3.0), logits]

    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("name", ["0.5m_short_and_thick", "gpt2_like", "gemma1_like", "grok_like", "modules"])
def test_a_model_on_kernels_equals_one_without(name):
    trained, tokens = build(EVERY_MODEL[name]).train(), some_tokens(2, 31)
    stories, results = torch.tensor([[0] * 12 + [1] * 18] * 2), []
    for backend in ("plain", "kernel"):
        probe.apply(probe.Choices("float32", backend, 2, torch.get_num_threads(), compile=False), trained)
        trained.zero_grad()
        trained.loss_chunk = None
        with torch.no_grad():
            logits, _ = trained(tokens[:, :-1], story_ids=stories)
        trained.loss_chunk = 7
        _, loss = trained(tokens[:, :-1], tokens[:, 1:], story_ids=stories)
        loss.backward()
        results.append((logits, loss, [weight.grad for weight in trained.parameters()]))
        with torch.no_grad():  # a few tokens at a time, as a story is told
            cache = model.Cache()
            told = torch.cat([trained(part, cache=cache)[0] for part in tokens[:, :-1].split(10, dim=1)], dim=1)
            torch.testing.assert_close(told, trained(tokens[:, :-1])[0], atol=1e-4, rtol=1e-4)
    (logits, loss, gradients), (our_logits, our_loss, our_gradients) = results
    torch.testing.assert_close(our_logits, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(our_loss, loss)
    for ours, wanted in zip(our_gradients, gradients, strict=True):
        assert (ours - wanted).norm() < 1e-3 * wanted.norm() + 1e-6


@pytest.mark.parametrize("name", [
    "0.5m_short_and_thick", "gpt2_like", "gemma1_like", "griffin_like", "megalodon_like", "gated_deltanet_like", "speedrun",
    "modules",
])  # fmt: skip
def test_a_model_trains_on_kernels_in_bfloat16_as_in_float32_without(name):
    choices = probe.Choices("bfloat16", "kernel", 2, torch.get_num_threads(), compile=False)
    assert probe.difference(build(EVERY_MODEL[name]), TrainConfig(loss_chunk=16), choices, torch.device("cpu")) == ""


def test_kernels_are_for_float32_and_bfloat16_and_not_for_compile(monkeypatch):
    """And there they are taken."""
    layers = "Shortcut->|->Norm->ShortConv->MLP->+"
    trained, tokens = build(replace(TINY, layers=layers)).train(), some_tokens(2, 20)
    for block in probe.with_backend(trained):
        block.backend = "kernel"
    trained.loss_chunk = 16
    calls = []
    library = kernels.build()
    monkeypatch.setattr(kernels, "build", lambda: calls.append("a kernel") or library)
    trained(tokens, tokens)[1].backward()
    assert len(calls) == 2 * 2 * 4 + 2 + 3  # forward and back of two layers' blocks and the last norm; three chunks of the loss
    with torch.autocast("cpu", torch.bfloat16):
        trained(tokens, tokens)[1].backward()
    assert len(calls) == 2 * (2 * 2 * 4 + 2 + 3)
    calls.clear()
    with torch.autocast("cpu", torch.float16):
        trained(tokens, tokens)[1].backward()
    torch._dynamo.reset()
    torch.compile(trained.layers[0], backend="eager", fullgraph=True)(torch.randn(2, 20, 24), shared={}, first=None)
    trained.double()(tokens, tokens)[1].backward()
    assert not calls


@pytest.mark.parametrize("config", [TINY, VARIANTS["qk_norm"], VARIANTS["modules"]])
def test_compile_needs_no_break_on_kernels(config):
    trained, tokens = build(config), some_tokens(2, 20)
    for block in probe.with_backend(trained):
        block.backend = "kernel"
    torch._dynamo.reset()
    compiled = torch.compile(trained, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), trained(tokens, tokens), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is loaded")
def test_one_openmp_runtime():
    kernels.build()
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in mapped if path.name.startswith(("libgomp", "libomp", "libiomp"))]) == 1


def build_anew():
    kernels.build.__wrapped__()


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    one_line_error(build_anew, "C++ compiler", "install g++", "attention='sdpa'", error=kernels.BuildError)
    assert kernels.fingerprint() == "none"
    monkeypatch.setenv("CXX", "my-compiler")
    one_line_error(build_anew, "$CXX='my-compiler'", error=kernels.BuildError)


def test_broken_compiler(monkeypatch, tmp_path, folders):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho In a file: >&2\necho fatal error: no memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    one_line_error(build_anew, str(broken), "fatal error: no memory", "attention='sdpa'", error=kernels.BuildError)
    assert not list((folders / "cache").iterdir())  # nothing that another run would take for the kernel
    broken.write_text("")
    one_line_error(build_anew, str(broken), "cannot be run", error=kernels.BuildError)


def test_damaged_library(monkeypatch, folders):
    path = folders / "cache" / f"kernels-{kernels.fingerprint()}.so"
    path.parent.mkdir()
    path.write_text("")
    one_line_error(build_anew, str(path), "attention='sdpa'", error=kernels.BuildError)
