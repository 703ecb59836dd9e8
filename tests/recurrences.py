"""What is checked of every block whose state is a matrix: its two forms, its cache, stories, long sequences and bfloat16.

Such a block has `step_by_step` and `in_parallel`, which take the same inputs; the latter is also told where stories begin.
"""

import itertools

import pytest
import torch
from errors import one_line_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def check_forms(block: nn.Module, x: Tensor, inputs_of):
    """inputs_of(x) is all that the forms take in front of the state. Answers and state to 1e-4, gradients to 1e-3."""
    inputs = [None if value is None else value.detach() for value in inputs_of(x)]
    B, H, T, K = inputs[0].shape
    state = torch.randn(B, H, K, inputs[2].shape[-1])
    directions = torch.randn(B, H, T, state.shape[-1]), torch.randn_like(state)
    found = []
    for form, more in ((block.step_by_step, ()), (block.in_parallel, (None,))):
        given = [None if value is None else value.clone().requires_grad_() for value in (*inputs, state)]
        results = form(*given, *more)
        sum((result * direction).sum() for result, direction in zip(results, directions, strict=True)).backward()
        found.append((results, [value.grad for value in given if value is not None]))
    (steps, step_gradients), (parallel, parallel_gradients) = found
    for ours, expected in zip(parallel, steps, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    for ours, expected in zip(parallel_gradients, step_gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3 * expected.abs().max().item() + 1e-6, rtol=0)


@torch.no_grad()
def check_cached(block: nn.Module, x: Tensor):
    """Token by token, in uneven pieces and behind a long prefill it is as at once; the cache does not grow."""
    T = x.shape[1]
    expected = block(x)
    for pieces in ([1] * T, [7, 1, 1, 40, 2, T - 51], [T - 3, 1, 1, 1]):
        cache, parts, sizes = {}, [], []
        for piece in x.split(pieces, dim=1):
            parts.append(block(piece, cache=cache))
            sizes.append(cache["state"].shape)
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
        assert len(set(sizes)) == 1


@torch.no_grad()
def check_stories(block: nn.Module, x: Tensor):
    """Those of a row give what they give alone, wherever in a chunk they begin; a window of 1 is a story for each token."""
    B, T, D = x.shape
    begins = [0, 1, 2, 15, 16, 17, 40, T]
    first = torch.cat([torch.full((end - begin,), begin) for begin, end in itertools.pairwise(begins)])
    alone = torch.cat([block(x[:, begin:end]) for begin, end in itertools.pairwise(begins)], dim=1)
    places = torch.arange(T)
    for narrower in (first, first.maximum(places - 8)):
        packed = block(x, first=narrower.int().expand(B, T))
        torch.testing.assert_close(packed, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(block(x, first=(places - 8).clamp(min=0).int().expand(B, T)), block(x))
    one_by_one = block(x.reshape(B * T, 1, D)).view(B, T, D)
    torch.testing.assert_close(block(x, first=places.int().expand(B, T)), one_by_one, atol=1e-4, rtol=1e-4)


def check_long(block: nn.Module, x: Tensor):
    """Finite, with finite gradients, and at the end still what the recurrence says."""
    y = block(x)
    y.square().mean().backward()
    assert y.isfinite().all()
    assert all(weight.grad.isfinite().all() for weight in block.parameters())
    with torch.no_grad():
        cache = {}
        block(x[:, :-70], cache=cache)
        last = torch.cat([block(x[:, t : t + 1], cache=cache) for t in range(x.shape[1] - 70, x.shape[1])], dim=1)
    torch.testing.assert_close(last, y[:, -70:], atol=1e-4, rtol=1e-3)


def check_stable_in_bfloat16(block: nn.Module, x: Tensor):
    """Under autocast the state stays in float32, and the result is that of float32 but for the rounding of the matrices."""
    expected = block(x).detach()
    cache = {}
    with torch.autocast("cpu", torch.bfloat16):
        y = block(x)
        block(x, cache=cache)
    y.float().square().mean().backward()
    assert cache["state"].dtype == torch.float32
    assert all(weight.grad.isfinite().all() for weight in block.parameters())
    assert (y - expected).square().mean() < 0.03**2 * expected.square().mean()


def check_wrong_cache(block: nn.Module, D: int):
    cache = {}
    block(torch.randn(2, 3, D), cache=cache)
    one_line_error(lambda: block(torch.randn(3, 1, D), cache=cache), "state of 2", "3")


@torch.no_grad()
def check_flops(block: nn.Module, x: Tensor, uncounted: float = 0.0):
    """What it says is what torch counts, with so many more for a token that torch does not see."""
    B, T, D = x.shape
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert block.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (B * T) + uncounted)
