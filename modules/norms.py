"""Norms beside RMSNorm and LayerNorm. `Norm` in the layer string is the one that the config names.  D size of the last axis."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import Norm


class CosineNorm(Norm):
    """x / |x| with a learned gain, so that dot products are cosines.  (..., D) -> (..., D)

    The normalisation of nGPT (Loshchilov et al. 2024, arXiv 2410.01131, section 2.1). The gain starts at sqrt(D), which gives
    each channel the size that the other norms give it.
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
    """tanh(alpha x) with a learned alpha, gain and shift, in place of a norm (Zhu et al. 2025, arXiv 2503.10622, section 4).

    (..., D) -> (..., D), each channel on its own.
    """

    def __init__(self, dim: int, norm_affine: bool = True, norm_bias: bool = False, norm_eps: float = 1e-5, alpha: float = 0.5):
        super().__init__(dim, norm_affine, norm_bias, norm_eps)
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def forward(self, x):
        squashed = torch.tanh(self.alpha * x)
        squashed = squashed if self.weight is None else squashed * self.weight
        return squashed if self.bias is None else squashed + self.bias


BLOCKS = {"CosineNorm": CosineNorm, "DynamicTanh": DynamicTanh}
