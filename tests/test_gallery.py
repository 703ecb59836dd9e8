"""Promises of gallery.py: every block of the menu is shown, with its shapes, its state and its cost."""

import html
from dataclasses import replace

import pytest
import torch

from config import ModelConfig
from metrics.cost import model_cost
from metrics.gallery import as_html, families, run_block, show_blocks
from modules.registry import all_blocks, build_model

TOY = ModelConfig(dim=16, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=32, max_seq_len=7)
TOKENS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))


def test_every_block_is_in_one_family():
    found = families(TOY)
    assert sorted(name for names in found.values() for name in names) == sorted(all_blocks(TOY).keys() - {"Norm"})
    assert found["model"] == ["Attn", "MLP", "RMSNorm", "LayerNorm"] and found["modules.norms"] == ["CosineNorm", "DynamicTanh"]
    assert all(all_blocks(TOY)[name].__module__ == module for module, names in found.items() for name in names)


def test_every_block_is_displayed_or_says_why_not(monkeypatch):
    shown, config = [], replace(TOY, plugins=("picky_blocks",))
    monkeypatch.setattr("IPython.display.display", lambda *parts, raw: shown.extend(next(iter(part.values())) for part in parts))
    show_blocks(config, TOKENS, vocab_size=11)
    headings = [text.splitlines()[0] for text in shown if text.startswith("#")]
    assert "`layers='»Picky«': dim=16: Picky needs 640`" in shown[-1]
    expected = []
    for module, names in families(config).items():
        expected += [f"### {module.replace('.', '/')}.py", *(f"#### {name}" for name in names)]
    assert headings == expected
    for name, block in all_blocks(TOY).items():
        if name != "Norm":
            text = shown[shown.index(next(text for text in shown if text.startswith(f"#### {name}\n"))) + 1]
            assert block.__name__ in text and "(3, 5, 16) → (3, 5, 16)" in html.unescape(text) and "✗" not in text


def test_a_plugin_shows_by_itself():
    config = ModelConfig(dim=16, num_heads=2, plugins=("experiments.example.blocks",), max_seq_len=7)
    assert "experiments.example.blocks" in families(config)


def test_a_call_is_shown_with_its_inside_once():
    visited = set()
    first, second = (run_block(name, name, TOY, TOKENS, vocab_size=11, visited=visited).shapes for name in ("Attn", "ValueAttn"))
    assert "x1, x2 = x.chunk" in first and "as above" not in first
    assert "x1, x2 = x.chunk" not in second and "as above" in second


@pytest.mark.parametrize(
    "name, layer, remembers",
    [
        ("Attn", "Norm->Attn->+", {"k": (3, 2, 5, 4), "v": (3, 2, 5, 4)}),
        ("ShortConv", "ShortConv(width=4)", {"past": (3, 3, 16)}),
        ("MLP", "MLP", {}),
    ],
)
def test_state_and_cost(name, layer, remembers):
    shown = run_block(name, layer, TOY, TOKENS, vocab_size=11, visited=set())
    assert shown.cache == remembers and shown.layer == layer
    config = ModelConfig(dim=16, num_layers=1, layers=layer, num_heads=8, num_kv_heads=2, head_dim=4, mlp_dim=32, max_seq_len=5)
    kind = all_blocks(TOY)[name].__name__
    assert shown.part.flops == model_cost(build_model(config, 11)).by_kind("flops")[kind]
    told = as_html(shown)
    assert f"{shown.part.parameters:,} parameters" in told and ("nothing" in told) == (not remembers)
