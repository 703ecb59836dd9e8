"""Kernels and autograd functions at the edges: empty tensors, infinities, bad targets, long sequences, second derivatives."""

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_fast_ops import needs_compiler, values_and_gradients

import model
from fast import loss, ops
from fast.selective_scan import selective_scan
from modules import attention, chunks, convolution, embeddings, mamba, mamba2, moe, moving_average, scan


def operations(B=2, T=5):
    """Each kernel, its formula in PyTorch, and inputs."""
    torch.manual_seed(0)
    x, q, k, v = torch.randn(B, T, 6), *torch.randn(3, B, 2, T, 4)
    weight, bias, pair, sinks, rope = torch.randn(3, 6), torch.randn(6), torch.randn(2), torch.randn(2), torch.rand(2, 1, T, 2)
    selection = x, x.abs(), -torch.rand(6, 3), x[..., :3], x[..., 3:]
    targets = torch.randint(3, (B, T))

    def with_sinks(q, k, v, sinks):
        return ops.attention(q, k, v, None, sinks)

    def mean_loss(x, weight):
        return F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=model.IGNORE)

    yield "attention", ops.attention, model.causal_attention, (q, k, v)
    yield "attention with sinks", with_sinks, attention.attention_with_sinks, (q, k, v, sinks)
    yield "RMSNorm", *(partial(norm, eps=1e-3) for norm in (ops.rms_norm, model.rms_norm)), (x, bias)
    yield "RoPE", *(partial(turn, rope=rope) for turn in (ops.apply_rope, model.apply_rope)), (q,)
    yield "ShortConv", ops.short_conv, convolution.short_conv, (x, weight, bias)
    yield "weighted sum", ops.weighted_sum, embeddings.weighted_sum, (x, x.flip(0), pair)
    yield "selective scan", *(partial(f, story_start=None, chunk=16) for f in (selective_scan, mamba.selective_scan)), selection
    for name in ops.ACTIVATIONS:
        yield name, partial(ops.activate, name), partial(model.activate, name), (x, x.flip(0))
    for in_place_loss in (ops.cross_entropy_, loss.cross_entropy_):
        chunked = partial(loss.chunked_cross_entropy, targets=targets, soft_cap=None, chunk=4, in_place_loss=in_place_loss)
        yield in_place_loss.__module__, chunked, mean_loss, (x, weight)


def assert_same(kernel, formula, inputs, name):
    for ours, expected in zip(values_and_gradients(kernel, inputs), values_and_gradients(formula, inputs), strict=True):
        torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")


def check_empty():
    for sizes in ((0, 5), (2, 0)):
        for name, kernel, formula, inputs in operations(*sizes):
            assert_same(kernel, formula, inputs, name)


@needs_compiler
def test_empty_tensors_give_the_values_of_torch():
    """In a process of its own, since a kernel could end it; seconds to start."""
    here = Path(__file__).parent
    code = "import test_kernel_edges; test_kernel_edges.check_empty()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parent))), "BASEGPT_CACHE": library_folder()}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def library_folder() -> str:
    """Where the kernels that this process has loaded are, so that another need not compile them."""
    return str(Path(ops.build()._name).parent)


@needs_compiler
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_inputs_give_the_values_of_torch(value):
    for name, kernel, formula, inputs in operations():
        for number, x in enumerate(inputs):
            if x.ndim < 3 or (name, number, value) == ("selective scan", 1, -math.inf):
                continue  # weights are finite, and steps positive
            infinite = x.clone()
            infinite[(-1,) * x.ndim] = value
            others = *inputs[:number], infinite, *inputs[number + 1 :]
            if name.startswith("attention"):  # the last query alone: PyTorch makes others NaN, too, which do not see the last key
                ours, expected = (attend(*others)[:, :, -1] for attend in (kernel, formula))
                torch.testing.assert_close(ours, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
            else:
                assert_same(kernel, formula, others, (name, number))


@needs_compiler
def test_weights_in_bfloat16_are_read_as_that():
    """A kernel that takes them for float32 reads beyond their end."""
    for name, kernel, formula, inputs in operations():
        if name in ("RMSNorm", "ShortConv", "weighted sum"):
            halves = [x.bfloat16() for x in inputs]
            results = values_and_gradients(kernel, halves), values_and_gradients(formula, [x.float() for x in halves])
            for ours, expected in zip(*results, strict=True):
                torch.testing.assert_close(ours.float(), expected, rtol=0.05, atol=0.05)
    q, rope = torch.randn(1, 2, 5, 4).bfloat16(), torch.rand(2, 1, 5, 2).bfloat16()
    torch.testing.assert_close(ops.apply_rope(q, rope).float(), model.apply_rope(q.float(), rope.float()), rtol=0.05, atol=0.05)


@needs_compiler
def test_attention_to_a_score_of_minus_infinity_alone_is_nan():
    """It does not fall back on the keys that are masked."""
    q, k, v = torch.ones(1, 1, 5, 4), torch.full((1, 1, 5, 4), -math.inf), torch.randn(1, 1, 5, 4)
    k[:, :, 1:] = 1.0
    out = ops.attention(q, k, v)
    assert out[:, :, 0].isnan().all() and torch.allclose(out[:, :, 1], v[:, :, 1])


@pytest.mark.parametrize("in_place_loss", [loss.cross_entropy_, pytest.param(ops.cross_entropy_, marks=needs_compiler)])
def test_bad_targets_raise_the_errors_of_torch(in_place_loss):
    hidden, weight = torch.randn(8, 4), torch.randn(7, 4)
    for targets in (torch.tensor([0] * 6 + [bad, 0]) for bad in (7, 10**9, -1, -101)):
        for cross_entropy in (partial(loss.chunked_cross_entropy, soft_cap=None, chunk=4, in_place_loss=in_place_loss),
                              lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets)):  # fmt: skip
            with pytest.raises(IndexError, match="out of bounds"):
                cross_entropy(hidden, weight, targets)
    with pytest.raises(RuntimeError, match="int32"):
        loss.chunked_cross_entropy(hidden, weight, targets.int(), None, 4, in_place_loss)


@pytest.mark.parametrize("in_place_loss", [loss.cross_entropy_, pytest.param(ops.cross_entropy_, marks=needs_compiler)])
def test_without_targets_the_loss_is_nan_and_gradients_are_0(in_place_loss):
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    mean = loss.chunked_cross_entropy(hidden, weight, torch.full((8,), model.IGNORE), None, 4, in_place_loss)
    mean.backward()
    assert mean.isnan() and not hidden.grad.any() and not weight.grad.any()


@needs_compiler
def test_a_state_without_decay_stays_the_same_for_10000_tokens():
    step = torch.zeros(1, 10_000, 64)
    step[:, 0] = 1.0
    one = torch.ones(1, 10_000, 1)
    assert selective_scan(torch.ones_like(step), step, -torch.rand(64, 1), one, one, None, 16).eq(1.0).all()


@needs_compiler
def test_decays_are_those_of_float64():
    """To 2e-7, and as much for the rounding of the exponent."""
    rates, ones = -torch.linspace(0, 1, 4096)[:, None], torch.ones(1, 2, 1)
    u = torch.tensor([1.0, 0.0])[None, :, None].expand(1, 2, 4096)
    decays = selective_scan(u, torch.ones_like(u), rates, ones, ones, None, 16)[0, 1]
    assert decays[0] == 1 and ((decays - rates[:, 0].double().exp()) / decays).abs().max() < 4e-7


def functions() -> set[type]:
    """Every autograd.Function of ours."""
    return {kind for kind in torch.autograd.Function.__subclasses__() if kind.__module__.startswith(("fast.", "modules."))}


def functions_of(node) -> set[type]:
    """The autograd.Functions in the graph that ends with a node."""
    inner = [functions_of(before) for before, _ in node.next_functions if before is not None]
    return set().union(*inner) | {getattr(node, "_forward_cls", None)}


@needs_compiler
def test_second_derivatives_raise():
    """Also where the gradient of the output is a constant, and PyTorch's own decorator does not notice."""
    x = torch.rand(2, 4, 3)
    recurrence, within = (x[:, :, :, None], x[:, :, :, None], x[:, 0, :, None]), torch.ones(4, 4, dtype=torch.bool)
    chunk = torch.rand(1, 1, 1, 4, 4), *torch.rand(3, 1, 2, 1, 4, 1), torch.rand(2)
    calls = [
        (scan.scan, (x, x)), (lambda x: moving_average.Permute.apply(x, (2, 0, 1)), (x,)),
        (lambda *inputs: chunks.ChunkRecurrence.apply(*inputs, False)[0], recurrence),
        (lambda x, weights: moe.ExpertProducts.apply(x, weights, torch.tensor([1, 1])), (x[0, :2], x)),
        (lambda *inputs: mamba2.WithinChunks.apply(*inputs, within), chunk),
        *((call, inputs) for _, kernel, formula, inputs in operations() for call in (kernel, formula)),
    ]  # fmt: skip
    visited = set()
    for call, inputs in calls:
        inputs = [x.clone().requires_grad_() for x in inputs]
        total = call(*inputs).sum()
        ours = functions_of(total.grad_fn) & functions()
        if ours:
            slopes = torch.autograd.grad(total, inputs, create_graph=True)
            with pytest.raises(RuntimeError, match="differentiate twice"):
                sum(slope.sum() for slope in slopes).backward()
        visited |= ours
    assert visited == functions()
