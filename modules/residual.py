"""Other residual connections: U-Net skips from early to late layers, and hyper-connections, which have several streams.

B batch, T time, D model dim, S streams.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Norm, RMSNorm
from modules.checks import check_sizes
from tools import LoggingModule


class SkipOut(LoggingModule):
    """Save x for a later SkipIn (U-Net skip connection); the identity.  (B, T, D) -> (B, T, D)

    The last x saved is the first used, so that the second half of the layers mirrors the first, as in U-ViT (Bao et al. 2022,
    arXiv 2209.12152, section 3) and modded-nanogpt (Jordan et al. 2024).
    """

    examples = ("SkipOut->Norm->MLP->SkipIn", "SkipOut->MLP->SkipOut->MLP->SkipIn->MLP->SkipIn")

    def forward(self, x, *, shared):
        shared.setdefault("skips", []).append(x)
        return x


class SkipIn(LoggingModule):
    """Add the x of the matching SkipOut, times a learned number that starts as `weight`.  (B, T, D) -> (B, T, D)

    As in modded-nanogpt (Jordan et al. 2024). With learned=False the number is `weight`. In a layer string write `SkipIn->|->`
    if the next `+` is to add to the sum. Raises ValueError if there are fewer SkipOut than SkipIn before it.
    """

    examples = ("SkipOut->Norm->MLP->SkipIn(weight=0.5)", "SkipOut->Norm->MLP->SkipIn(learned=False)")

    def __init__(self, weight: float = 1.0, learned: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(weight))) if learned else weight

    def forward(self, x, *, shared):
        if not shared.get("skips"):
            raise ValueError("layers: a SkipIn finds nothing: put as many SkipOut before it as there are SkipIn")
        return x + self.weight * shared["skips"].pop()


class HyperRead(LoggingModule):
    """Hyper-connections: the blocks up to the next HyperWrite read a mix of S residual streams.  (B, T, D) -> (B, T, D)

    Zhu et al. 2024, arXiv 2409.19606. Each pair of HyperRead and HyperWrite has one matrix (equation 1): weights for reading the
    streams (A_m), mixing them (A_r) and writing to them (B). With dynamic=True a learned function of each stream is added
    (section 2.2). Initially all streams are x, one of them is read, they do not mix, and all are written to, which equals a layer
    with `+` (section 2.3). The paper reads another stream in each layer; here it is `stream`, or a random one: streams that no
    layer reads stay equal.

    The streams are in shared["streams"], so only the first HyperRead uses its x; `+` and `|` within a pair do not change them.
    Raises ValueError if the number of streams changes, or if a HyperRead follows where a HyperWrite should.
    """

    examples = (
        "HyperRead->Norm->MLP->HyperWrite",
        "HyperRead(streams=3)->Norm->Attn->HyperWrite->HyperRead(streams=3, dynamic=False, stream=1)->Norm->MLP->HyperWrite",
    )

    def __init__(
        self, dim: int, streams: int = 4, dynamic: bool = True, stream: int | None = None, norm: type[Norm] = RMSNorm,
        norm_eps: float = 1e-5,
    ):  # fmt: skip
        super().__init__()
        check_sizes(streams=streams)
        if stream is not None and not 0 <= stream < streams:
            raise ValueError(f"stream={stream}: there are {streams}, so give 0 to {streams - 1}, or None")
        self.streams = streams
        read = torch.zeros(streams, 1)
        read[torch.randint(streams, ()) if stream is None else stream] = 1
        # a row for each stream: A_m, A_r, B; called a bias, which it is to the dynamic part, it has no weight decay
        self.bias = nn.Parameter(torch.cat([read, torch.eye(streams), torch.ones(streams, 1)], dim=1))
        self.norm = norm(dim, norm_eps=norm_eps) if dynamic else None
        self.w_dynamic = nn.Linear(dim, streams + 2, bias=False) if dynamic else None
        self.scale = nn.Parameter(torch.tensor([0.01, 0.01])) if dynamic else None
        if dynamic:
            nn.init.zeros_(self.w_dynamic.weight)

    def forward(self, x, *, shared):
        B, T, D = x.shape
        S = self.streams
        if "write" in shared:
            raise ValueError("layers: a HyperRead comes before the HyperWrite of the one before it: put one there")
        streams = shared.get("streams", x[:, :, None].expand(B, T, S, D))
        if streams.shape[2] != S:
            raise ValueError(f"layers: HyperRead(streams={S}) finds {streams.shape[2]} streams: give all the same number")
        weights = self.bias
        if self.w_dynamic is not None:
            scale = torch.cat([self.scale[:1].expand(S + 1), self.scale[1:]])
            weights = weights + scale * torch.tanh(self.w_dynamic(self.norm(streams)))  # (B, T, S, S + 2)
        read_and_mix, write = weights.split([S + 1, 1], dim=-1)
        mixed = read_and_mix.transpose(-1, -2) @ streams  # (B, T, S + 1, D)
        shared["streams"], shared["write"] = mixed[:, :, 1:], write
        return mixed[:, :, 0]


class HyperWrite(LoggingModule):
    """Add x, with dropout, to the streams of the HyperRead before; return their mean.  (B, T, D) -> (B, T, D)

    Equation 2 of Zhu et al. 2024, arXiv 2409.19606. The paper ends with the sum of the streams, which is the same to the norm
    before the head; the mean has the scale of a residual stream.
    """

    examples = ("HyperRead->Norm->MLP->HyperWrite->Norm->Attn->+",)

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.dropout = dropout

    def forward(self, x, *, shared):
        if "write" not in shared:
            raise ValueError("layers: a HyperWrite has no HyperRead before it: put one there")
        B, T, S, D = shared["streams"].shape
        update = F.dropout(x, self.dropout, self.training)
        streams = shared["streams"] + shared.pop("write") * update[:, :, None]  # (B, T, S, D)
        shared["streams"] = streams
        return streams.mean(dim=2)  # (B, T, D)


BLOCKS = {"SkipOut": SkipOut, "SkipIn": SkipIn, "HyperRead": HyperRead, "HyperWrite": HyperWrite}
