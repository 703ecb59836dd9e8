"""Custom PyTorch operators, which torch.compile and the FLOP counter treat as one operation, and their gradients."""

import functools
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("basegpt", "FRAGMENT")


def define_operator(schema: str, run: Callable, empty_outputs: Callable, key: str = "CompositeExplicitAutograd"):
    """Define torch.ops.basegpt.name by a schema, such as "name(Tensor x) -> Tensor".

    run computes the outputs, empty_outputs only allocates them. key: the dispatch key, by default that of all devices.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"basegpt::{name}", empty_outputs, lib=LIBRARY)


def once_differentiable(backward: Callable) -> Callable:
    """Mark the backward of an autograd.Function that has no derivative: a second backward pass through it raises RuntimeError.

    PyTorch's decorator misses the case that the output's gradient is a constant, and second derivatives are then silently zero.
    """
    raising = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # with create_graph=True
            gradients = [gradient.detach().requires_grad_() for gradient in gradients]
        return raising(ctx, *gradients)

    return wrapper
