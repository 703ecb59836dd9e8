"""Custom PyTorch operators: torch.compile and the FLOP counter treat each as one operation."""

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
