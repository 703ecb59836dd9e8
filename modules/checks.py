"""Checks of a block's options and of its cache."""

from torch import Tensor

from config import all_steps
from model import Branch


def check_sizes(**sizes: int | None):
    """Raises ValueError for an option that is less than 1; None stands for the block's default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: give a whole number of at least 1")


def check_adds(layer: Branch):
    """Raises ValueError for a layer in brackets that adds nothing to its input."""
    if all(name != "+" for name, *_ in all_steps(layer.layer)):
        raise ValueError(f"[{layer.layer}] adds nothing to its input: put a + into the brackets, as in [Norm->MLP->+]")


def check_rows(state: Tensor, B: int):
    """Raises ValueError if a cached state is not of B rows."""
    if state.shape[0] != B:
        rows = state.shape[0]
        raise ValueError(f"the cache holds a state of {rows} rows, but x has {B}: give {rows} rows, or start with an empty cache")
