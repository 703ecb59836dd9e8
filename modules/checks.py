"""Checks of a block's options and of its cache."""

from torch import Tensor


def check_sizes(**sizes: int | None):
    """Raises ValueError for an option that is less than 1; None stands for the block's default."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name}={size}: give a whole number of at least 1")


def check_rows(state: Tensor, B: int):
    """Raises ValueError if a cached state is not of B rows."""
    if state.shape[0] != B:
        rows = state.shape[0]
        raise ValueError(f"the cache holds a state of {rows} rows, but x has {B}: give {rows} rows, or start with an empty cache")
