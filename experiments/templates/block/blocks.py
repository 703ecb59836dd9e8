"""Say here what the block does, and name the paper.  B batch, T time, D model dim."""

from model import linear
from tools import LoggingModule


class Template(LoggingModule):
    """A plain MLP: put your idea in its place.  (B, T, D) -> (B, T, D)"""

    def __init__(self, dim: int, expand: int = 3):
        super().__init__()
        self.w_in = linear(dim, expand * dim)
        self.w_out = linear(expand * dim, dim)

    def forward(self, x):
        hidden = self.w_in(x).relu()
        return self.w_out(hidden)


BLOCKS = {"Template": Template}
