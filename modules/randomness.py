"""The state of the random number generators, and drawing without a trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def random_state() -> dict[str, torch.Tensor | list[torch.Tensor]]:
    """State of torch's random number generators on all devices."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, torch.Tensor | list[torch.Tensor]]):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Seed torch, numpy and Python inside; afterwards the random state is as if nothing had been drawn."""
    state, of_numpy, of_python = random_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(state)
        np.random.set_state(of_numpy)
        random.setstate(of_python)
