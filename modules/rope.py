"""RoPE of a block: rotate a share of the channels, and scale the frequencies for a context longer than that of the training."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import look_up

SCALINGS = {  # the options of each type of rope_scaling, all positive numbers
    "linear": ("factor",),
    "llama3": ("factor", "original_max_seq_len", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_seq_len", "beta_fast", "beta_slow", "attention_factor"),
}


class RopeTable(nn.Module):
    """Cosines and sines of the rotation angles of a block, and the position in them of the next tokens.

    rope_share of the head_dim / 2 pairs of channels, the first ones, are rotated; the others keep an angle of 0.
    rope_scaling: see scale_frequencies; None does not scale.
    """

    def __init__(
        self, max_seq_len: int, head_dim: int, rope_theta: float, rope_share: float = 1.0, rope_scaling: dict | None = None
    ):
        super().__init__()
        num_rotated, attention_factor = round(rope_share * head_dim / 2), 1.0
        frequencies = rope_theta ** (-torch.arange(num_rotated, dtype=torch.float64) / max(num_rotated, 1))
        if rope_scaling is not None:
            frequencies, attention_factor = scale_frequencies(frequencies, rope_theta, rope_scaling)
        angles = torch.outer(torch.arange(max_seq_len, dtype=torch.float64), frequencies)
        cos, sin = (attention_factor * angles.cos()).float(), (attention_factor * angles.sin()).float()
        num_fixed = head_dim // 2 - num_rotated
        self.register_buffer("cos", F.pad(cos, (0, num_fixed), value=1.0), persistent=False)
        self.register_buffer("sin", F.pad(sin, (0, num_fixed), value=0.0), persistent=False)

    def next(self, T: int, cache: dict | None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the next T tokens, each (1, T, head_dim / 2); the cache counts the tokens read."""
        start = 0 if cache is None else cache.get("num_tokens", 0)
        if cache is not None:
            cache["num_tokens"] = start + T
        return self.cos[None, start : start + T], self.sin[None, start : start + T]


def scale_frequencies(frequencies: Tensor, rope_theta: float, rope_scaling: dict) -> tuple[Tensor, float]:
    """Divide all frequencies, or the low ones alone, by a factor; return them, and the factor of cosines and sines.

    rope_scaling has a type and the options that SCALINGS names for it:

    linear: divide all of them (position interpolation: Chen et al. 2023, arXiv 2306.15595, section 2.3).
    llama3: divide those that turn less than low_freq_factor times in original_max_seq_len tokens, the context before scaling,
    keep those above high_freq_factor turns, and blend between (the published code of Llama 3.1, 2024, arXiv 2407.21783).
    yarn: likewise with beta_slow and beta_fast (32 and 1 in the paper), and a blend over the indices of the frequencies, as in
    the published code. The scores are multiplied by attention_factor squared, 0.1 ln(factor) + 1 in the paper (Peng et al. 2023,
    arXiv 2309.00071, sections 3.2 and 3.4).
    """
    options = dict(rope_scaling)
    names = look_up("type of rope_scaling", str(options.pop("type", None)), SCALINGS)
    for name in names:
        value = options.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"rope_scaling={rope_scaling}: give a positive number as {name!r}")
    if unknown := sorted(options.keys() - set(names)):
        raise ValueError(f"rope_scaling={rope_scaling} has no option {unknown[0]!r}. There are: {', '.join(names)}")
    length, keep = options.get("original_max_seq_len"), 0.0  # keep: the share of each frequency that is not divided
    match rope_scaling["type"]:
        case "llama3":
            low, high = options["low_freq_factor"], options["high_freq_factor"]
            if low >= high:
                raise ValueError(f"rope_scaling={rope_scaling}: low_freq_factor must be less than high_freq_factor")
            keep = ((length * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        case "yarn":
            pairs, log_theta = len(frequencies), math.log(rope_theta)
            turns = (options["beta_fast"], options["beta_slow"])  # and the index of the frequency that turns so often:
            fast, slow = (pairs * math.log(length / (2 * math.pi * beta)) / log_theta for beta in turns)
            fast, slow = max(math.floor(fast), 0), min(math.ceil(slow), 2 * pairs - 1)
            keep = 1 - ((torch.arange(pairs) - fast) / (slow - fast or 0.001)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / options["factor"]), options.get("attention_factor", 1.0)
