"""The residual stream, otherwise: U-net skips from early layers to late ones, and several streams in place of one.

B batch, T time, D model dim, S streams.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import Norm, RMSNorm
from tools import LoggingModule


class SkipOut(LoggingModule):
    """Leaves x for a SkipIn further up, and changes nothing.  (B, T, D) -> (B, T, D)

    The last that was left is the first that is taken, so that the second half of the layers meets the first half mirrored, as
    in U-ViT (Bao et al. 2022, arXiv 2209.12152, section 3) and modded-nanogpt (Jordan et al. 2024).
    """

    examples = ("SkipOut->Norm->MLP->SkipIn", "SkipOut->MLP->SkipOut->MLP->SkipIn->MLP->SkipIn")

    def forward(self, x, *, shared):
        shared.setdefault("skips", []).append(x)
        return x


class SkipIn(LoggingModule):
    """x + a skip, with what the SkipOut that belongs to it has left and a learned number a.  (B, T, D) -> (B, T, D)

    As modded-nanogpt has it (Jordan et al. 2024). `weight` is what a begins with, and stays without learned. In a layer string
    write `SkipIn->|->` where what follows adds to the sum. Raises ValueError where nothing is left that no other SkipIn took.
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
    """Hyper-connections: S residual streams; what comes next reads a mix of them, until HyperWrite.  (B, T, D) -> (B, T, D)

    From Zhu et al. 2024, arXiv 2409.19606. Each pair of HyperRead and HyperWrite has a matrix of its own (equation 1) of what is
    read (A_m), how the streams mix (A_r) and what is written to each (B). With dynamic=True a learned function of each stream
    adds to it (section 2.2). At first all streams are x, one is read, the streams do not mix, and all are written to, so
    it begins as a layer with `+` does (section 2.3). The paper takes each stream in turn to read from; here it is `stream`, or
    one drawn by lot: as long as all layers read the same one, the others stay alike.

    The streams are in shared["streams"]: x is read by the first HyperRead alone, and `+` and `|` have no say between the two.
    Raises ValueError for streams of another number, or a HyperRead that comes where a HyperWrite is due.
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
        if streams < 1:
            raise ValueError(f"streams={streams}: give a whole number of at least 1")
        if stream is not None and not 0 <= stream < streams:
            raise ValueError(f"stream={stream}: there are {streams}, so give 0 to {streams - 1}, or None")
        self.streams = streams
        read = torch.zeros(streams, 1)
        read[torch.randint(streams, ()) if stream is None else stream] = 1
        # A row for each stream: A_m, A_r, B. By the name of what it is to the dynamic part, weight decay leaves it alone.
        self.bias = nn.Parameter(torch.cat([read, torch.eye(streams), torch.ones(streams, 1)], dim=1))
        self.norm = norm(dim, norm_eps=norm_eps) if dynamic else None
        self.w_dynamic = nn.Linear(dim, streams + 2, bias=False) if dynamic else None
        self.scale = nn.Parameter(torch.tensor([0.01, 0.01])) if dynamic else None
        if dynamic:
            nn.init.zeros_(self.w_dynamic.weight)

    def forward(self, x, *, shared):
        B, T, D = x.shape
        S = self.streams
        streams = shared.get("streams")
        if "write" in shared:
            raise ValueError("layers: a HyperRead comes before the HyperWrite of the one before it: put one there")
        if streams is None:
            streams = x[:, :, None].expand(B, T, S, D)
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
    """Adds what was made of a HyperRead to its streams, and gives their mean.  (B, T, D) -> (B, T, D)

    Equation 2 of Zhu et al. 2024, arXiv 2409.19606. The paper ends with the sum of the streams, which the norm
    before the head takes for the same; their mean is as large as a residual stream, for whatever reads it. Dropout is as in `+`.
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
