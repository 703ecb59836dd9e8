"""Losses that training can minimise instead of the mean cross-entropy.  B batch, T time, N targets, V vocabulary."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, TrainConfig, name_and_options
from modules.explain import explain
from modules.registry import find_with_options


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


# From logits (N, V) and targets (N), those that count, to one number, a mean over the targets. More arguments are options.
LOSSES: dict[str, Callable] = {"cross_entropy": cross_entropy}


def build_loss(config: TrainConfig, model: nn.Module) -> Callable[[Tensor, Tensor], tuple[str, Tensor]] | None:
    """The loss that config.loss names, from logits (B, T, V) and targets (B, T) to its name and value; None for cross_entropy.

    Raises ValueError for an unknown name or option, and if its value is not one finite number with a gradient, or is a sum.
    """
    if config.loss == "cross_entropy":
        return None
    function, options = find_with_options("LOSSES", config.loss, LOSSES, model.config, supplied=2)
    name, _ = name_and_options(config.loss)

    def loss(logits: Tensor, targets: Tensor) -> tuple[str, Tensor]:
        is_target = targets != IGNORE
        return name, function(logits[is_target], targets[is_target], **options)

    with torch.random.fork_rng(devices=[]):
        check_loss(lambda *inputs: loss(*inputs)[1], f"loss={config.loss!r}", model)
    return loss


def check_loss(loss: Callable[[Tensor, Tensor], Tensor], name: str, model: nn.Module):
    """Try a loss on random logits. Raises ValueError of one line with what is wrong."""
    torch.manual_seed(0)
    logits = torch.randn(1, 8, model.vocab_size, device=next(model.parameters()).device, requires_grad=True)
    targets = torch.arange(8, device=logits.device)[None] % model.vocab_size
    try:
        value = loss(logits, targets)
        twice = loss(logits.repeat(2, 1, 1), targets.repeat(2, 1))
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        raise ValueError(f"{name} fails: {explain(error)}") from error
    if not isinstance(value, Tensor) or value.ndim:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} returns {what}: return a tensor with one number, such as the mean over the targets")
    if not value.isfinite():
        raise ValueError(f"{name} returns {value.item()} for random logits: it must be finite")
    if not value.requires_grad:
        raise ValueError(f"{name} has no gradient: compute it from the logits, without .item() and .detach()")
    if value and abs(twice / value - 2) < 1e-3:
        raise ValueError(f"{name} is a sum, twice as large for twice the targets: return the mean over the targets")


def loss_terms(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The terms of the last training loss by name, "next_token" among them; a model without `losses` has only that one.

    Raises ValueError if the model's `losses` lack it.
    """
    terms = getattr(model, "losses", None) or {"next_token": loss}
    if "next_token" not in terms:
        raise ValueError(f"the losses of the model {model.config.model!r} lack 'next_token', the cross-entropy: set it in losses")
    return terms
