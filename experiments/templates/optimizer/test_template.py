"""What this experiment promises: its optimizer minimises, and its presets train, load and resume."""

from dataclasses import replace

import pytest
import torch

from experiments.templates.optimizer.config import PRESETS
from experiments.templates.optimizer.optimizers import OPTIMIZERS
from inference import generate, load_model


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_minimises(name):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([weight], lr=0.05, weight_decay=0.0)
    for _ in range(50):
        weight.grad = 2 * weight.detach()  # of the sum of squares
        optimizer.step()
    assert weight.square().sum() < 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_resume_and_load(name, make_config, train_in_parts):
    model_config, train_config = PRESETS[name]
    model_config = replace(model_config, max_seq_len=64)
    config = make_config(max_steps=4, optimizer=train_config.optimizer, lr_max=train_config.lr_max)
    whole, parts = train_in_parts(model_config, config, stop_at=2)
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[2:]]
    assert generate(*load_model("parts"), "Tom", max_new_tokens=5).startswith("Tom")
