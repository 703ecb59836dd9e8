"""Promises of modules/moving_average.py: both blocks are the equations of the paper, in chunks and from a cache, too."""

import cmath
import math

import pytest
import torch
from errors import one_line_error
from recurrences import check_cached, check_long, check_stable_in_bfloat16, check_stories, check_wrong_cache
from torch.utils.flop_counter import FlopCounterMode

from modules.moving_average import CEMA, TimestepNorm

D, N, L, G = 6, 3, 8, 2
LENGTHS = (1, 3, L - 1, L, L + 1, 3 * L + 5, 100)


def randomised(made):
    """Add noise to every weight."""
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight) * 0.5)
    return made


def average(**options) -> CEMA:
    torch.manual_seed(0)
    return randomised(CEMA(D, **{"state_dim": N, "chunk": L} | options))


def norm(groups: int = G) -> TimestepNorm:
    torch.manual_seed(0)
    return randomised(TimestepNorm(D, groups))


def sigmoid(number: float) -> float:
    return 1 / (1 + math.exp(-number))


def average_as_written(made: CEMA, x: torch.Tensor) -> torch.Tensor:
    """Section 3.1 of arXiv 2404.08801 in Python's complex numbers, with the skip.  (B, T, D) -> (B, T, D)"""
    B, T, D = x.shape
    N = made.alpha.shape[1]
    out = torch.zeros(B, T, D, dtype=torch.float64)
    for b in range(B):
        for j in range(D):
            h = [0j] * N
            for t in range(T):
                y = made.skip[j].item() * x[b, t, j].item()
                for k in range(N):
                    alpha, delta = sigmoid(made.alpha[j, k].item()), sigmoid(made.delta[j, k].item())
                    rotation = cmath.exp(1j * 2 * math.pi * (k + 1) / N * sigmoid(made.base_angle[j].item()))
                    h[k] = alpha * rotation * x[b, t, j].item() + (1 - alpha * delta) * rotation * h[k]
                    y += (complex(*made.eta[j, k].tolist()) * h[k]).real
                out[b, t, j] = y
    return out


def norm_as_written(made: TimestepNorm, x: torch.Tensor) -> torch.Tensor:
    """Section 3.2 of arXiv 2404.08801, in float64.  (B, T, D) -> (B, T, D)"""
    x, out = x.double(), torch.zeros_like(x, dtype=torch.float64)
    width = x.shape[2] // made.groups
    for t in range(x.shape[1]):
        for start in range(0, x.shape[2], width):
            channels = slice(start, start + width)
            so_far = x[:, : t + 1, channels].flatten(1)
            mean, variance = so_far.mean(dim=1, keepdim=True), so_far.var(dim=1, correction=0, keepdim=True)
            normed = (x[:, t, channels] - mean) / (variance + made.eps).sqrt()
            out[:, t, channels] = normed * made.weight[channels].double() + made.bias[channels].double()
    return out


class TestCEMA:
    @torch.no_grad()
    def test_it_computes_what_the_paper_writes(self):
        made, x = average(), torch.randn(2, 3 * L + 5, D)
        expected = average_as_written(made, x)
        torch.testing.assert_close(made(x).double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(made.step_by_step(x)[0].double(), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("T", LENGTHS)
    @pytest.mark.parametrize("has_state", [False, True])
    def test_in_chunks_equals_step_by_step_with_its_gradients(self, T, has_state):
        made, results = average(), []
        x, state = torch.randn(2, T, D), torch.randn(2, D, N, dtype=torch.complex64)
        direction, end_direction = torch.randn(2, T, D), torch.randn(2, D, N, dtype=torch.complex64)
        for form in (made.step_by_step, lambda x, state: made.in_chunks(x, state, keep=True)):
            leaves = [leaf.clone().requires_grad_() for leaf in ((x, state) if has_state else (x,))]
            y, end = form(leaves[0], leaves[1] if has_state else None)
            loss = (y * direction).sum() + (end * end_direction).real.sum()
            results.append(([y, end], torch.autograd.grad(loss, [*leaves, *made.parameters()], materialize_grads=True)))
        (expected_outputs, expected_gradients), (outputs, gradients) = results
        for ours, expected in zip(outputs, expected_outputs, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-4 * expected.abs().max().item(), rtol=0)
        for ours, expected in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(ours, expected, atol=1e-3 * expected.abs().max().item() + 1e-6, rtol=0)

    @torch.no_grad()
    def test_the_chunk_does_not_matter(self):
        x = torch.randn(2, 50, D)
        expected = average().step_by_step(x)[0]
        for chunk in (1, 5, 50, 300):
            torch.testing.assert_close(average(chunk=chunk)(x), expected, atol=1e-4, rtol=1e-4)

    def test_it_continues_from_a_state_of_constant_size(self):
        check_cached(average(), torch.randn(2, 70, D))

    def test_stories_of_a_row_do_not_see_each_other(self):
        check_stories(average(), torch.randn(2, 70, D))

    def test_rows_may_have_different_stories(self):
        made, x = average(), torch.randn(2, 40, D)
        story_start = torch.zeros(2, 40, dtype=torch.long)
        story_start[1, 11:] = 11
        row = torch.cat([made(x[1:, :11]), made(x[1:, 11:])], dim=1)
        expected = torch.cat([made(x[:1]), row])
        torch.testing.assert_close(made(x, story_start=story_start), expected, atol=1e-5, rtol=1e-4)

    def test_no_gradient_flows_from_a_story_to_the_one_before(self):
        made, x = average(), torch.randn(1, 40, D, requires_grad=True)
        story_start = torch.where(torch.arange(40) < 13, 0, 13)[None]
        made(x, story_start=story_start)[:, 13:].sum().backward()
        assert not x.grad[:, :13].any() and x.grad[:, 13:].any()

    def test_long_sequences_and_bfloat16_are_stable(self):
        check_long(average(chunk=32), torch.randn(1, 4096, D))
        check_stable_in_bfloat16(average(), torch.randn(2, 300, D))

    @pytest.mark.parametrize("size", [-40.0, 40.0])
    def test_the_fastest_and_slowest_decays_are_finite(self, size):
        made, x = average(), torch.randn(2, 60, D)
        with torch.no_grad():
            made.alpha.fill_(size)
            made.delta.fill_(size)
        y = made(x)
        torch.testing.assert_close(y, made.step_by_step(x)[0], atol=1e-4, rtol=1e-4)
        y.sum().backward()
        assert all(weight.grad.isfinite().all() for weight in made.parameters())

    def test_initial_rotations_are_slow_to_fast_and_outputs_real(self):
        torch.manual_seed(0)
        made = CEMA(64)
        angles = made.base_angle.sigmoid().sort().values
        assert angles[0] < 0.02 and angles[-1] > 0.9
        assert made.eta[..., 0].std().item() == pytest.approx(0.25, rel=0.1) and not made.eta[..., 1].any()

    def test_bad_options_are_one_line(self):
        one_line_error(lambda: CEMA(8, state_dim=0), "state_dim=0", "at least 1")
        one_line_error(lambda: CEMA(8, chunk=-1), "chunk=-1", "at least 1")

    def test_a_state_of_another_batch_size_is_an_error(self):
        check_wrong_cache(average(), D)

    def test_flops_are_those_torch_counts_and_the_recurrence(self):
        made, T = average(), 5 * L
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            made(torch.randn(1, T, D))
        assert made.flops_per_token(T) == counter.get_total_flops() / T + 8 * D * N / L


class TestTimestepNorm:
    @pytest.mark.parametrize("T", [1, 2, 40])
    @torch.no_grad()
    def test_it_computes_what_the_paper_writes(self, T):
        x = torch.randn(2, T, D) * 3 + torch.linspace(-2, 2, D)
        torch.testing.assert_close(norm()(x).double(), norm_as_written(norm(), x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(norm(1)(x).double(), norm_as_written(norm(1), x), atol=1e-4, rtol=1e-4)

    @torch.no_grad()
    def test_a_large_mean_does_not_spoil_the_variance(self):
        x = torch.randn(1, 200, D) + 1000
        torch.testing.assert_close(norm()(x).double(), norm_as_written(norm(), x), atol=1e-3, rtol=0)

    def test_its_gradients_are_those_of_the_formula(self):
        made, x = norm(), torch.randn(2, 30, D, requires_grad=True)
        direction = torch.randn(2, 30, D)
        leaves = [x, made.weight, made.bias]
        expected = torch.autograd.grad(norm_as_written(made, x), leaves, direction.double())
        torch.testing.assert_close(torch.autograd.grad(made(x), leaves, direction), expected, atol=1e-4, rtol=1e-3)

    @torch.no_grad()
    def test_it_continues_from_a_cache_of_constant_size(self):
        made, x, cache, outputs = norm(), torch.randn(2, 60, D), {}, []
        for chunk in x.split([7, 1, 1, 30, 2, 19], dim=1):
            outputs.append(made(chunk, cache=cache))
            assert cache["mean"].shape == cache["variance"].shape == (2, G)
        torch.testing.assert_close(torch.cat(outputs, dim=1), made(x), atol=1e-5, rtol=1e-5)
        assert cache["num_tokens"] == 60
        one_line_error(lambda: made(x[:1], cache=cache), "state of 2", "x has 1")

    def test_stories_of_a_row_do_not_see_each_other(self):
        check_stories(norm(), torch.randn(2, 70, D))

    def test_long_sequences_and_bfloat16_are_stable(self):
        check_long(norm(), torch.randn(1, 4096, D))
        x = torch.randn(2, 300, D)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = norm()(x.bfloat16())
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), norm()(x), atol=0.05, rtol=0.05)

    def test_bad_options_are_one_line(self):
        for groups in (0, 4, 6, -1):
            one_line_error(lambda groups=groups: TimestepNorm(6, groups), f"groups={groups}", "dim=6")
