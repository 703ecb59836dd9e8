"""The selective scan of Mamba in C++ (scan.cpp), in one pass over time and the state.

B batch, T time, W inner channels, N numbers of state for each channel; see modules/mamba.py.
"""

import math

import torch
from torch import Tensor

from fast.build import build
from fast.ops import as_int32
from modules import mamba
from modules.operators import define_operator, once_differentiable

SAVE_EVERY = 16  # tokens: one state in this many is saved for the backward pass
BLOCK = 64  # channels at a time: WIDTH of scan.cpp


def selective_scan(u, step, rates, write, read, story_start, chunk) -> Tensor:
    """selective_scan of modules/mamba.py, for float32."""
    if u.device.type != "cpu":
        return mamba.selective_scan(u, step, rates, write, read, story_start, chunk)
    return SelectiveScan.apply(u, step, rates, write, read, as_int32(story_start))


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, step, rates, write, read, story_start):
        inputs = *(x.contiguous() for x in (u, step, rates, write, read)), story_start
        y, states = torch.ops.basegpt.selective_scan(*inputs)
        ctx.save_for_backward(*inputs, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        d_u, d_step, d_rates, d_write, d_read = torch.ops.basegpt.selective_scan_backward(*ctx.saved_tensors, d_y.contiguous())
        return d_u, d_step, d_rates.sum(dim=0), d_write.sum(dim=0), d_read.sum(dim=0), None


def scan_forward(u, step, rates, write, read, story_start):
    y, states = empty_outputs(u, step, rates, write, read, story_start)
    sizes = *u.shape, rates.shape[1], SAVE_EVERY, torch.get_num_threads()
    build().selective_scan_forward(u, step, rates, write, read, story_start, y, states, *sizes)
    return y, states


def scan_backward(u, step, rates, write, read, story_start, states, d_y):
    gradients = empty_gradients(u, step, rates, write, read, story_start, states, d_y)
    sizes = *u.shape, rates.shape[1], SAVE_EVERY, torch.get_num_threads()
    build().selective_scan_backward(u, step, rates, write, read, story_start, states, d_y, *gradients, *sizes)
    return gradients


def empty_outputs(u, step, rates, write, read, story_start):
    """y (B, T, W), and the saved states, in the kernel's order."""
    (B, T, W), N = u.shape, rates.shape[1]
    assert step.shape == u.shape and rates.shape == (W, N) and write.shape == read.shape == (B, T, N)
    assert story_start is None or (story_start.shape == (B, T) and story_start.dtype == torch.int32)
    return torch.empty_like(u), u.new_empty(B, math.ceil(T / SAVE_EVERY), math.ceil(W / BLOCK), N, BLOCK)


def empty_gradients(u, step, rates, write, read, story_start, states, d_y):
    """Gradients of u, step, rates, write and read; the last three as terms, one for each row or block of channels."""
    B, T, N = write.shape
    blocks = states.shape[2]
    terms = rates.new_empty(B, *rates.shape), write.new_empty(blocks, B, T, N), read.new_empty(blocks, B, T, N)
    return torch.empty_like(u), torch.empty_like(u), *terms


INPUTS = "Tensor u, Tensor step, Tensor rates, Tensor write, Tensor read, Tensor? story_start"
define_operator(f"selective_scan({INPUTS}) -> (Tensor, Tensor)", scan_forward, empty_outputs, "CPU")
define_operator(
    f"selective_scan_backward({INPUTS}, Tensor states, Tensor d_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    scan_backward, empty_gradients, "CPU",
)  # fmt: skip
