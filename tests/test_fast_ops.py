"""The C++ kernels give the formulas in float64, for any memory layout and number of threads; or say why they cannot be built."""

import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from errors import one_line_error

import model
from fast import build, loss, ops
from modules import convolution, embeddings

needs_compiler = pytest.mark.skipif(build.fingerprint() == "none", reason="there is no C++ compiler")


def projections(B, H, G, T, K):
    """q, k, v and the gradient of the output, transposed as in a model."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(B, T, heads, K).transpose(1, 2) for heads in (H, G, G, H))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), d_out


def first_visible(kind, B, T):
    """The start of the story of each token, or of its window; None if it sees all earlier tokens.  (B, T)"""
    times = torch.arange(T).expand(B, T)
    if kind == "stories":  # each token starts one with a probability of 1 in 40
        torch.manual_seed(1)
        return (times * (torch.rand(B, T) < 1 / 40)).cummax(dim=1).values
    return None if kind == "causal" else (times - 50).clamp(min=0).int()


def reference(q, k, v, first=None):
    """Scores, softmax and weighted sum in float64."""
    B, H, T, K = q.shape
    q, k, v = q.double(), *(x.double().repeat_interleave(H // k.shape[1], dim=1) for x in (k, v))
    times = torch.arange(T)
    mask = (times <= times[:, None]) & (times >= (0 if first is None else first[:, None, :, None]))
    return (q @ k.mT / math.sqrt(K)).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v


def output_and_gradients(attention, q, k, v, d_out, first=None):
    out = attention(q, k, v, first)
    return out, *torch.autograd.grad(out, (q, k, v), d_out.type_as(out))


def assert_near(ours, expected, **tolerance):
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **(tolerance or {"rtol": 1e-5, "atol": 1e-5}))


@needs_compiler
@pytest.mark.parametrize("kind", ["causal", "stories", "window"])
@pytest.mark.parametrize(
    "B, H, G, T, K",
    [(2, 2, 1, 1, 16), (2, 3, 3, 7, 8), (2, 4, 2, 64, 32), (3, 4, 1, 100, 40), (2, 4, 2, 256, 32), (1, 2, 2, 300, 64),
     (2, 8, 2, 300, 16), (1, 1, 1, 256, 128)],
)  # fmt: skip
def test_attention_equals_float64(B, H, G, T, K, kind):
    inputs, first = projections(B, H, G, T, K), first_visible(kind, B, T)
    assert_near(output_and_gradients(ops.attention, *inputs, first), output_and_gradients(reference, *inputs, first))


@needs_compiler
def test_attention_with_sharp_weights():
    """Scores of several hundred neither overflow nor lose the largest."""
    q, k, v, d_out = projections(2, 2, 1, 100, 32)
    inputs = (q.detach() * 100).requires_grad_(), k, v, d_out
    ours, expected = output_and_gradients(ops.attention, *inputs), output_and_gradients(reference, *inputs)
    assert_near(ours, expected, rtol=1e-3, atol=1e-3)


@needs_compiler
def test_attention_takes_any_memory_layout():
    q, k, v, d_out = (x.detach() for x in projections(2, 4, 2, 70, 16))
    layouts = [q.contiguous(), k.mT.contiguous().mT, v[:1].expand(2, -1, -1, -1), torch.ones(()).expand_as(d_out)]
    inputs = [x.requires_grad_() for x in layouts[:3]] + layouts[3:]
    assert_near(output_and_gradients(ops.attention, *inputs), output_and_gradients(reference, *inputs))


@needs_compiler
def test_the_output_of_attention_needs_no_copy():
    q, k, v, d_out = projections(2, 4, 2, 10, 16)
    assert ops.attention(q, k, v).transpose(1, 2).is_contiguous()


@needs_compiler
def test_attention_gives_the_same_bits_with_any_threads():
    inputs, first, results = projections(1, 4, 2, 300, 32), first_visible("stories", 1, 300), []
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(output_and_gradients(ops.attention, *inputs, first))
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@needs_compiler
def test_attention_does_not_hide_nan():
    q, k, v, d_out = projections(1, 2, 1, 40, 16)
    with torch.no_grad():
        k[0, 0, 20] = math.nan
    out = ops.attention(q, k, v)
    assert out[:, :, :20].isfinite().all() and out[:, :, 20:].isnan().all()


@needs_compiler
def test_attention_is_compiled_without_a_graph_break():
    inputs, first = projections(2, 4, 2, 30, 16), first_visible("stories", 2, 30)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    for start in (None, first):
        assert_near(output_and_gradients(compiled, *inputs, start), output_and_gradients(ops.attention, *inputs, start))


@needs_compiler
def test_the_operators_of_attention_pass_opcheck():
    """Nothing is changed in place; the fake kernels have the right shapes and strides."""
    q, k, v, d_out = (x.detach() for x in projections(2, 4, 2, 30, 16))
    for first in (None, first_visible("stories", 2, 30).int()):
        out, lse = torch.ops.basegpt.attention(q, k, v, first)
        torch.library.opcheck(torch.ops.basegpt.attention.default, (q, k, v, first))
        torch.library.opcheck(torch.ops.basegpt.attention_backward.default, (d_out, q, k, v, first, out, lse))


@needs_compiler
def test_attention_under_autocast():
    """bfloat16 in, bfloat16 out, and float32 in between."""
    inputs = [x.detach().bfloat16().requires_grad_() for x in projections(2, 4, 2, 30, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = output_and_gradients(ops.attention, *inputs)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    assert_near(ours, output_and_gradients(reference, *inputs), rtol=1e-2, atol=1e-2)


def as_projected(B, H, T, K):
    """(B, H, T, K), in memory (B, T, H, K) as a linear layer leaves it."""
    return torch.randn(B, T, H, K).transpose(1, 2)


def operations():
    """Each kernel, its formula, and inputs of all sizes; gradients are those of the floats."""
    torch.manual_seed(0)
    for x in (torch.randn(7, 3), torch.randn(2, 50, 129), as_projected(2, 3, 33, 40), torch.randn(5, 70, 31).mT):
        for weight in (None, torch.randn(x.shape[-1])):
            kernel, formula = (lambda x, weight, f=f: f(x, weight, 1e-3) for f in (ops.rms_norm, model.rms_norm))
            yield "rms_norm", kernel, formula, (x, weight)
    for B, H, T, K in ((2, 3, 33, 40), (1, 1, 1, 2), (3, 2, 70, 6)):
        rope = torch.randn(1, T, K // 2), torch.randn(1, T, K // 2)
        kernel, formula = (lambda x, f=f, rope=rope: f(x, rope) for f in (ops.apply_rope, model.apply_rope))
        yield "apply_rope", kernel, formula, (as_projected(B, H, T, K),)
    for B, T, D, width in ((2, 100, 24, 4), (3, 2, 17, 4), (1, 1, 5, 2), (2, 60, 33, 1)):
        for first in (None, first_visible("stories", B, T)):
            for bias in (None, torch.randn(D)):
                inputs = torch.randn(B, T, D), torch.randn(width, D), bias, first
                yield "short_conv", ops.short_conv, convolution.short_conv, inputs
    for name in ops.ACTIVATIONS:
        for shape in ((2, 5, 24), (3, 999)):
            kernel, formula = partial(ops.activate, name), partial(model.activate, name)
            x = torch.randn(shape) * torch.tensor(10.0).pow(torch.randint(-2, 3, shape))
            yield name, kernel, formula, (x,)
            yield name, kernel, formula, (x, torch.randn(shape))
    for make, shape in ((torch.randn, (2, 30, 24)), (as_projected, (2, 3, 5, 7))):
        yield "weighted_sum", ops.weighted_sum, embeddings.weighted_sum, (make(*shape), make(*shape), torch.randn(2))


def values_and_gradients(operation, inputs, expanded=False):
    inputs = [x.detach().requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    out = operation(*inputs)
    torch.manual_seed(1)
    d_out = torch.ones(()).expand(out.shape) if expanded else torch.randn(out.shape)
    return out, *torch.autograd.grad(out, [x for x in inputs if x is not None and x.requires_grad], d_out.to(out.dtype))


@needs_compiler
@pytest.mark.parametrize("expanded", [False, True], ids=["", "the gradient is one number, expanded"])
def test_operations_equal_float64(expanded):
    for name, kernel, formula, inputs in operations():
        in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
        results, expected = values_and_gradients(kernel, inputs, expanded), values_and_gradients(formula, in_float64, expanded)
        for one, other in zip(results, expected, strict=True):
            assert one.shape == other.shape and one.dtype == torch.float32
            assert (one.double() - other).abs().max() <= 5e-6 * other.abs().max(), (name, inputs[0].shape)


@needs_compiler
def test_operations_under_autocast():
    """Activations are bfloat16; weights, and all arithmetic, are float32."""
    first_weight = {"rms_norm": 1, "short_conv": 1, "weighted_sum": 2}  # its place among the inputs
    for name, kernel, formula, inputs in operations():
        weights_from = first_weight.get(name, 9)
        halves = [x.bfloat16() if x is not None and i < weights_from else x for i, x in enumerate(inputs)]
        in_float64 = [x.double() if x is not None and x.is_floating_point() else x for x in halves]
        with torch.autocast("cpu", torch.bfloat16):
            results = values_and_gradients(kernel, halves)
        for i, (one, other) in enumerate(zip(results, values_and_gradients(formula, in_float64), strict=True)):
            assert one.dtype == (torch.float32 if i > weights_from else torch.bfloat16), (name, i)
            assert (one.double() - other).norm() <= 3e-2 * other.norm(), (name, i, inputs[0].shape)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_writes_the_dtype_of_the_next_product(dtype):
    x = torch.randn(2, 30, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, d_x = values_and_gradients(lambda x: ops.rms_norm(x, None, 1e-3, torch.bfloat16), (x,))
    assert out.dtype == torch.bfloat16 and d_x.dtype == dtype
    assert (out.double() - F.rms_norm(x.double(), (24,), None, 1e-3)).norm() < 1e-2 * out.double().norm()


@needs_compiler
def test_bfloat16_is_rounded_as_in_torch():
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3.3e38, 1.00390625, 1.01171875])
    x, weight = torch.cat([torch.randn(10_000), special]).bfloat16(), torch.tensor([[0.1234]])
    y, expected = ops.short_conv(x[None, :, None], weight).flatten(), (x.float() * (1 + weight[0])).bfloat16()
    torch.testing.assert_close(y, expected, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("V, soft_cap", [(98, None), (2048, 15.0), (3, 0.5)])
@pytest.mark.parametrize(
    "cross_entropy_, dtype",
    [
        (loss.cross_entropy_, torch.float32),
        pytest.param(ops.cross_entropy_, torch.float32, marks=needs_compiler),
        pytest.param(ops.cross_entropy_, torch.bfloat16, marks=needs_compiler),
    ],
)
def test_cross_entropy_and_its_gradient_equal_float64(cross_entropy_, dtype, V, soft_cap):
    torch.manual_seed(0)
    logits, targets = (torch.randn(70, V) * 20).to(dtype), torch.randint(V, (70,))
    targets[::3] = model.IGNORE
    leaf = logits.double().requires_grad_()
    capped = leaf if soft_cap is None else soft_cap * torch.tanh(leaf / soft_cap)
    expected = F.cross_entropy(capped, targets, reduction="sum", ignore_index=model.IGNORE)
    expected.backward()
    total, grad = cross_entropy_(logits, targets, soft_cap)
    torch.testing.assert_close(total.double(), expected.detach(), atol=0, rtol=1e-5)
    torch.testing.assert_close(grad.double(), leaf.grad, atol=1e-5, rtol=1e-4 if dtype == torch.float32 else 5e-3)


@needs_compiler
def test_operations_do_not_hide_nan():
    for name, kernel, _, (x, *others) in operations():
        x[(0,) * x.ndim] = math.nan
        assert kernel(x, *others).isnan().any(), name
    logits = torch.randn(2, 50)
    logits[0, 3] = math.nan
    assert ops.cross_entropy_(logits, torch.tensor([1, 1]), 15.0)[0].isnan()


@needs_compiler
def test_operations_give_the_same_bits_with_any_threads():
    def everything():
        results = [value for _, kernel, _, inputs in operations() for value in values_and_gradients(kernel, inputs)]
        return [*results, *ops.cross_entropy_(torch.randn(70, 98), torch.arange(70), 3.0)]

    results, num_threads = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(everything())
    finally:
        torch.set_num_threads(num_threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is loaded")
def test_there_is_one_openmp_runtime():
    build.build()
    mapped = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    assert len([path for path in mapped if path.name.startswith(("libgomp", "libomp", "libiomp"))]) == 1


def build_uncached():
    build.build.__wrapped__()


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    one_line_error(build_uncached, "C++ compiler", "install g++", "--train.fast False", error=build.BuildError)
    assert build.fingerprint() == "none"
    monkeypatch.setenv("CXX", "my-compiler")
    one_line_error(build_uncached, "$CXX='my-compiler'", error=build.BuildError)


def test_a_broken_compiler_is_named(monkeypatch, tmp_path, folders):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho In a file: >&2\necho fatal error: no memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    one_line_error(build_uncached, str(broken), "fatal error: no memory", "--train.fast False", error=build.BuildError)
    assert not list((folders / "cache").iterdir())  # nothing that another run would take for the library
    broken.write_text("")
    one_line_error(build_uncached, str(broken), "cannot be run", error=build.BuildError)


@needs_compiler
def test_a_damaged_library_is_named(folders):
    path = build.library_path(build.fingerprint())
    assert path.parent == folders / "cache"
    path.parent.mkdir()
    path.write_text("")
    one_line_error(build_uncached, str(path), "--train.fast False", error=build.BuildError)
