"""Optimizers, weight EMA, and schedules for learning rate, batch size and window."""

import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from config import TrainConfig
from model import GPT


def build_optimizers(model: GPT, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Build AdamW for all parameters, or Muon for the hidden matrices and AdamW for the others.

    Matrices get weight_decay, embeddings embedding_decay, norms and biases none. A group's learning rate is that of the step
    times its lr_scale. A block's `after_step` method, if it has one, is called after every step.
    """
    tables = {id(table.weight) for table in model.modules() if isinstance(table, torch.nn.Embedding)}
    matrices, embeddings, vectors = [], [], []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim >= 2 and not name.endswith("bias")
        (embeddings if id(weight) in tables else matrices if is_matrix else vectors).append(weight)
    groups = [
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
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
    """Nesterov momentum with orthogonalised updates (Jordan et al. 2024).

    torch.optim.Muon updates one matrix at a time, which costs a third of a step for small models and batches. Here matrices of
    equal shape are stacked. Updates have the RMS of AdamW's, so that both optimizers share a learning rate (Liu et al. 2025,
    arXiv 2502.16982, section 2.2).
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
            for (*_, rows, columns), weights in by_shape.items():  # a weight may be a stack of matrices
                gradients = [weight.grad for weight in weights]
                for weight in weights:
                    if "momentum" not in self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight)
                momenta = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov momentum
                updates = orthogonalise(torch.stack(ahead).view(-1, rows, columns)).view(len(weights), *weights[0].shape)
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, list(updates.unbind()), alpha=-group["lr"] * 0.2 * math.sqrt(max(rows, columns)))


# Polar Express (Amsel et al. 2025, arXiv 2505.16932, appendix): polynomials a x + b x^3 + c x^5 that drive singular values to 1.
# These are the last four of the paper's five, for singular values in [0.008, 1] instead of [0.001, 1].
POLYNOMIALS = (
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix U S V^T: singular values become 0.9 to 1.1, or less where they were tiny.

    (number, rows, columns) -> (number, rows, columns)
    """
    rows, columns = matrices.shape[1:]
    if rows > columns:
        return orthogonalise(matrices.mT).mT
    square = matrices @ matrices.mT  # (number, rows, rows)
    norm = square.norm(dim=(1, 2), keepdim=True).sqrt() * 1.02 + 1e-7  # sum(S^4)^(1/4), a tight upper bound of max(S)
    if columns < 2 * rows:
        x = matrices / norm
        for a, b, c in POLYNOMIALS:
            square = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x
    # Each step multiplies x by a polynomial of x x^T. For a long x it is cheaper to iterate on the small x x^T alone.
    square, product = square / norm.square(), None
    for a, b, c in POLYNOMIALS:
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # (number, rows, rows)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        square = factor @ square @ factor
    return product @ (matrices / norm)


def average_of_weights(model: torch.nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights, with warm-up.

    The noise that it averages out falls with the learning rate, so the decay is lowered with the attribute `lr_fraction`, the
    learning rate as a fraction of its maximum; at a learning rate of 0 the average equals the weights.
    """

    def blend(averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor):
        update_rate = max(1 - decay, 9 / (10 + num_averaged.item()))
        torch._foreach_lerp_(averaged, current, min(1.0, update_rate / max(average.lr_fraction, 1e-9)))

    average = AveragedModel(model, multi_avg_fn=blend, use_buffers=False)
    average.lr_fraction = 1.0
    return average


def scheduled_learning_rate(step: int, num_steps: float, config: TrainConfig) -> float:
    """Learning rate of a step (counted from 0) out of num_steps: warm-up, schedule with restarts, final steps at lr_min."""
    warmup = min(config.warmup_steps, num_steps / 2) if config.max_minutes else config.warmup_steps  # minutes may hold few steps
    if step < warmup:
        return config.lr_init + (config.lr_max - config.lr_init) * min(1.0, (step + 1) / warmup)
    if config.schedule == "constant":
        return config.lr_max
    if step >= num_steps - config.final_flat_steps:
        return config.lr_min
    done = (step - warmup) / (num_steps - config.final_flat_steps - warmup)

    lengths = [config.restart_mult**cycle for cycle in range(config.num_restarts + 1)]
    ends = [end / sum(lengths) for end in itertools.accumulate(lengths)]
    cycle = next((cycle for cycle, end in enumerate(ends) if done < end), config.num_restarts)
    start = ends[cycle - 1] if cycle else 0.0
    done = (done - start) / (ends[cycle] - start)

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
    """Batch size after a fraction `done` of the run: doubled at equal intervals from batch_size_start, batch_size from 0.5 on.

    Small batches make the fastest progress early, larger ones reach a lower loss in the end.
    """
    start = config.batch_size_start or config.batch_size
    doublings = math.ceil(math.log2(config.batch_size / start))
    return min(config.batch_size, start * 2 ** int(2 * done * doublings))


def growing_window(done: float, config: TrainConfig, max_seq_len: int) -> int | None:
    """Attention window after a fraction `done` of the run: grows linearly from window_start, None (unlimited) from 0.5 on."""
    if config.window_start is None or done >= 0.5:
        return None
    return config.window_start + int((max_seq_len - config.window_start) * 2 * done)
