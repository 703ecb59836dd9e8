"""A plugin for training: an optimizer, schedules, losses, a block with hooks, and models that do more or less in training.

B batch, T time, D model dim, N targets, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model import GPT, IGNORE
from tools import LoggingModule


class Lion(torch.optim.Optimizer):
    """The sign of a blend of the gradient and its moving average (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

    def __init__(self, groups, lr: float, betas: tuple[float, float] = (0.9, 0.99)):
        super().__init__(groups, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            one, two = group["betas"]
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(torch.lerp(weight.grad, average, one).sign(), alpha=group["lr"])
                average.lerp_(weight.grad, 1 - two)


class HiddenSign(Lion):
    """Lion for the hidden matrices; AdamW does the rest."""

    hidden_matrices_only = True

    def __init__(self, groups, lr: float, momentum: float):
        super().__init__(groups, lr, (momentum, momentum))


class Forgetful(Lion):
    """It counts its steps where no state dict has them."""

    steps = 0

    def step(self):
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        super().step()


class Strict(Lion):
    """It needs a gradient of every weight."""

    def step(self):
        assert all(weight.grad is not None for group in self.param_groups for weight in group["params"])
        super().step()


class Deaf(torch.optim.Optimizer):
    """It has a learning rate of its own."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                weight.sub_(weight.grad, alpha=0.01)


class Idle(Deaf):
    def step(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight = weight - group["lr"] * weight.grad


class Asking(Deaf):
    def step(self, closure=None):
        loss = closure()
        return loss


class Unsaveable(Deaf):
    def step(self):
        super().step()
        self.state["loss"]["function"] = F.cross_entropy


class Rho(Deaf):
    def __init__(self, groups, lr: float, rho: float):
        super().__init__(groups)


def inverse_sqrt(done, end: float = 0.1):
    """1 / sqrt(step), which reaches `end` (Vaswani et al. 2017, arXiv 1706.03762, equation 3)."""
    return (1 + (end**-2 - 1) * done) ** -0.5


def z_loss(logits, targets, weight: float = 1e-4):
    """Cross-entropy, and a penalty of large normalisers (Chowdhery et al. 2022, arXiv 2204.02311, section 5)."""
    return F.cross_entropy(logits, targets) + weight * logits.logsumexp(dim=-1).square().mean()


class Hooked(LoggingModule):
    """Scale each channel. After each step the scales have norm 1; before it, the norm of their gradient is noted."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.scale.decay, self.scale.lr_scale = 0.02, 0.5
        self.register_buffer("gradient_norm", torch.zeros(()))

    def forward(self, x):
        return x * self.scale

    @torch.no_grad()
    def before_step(self):
        self.gradient_norm.copy_(self.scale.grad.norm())

    @torch.no_grad()
    def after_step(self):
        self.scale.div_(self.scale.norm())


class LookAhead(LoggingModule):
    """In training, a head of the block's own predicts the token after next (arXiv 2404.19737).  (B, T, D) -> (B, T, D), x"""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.head = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, x, *, shared, targets=None):
        if targets is not None:
            logits = self.head(x[:, :-1]).flatten(0, 1)
            shared["losses"]["ahead"] += 0.3 * F.cross_entropy(logits, targets[:, 1:].flatten(), ignore_index=IGNORE)
        return x


class Noisy(LoggingModule):
    """Add noise in training.  (B, T, D) -> (B, T, D)"""

    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class OwnForward(GPT):
    """A GPT that computes its loss itself."""

    def score(self, x, targets, shared):
        logits, loss = self.predict(self.norm(x), targets)
        if targets is not None:
            self.losses = {"next_token": loss.detach()}
        return logits, loss


class Unnamed(OwnForward):
    """Its losses lack that of the next token."""

    def score(self, x, targets, shared):
        logits, loss = super().score(x, targets, shared)
        if targets is not None:
            self.losses = {"mine": loss.detach()}
        return logits, loss


BLOCKS = {"Hooked": Hooked, "LookAhead": LookAhead, "Noisy": Noisy}
MODELS = {"OwnForward": OwnForward, "Unnamed": Unnamed}
OPTIMIZERS = {
    "Lion": Lion, "HiddenSign": HiddenSign, "SGD": torch.optim.SGD, "LBFGS": torch.optim.LBFGS, "Forgetful": Forgetful,
    "Strict": Strict, "Deaf": Deaf, "Idle": Idle, "Asking": Asking, "Unsaveable": Unsaveable, "Rho": Rho,
}  # fmt: skip
SCHEDULES = {
    "inverse_sqrt": inverse_sqrt,
    "broken": lambda done: float("nan") if done > 0.3 else 1.0,
    "high": lambda done: 1 + done,
    "text": lambda done: "high",
    "without_done": lambda: 1.0,
}
LOSSES = {
    "z_loss": z_loss,
    "vector": lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
    "summed": lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"),
    "number": lambda logits, targets: F.cross_entropy(logits, targets).item(),
    "detached": lambda logits, targets: F.cross_entropy(logits.detach(), targets),
    "infinite": lambda logits, targets: logits.sum() / 0.0,
    "of_three": lambda logits, targets, table: table[targets].sum(),
}
