"""A gallery of all blocks for testing_modules.ipynb: purpose, shapes, cache and cost of each.

B batch, T time, M tokens of memory, D model dim.
"""

import inspect
import sys
from dataclasses import dataclass, replace
from html import escape

import torch
from torch import Tensor, nn

from config import ModelConfig
from metrics.cost import Part, last_part, model_cost
from model import Cache
from modules.contract import layers_to_try
from modules.explain import explain
from modules.registry import all_blocks, build_model
from shapes.comments import tensors_in
from shapes.drawing import as_text
from shapes.recording import Recording
from shapes.tree import fold, without_repeats


@dataclass(frozen=True)
class Exhibit:
    """A block of the gallery, run inside a layer."""

    name: str
    layer: str
    summary: str  # first line of its docstring
    shapes: str  # of all tensors inside, as a tree
    cache: dict[str, tuple[int, ...]]  # shapes of its cache
    part: Part  # its cost


def show_blocks(config: ModelConfig, tokens: Tensor, vocab_size: int):
    """Display every block of the registry in a notebook, by family; one that does not fit the sizes, with the reason.

    Parameters
    ----------
    config : ModelConfig
        Sizes of the blocks, and plugins to include.
    tokens : Tensor, shape (B, T)
        Input to run them on.
    vocab_size : int
        Size of the vocabulary.

    Examples
    --------
    >>> show_blocks(ModelConfig(), torch.randint(100, (2, 16)), vocab_size=100)  # doctest: +SKIP
    """
    from IPython.display import display

    visited: set[tuple] = set()
    for module, names in families(config).items():
        family = inspect.getdoc(sys.modules[module]).splitlines()[0]
        display({"text/markdown": f"### {module.replace('.', '/')}.py\n\n{family}"}, raw=True)
        for name in names:
            try:
                layer = layers_to_try(name, all_blocks(config)[name])[0]
                exhibit = run_block(name, layer, config, tokens, vocab_size, visited)
            except Exception as error:  # a block of a plugin may raise anything
                display({"text/markdown": f"#### {name}\n\nIt cannot be shown at these sizes: `{explain(error)}`"}, raw=True)
                continue
            display({"text/markdown": f"#### {name}\n\n{exhibit.summary}"}, {"text/html": as_html(exhibit)}, raw=True)


def families(config: ModelConfig) -> dict[str, list[str]]:
    """Group the names of blocks by their Python module, without Norm, which is an alias."""
    names: dict[str, list[str]] = {}
    for name, block in all_blocks(config).items():
        if name != "Norm":
            names.setdefault(block.__module__, []).append(name)
    return names


def run_block(name: str, layer: str, config: ModelConfig, tokens: Tensor, vocab_size: int, visited: set[tuple]) -> Exhibit:
    """Run a layer on tokens (B, T) and a memory (B, M, D), and record the last block of that name.

    Calls that look like visited ones are shown without their inside.
    """
    B, T = tokens.shape
    model = build_model(replace(config, layers=layer, num_layers=1), vocab_size).eval()
    part = last_part(name, model_cost(model, T))
    block, cache = model.get_submodule(part.place), Cache()
    memory = torch.randn(B, T + 1, getattr(block, "memory_dim", config.dim))  # (B, M, D)
    with torch.no_grad():
        with Recording(block, values=False, tensors=False, lines=True) as recording:
            model(tokens, memory=memory)
        model(tokens, memory=memory, cache=cache)
    summary = inspect.getdoc(block).splitlines()[0]
    shapes = as_text(without_repeats(fold(recording.calls), visited), width=96)
    return Exhibit(name, layer, summary, shapes, cached_shapes(cache, block), part)


def cached_shapes(cache: Cache, block: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shapes of what a block, and each turn of the blocks inside it, has in a cache."""
    places, shapes = {module: place for place, module in block.named_modules()}, {}
    for (owner, turn), state in cache.blocks.items():
        if owner in places:
            inside = f"{places[owner]}, turn {turn}, " if places[owner] else ""
            for name, value in state.items():
                if isinstance(value, Cache):  # of a row of the batch
                    shapes |= {f"{inside}row {name}, {key}": shape for key, shape in cached_shapes(value, block).items()}
                else:
                    shapes |= {inside + key: tuple(tensor.shape) for key, tensor in tensors_in(name, value)}
    return shapes


def as_html(exhibit: Exhibit) -> str:
    """Render cost and cache in a line, and the shapes in a collapsible section."""
    part = exhibit.part
    cache = ", ".join(f"<code>{escape(name)} {shape}</code>" for name, shape in exhibit.cache.items())
    return (
        f"<p>In <code>{escape(exhibit.layer)}</code>: {part.parameters:,} parameters, {part.flops:,.0f} FLOPs per token. "
        f"In the cache: {cache or 'nothing'}.</p><details><summary>shapes</summary><pre>{escape(exhibit.shapes)}</pre></details>"
    )
