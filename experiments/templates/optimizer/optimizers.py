"""Say here what the optimizer does, and name the paper."""

import torch


class Template(torch.optim.Optimizer):
    """Gradient descent with momentum and decoupled weight decay: put your idea in its place.

    lr and weight_decay are those of TrainConfig; the learning rate follows the schedule.
    """

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                average = self.state[weight].setdefault("average", torch.zeros_like(weight))
                average.mul_(group["momentum"]).add_(weight.grad)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(average, alpha=group["lr"])


OPTIMIZERS = {"Template": Template}
