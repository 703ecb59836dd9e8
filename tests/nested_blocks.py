"""A plugin of blocks that hold a layer: one that is right, and typical mistakes.  B batch, T time, D model dim."""

from model import Branch
from tools import LoggingModule


class Holder(LoggingModule):
    """Base class: hold a layer."""

    def __init__(self, layer: Branch):
        super().__init__()
        self.layer = layer


class Twice(Holder):
    """The mean of two turns of a layer.  (B, T, D) -> (B, T, D)"""

    def forward(self, x, **inputs):
        first = self.layer(x, **inputs)
        return (first + self.layer(first, **inputs)) / 2


class TakesNoInputs(Holder):
    """(B, T, D) -> (B, T, D)"""

    def forward(self, x):
        return self.layer(x)


class HandsNothingOn(Holder):
    """(B, T, D) -> (B, T, D)"""

    def forward(self, x, **inputs):
        return self.layer(x)


class HandsNoCacheOn(Holder):
    """(B, T, D) -> (B, T, D)"""

    def forward(self, x, *, cache=None, **inputs):
        return self.layer(x, **inputs)


class ForgetsTheLayer(Holder):
    """(B, T, D) -> (B, T, D)"""

    def forward(self, x, **inputs):
        return x


BLOCKS = {
    "Twice": Twice, "TakesNoInputs": TakesNoInputs, "HandsNothingOn": HandsNothingOn, "HandsNoCacheOn": HandsNoCacheOn,
    "ForgetsTheLayer": ForgetsTheLayer,
}  # fmt: skip
