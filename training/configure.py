"""Apply the training options to a model: check that it supports them; the loss; activation checkpointing."""

from torch import nn
from torch.utils.checkpoint import checkpoint

from config import TrainConfig
from model import Layer
from modules.registry import takes
from training.losses import build_loss


class CheckpointedLayer(Layer):
    """A layer whose activations are recomputed in the backward pass (Chen et al. 2016, arXiv 1604.06174)."""

    def forward(self, x, *, shared, **inputs):
        if not self.training:
            return super().forward(x, shared=shared, **inputs)
        x, updated = checkpoint(self.run_on_copy, x, shared.copy(), use_reentrant=False, **inputs)
        shared.clear()  # a block may have removed something
        shared.update(updated)
        return x

    def run_on_copy(self, x, shared, **inputs):
        """Run on a copy of `shared`, so that the backward pass can run it again."""
        shared = {name: value.copy() if isinstance(value, list | dict) else value for name, value in shared.items()}
        return super().forward(x, shared=shared, **inputs), shared


def configure_for_training(model: nn.Module, config: TrainConfig):
    """Apply the loss and gradient_checkpointing. Raises ValueError for an option that the model does not support."""
    name = model.config.model
    if config.mask_stories and config.packing == "packed" and not takes(model, "story_ids"):
        raise ValueError(
            f"the model {name!r} does not accept story_ids, so the stories of a row would see each other: "
            "take --train.packing padded (one story a row) or --train.no_mask_stories (to allow it)"
        )
    if config.window_start is not None and not takes(model, "window"):
        raise ValueError(f"window_start={config.window_start}: the model {name!r} does not accept a window: leave it out")
    loss = build_loss(config, model)
    if loss is not None:
        if not hasattr(model, "own_loss"):
            raise ValueError(f"loss={config.loss!r}: the model {name!r} computes its loss itself: leave --train.loss out")
        model.own_loss = loss
    if config.gradient_checkpointing:
        layers = [module for module in model.modules() if type(module) in (Layer, CheckpointedLayer)]
        if not layers:
            raise ValueError(f"gradient_checkpointing=True: the model {name!r} has no layer strings: leave it out")
        for layer in layers:
            layer.__class__ = CheckpointedLayer
