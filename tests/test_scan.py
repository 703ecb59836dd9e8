"""Promises of modules/scan.py: the parallel scan is the recurrence, for real and complex numbers, and so are its gradients."""

import pytest
import torch
from errors import one_line_error

from modules.scan import check_rows, recurrence, scan

LENGTHS = (1, 2, 3, 15, 16, 17, 53, 300)


def some(dtype: torch.dtype, T: int):
    """Decays (2, T, 3) of size 0 to 1, updates and a state."""
    torch.manual_seed(T)
    decay, update, state = (torch.randn(*shape, dtype=dtype) for shape in ((2, T, 3), (2, T, 3), (2, 3)))
    decay = decay / (1 + decay.abs()) * (torch.rand(2, T, 3) > 0.1)
    return [x.requires_grad_() for x in (decay, update, state)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("T", LENGTHS)
def test_outputs_and_gradients_are_those_of_the_recurrence(dtype, T):
    decay, update, state = some(dtype, T)
    for inputs in ((decay, update), (decay, update, state)):
        expected, ours = recurrence(*inputs), scan(*inputs)
        torch.testing.assert_close(ours, expected)
        direction = torch.randn_like(expected)
        gradients = (torch.autograd.grad(y, inputs, direction, materialize_grads=True) for y in (ours, expected))
        torch.testing.assert_close(*gradients)


def test_the_gradient_is_that_of_finite_differences():
    for dtype in (torch.float64, torch.complex128):
        assert torch.autograd.gradcheck(scan, some(dtype, 11))


def test_the_recurrence_by_hand():
    decay, update, state = (torch.tensor(numbers)[None] for numbers in ([[2.0], [0.5], [0.0]], [[1.0], [3.0], [5.0]], [4.0]))
    assert recurrence(decay, update, state).flatten().tolist() == [9.0, 7.5, 5.0]
    assert scan(decay, update, state).flatten().tolist() == [9.0, 7.5, 5.0]


def test_float32_and_more_axes_after_time():
    torch.manual_seed(0)
    decay, update = 1 - torch.rand(2, 700, 4, 3) ** 2 * 0.01, torch.randn(2, 700, 4, 3)
    expected = recurrence(decay.double(), update.double())
    torch.testing.assert_close(scan(decay, update).double(), expected, atol=1e-4, rtol=1e-4)


def test_nothing_passes_a_decay_of_zero():
    decay, update, state = some(torch.float64, 60)
    with torch.no_grad():
        decay[:, 23] = 0
    whole, alone = scan(decay, update, state), scan(decay[:, 23:].clone(), update[:, 23:], None)
    assert whole[:, 23:].allclose(alone)
    (gradient,) = torch.autograd.grad(whole[:, 23:].sum(), update)
    assert not gradient[:, :23].any() and gradient[:, 23].all()


def test_a_state_of_other_rows_is_an_error():
    check_rows(torch.zeros(2, 5), 2)
    one_line_error(lambda: check_rows(torch.zeros(2, 5), 3), "state of 2 rows", "x has 3")
