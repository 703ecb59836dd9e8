"""Every block of the menu, for testing_modules.ipynb: what it is for, its shapes, what it remembers, what it costs.

B batch, T time, M tokens of memory, D model dim.
"""

import inspect
import io
import sys
from dataclasses import dataclass, replace
from html import escape

import torch
from torch import Tensor

from config import ModelConfig
from metrics.cost import Part, model_cost
from model import Cache
from modules.contract import layers_to_try
from modules.registry import all_blocks, build_model
from shapes.comments import tensors_in
from tools import show_shapes


@dataclass(frozen=True)
class Shown:
    """A block as it was seen in a layer."""

    name: str
    layer: str
    says: str  # the first line of its docstring
    shapes: str  # what show_shapes tells
    remembers: dict[str, tuple[int, ...]]  # the shapes of what it has in the cache
    part: Part  # its cost


def show_blocks(config: ModelConfig, tokens: Tensor, vocab_size: int):
    """Display every block of the menu in a notebook, family by family, reading the tokens (B, T) at the sizes of a config."""
    from IPython.display import HTML, Markdown, display

    for module, names in families(config).items():
        family = inspect.getdoc(sys.modules[module]).splitlines()[0]
        display(Markdown(f"### {module.replace('.', '/')}.py\n\n{family}"))
        for name in names:
            shown = watch(name, layers_to_try(name, all_blocks(config)[name])[0], config, tokens, vocab_size)
            display(Markdown(f"#### {name}\n\n{shown.says}"), HTML(as_html(shown)))


def families(config: ModelConfig) -> dict[str, list[str]]:
    """The names of the blocks in the menu, by the Python module that they come from. `Norm` is another name, and no block."""
    found: dict[str, list[str]] = {}
    for name, block in all_blocks(config).items():
        if name != "Norm":
            found.setdefault(block.__module__, []).append(name)
    return found


def watch(name: str, layer: str, config: ModelConfig, tokens: Tensor, vocab_size: int) -> Shown:
    """What the last block of that name in a layer string does with tokens (B, T), and with a memory (B, M, D) if it reads one."""
    B, T = tokens.shape
    model = build_model(replace(config, layers=layer, num_layers=1), vocab_size).eval()
    cost = model_cost(model, T)
    part = [part for part in cost.parts if part.place.startswith("layers.") and part.step.split("(")[0] == name][-1]
    block, cache, page = model.get_submodule(part.place), Cache(), io.StringIO()
    memory = torch.randn(B, T + 1, getattr(block, "memory_dim", config.dim))  # (B, M, D)
    with torch.no_grad():
        with show_shapes(block, file=page):
            model(tokens, memory=memory)
        model(tokens, memory=memory, cache=cache)
    kept = dict(pair for key, value in cache.blocks.get(block, {}).items() for pair in tensors_in(key, value))
    says = inspect.getdoc(block).splitlines()[0]
    return Shown(name, layer, says, page.getvalue(), {key: tuple(value.shape) for key, value in kept.items()}, part)


def as_html(shown: Shown) -> str:
    """Cost and state in a line, and the shapes to unfold."""
    part = shown.part
    kept = ", ".join(f"<code>{escape(name)} {shape}</code>" for name, shape in shown.remembers.items())
    return (
        f"<p>In <code>{escape(shown.layer)}</code>: {part.parameters:,} parameters, {part.flops:,.0f} FLOPs per token. "
        f"In the cache: {kept or 'nothing'}.</p><details><summary>shapes</summary><pre>{escape(shown.shapes)}</pre></details>"
    )
