"""Short convolutions over time.

B batch, T time, D model dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.checks import check_sizes
from tools import LoggingModule


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, story_start: Tensor | None = None) -> Tensor:
    """x[t] + bias + the sum over i of x[t - i] weight[i], within the story.  x (B, T, D), weight (width, D), bias (D)"""
    B, T, D = x.shape
    width = len(weight)
    padded, positions = F.pad(x, (0, 0, width - 1, 0)), torch.arange(T, device=x.device)
    y = x * (1 + weight[0])
    for i in range(1, width):
        earlier = padded[:, width - 1 - i : width - 1 - i + T]  # (B, T, D)
        if story_start is not None:
            earlier = earlier * (positions - i >= story_start)[..., None]
        y = y + earlier * weight[i]
    return y if bias is None else y + bias


class ShortConv(LoggingModule):
    """Causal depthwise convolution with a skip, over `width` tokens: the Canon layer (Allen-Zhu 2025, arXiv 2512.17351).

    (B, T, D) -> (B, T, D). Starts as the identity; bias adds a learned number to each channel. It is elementwise work: cheap,
    but far slower for its few FLOPs than a matrix product.
    """

    short_conv = staticmethod(short_conv)

    def __init__(self, dim: int, width: int = 4, bias: bool = False):
        super().__init__()
        check_sizes(width=width)
        self.weight = nn.Parameter(torch.zeros(width, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x, *, story_start=None, cache=None):
        B, T, D = x.shape
        if cache is None:
            return self.short_conv(x, self.weight, self.bias, story_start)
        width = len(self.weight)
        past = cache["past"] if cache else x.new_zeros(B, width - 1, D)
        extended = torch.cat([past, x], dim=1)  # (B, width - 1 + T, D)
        cache["past"] = extended[:, T:]
        return short_conv(extended, self.weight, self.bias)[:, -T:].contiguous()  # (B, T, D)

    def flops_per_token(self, T: int) -> float:
        """One multiply-add for each of the width values of a channel."""
        return 2.0 * self.weight.numel()


BLOCKS = {"ShortConv": ShortConv}
