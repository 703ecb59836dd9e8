"""Promises of docs/recipes.md: each idea trains, resumes bit for bit, writes, is scored, compared, priced and shown."""

import importlib
import io
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evaluation.comparison import compare
from inference import generate, load_model
from metrics.cost import cost_of
from metrics.story_losses import save_losses
from modules.contract import CONFIG, check_block
from runs.command_line import parse
from tools import show_shapes

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
RECIPE = r"```python\n# (\w+)\.py\n(.*?)```\n\n```bash\npython train\.py (.*?)\n```"
RECIPES = {name: (code, command) for name, code, command in re.findall(RECIPE, PAGE.read_text(encoding="utf-8"), re.DOTALL)}


@pytest.fixture
def recipe(request, folders, monkeypatch, corpus):
    """The module of a recipe, and the configs of its command at a tiny size."""
    name = request.param
    code, command = RECIPES[name]
    monkeypatch.syspath_prepend(str(folders))
    (folders / f"{name}.py").write_text(code, encoding="utf-8")
    arguments = parse(shlex.split(command.replace("\\\n", "")))
    tile = arguments.model.layers
    model_config = replace(
        arguments.model, dim=16, num_heads=2, num_kv_heads=1, mlp_dim=16, max_seq_len=48,
        num_layers=len(tile) if isinstance(tile, tuple) else 1,
    )  # fmt: skip
    own_tokenizer = ":" in arguments.train.tokenizer
    config = replace(
        arguments.train, data=corpus, batch_size=4, max_steps=4, max_minutes=None, eval_every=4, eval_stories=200,
        checkpoint_every=2, warmup_steps=min(2, arguments.train.warmup_steps),
        tokenizer=arguments.train.tokenizer if own_tokenizer else "bpe_tokenizer_128",
    )  # fmt: skip
    yield importlib.import_module(name), model_config, config
    sys.modules.pop(name)


@pytest.mark.parametrize("recipe", RECIPES, indirect=True)
def test_a_recipe_does_all_that_the_base_model_does(recipe, make_run, tiny_run, train_in_parts, capsys):
    module, model_config, config = recipe
    for name in getattr(module, "BLOCKS", {}):
        check_block(name, replace(CONFIG, plugins=(module.__name__,)))

    whole, parts = train_in_parts(model_config, config, stop_at=2, name="idea")
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[2:]]
    assert "warning" not in capsys.readouterr().err

    save_losses("idea")
    assert "idea" in str(compare(tiny_run, "idea"))
    assert cost_of("idea").flops > 0
    model, tokenizer = load_model("idea")
    with show_shapes(model, file=io.StringIO()) as calls:
        model(torch.arange(8)[None])
    assert calls[0].children

    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    prompts = ["Tom", "Lily had a red"]
    stories = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0)
    assert stories == generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, use_cache=False)
