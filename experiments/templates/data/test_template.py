"""What this experiment promises: its presets train on its rows, load and write, and go on where they were stopped."""

from dataclasses import replace

import pytest

from experiments.templates.data.config import PRESETS
from inference import generate, load_model


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_train_resume_and_load(name, make_config, corpus, train_in_parts):
    model_config, train_config = PRESETS[name]
    model_config = replace(model_config, max_seq_len=64)
    config = make_config(max_steps=4, data=train_config.data.replace("'tinystories'", repr(corpus)))
    whole, parts = train_in_parts(model_config, config, stop_at=2)
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[2:]]
    assert generate(*load_model("parts"), "Tom", max_new_tokens=5).startswith("Tom")
