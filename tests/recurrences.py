"""Checks for blocks with a recurrent state: both forms, the cache, stories, long sequences and bfloat16.

A block whose state is a matrix has `step_by_step` and `in_parallel`, which take the same inputs; the latter also story_start.
"""

import itertools

import pytest
import torch
from errors import one_line_error
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def check_forms(block: nn.Module, x: Tensor, inputs_of):
    """Outputs and states agree to 1e-4, gradients to 1e-3. inputs_of(x): the arguments of both forms before the state."""
    inputs = [None if value is None else value.detach() for value in inputs_of(x)]
    B, H, T, K = inputs[0].shape
    state = torch.randn(B, H, K, inputs[2].shape[-1])
    directions = torch.randn(B, H, T, state.shape[-1]), torch.randn_like(state)
    results = []
    for form, more in ((block.step_by_step, ()), (block.in_parallel, (None,))):
        leaves = [None if value is None else value.clone().requires_grad_() for value in (*inputs, state)]
        outputs = form(*leaves, *more)
        sum((output * direction).sum() for output, direction in zip(outputs, directions, strict=True)).backward()
        results.append((outputs, [leaf.grad for leaf in leaves if leaf is not None]))
    (expected_outputs, expected_gradients), (outputs, gradients) = results
    for ours, expected in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3 * expected.abs().max().item() + 1e-6, rtol=0)


@torch.no_grad()
def check_cached(block: nn.Module, x: Tensor):
    """Token by token, in uneven chunks and after a long prompt it is the same; the cache does not grow."""
    T = x.shape[1]
    expected = block(x)
    for chunks in ([1] * T, [7, 1, 1, 40, 2, T - 51], [T - 3, 1, 1, 1]):
        cache, outputs, sizes = {}, [], []
        for chunk in x.split(chunks, dim=1):
            outputs.append(block(chunk, cache=cache))
            sizes.append(cache["state"].shape)
        torch.testing.assert_close(torch.cat(outputs, dim=1), expected, atol=1e-4, rtol=1e-4)
        assert len(set(sizes)) == 1


@torch.no_grad()
def check_stories(block: nn.Module, x: Tensor):
    """Stories of a row give what each gives alone, wherever in a chunk they start, and if each is a single token."""
    B, T, D = x.shape
    starts = [0, 1, 2, 15, 16, 17, 40, T]
    story_start = torch.cat([torch.full((end - start,), start) for start, end in itertools.pairwise(starts)])
    alone = torch.cat([block(x[:, start:end]) for start, end in itertools.pairwise(starts)], dim=1)
    torch.testing.assert_close(block(x, story_start=story_start.expand(B, T)), alone, atol=1e-4, rtol=1e-4)
    single_tokens = block(x.reshape(B * T, 1, D)).view(B, T, D)
    torch.testing.assert_close(block(x, story_start=torch.arange(T).expand(B, T)), single_tokens, atol=1e-4, rtol=1e-4)


def check_long(block: nn.Module, x: Tensor):
    """Outputs and gradients are finite, and the last outputs are still those of the recurrence."""
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
    """Under autocast the state stays in float32, and only the rounding of the matrices differs from float32."""
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
    """A cache of another batch size is an error."""
    cache = {}
    block(torch.randn(2, 3, D), cache=cache)
    one_line_error(lambda: block(torch.randn(3, 1, D), cache=cache), "state of 2", "3")


@torch.no_grad()
def check_flops(block: nn.Module, x: Tensor, uncounted: float = 0.0):
    """flops_per_token is what torch counts, plus `uncounted` FLOPs per token that torch does not see."""
    B, T, D = x.shape
    with FlopCounterMode(display=False) as counter:
        block(x)
    assert block.flops_per_token(T) == pytest.approx(counter.get_total_flops() / (B * T) + uncounted)
