"""A plugin of variants of the base model: each overrides something that fast/ replaces in its base class.

B batch, T time (new tokens), S time including cached tokens, D model dim, K head dim.
"""

import torch
from torch import Tensor

from model import GPT, MLP, Attention, RMSNorm, append_to_cache, causal_mask
from modules.attention import narrowest


def sigmoid_attention(q, k, v, story_start=None, window=None, soft_cap=None, dropout=0.0) -> Tensor:
    """Attention with sigmoid weights instead of softmax weights.  q (B, H, T, K), k and v (B, G, S, K) -> (B, H, T, K)"""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    mask = causal_mask(q.shape[2], k.shape[2], story_start, window, q.device)
    return ((q @ k.mT * k.shape[-1] ** -0.5).sigmoid() * mask) @ v


class SigmoidAttn(Attention):
    """Attention with another function of its class.  (B, T, D) -> (B, T, D)"""

    causal_attention = staticmethod(sigmoid_attention)


class SigmoidMethod(Attention):
    """The same by another method.  (B, T, D) -> (B, T, D)"""

    def attend(self, q, k, v, story_start, window, cache):
        if cache is not None:
            k, v = append_to_cache(cache, k, v, self.window)
        return sigmoid_attention(q, k, v, story_start, narrowest(self.window, window))


class SineMLP(MLP):
    """An MLP with another activation.  (B, T, D) -> (B, T, D)"""

    activate = staticmethod(lambda activation, x, factor=None: x.sin() if factor is None else x.sin() * factor)


class SquareNorm(RMSNorm):
    """An RMSNorm, squared.  (..., D) -> the same"""

    def forward(self, x):
        return super().forward(x).square()


class ShyGPT(GPT):
    """GPT with smaller logits."""

    def predict(self, x, targets):
        logits, loss = super().predict(x, targets)
        return 0.5 * logits, loss if loss is None else torch.sqrt(loss)


BLOCKS = {block.__name__: block for block in (SigmoidAttn, SigmoidMethod, SineMLP, SquareNorm)}
MODELS = {"ShyGPT": ShyGPT}
