"""FLOPs of blocks per token: a multiply-add is two.  T tokens in the sequence."""

from torch import nn


def linear_flops(module: nn.Module) -> int:
    """FLOPs per token of all linear layers in a module: two for each weight."""
    return 2 * sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def mean_visible(T: int, window: int | None = None) -> float:
    """The mean number of tokens that one of T sees, itself included: all before it, or the last `window` of them."""
    window = T if window is None else min(window, T)
    return window - window * (window - 1) / (2 * T)


def attention_flops(attention: nn.Module, T: int) -> float:
    """FLOPs per token of attention: linear layers, and scores and weighted sums of the visible tokens.

    A block with another mask than its window has a method visible_per_token(T), the mean number of keys per query.
    """
    has_own_mask = hasattr(attention, "visible_per_token")
    visible = attention.visible_per_token(T) if has_own_mask else mean_visible(T, attention.window)
    return linear_flops(attention) + 4 * attention.num_heads * attention.head_dim * visible
