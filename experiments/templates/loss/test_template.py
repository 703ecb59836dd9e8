"""What this experiment promises: its loss prefers the truth, and its presets train, load and write."""

from dataclasses import replace

import pytest
import torch

from experiments.templates.loss.config import PRESETS
from experiments.templates.loss.losses import LOSSES
from inference import generate, load_model
from train import train


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_lower_where_the_truth_is_more_likely(name):
    logits, targets = torch.zeros(3, 5), torch.tensor([4, 0, 2])
    better = logits.scatter(1, targets[:, None], 1.0)
    assert LOSSES[name](better, targets) < LOSSES[name](logits, targets)


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_load_and_write(name, make_config):
    model_config, train_config = PRESETS[name]
    list(train(replace(model_config, max_seq_len=64), make_config(max_steps=3, loss=train_config.loss), "quick"))
    assert generate(*load_model("quick"), "Tom", max_new_tokens=5).startswith("Tom")
