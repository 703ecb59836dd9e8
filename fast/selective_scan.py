"""The selective scan of Mamba in C++ (scan.cpp): one pass over time and all numbers of the state.

B batch, T time, W inner channels, N numbers of state for each of them; see modules/mamba.py.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.ops import build
from modules import mamba

KEPT_EVERY = 16  # tokens, of which one state is kept for the backward pass
BLOCK = 64  # channels at a time: WIDTH of scan.cpp


def selective_scan(u, step, rates, write, read, story_start, chunk) -> Tensor:
    """selective_scan of modules/mamba.py, whose inputs are in float32."""
    if u.device.type != "cpu":
        return mamba.selective_scan(u, step, rates, write, read, story_start, chunk)
    return SelectiveScan.apply(u, step, rates, write, read, None if story_start is None else story_start.int().contiguous())


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, step, rates, write, read, first):
        inputs = *(x.contiguous() for x in (u, step, rates, write, read)), first
        y, states = torch.ops.basegpt.selective_scan(*inputs)
        ctx.save_for_backward(*inputs, states)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        d_u, d_step, d_rates, d_write, d_read = torch.ops.basegpt.selective_scan_backward(*ctx.saved_tensors, d_y.contiguous())
        return d_u, d_step, d_rates.sum(dim=0), d_write.sum(dim=0), d_read.sum(dim=0), None


def run_forward(u, step, rates, write, read, first):
    y, states = empty_outputs(u, step, rates, write, read, first)
    build().selective_scan_forward(u, step, rates, write, read, first, y, states, *sizes(u, rates))
    return y, states


def run_backward(u, step, rates, write, read, first, states, d_y):
    gradients = empty_gradients(u, step, rates, write, read, first, states, d_y)
    pointers = u, step, rates, write, read, first, states, d_y, *gradients
    build().selective_scan_backward(*pointers, *sizes(u, rates))
    return gradients


def sizes(u: Tensor, rates: Tensor) -> tuple[int, ...]:
    return *u.shape, rates.shape[1], KEPT_EVERY, torch.get_num_threads()


def empty_outputs(u, step, rates, write, read, first):
    """y (B, T, W), and the states that are kept for the way back, in an order of the kernel's own."""
    (B, T, W), N = u.shape, rates.shape[1]
    assert step.shape == u.shape and rates.shape == (W, N) and write.shape == read.shape == (B, T, N)
    assert first is None or (first.shape == (B, T) and first.dtype == torch.int32)
    return torch.empty_like(u), u.new_empty(B, math.ceil(T / KEPT_EVERY), math.ceil(W / BLOCK), N, BLOCK)


def empty_gradients(u, step, rates, write, read, first, states, d_y):
    """Those of u, step, rates, write and read; of the last three, what each row or block of channels adds to the sum."""
    B, T, N = write.shape
    blocks = states.shape[2]
    parts = rates.new_empty(B, *rates.shape), write.new_empty(blocks, B, T, N), read.new_empty(blocks, B, T, N)
    return torch.empty_like(u), torch.empty_like(u), *parts


INPUTS = "Tensor u, Tensor step, Tensor rates, Tensor write, Tensor read, Tensor? first"
LIBRARY = torch.library.Library("basegpt", "FRAGMENT")
LIBRARY.define(f"selective_scan({INPUTS}) -> (Tensor, Tensor)")
LIBRARY.define(f"selective_scan_backward({INPUTS}, Tensor states, Tensor d_y) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.impl("selective_scan", run_forward, "CPU")
LIBRARY.impl("selective_scan_backward", run_backward, "CPU")
torch.library.register_fake("basegpt::selective_scan", empty_outputs, lib=LIBRARY)
torch.library.register_fake("basegpt::selective_scan_backward", empty_gradients, lib=LIBRARY)
