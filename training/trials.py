"""Try the optimizer and the loss of a plugin before training."""

import copy
import io

import torch
from torch import Tensor

from config import TrainConfig, name_and_options
from data.cache import say
from modules.explain import explain
from training.optim import OPTIMIZERS, build_optimizer, optimizer_parts
from training.plan import make_step


def try_loss(model: torch.nn.Module, config: TrainConfig):
    """Train a copy for a step if the loss is not the plain cross-entropy. Raises ValueError if the model does not minimise it."""
    if config.loss == "cross_entropy":
        return
    trial, name = copy.deepcopy(model).train(), model.config.model
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        make_step(trial, config, 1, next(trial.parameters()).device)("float32")
    if name_and_options(config.loss)[0] not in getattr(trial, "losses", {}):
        raise ValueError(f"loss={config.loss!r}: the model {name!r} computes its loss itself: leave --train.loss out")


def try_optimizers(model: torch.nn.Module, config: TrainConfig):
    """Take some steps with each optimizer that is not ours, on random weights and gradients of the model's shapes.

    Raises ValueError if it fails, changes no weight, or its state cannot be saved. Prints a line if it would not resume
    exactly, or does not follow the learning rate.
    """
    if name_and_options(config.optimizer)[0] in OPTIMIZERS:
        return
    parts = [part for part in optimizer_parts(model, config) if part[0] not in OPTIMIZERS.values()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for part in parts:
            try_optimizer(*part, config)


def try_optimizer(optimizer_class: type, groups: list[dict], options: dict, config: TrainConfig):
    name = f"optimizer={config.optimizer!r}"

    def build(weights: list[Tensor]) -> torch.optim.Optimizer:
        copies = iter(weights)
        stand_ins = [group | {"params": [torch.nn.Parameter(next(copies).clone()) for _ in group["params"]]} for group in groups]
        return build_optimizer(optimizer_class, stand_ins, options, config)

    # take some steps, and save the state before the last one
    optimizer = build([torch.randn_like(weight) for group in groups for weight in group["params"]])
    before = weights_of(optimizer)
    try:
        for seed in range(2):
            take_step(optimizer, config.lr_max, seed)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        resumed = build(weights_of(optimizer))
        take_step(optimizer, config.lr_max, seed=2)
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        raise ValueError(f"{name} fails in a step: {explain(error)}") from error
    after = weights_of(optimizer)
    if same(before, after):
        raise ValueError(f"{name}: its steps change no weight: change weights in place, as by weight.sub_(update)")

    # resume, and take the last step again
    load_state(resumed, file, name)
    take_step(resumed, config.lr_max, seed=2)
    again = weights_of(resumed)
    if not same(after, again):
        say(f"warning: {name} would not resume exactly: keep all that lasts from step to step in self.state[weight] "
            "or in the parameter groups")  # fmt: skip

    # a learning rate of 0; weights without a gradient, as those of a layer that is left out
    take_step(resumed, 0.0, seed=3)
    if not same(again, weights_of(resumed)):
        say(f'warning: {name} changes weights at a learning rate of 0: without group["lr"] the schedule has no effect')
    resumed.zero_grad()
    try:
        resumed.step()
    except Exception as error:
        raise ValueError(f"{name} fails for a weight without a gradient, so skip it if grad is None: {explain(error)}") from error


def load_state(optimizer: torch.optim.Optimizer, file: io.BytesIO, name: str):
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:  # torch.load raises many types
        raise ValueError(f"{name}: its state cannot be loaded again: keep only tensors and numbers in self.state") from error
    optimizer.load_state_dict(state)


def take_step(optimizer: torch.optim.Optimizer, learning_rate: float, seed: int):
    """Take a step as train.py does, with random gradients."""
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
        for weight in group["params"]:
            weight.grad = torch.randn_like(weight)
    optimizer.step()


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]]


def same(weights: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, weights, others))
