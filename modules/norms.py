"""The norms, which all take the same arguments. `Norm` in the layer string is the one that the config names.

D model dim, or whatever the last axis is.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fast import ops as kernels
from tools import LoggingModule


class Norm(LoggingModule):
    """What the norms share: a learned gain, and a learned shift where it is asked for."""

    def __init__(self, dim: int, norm_affine: bool = True, norm_bias: bool = False, norm_eps: float = 1e-5):
        super().__init__()
        self.eps = norm_eps
        self.weight = nn.Parameter(torch.ones(dim)) if norm_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if norm_bias else None


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, backend: str, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight, by our kernel where the backend is that and x fits it.  x (..., D), weight (D) → (..., D)

    The kernel may write another dtype than that of x, such as the one that the products behind it read.
    """
    if kernels.fit(backend, x):
        return kernels.rms_norm(x, x.shape[-1:], weight, eps, dtype)
    return F.rms_norm(x, x.shape[-1:], None if weight is None else weight.type_as(x), eps)  # fast where both are alike


class RMSNorm(Norm):
    """x / rms(x), with a learned gain (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4).  (..., D) → (..., D)"""

    backend = "auto"

    def forward(self, x):
        read_as = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        normed = rms_norm(x, self.weight, self.eps, self.backend, read_as)
        return normed if self.bias is None else normed + self.bias


class LayerNorm(Norm):
    """(x - mean) / std, with a learned gain and shift (Ba et al. 2016, arXiv 1607.06450, equation 4).  (..., D) → (..., D)"""

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class CosineNorm(Norm):
    """x / |x|, a vector of length 1, with a learned gain: the dot product of two is their cosine.  (..., D) → (..., D)

    As the normalisation of nGPT (Loshchilov et al. 2024, arXiv 2410.01131, section 2.1). The gain begins at sqrt(D), so
    that a channel has the size that the other norms give it.
    """

    def __init__(self, dim: int, norm_affine: bool = True, norm_bias: bool = False, norm_eps: float = 1e-5):
        super().__init__(dim, norm_affine, norm_bias, norm_eps)
        if norm_affine:
            nn.init.constant_(self.weight, math.sqrt(dim))

    def forward(self, x):
        normed = F.normalize(x, dim=-1, eps=self.eps)
        normed = normed if self.weight is None else normed * self.weight
        return normed if self.bias is None else normed + self.bias


class DynamicTanh(Norm):
    """tanh(alpha x) with a learned alpha, gain and shift, in the place of a norm (Zhu et al. 2025, arXiv 2503.10622, section 4).

    No channel needs to see the others.  (..., D) → (..., D)
    """

    def __init__(self, dim: int, norm_affine: bool = True, norm_bias: bool = False, norm_eps: float = 1e-5, alpha: float = 0.5):
        super().__init__(dim, norm_affine, norm_bias, norm_eps)
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self, x):
        squashed = torch.tanh(self.alpha * x)
        squashed = squashed if self.weight is None else squashed * self.weight
        return squashed if self.bias is None else squashed + self.bias


NORMS = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm, "CosineNorm": CosineNorm, "DynamicTanh": DynamicTanh}
