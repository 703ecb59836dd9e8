"""Griffin's recurrent block: a gated linear recurrence after a short convolution (De et al. 2024, arXiv 2402.19427).

B batch, T time, D model dim, W width of the recurrence, H blocks of the gates' matrices.

    here             paper     meaning (sections 2.3 and 2.4)
    inner            x_t       input of the recurrence: x, projected to W channels, after the convolution
    remember         r_t       recurrence gate, a sigmoid (equation 1): 0 keeps the state as it is
    admit            i_t       input gate, a sigmoid (equation 2)
    forgetting       Λ         learned, for each channel: a = sigmoid(Λ)
    SHARPNESS        c         8
    decay            a_t       a^(c r_t) (equation 3)
    update                     sqrt(1 - a_t²) (i_t x_t), which is added to the state
    state            h_t       a_t h_{t-1} + update (equation 4)
    w_gate, w_in, w_out        matrices of the gated branch, the recurrent branch, and the output (section 2.3)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from model import activate, linear
from modules.checks import check_sizes
from modules.convolution import ShortConv
from modules.flops import linear_flops
from modules.scan import cached_state, recurrence, scan
from tools import LoggingModule

SHARPNESS = 8.0
MIN_SQUARED_SCALE = 2.5e-7  # of the update; below it sqrt(1 - a²) has no gradient, which would grow beyond 1000, to infinity at 0


class RGLRU(LoggingModule):
    """The recurrent block with the real-gated linear recurrent unit (arXiv 2402.19427, section 2.3).  (B, T, D) -> (B, T, D)

    Two branches of `width` channels (None is D; the paper takes about 4 D / 3): GELU in one, a convolution over conv_width
    tokens and the recurrence in the other; their product goes through the last matrix. The gates' matrices are block-diagonal,
    with `blocks` blocks (None is num_heads). A story starts with a decay of 0, so its first token enters the state unscaled, as
    in the published RecurrentGemma. A window has no effect: the state covers the whole story. Much of the work is elementwise:
    per FLOP it takes longer than Attn.
    """

    activate = staticmethod(activate)
    examples = ("RGLRU", "Norm->RGLRU(width=36, blocks=6, conv_width=2, linear_bias=True)->+")

    def __init__(
        self, dim: int, num_heads: int, width: int | None = None, blocks: int | None = None, conv_width: int = 4,
        linear_bias: bool = False,
    ):  # fmt: skip
        super().__init__()
        width, blocks = dim if width is None else width, num_heads if blocks is None else blocks
        check_sizes(width=width, blocks=blocks, conv_width=conv_width)
        if width % blocks:
            raise ValueError(f"blocks={blocks}: it must divide width={width}. By default that is dim, and blocks is num_heads")
        self.blocks = blocks
        self.w_gate = linear(dim, width, bias=linear_bias)
        self.w_in = linear(dim, width, bias=linear_bias)
        for matrix in (self.w_gate, self.w_in):  # larger than usual, since their product is taken
            nn.init.normal_(matrix.weight, std=dim**-0.5)
        self.conv = ShortConv(width, conv_width, bias=True)
        block = width // blocks
        self.w_remember = nn.Parameter(torch.randn(blocks, block, block) * 0.1 * block**-0.5)
        self.w_admit = nn.Parameter(torch.randn(blocks, block, block) * 0.1 * block**-0.5)
        self.remember_bias = nn.Parameter(torch.zeros(width))
        self.admit_bias = nn.Parameter(torch.zeros(width))
        # a^c starts uniform from 0.9 to 0.999 (section 2.4)
        a = torch.empty(width).uniform_(0.9, 0.999) ** (1 / SHARPNESS)
        self.forgetting = nn.Parameter(torch.logit(a))
        self.w_out = linear(width, dim, bias=linear_bias)

    def forward(self, x, *, story_start=None, cache=None):
        """The cache keeps the state and the last few inputs of the convolution."""
        B, T, D = x.shape
        state = cached_state(cache, x)
        conv_cache = None if cache is None else cache.setdefault("conv", {})
        inner = self.conv(self.w_in(x), story_start=story_start, cache=conv_cache).float()
        remember, admit = self.gates(inner)

        # equations 3 and 4, in float32
        if story_start is None:
            story_start = 0 if state is None else -1  # a cached story continues
        is_start = (torch.arange(T, device=x.device) == story_start).expand(B, T)  # (B, T)
        log_decay = -SHARPNESS * F.softplus(-self.forgetting) * remember  # log sigmoid(Λ) is -softplus(-Λ)
        log_decay = log_decay.masked_fill(is_start[..., None], -math.inf)
        squared_scale = -torch.expm1(2 * log_decay)  # 1 - a_t², also exact near 0
        update = squared_scale.clamp(min=MIN_SQUARED_SCALE).sqrt() * admit * inner
        states = (recurrence if T == 1 else scan)(log_decay.exp(), update, state)
        if cache is not None:
            cache["state"] = states[:, -1]
        return self.w_out(self.activate("GELU", self.w_gate(x), states))

    def gates(self, inner):
        """Both gates (equations 1 and 2), as one product with all blocks.  (B, T, W) -> twice (B, T, W)"""
        B, T, W = inner.shape
        H = self.blocks
        weights = torch.cat([self.w_remember, self.w_admit], dim=2)  # (H, W // H, 2 * W // H)
        biases = torch.cat([self.remember_bias.view(H, 1, -1), self.admit_bias.view(H, 1, -1)], dim=2)
        with torch.autocast(inner.device.type, enabled=False):
            gates = torch.baddbmm(biases, inner.view(B * T, H, -1).transpose(0, 1), weights).sigmoid()
        gates = gates.view(H, B, T, 2, -1).permute(3, 1, 2, 0, 4)  # (2, B, T, H, W // H)
        return gates.reshape(2, B, T, W).unbind()

    def flops_per_token(self, T: int) -> float:
        """Matrices, convolution, and recurrence: for each channel a multiply-add, which a scan does three times."""
        gates = 2 * (self.w_remember.numel() + self.w_admit.numel())
        return linear_flops(self) + gates + self.conv.flops_per_token(T) + 6 * self.forgetting.numel()


BLOCKS = {"RGLRU": RGLRU}
