"""Promises of modules/scan.py: side by side is as step by step, for real and complex numbers, with the gradients."""

import pytest
import torch
from errors import one_line_error

from modules.scan import check_rows, recurrence, scan, story_starts

LENGTHS = (1, 2, 3, 15, 16, 17, 53, 300)


def some(dtype: torch.dtype, T: int):
    """Decays (2, T, 3) from 0 to 1 in size, updates and a state."""
    torch.manual_seed(T)
    decay, update, state = (torch.randn(*shape, dtype=dtype) for shape in ((2, T, 3), (2, T, 3), (2, 3)))
    decay = decay / (1 + decay.abs()) * (torch.rand(2, T, 3) > 0.1)
    return [x.requires_grad_() for x in (decay, update, state)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("T", LENGTHS)
def test_answers_and_gradients_are_those_of_the_recurrence(dtype, T):
    decay, update, state = some(dtype, T)
    for begin in (state, None):
        inputs = [decay, update] if begin is None else [decay, update, state]
        expected, found = recurrence(decay, update, begin), scan(decay, update, begin)
        torch.testing.assert_close(found, expected)
        direction = torch.randn_like(expected)
        wanted = torch.autograd.grad(expected, inputs, direction, allow_unused=True)
        for ours, theirs in zip(torch.autograd.grad(found, inputs, direction, allow_unused=True), wanted, strict=True):
            torch.testing.assert_close(torch.zeros_like(decay) if ours is None else ours, decay * 0 if theirs is None else theirs)


def test_the_gradient_is_that_of_finite_differences():
    for dtype in (torch.float64, torch.complex128):
        assert torch.autograd.gradcheck(scan, some(dtype, 11))


def test_the_recurrence_is_what_it_says():
    decay, update, state = (torch.tensor(numbers)[None] for numbers in ([[2.0], [0.5], [0.0]], [[1.0], [3.0], [5.0]], [4.0]))
    assert recurrence(decay, update, state).flatten().tolist() == [9.0, 7.5, 5.0]
    assert scan(decay, update, state).flatten().tolist() == [9.0, 7.5, 5.0]


def test_float32_and_other_axes_behind_time():
    torch.manual_seed(0)
    decay, update = 1 - torch.rand(2, 700, 4, 3) ** 2 * 0.01, torch.randn(2, 700, 4, 3)
    expected = recurrence(decay.double(), update.double())
    torch.testing.assert_close(scan(decay, update).double(), expected, atol=1e-4, rtol=1e-4)


def test_what_is_behind_a_decay_of_zero_does_not_know_what_was_before():
    decay, update, state = some(torch.float64, 60)
    with torch.no_grad():
        decay[:, 23] = 0
    whole, alone = scan(decay, update, state), scan(decay[:, 23:].clone(), update[:, 23:], None)
    assert whole[:, 23:].allclose(alone)
    (gradient,) = torch.autograd.grad(whole[:, 23:].sum(), update)
    assert not gradient[:, :23].any() and gradient[:, 23].all()


def test_a_story_begins_where_a_token_sees_nothing_before_itself():
    first = torch.tensor([[0, 0, 2, 2, 3, 5, 6], [0, 0, 0, 1, 2, 3, 4]])  # the second is a window of 3
    assert story_starts(first).tolist() == [[0, 0, 2, 2, 2, 5, 6], [0] * 7]


def test_rows_of_the_cache():
    check_rows(torch.zeros(2, 5), 2)
    one_line_error(lambda: check_rows(torch.zeros(2, 5), 3), "state of 2 rows", "x has 3")
