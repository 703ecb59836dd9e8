"""Short convolutions: each token sees the few before it, cheaper and sooner than attention can learn to.

B batch, T time, D model dim.
"""

import torch
from torch import nn

from fast import ops as kernels
from tools import LoggingModule


class ShortConv(LoggingModule):
    """Adds to each channel a learned mix of its last `width` values: the Canon layer (Allen-Zhu 2025, arXiv 2512.17351).

    A causal depthwise convolution with a skip, that begins as the identity; bias adds a learned number to each channel. It is
    elementwise work, cheap, but far slower for its few FLOPs than products of matrices.  (B, T, D) → (B, T, D)
    """

    def __init__(self, dim: int, width: int = 4, bias: bool = False):
        super().__init__()
        if width < 1:
            raise ValueError(f"layers: ShortConv(width={width}): give a whole number of at least 1")
        self.weight = nn.Parameter(torch.zeros(width, dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None
        self.backend = "auto"

    def forward(self, x, *, first=None, cache=None):
        """first (B, T) is the first token that each one may look at; None is the first of the row."""
        if cache is None and kernels.fit(self.backend, x):
            return kernels.short_conv(x, self.weight, self.bias, first)
        B, T, D = x.shape
        width = len(self.weight)
        past = cache["past"] if cache else x.new_zeros(B, width - 1, D)
        seen = torch.cat([past, x], dim=1)  # (B, width - 1 + T, D)
        if cache is not None:
            cache["past"] = seen[:, T:]
        places = torch.arange(T, device=x.device)
        mixed = x * (1 + self.weight[0])
        for back in range(1, width):
            earlier = seen[:, width - 1 - back : width - 1 - back + T]  # (B, T, D)
            if first is not None:
                earlier = earlier * (places - back >= first)[..., None]
            mixed = mixed + earlier * self.weight[back]
        return mixed if self.bias is None else mixed + self.bias

    def flops_per_token(self, T: int) -> float:
        """A multiply-add for each of the width values of a channel."""
        return 2.0 * self.weight.numel()


BLOCKS = {"ShortConv": ShortConv}
