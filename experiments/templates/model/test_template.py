"""What this experiment promises: its presets train, load and write, and go on where they were stopped."""

from dataclasses import replace

import pytest

from experiments.templates.model.config import PRESETS
from inference import generate, load_model
from train import train


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_load_and_write(name, make_config):
    model_config = replace(PRESETS[name].model, max_seq_len=64)
    list(train(model_config, make_config(max_steps=3), "quick"))
    model, tokenizer = load_model("quick")
    story = generate(model, tokenizer, "Tom", max_new_tokens=5)
    assert story == generate(model, tokenizer, "Tom", max_new_tokens=5, use_cache=False)


def test_a_stopped_run_goes_on_as_if_it_had_not_been(make_config, train_in_parts):
    model_config, config = replace(PRESETS["template"].model, max_seq_len=64), make_config(max_steps=4)
    whole, parts = train_in_parts(model_config, config, stop_at=2)
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[2:]]
