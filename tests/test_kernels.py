"""The kernel gives what attention written out in float64 gives, for any layout and number of threads; or says why it cannot."""

import math
import sys
from pathlib import Path

import pytest
import torch
from errors import one_line_error

import kernels

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
