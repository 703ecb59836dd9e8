"""How weights are moved: the optimizers, the average of the weights, and the learning rate over a run."""

import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from config import TrainConfig
from model import GPT


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

    Weight decay pulls on matrices, embeddings have one of their own, and norms and biases none. The lr_scale of a group is a
    factor on the learning rate of the step. Blocks with a method `after_step` are called after each.
    """
    tables = {id(table.weight) for table in model.modules() if isinstance(table, torch.nn.Embedding)}
    matrices, embeddings, rest = [], [], []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim >= 2 and not name.endswith("bias")
        (embeddings if id(weight) in tables else matrices if is_matrix else rest).append(weight)
    groups = [
        {"params": rest, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": embeddings, "weight_decay": config.embedding_decay, "lr_scale": 1.0},
    ]
    optimizers = []
    if config.optimizer == "Muon":
        linears = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Linear)}
        head = getattr(getattr(model, "head", None), "weight", None)  # a model of a plugin may have none
        hidden = [weight for weight in matrices if id(weight) in linears and weight is not head]
        hidden_ids = {id(weight) for weight in hidden}
        matrices = [weight for weight in matrices if id(weight) not in hidden_ids]
        hidden_group = {"params": hidden, "lr_scale": config.muon_lr_scale}
        optimizers.append(Muon([hidden_group], config.lr_max, config.weight_decay, config.muon_momentum))
    groups.append({"params": matrices, "weight_decay": config.weight_decay, "lr_scale": 1.0})
    optimizers.append(torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.lr_max, betas=config.betas, eps=config.eps, fused=True,
    ))  # fmt: skip
    for block in model.modules():
        if hasattr(block, "after_step"):
            optimizers[-1].register_step_post_hook(lambda *_, after_step=block.after_step: after_step())
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum whose every update is turned into the nearest orthogonal matrix (Jordan et al. 2024).

    torch.optim.Muon takes the matrices one after the other, which costs a third of a step where models and batches are small.
    Here matrices of one shape go together. Updates are scaled to the size of AdamW's, so that both take the same learning
    rate (Liu et al. 2025, arXiv 2502.16982, section 2.2).
    """

    def __init__(self, weights: list[Tensor] | list[dict], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.shape].append(weight)
            for (*_, rows, columns), weights in by_shape.items():  # several matrices where a weight is a stack of them
                gradients = [weight.grad for weight in weights]
                for weight in weights:
                    if "momentum" not in self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                momenta = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's look ahead
                updates = orthogonalise(torch.stack(ahead).view(-1, rows, columns)).view(len(weights), *weights[0].shape)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


# Four polynomials a x + b x^3 + c x^5 that bring singular values from [0.008, 1] to 1 fastest (Amsel et al. 2025, arXiv
# 2505.16932, appendix; they call it Polar Express, and begin with a fifth, for [0.001, 1]).
POLYNOMIALS = (
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalise(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T: all singular values become 0.9 to 1.1, or less where they were tiny.

    (number, rows, columns) → the same
    """
    rows, columns = matrices.shape[1:]
    if rows > columns:
        return orthogonalise(matrices.mT).mT
    square = matrices @ matrices.mT  # (number, rows, rows)
    norm = square.norm(dim=(1, 2), keepdim=True).sqrt() * 1.02 + 1e-7  # sum(S^4)^(1/4) is near S's largest, and not below
    if columns < 2 * rows:
        x = matrices / norm
        for a, b, c in POLYNOMIALS:
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x
    # Each step multiplies x by a polynomial of x x^T. Where x is long, it is cheaper to follow the small x x^T alone.
    square, product = square / norm.square(), None
    for a, b, c in POLYNOMIALS:
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # (number, rows, rows)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor
    return product @ (matrices / norm)


def average_of_weights(model: torch.nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the weights: `decay` is the share it keeps a step, less at its beginning.

    What it averages out is the noise of steps, which falls with the learning rate. So it also keeps less where its attribute
    `pace`, the learning rate as a share of its maximum, is small; at a learning rate of 0 it is the weights themselves.
    """

    def blend(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor):
        forgotten = max(1 - decay, 9 / (10 + num_averaged.item()))
        torch._foreach_lerp_(averaged, current, min(1.0, forgotten / max(average.lr_fraction, 1e-9)))

    average = AveragedModel(model, multi_avg_fn=blend, use_buffers=False)
    average.lr_fraction = 1.0
    return average


def scheduled_learning_rate(step: int, num_steps: float, config: TrainConfig) -> float:
    """The learning rate of a step (counted from 0) of num_steps: warm-up, schedule with restarts, a flat end at lr_min."""
    if step < config.warmup_steps:
        return config.lr_init + (config.lr_max - config.lr_init) * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr_max
    if step >= num_steps - config.final_flat_steps:
        return config.lr_min
    done = (step - config.warmup_steps) / (num_steps - config.final_flat_steps - config.warmup_steps)

    lengths = [config.restart_mult**cycle for cycle in range(config.num_restarts + 1)]
    ends = [end / sum(lengths) for end in itertools.accumulate(lengths)]
    cycle = next((cycle for cycle, end in enumerate(ends) if done < end), config.num_restarts)
    begin = ends[cycle - 1] if cycle else 0.0
    done = (done - begin) / (ends[cycle] - begin)

    if config.schedule == "cosine":
        height = (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "linear":
        height = 1 - done
    else:
        height = min(1.0, (1 - done) / 0.2)
    return config.lr_min + (config.lr_max - config.lr_min) * height


def expected_steps(step: int, seconds: float, config: TrainConfig) -> float:
    """Estimate the total number of steps from the progress so far; with max_steps alone it is max_steps, up to rounding."""
    progress = config.progress(step, seconds)
    return step / progress if progress else config.max_steps or math.inf


def growing_batch_size(done: float, config: TrainConfig) -> int:
    """The sequences of a step: batch_size_start, doubled in equal times, batch_size from half of the run on.

    Small batches learn most in little time, larger ones find better weights in the end. done: the share of the run that is over.
    """
    start = config.batch_size_start or config.batch_size
    doublings = math.ceil(math.log2(config.batch_size / start))
    return min(config.batch_size, start * 2 ** int(2 * done * doublings))


def growing_window(done: float, config: TrainConfig, max_seq_len: int) -> int | None:
    """How many tokens back a token may look: from window_start on it grows evenly until half of the run. None is all."""
    if config.window_start is None or done >= 0.5:
        return None
    return config.window_start + int((max_seq_len - config.window_start) * 2 * done)
