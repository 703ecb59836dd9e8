"""Mixture of experts: more parameters at the same compute per token.

B batch, T time, D model dim, E experts, R = B T top_k rows: a token's input to one expert.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from model import MLP, linear
from modules.checks import check_sizes
from modules.operators import define_operator, once_differentiable
from tools import LoggingModule


class MoE(LoggingModule):
    """Mixture of experts: a router sends each token through top_k of num_experts MLPs.  (B, T, D) -> (B, T, D)

    By default as in Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1). Options:

    num_experts, top_k: number of experts (MLPs of width mlp_dim), and of experts per token.
    shared_experts: width, in experts, of an MLP for all tokens (Dai et al. 2024, arXiv 2401.06066).
    shared_gate: gate its output by a sigmoid of a projection of the token, as in Qwen1.5-MoE and Qwen3-Next.
    scores: "softmax" over the experts, or a "sigmoid" for each (DeepSeek-AI 2024, arXiv 2412.19437, equation 15).
    renormalise: normalise the selected experts' scores to sum to 1, as their weights. False: use the scores as weights, as in
    Grok-1 and Switch (Fedus et al. 2021, arXiv 2101.03961, equation 2). routed_scale multiplies the weights.
    balance_loss: coefficient of the load-balancing loss (Fedus et al. 2021, equation 4; for any top_k as in Dai et al. 2024,
    equation 12). z_loss: coefficient of the router z-loss (Zoph et al. 2022, arXiv 2202.08906, equation 5).
    bias_rate: bias the scores for the selection, not the weights. Each step raises the bias by bias_rate for experts used less
    than average, and lowers it for the others (Wang et al. 2024, arXiv 2408.15664, algorithm 1). None: no bias; 0: constant bias.
    groups, top_groups: select in the best top_groups of `groups` equal groups of experts alone, by the sum of the two highest
    biased scores in each (DeepSeek-AI 2024, arXiv 2412.19437, section 2.1.2).
    noise: standard deviation of Gaussian noise on the router's logits in training; "learned": predicted per token and expert
    (Shazeer et al. 2017, arXiv 1701.06538, equation 4).
    capacity: capacity factor; in training, an expert takes at most capacity times its even share of a sequence's tokens. Tokens
    beyond it skip the expert; earlier tokens have precedence, for causality. Stories in a sequence share the capacity. None drops
    no tokens; evaluation never does.
    """

    examples = (
        "MoE",
        "MoE(num_experts=5, top_k=3, shared_experts=1, scores='sigmoid', bias_rate=0.001, routed_scale=2.5, z_loss=0.001)",
        "MoE(shared_experts=2, shared_gate=True)",
        "MoE(num_experts=6, groups=3, top_groups=2, bias_rate=0.001)",
        "MoE(num_experts=4, top_k=1, renormalise=False, noise='learned', capacity=1.25)",
    )

    def __init__(
        self, dim: int, mlp_dim: int, activation: str = "SiLU", gated: bool = True, linear_bias: bool = False,
        num_experts: int = 8, top_k: int = 2, shared_experts: int = 0, scores: Literal["softmax", "sigmoid"] = "softmax",
        renormalise: bool = True, routed_scale: float = 1.0, balance_loss: float = 0.01, z_loss: float = 0.0,
        bias_rate: float | None = None, noise: float | Literal["learned"] = 0.0, capacity: float | None = None,
        shared_gate: bool = False, groups: int = 1, top_groups: int = 1,
    ):  # fmt: skip
        super().__init__()
        check_sizes(num_experts=num_experts)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}: a token chooses among {num_experts} experts, so give 1 to {num_experts}")
        if top_k == 1 and renormalise:
            raise ValueError("top_k=1: its weight would always be 1, and the router could not learn. Set renormalise=False")
        if groups < 1 or num_experts % groups or (groups > 1 and num_experts < 2 * groups):
            raise ValueError(f"groups={groups}: it must divide num_experts={num_experts} into groups of at least 2")
        if not 1 <= top_groups <= groups or top_k > top_groups * (num_experts // groups):
            raise ValueError(f"top_groups={top_groups}: give 1 to {groups}, groups with at least top_k={top_k} experts")
        if shared_gate and not shared_experts:
            raise ValueError("shared_gate=True: without shared experts there is nothing to gate: set shared_experts=1")
        amounts = {"balance_loss": balance_loss, "z_loss": z_loss, "shared_experts": shared_experts}
        for option, value in {**amounts, "bias_rate": bias_rate or 0.0, "noise": 0.0 if noise == "learned" else noise}.items():
            if value < 0:
                raise ValueError(f"{option}={value}: give a number of at least 0")
        for option, value in (("routed_scale", routed_scale), ("capacity", capacity)):
            if value is not None and value <= 0:
                raise ValueError(f"{option}={value}: give a positive number")
        self.top_k, self.scores, self.renormalise, self.routed_scale = top_k, scores, renormalise, routed_scale
        self.balance_loss, self.z_loss, self.bias_rate, self.capacity = balance_loss, z_loss, bias_rate, capacity
        self.noise, self.groups, self.top_groups = noise, groups, top_groups
        self.w_router = linear(dim, num_experts)
        self.w_noise = nn.Linear(dim, num_experts, bias=False) if noise == "learned" else None
        if self.w_noise is not None:
            nn.init.zeros_(self.w_noise.weight)
        self.experts = Experts(num_experts, dim, mlp_dim, activation, gated, linear_bias)
        self.shared_mlp = MLP(dim, shared_experts * mlp_dim, activation, gated, linear_bias) if shared_experts else None
        self.w_shared_gate = linear(dim, 1) if shared_gate else None
        self.register_buffer("selection_bias", None if bias_rate is None else torch.zeros(num_experts))
        for counts in ("uses", "uses_in_step"):
            self.register_buffer(counts, torch.zeros(num_experts, dtype=torch.long), persistent=False)
        self.register_buffer("dropped", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x, *, shared=None):
        """In training, add the router's losses to shared["losses"]."""
        B, T, D = x.shape
        logits = self.route(x)
        scores = logits.softmax(dim=-1) if self.scores == "softmax" else logits.sigmoid()
        biased = scores if self.selection_bias is None else scores + self.selection_bias
        if self.top_groups < self.groups:
            biased = self.within_groups(biased)
        selected = biased.topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, selected)  # (B, T, top_k)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights, fits = weights * self.routed_scale, None
        if self.training:
            fits = self.within_capacity(selected)
            self.count(selected, fits)
            if shared is not None:
                for name, loss in self.losses(logits, scores, selected).items():
                    shared["losses"][name] += loss
        y = self.mix(x, selected, weights, fits)
        if self.shared_mlp is None:
            return y
        shared_y = self.shared_mlp(x)
        if self.w_shared_gate is not None:
            shared_y = self.w_shared_gate(x).sigmoid() * shared_y
        return y + shared_y

    def route(self, x) -> Tensor:
        """The router's logits, in float32 (Fedus et al. 2021, section 2.4).  (B, T, D) -> (B, T, E)"""
        with torch.autocast(x.device.type, enabled=False):
            logits = self.w_router(x.float())
            if self.training and self.noise:
                deviation = self.noise if self.w_noise is None else F.softplus(self.w_noise(x.float()))
                logits = logits + deviation * torch.randn_like(logits)
        return logits

    def within_groups(self, scores) -> Tensor:
        """The scores in the best groups, elsewhere -inf.  (B, T, E) -> the same"""
        B, T, E = scores.shape
        grouped = scores.view(B, T, self.groups, -1)  # (B, T, self.groups, E // self.groups)
        of_groups = grouped.topk(2, dim=-1).values.sum(dim=-1)  # (B, T, self.groups)
        best = of_groups.topk(self.top_groups, dim=-1).indices
        is_outside = torch.ones_like(of_groups, dtype=torch.bool).scatter(-1, best, False)
        return grouped.masked_fill(is_outside[..., None], -math.inf).flatten(-2)

    def within_capacity(self, selected) -> Tensor | None:
        """True where an expert still has capacity for the token, None: everywhere.  (B, T, top_k) -> the same"""
        if self.capacity is None:
            return None
        B, T, top_k = selected.shape
        E = len(self.uses)
        limit = max(1, math.ceil(self.capacity * top_k * T / E))
        uses = torch.zeros(B, T, E, dtype=torch.int32, device=selected.device).scatter_(2, selected, 1)
        return uses.cumsum(dim=1).gather(2, selected) <= limit

    def mix(self, x, selected, weights, fits) -> Tensor:
        """Weighted sum of the experts' outputs.  x (B, T, D), selected, weights and fits (B, T, top_k) -> (B, T, D)

        The rows are sorted by expert, for a few large matrix products.
        """
        B, T, D = x.shape
        E, R = len(self.uses), selected.numel()
        experts = selected.view(R)
        if fits is not None:
            weights = weights * fits
            experts = experts.masked_fill(~fits.view(R), E)  # dropped rows come last
        experts, order = experts.sort(stable=True)
        num_rows = count_uses(experts, E + 1)[:E]
        rows = x.reshape(-1, D).index_select(0, order // self.top_k)  # (R, D)
        rows = self.experts(rows, num_rows=num_rows, experts=experts.clamp(max=E - 1))  # (R, D)
        rows = rows.index_select(0, order.argsort()).view(B, T, self.top_k, D)
        return (rows * weights[..., None]).sum(dim=2).type_as(rows)

    def losses(self, logits, scores, selected) -> dict[str, Tensor]:
        """The load-balancing loss and the z-loss.  logits and scores (B, T, E), selected (B, T, top_k)"""
        E, losses = len(self.uses), {}
        if self.balance_loss:
            share_selected = count_uses(selected, E) / selected.numel()  # (E)
            share_scored = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))  # (E)
            losses["router_balance"] = self.balance_loss * E * (share_selected * share_scored).sum()
        if self.z_loss:
            losses["router_z"] = self.z_loss * logits.logsumexp(dim=-1).square().mean()
        return losses

    @torch.no_grad()
    def count(self, selected, fits):
        """Count the uses of each expert, for `report` and for the bias."""
        uses = count_uses(selected, len(self.uses))
        self.uses += uses
        self.uses_in_step += uses
        if fits is not None:
            self.dropped += (~fits).sum()

    @torch.no_grad()
    def after_step(self):
        """Called after every step of the optimizers: raise the bias of experts used too little, lower that of the others."""
        if self.bias_rate:
            uses = self.uses_in_step.float()
            self.selection_bias += self.bias_rate * (uses.mean() - uses).sign()
        self.uses_in_step.zero_()

    def report(self) -> dict[str, float]:
        """Use of the experts in training since the last report; empty if no token was read.

        The share of tokens for the least and the most used expert, the number of unused ones, and the share of dropped uses.
        """
        total = self.uses.sum().item()
        if not total:
            return {}
        report = {
            "least_used": self.uses.min().item() * self.top_k / total,
            "most_used": self.uses.max().item() * self.top_k / total,
            "dead_experts": (self.uses == 0).sum().item(),
            "dropped": self.dropped.item() / total,
        }
        self.uses.zero_()
        self.dropped.zero_()
        return report


def count_uses(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs.  Any shape -> (E)"""
    experts = experts.flatten()
    return torch.zeros(num_experts, dtype=torch.long, device=experts.device).scatter_add_(0, experts, torch.ones_like(experts))


class Experts(MLP):
    """num_experts MLPs of one shape, applied to rows sorted by expert.  (R, D) -> (R, D)"""

    def __init__(self, num_experts: int, dim: int, mlp_dim: int, activation: str, gated: bool, linear_bias: bool):
        super().__init__(dim, mlp_dim, activation, gated, linear_bias)
        for name, layer in list(self.named_children()):
            setattr(self, name, ExpertLinear(num_experts, layer.in_features, layer.out_features, linear_bias))

    def forward(self, x, *, num_rows, experts):
        """num_rows (E) of each expert; the output of the rows after these is not to be used. experts (R): that of each row."""
        hidden = self.w_in(x, num_rows, experts)
        if self.w_gate is None:
            hidden = self.activate(self.activation, hidden)
        else:
            hidden = self.activate(self.activation, self.w_gate(x, num_rows, experts), hidden)
        return self.w_out(hidden, num_rows, experts)


class ExpertLinear(nn.Linear):
    """A linear layer per expert, with GPT-2 initialization: weight (E, out, in), bias (E, out).  (R, in) -> (R, out)"""

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
    """Grouped matmul, x @ weight.T for each expert's rows.  x (R, in), weights (E, out, in), num_rows (E) -> (R, out)

    Rows are sorted by expert; dropped rows come last and become 0.
    """

    @staticmethod
    def forward(ctx, x, weights, num_rows):
        ctx.save_for_backward(x, weights, num_rows)
        return torch.ops.basegpt.expert_products(x, weights, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weights, num_rows = ctx.saved_tensors
        grad_x = torch.ops.basegpt.expert_products(grad, weights.mT, num_rows)
        return grad_x, torch.ops.basegpt.expert_gradients(x, grad, num_rows), None


def expert_products(x: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    y = empty_products(x, weights, num_rows)
    slices = expert_slices(num_rows)
    for rows, weight in zip(slices, weights, strict=True):
        torch.mm(x[rows], weight.T, out=y[rows])
    y[slices[-1].stop :] = 0
    return y


def expert_gradients(x: Tensor, grad: Tensor, num_rows: Tensor) -> Tensor:
    """Gradients of the weights (E, out, in); 0 for an expert without rows."""
    weights = empty_gradients(x, grad, num_rows)
    for rows, weight in zip(expert_slices(num_rows), weights, strict=True):
        torch.mm(grad[rows].T, x[rows], out=weight)
    return weights


def expert_slices(num_rows: Tensor) -> list[slice]:
    """The rows of each expert."""
    ends = num_rows.cumsum(dim=0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def empty_products(x: Tensor, weights: Tensor, num_rows: Tensor) -> Tensor:
    return x.new_empty(len(x), weights.shape[1])


def empty_gradients(x: Tensor, grad: Tensor, num_rows: Tensor) -> Tensor:
    return x.new_empty(len(num_rows), grad.shape[1], x.shape[1])


# operators, since torch.compile cannot trace slices that depend on num_rows
define_operator("expert_products(Tensor x, Tensor weights, Tensor num_rows) -> Tensor", expert_products, empty_products)
define_operator("expert_gradients(Tensor x, Tensor grad, Tensor num_rows) -> Tensor", expert_gradients, empty_gradients)


@register_flop_formula([torch.ops.basegpt.expert_products, torch.ops.basegpt.expert_gradients])
def flops_of_products(x_shape, other_shape, num_rows_shape, *, out_shape, **options) -> int:
    """A matrix product for each row, with weights (E, out, in) or grad (R, out)."""
    return 2 * x_shape[0] * x_shape[1] * other_shape[1]


BLOCKS = {"MoE": MoE}
