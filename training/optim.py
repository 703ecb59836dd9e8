"""Optimizers, parameter groups, and weight EMA."""

import inspect
import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from config import ModelConfig, TrainConfig, init_parameters, name_and_options
from data.cache import say
from modules.explain import explain
from modules.registry import find_with_options


def build_optimizers(model: torch.nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Build the optimizer that config.optimizer names, of ours or of a plugin; one like Muon leaves some weights to AdamW.

    Each parameter group has its weight_decay, and lr_scale, which the learning rate of a step is multiplied by. Raises ValueError
    for an unknown name or option, and for what an optimizer does not accept.
    """
    return [build_optimizer(*part, config) for part in optimizer_parts(model, config)]


def optimizer_parts(model: torch.nn.Module, config: TrainConfig) -> list[tuple[type, list[dict], dict]]:
    """The class of each optimizer, its parameter groups, and its options."""
    fields = {"lr": "lr_max", "weight_decay": "weight_decay"}
    for option in fields.keys() & name_and_options(config.optimizer)[1]:
        raise ValueError(f"optimizer={config.optimizer!r}: parameter groups set {option}: give --train.{fields[option]} instead")
    model_config = getattr(model, "config", ModelConfig())
    optimizer, options = find_with_options(
        "OPTIMIZERS", config.optimizer, OPTIMIZERS, model_config, supplied=1, fixed=tuple(fields)
    )  # fmt: skip
    is_split = getattr(optimizer, "hidden_matrices_only", False)
    hidden, others = parameter_groups(model, config, is_split)
    if not is_split:
        return [(optimizer, others, options)]
    if not hidden:
        say(f"optimizer={config.optimizer!r}: the model has no hidden matrices, so AdamW trains all weights")
    parts = (optimizer, hidden, {"momentum": config.muon_momentum, **options}), (torch.optim.AdamW, others, {})
    return [part for part in parts if part[1]]


def build_optimizer(optimizer: type, groups: list[dict], options: dict, config: TrainConfig) -> torch.optim.Optimizer:
    """Build one optimizer; each argument of its __init__ comes from the options, or else from the config. `lr` is lr_max."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(
            f"optimizer={config.optimizer!r}: its step needs a closure that computes the loss again, but train.py calls step() "
            "once after each backward pass: take an optimizer whose step works without a closure"
        )
    fused = {"fused": True} if optimizer is torch.optim.AdamW else {}
    values = {**vars(config), "lr": config.lr_max, **fused, **options}
    _, *arguments = init_parameters(optimizer).values()
    for argument in arguments:
        if argument.name not in values and argument.default is argument.empty:
            cure = f"which is no field of the config: write {optimizer.__name__}({argument.name}=...)"
            raise ValueError(f"optimizer={config.optimizer!r} needs {argument.name!r}, {cure}")
    try:
        return optimizer(groups, **{argument.name: values[argument.name] for argument in arguments if argument.name in values})
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        raise ValueError(f"optimizer={config.optimizer!r} cannot be built: {explain(error)}") from error


def parameter_groups(model: torch.nn.Module, config: TrainConfig, is_split: bool) -> tuple[list[dict], list[dict]]:
    """Groups of weights with equal weight_decay and lr_scale: the hidden matrices if they are split off, and all others.

    Matrices get weight_decay, embeddings embedding_decay, norms and biases none. Hidden matrices are the weights of linear layers
    other than heads. A weight may say otherwise by its attributes decay, lr_scale and by_muon (CONTRIBUTING.md).
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    linears = hidden_linears(model)
    kinds = {kind: defaultdict(list) for kind in ("hidden", "vectors", "embeddings", "matrices")}
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim >= 2 and not name.endswith("bias")
        kind = "embeddings" if id(weight) in tables else "matrices" if is_matrix else "vectors"
        check_marks(name, weight)
        decay = getattr(weight, "decay", kind != "vectors")
        if isinstance(decay, bool):
            decay = decay * (config.embedding_decay if kind == "embeddings" else config.weight_decay)
        lr_scale = float(getattr(weight, "lr_scale", 1.0))
        if is_split and getattr(weight, "by_muon", kind == "matrices" and id(weight) in linears):
            kind, lr_scale = "hidden", lr_scale * config.muon_lr_scale
        kinds[kind][decay, lr_scale].append(weight)
    hidden, *others = (
        [{"params": weights, "weight_decay": decay, "lr_scale": scale} for (decay, scale), weights in groups.items()]
        for groups in kinds.values()
    )
    return hidden, list(itertools.chain(*others))


def hidden_linears(model: torch.nn.Module) -> set[int]:
    """The ids of the weights of all linear layers but the model's head and heads inside of blocks.

    A head inside of a block has vocab_size outputs, which marks it unless other layers of the config are just as wide.
    """
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    head, config = getattr(model, "head", None), getattr(model, "config", ModelConfig())
    values = config.block_values()
    widths = {values["dim"], values["mlp_dim"], *(values[heads] * values["head_dim"] for heads in ("num_heads", "num_kv_heads"))}
    outputs = {getattr(model, "vocab_size", None)} - widths
    return {id(layer.weight) for layer in linears if layer is not head and layer.out_features not in outputs}


def check_marks(name: str, weight: Tensor):
    """Raises ValueError for an impossible value of a weight's attribute decay, lr_scale or by_muon."""
    decay, lr_scale, by_muon = (getattr(weight, *mark) for mark in (("decay", True), ("lr_scale", 1.0), ("by_muon", False)))
    if not (isinstance(decay, int | float) and 0 <= decay < math.inf):
        raise ValueError(f"decay={decay!r} of the weight {name}: give False, True for the config's, or a number of at least 0")
    if not (isinstance(lr_scale, int | float) and 0 < lr_scale < math.inf):
        raise ValueError(f"lr_scale={lr_scale!r} of the weight {name}: give a positive number")
    if not isinstance(by_muon, bool):
        raise ValueError(f"by_muon={by_muon!r} of the weight {name}: give True or False")
    if by_muon and weight.ndim < 2:
        raise ValueError(f"by_muon=True of the weight {name}: it is no matrix, as its shape is {tuple(weight.shape)}")


def step_optimizers(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]):
    """Take a step with the gradients, between the `before_step` and the `after_step` of the model and blocks that have them."""
    modules = list(model.modules())
    call_all(modules, "before_step")
    for optimizer in optimizers:
        optimizer.step()
    call_all(modules, "after_step")
    for optimizer in optimizers:
        optimizer.zero_grad()


def call_all(modules: list[torch.nn.Module], method: str):
    """Call a method of every module that has it. hasattr(module, method) would be slow, as torch formats an error inside."""
    for module in modules:
        if hasattr(type(module), method) or method in vars(module):
            getattr(module, method)()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates (Jordan et al. 2024).

    torch.optim.Muon updates one matrix at a time, which costs a third of a step for small models and batches. Here matrices of
    equal shape are stacked. Updates have the RMS of AdamW's, so that both optimizers share a learning rate (Liu et al. 2025,
    arXiv 2502.16982, section 2.2).
    """

    hidden_matrices_only = True

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


OPTIMIZERS = {"AdamW": torch.optim.AdamW, "Muon": Muon}

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
