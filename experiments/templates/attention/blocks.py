"""Say here what the block does, and name the paper.

B batch, T time (new tokens), S time with cached tokens, D model dim, H heads, K head dim.
"""

import math

from model import append_to_cache, apply_rope, causal_mask, linear
from tools import LoggingModule


class Template(LoggingModule):
    """Plain softmax attention: put your idea in its place.  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, num_heads: int, head_dim: int):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.w_q, self.w_k, self.w_v = (linear(dim, num_heads * head_dim) for _ in range(3))
        self.w_out = linear(num_heads * head_dim, dim)

    def forward(self, x, *, rope=None, story_start=None, window=None, cache=None):
        B, T, D = x.shape
        q, k, v = (w(x).view(B, T, self.num_heads, -1).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)  # (B, num_heads, T, head_dim)
        if cache is not None:
            k, v = append_to_cache(cache, k, v, window=None)
        S = k.shape[2]
        scores = q @ k.mT / math.sqrt(self.head_dim)  # (B, num_heads, T, S)
        scores = scores.masked_fill(~causal_mask(T, S, story_start, window, x.device), -math.inf)
        y = scores.softmax(dim=-1) @ v
        return self.w_out(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


BLOCKS = {"Template": Template}
