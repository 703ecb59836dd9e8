"""Mixture of experts: many MLPs, of which each token goes through a few, so that weights grow and work does not.

B batch, T time, N all tokens, D model dim, E experts, R rows, one for every expert that a token has chosen.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from model import MLP, linear
from tools import LoggingModule


class MoE(LoggingModule):
    """Mixture of experts: a router sends each token through top_k of num_experts MLPs.  (B, T, D) -> (B, T, D)

    As in Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1) unless the options say otherwise:

    num_experts, top_k: how many MLPs there are, and how many a token goes through. Each is as wide as `MLP` with this mlp_dim.
    shared_experts: the width, in experts, of an MLP that every token goes through besides (Dai et al. 2024, arXiv 2401.06066).
    shared_gate: what it gives is multiplied by a sigmoid of the token, as in Qwen1.5-MoE and Qwen3-Next.
    scores: of the experts, "softmax" over all of them or "sigmoid" of each (DeepSeek-AI 2024, arXiv 2412.19437, equation 15).
    renormalise: the scores of the chosen ones are made to sum to 1, and are then their weights. Without it a weight is the
    score itself, as in Grok-1 and Switch (Fedus et al. 2021, arXiv 2101.03961, equation 2). routed_scale multiplies the weights.
    balance_loss: what an uneven use of the experts costs (Fedus et al. 2021, equation 4; for top_k of any size as in Dai et al.
    2024, equation 12). z_loss: what large router logits cost (Zoph et al. 2022, arXiv 2202.08906, equation 5).
    bias_rate: a bias on the scores decides along with them who is chosen, but not the weights. After every step it rises by so
    much for experts that were used less than the mean, and falls for the others (Wang et al. 2024, arXiv 2408.15664, algorithm
    1). None is no bias; 0 leaves it as it is.
    noise: in training, the deviation of normal noise on the router's logits; "learned" is learned from the token, for each
    expert (Shazeer et al. 2017, arXiv 1701.06538, equation 4).
    capacity: in training, an expert takes at most capacity times its even share of the tokens of a row. First come, first
    served, so that no token depends on later ones; stories of a row share the places. What comes too late skips the expert, and
    is left with what the residual stream has. None drops nothing; nothing is dropped where there is no training.
    """

    examples = (
        "MoE",
        "MoE(num_experts=5, top_k=3, shared_experts=1, scores='sigmoid', bias_rate=0.001, routed_scale=2.5, z_loss=0.001)",
        "MoE(shared_experts=2, shared_gate=True)",
        "MoE(num_experts=4, top_k=1, renormalise=False, noise='learned', capacity=1.25)",
    )

    def __init__(
        self, dim: int, mlp_dim: int, activation: str = "SiLU", gated: bool = True, linear_bias: bool = False,
        num_experts: int = 8, top_k: int = 2, shared_experts: int = 0, scores: Literal["softmax", "sigmoid"] = "softmax",
        renormalise: bool = True, routed_scale: float = 1.0, balance_loss: float = 0.01, z_loss: float = 0.0,
        bias_rate: float | None = None, noise: float | Literal["learned"] = 0.0, capacity: float | None = None,
        shared_gate: bool = False,
    ):  # fmt: skip
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}: give a whole number of at least 1")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: a token chooses among {num_experts} experts, so give 1 to {num_experts}")
        if top_k == 1 and renormalise:
            raise ValueError("top_k=1: its weight would always be 1, and the router could not learn. Set renormalise=False")
        if shared_gate and not shared_experts:
            raise ValueError("shared_gate=True: without shared experts there is nothing to gate: set shared_experts=1")
        least = {"shared_experts": shared_experts, "balance_loss": balance_loss, "z_loss": z_loss, "bias_rate": bias_rate or 0.0}
        for option, value in least.items() | ({} if noise == "learned" else {"noise": noise}).items():
            if value < 0:
                raise ValueError(f"{option}={value}: give a number of at least 0")
        for option, value in (("routed_scale", routed_scale), ("capacity", capacity)):
            if value is not None and value <= 0:
                raise ValueError(f"{option}={value}: give a positive number")
        self.top_k, self.scores, self.renormalise, self.routed_scale = top_k, scores, renormalise, routed_scale
        self.balance_loss, self.z_loss, self.bias_rate, self.capacity = balance_loss, z_loss, bias_rate, capacity
        self.noise = noise
        self.w_router = linear(dim, num_experts)
        self.w_noise = nn.Linear(dim, num_experts, bias=False) if noise == "learned" else None
        if self.w_noise is not None:
            nn.init.zeros_(self.w_noise.weight)
        self.experts = Experts(num_experts, dim, mlp_dim, activation, gated, linear_bias)
        self.shared_mlp = MLP(dim, shared_experts * mlp_dim, activation, gated, linear_bias) if shared_experts else None
        self.w_shared_gate = linear(dim, 1) if shared_gate else None
        self.register_buffer("selection_bias", None if bias_rate is None else torch.zeros(num_experts))
        for counts in ("chosen", "chosen_in_step"):
            self.register_buffer(counts, torch.zeros(num_experts, dtype=torch.long), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x, *, shared=None):
        """shared: in training, the router's losses are left in its list "losses"."""
        B, T, D = x.shape
        logits = self.route(x)
        scores = logits.softmax(dim=-1) if self.scores == "softmax" else logits.sigmoid()
        wanted = scores if self.selection_bias is None else scores + self.selection_bias
        chosen = wanted.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, chosen)  # (B, T, top_k)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * self.routed_scale
        kept = None
        if self.training:
            kept = self.within_capacity(chosen)
            self.count(chosen, kept)
            if shared is not None:
                shared.setdefault("losses", []).extend(self.losses(logits, scores, chosen))
        mixed = self.mix(x, chosen, weights, kept)
        if self.shared_mlp is None:
            return mixed
        shared_by_all = self.shared_mlp(x)
        if self.w_shared_gate is not None:
            shared_by_all = self.w_shared_gate(x).sigmoid() * shared_by_all
        return mixed + shared_by_all

    def route(self, x) -> Tensor:
        """How much each token wants each expert, in float32, as all of routing (Fedus et al. 2021, section 2.4).  (B, T, E)"""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.w_router(x.float())
            if self.training and self.noise:
                deviation = self.noise if self.w_noise is None else F.softplus(self.w_noise(x.float()))
                logits = logits + deviation * torch.randn_like(logits)
        return logits

    def within_capacity(self, chosen) -> Tensor | None:
        """True where an expert has a place left when a token's turn comes; None is everywhere.  (B, T, top_k) -> the same"""
        if self.capacity is None:
            return None
        B, T, top_k = chosen.shape
        E = len(self.chosen)
        places = max(1, math.ceil(self.capacity * top_k * T / E))
        comes = torch.zeros(B, T, E, dtype=torch.int32, device=chosen.device).scatter_(2, chosen, 1)
        turn = comes.cumsum(dim=1)  # (B, T, E)
        return turn.gather(2, chosen) <= places

    def mix(self, x, chosen, weights, kept) -> Tensor:
        """The weighted sum of what the chosen experts make of each token.

        x (B, T, D), chosen, weights and kept (B, T, top_k) -> (B, T, D). The rows of an expert are brought together, so that
        the work is that of a few large matrix products.
        """
        B, T, D = x.shape
        E, R = len(self.chosen), chosen.numel()
        experts = chosen.view(R)
        if kept is not None:
            weights = weights * kept
            experts = experts.masked_fill(~kept.view(R), E)  # behind all others
        experts, order = experts.sort(stable=True)
        num_rows = uses(experts, E + 1)
        rows = x.reshape(-1, D).index_select(0, order // self.top_k)  # (R, D)
        rows = self.experts(rows, num_rows=num_rows[:E], experts=experts.clamp(max=E - 1))  # (R, D)
        rows = rows.index_select(0, order.argsort()).view(B, T, self.top_k, D)
        return (rows * weights[..., None]).sum(dim=2).type_as(rows)

    def losses(self, logits, scores, chosen) -> list[Tensor]:
        """What is added to the loss: uneven use of the experts, and large logits.  (B, T, E), (B, T, E), (B, T, top_k)"""
        E, losses = len(self.chosen), []
        if self.balance_loss:
            share_chosen = uses(chosen, E) / chosen.numel()  # (E)
            share_scored = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))  # (E)
            losses.append(self.balance_loss * E * (share_chosen * share_scored).sum())
        if self.z_loss:
            losses.append(self.z_loss * logits.logsumexp(dim=-1).square().mean())
        return losses

    @torch.no_grad()
    def count(self, chosen, kept):
        """For the report, and for the bias."""
        used = uses(chosen, len(self.chosen))
        self.chosen += used
        self.chosen_in_step += used
        if kept is not None:
            self.dropped += (~kept).sum()

    @torch.no_grad()
    def after_step(self):
        """Called by the optimizer after every step: the bias of experts that were used too little rises, that of others falls."""
        if self.bias_rate:
            used = self.chosen_in_step.float()
            self.selection_bias += self.bias_rate * (used.mean() - used).sign()
        self.chosen_in_step.zero_()

    def report(self) -> dict[str, float]:
        """Since the last report, in training: the share of all tokens that chose the least and the most used expert, how many
        experts none chose, and the share of choices that were dropped. Empty where no token was read."""
        chosen = self.chosen.sum().item()
        if not chosen:
            return {}
        report = {
            "least_used": self.chosen.min().item() * self.top_k / chosen,
            "most_used": self.chosen.max().item() * self.top_k / chosen,
            "dead_experts": (self.chosen == 0).sum().item(),
            "dropped": self.dropped.item() / chosen,
        }
        self.chosen.zero_()
        self.dropped.zero_()
        return report


def uses(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert is among the chosen.  Any shape -> (E)"""
    chosen = chosen.flatten()
    return torch.zeros(num_experts, dtype=torch.long, device=chosen.device).scatter_add_(0, chosen, torch.ones_like(chosen))


class Experts(MLP):
    """num_experts MLPs of one shape: rows that are sorted by expert go each through its own.  (R, D) -> (R, D)"""

    def __init__(self, num_experts: int, dim: int, mlp_dim: int, activation: str, gated: bool, linear_bias: bool):
        super().__init__(dim, mlp_dim, activation, gated, linear_bias)
        for name, layer in list(self.named_children()):
            setattr(self, name, ExpertLinear(num_experts, layer.in_features, layer.out_features, linear_bias))

    def forward(self, x, *, num_rows, experts):
        """num_rows (E) of each expert; rows behind these belong to none, and their result is not to be used; experts (R)."""
        hidden = self.w_in(x, num_rows, experts)
        if self.w_gate is None:
            hidden = self.activate(self.activation, hidden)
        else:
            hidden = self.activate(self.activation, self.w_gate(x, num_rows, experts), hidden)
        return self.w_out(hidden, num_rows, experts)


class ExpertLinear(nn.Linear):
    """An nn.Linear for each expert, that begins as ours: weight (E, out, in), bias (E, out).  (R, in) -> (R, out)"""

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = False):
        super().__init__(in_features, out_features, bias=False)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(num_experts, out_features)) if bias else None

    def forward(self, x, num_rows, experts):
        weight, device = self.weight, x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight = x.to(dtype), weight.to(dtype)
        y = ExpertProducts.apply(x, weight, num_rows)
        return y if self.bias is None else y + self.bias.index_select(0, experts).type_as(y)


class ExpertProducts(torch.autograd.Function):
    """x @ weight.T with the weight of each row's expert.  x (R, in), weights (E, out, in), num_rows (E) -> (R, out)

    The rows stand in the order of the experts, and those that are left have none: they become 0.
    """

    @staticmethod
    def forward(ctx, x, weights, num_rows):
        ctx.save_for_backward(x, weights, num_rows)
        return torch.ops.basegpt.expert_products(x, weights, num_rows)

    @staticmethod
    def backward(ctx, grad):
        x, weights, num_rows = ctx.saved_tensors
        grad_x = torch.ops.basegpt.expert_products(grad, weights.mT, num_rows)
        return grad_x, torch.ops.basegpt.expert_gradients(x, grad, num_rows), None


def expert_products(x: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    y = empty_products(x, weights, num_rows)
    parts = parts_of(num_rows)
    for part, weight in zip(parts, weights, strict=True):
        torch.mm(x[part], weight.T, out=y[part])
    y[parts[-1].stop :] = 0
    return y


def expert_gradients(x: Tensor, grad: Tensor, num_rows: Tensor) -> Tensor:
    """Of the weights, (E, out, in): 0 for an expert without rows."""
    weights = empty_gradients(x, grad, num_rows)
    for part, weight in zip(parts_of(num_rows), weights, strict=True):
        torch.mm(grad[part].T, x[part], out=weight)
    return weights


def parts_of(num_rows: Tensor) -> list[slice]:
    """Where the rows of each expert stand."""
    ends = num_rows.cumsum(dim=0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def empty_products(x: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[1])


def empty_gradients(x: Tensor, grad: Tensor, num_rows: Tensor) -> Tensor:
    return x.new_empty(len(num_rows), grad.shape[1], x.shape[1])


# As operators of torch they can be compiled around, though how many rows an expert has is known only when they run.
LIBRARY = torch.library.Library("basegpt", "FRAGMENT")
LIBRARY.define("expert_products(Tensor x, Tensor weights, Tensor num_rows) -> Tensor")
LIBRARY.define("expert_gradients(Tensor x, Tensor grad, Tensor num_rows) -> Tensor")
LIBRARY.impl("expert_products", expert_products, "CompositeExplicitAutograd")
LIBRARY.impl("expert_gradients", expert_gradients, "CompositeExplicitAutograd")
torch.library.register_fake("basegpt::expert_products", empty_products, lib=LIBRARY)
torch.library.register_fake("basegpt::expert_gradients", empty_gradients, lib=LIBRARY)


@register_flop_formula([torch.ops.basegpt.expert_products, torch.ops.basegpt.expert_gradients])
def flops_of_products(x_shape, other_shape, num_rows_shape, *, out_shape, **options) -> int:
    """Each row goes through one matrix: of weights (E, out, in), or grad (R, out) of it."""
    return 2 * x_shape[0] * x_shape[1] * other_shape[1]


BLOCKS = {"MoE": MoE}
