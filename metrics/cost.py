"""The cost of a model: parameters, FLOPs per token, and cache bytes per token.

    python -m evaluation cost 1m gemma2_like my_run    # presets and runs side by side
    python -m evaluation cost 1m "Norm->MyAttn->+->Norm->MLP->+" --plugins my_blocks    # layer strings, at the size of 1m
    python -m evaluation cost --blocks                # every block of the registry

FLOPs are those of matrix products and convolutions in the forward pass (a multiply-add is two), per token, as the mean over a
sequence of T tokens. Training takes three times those of its forward pass: the gradient of a product is two products of the same
size. As a model may do more or less in training, such as predict further tokens or skip layers, that forward pass is in training,
with targets, and the mean of several if it draws random numbers. Elementwise operations (norms, activations, softmax, sums) and
table look-ups are not counted.

Attention is counted by its visible pairs, (T + 1) / 2 per token if causal. A block may count itself by a method
`flops_per_token(T)`. For all other blocks torch counts the products of a forward pass; masked products count in full.

Cache bytes are measured after T / 2 and after T tokens: the slope of the line through both is the bytes per token, its intercept
the fixed bytes of a state that does not grow.

B batch, T time, M tokens of memory, D model dim.
"""

import copy
import re
from collections import Counter
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import ModelConfig, TrainConfig, did_you_mean, format_step, init_parameters, layer_steps
from metrics.counting import as_torch_does_it, cache_bytes, count_flops
from model import GPT, Branch
from modules.contract import layers_to_try
from modules.explain import explain
from modules.registry import all_blocks, build_model, takes
from runs.command_line import read_layers
from runs.folder import Run, group_members, group_names, run_names
from runs.presets import PRESETS, preset
from runs.tables import FrameTable, show
from tokenizer import load_tokenizer
from tools import LoggingModule

TRAINING = 3  # forward, plus a backward pass of twice the FLOPs
FEWEST_DRAWS, MOST_DRAWS = 8, 32  # forward passes in training to average over if they draw random numbers; fewest: all equal
QUANTITIES = {  # heading in tables: field of Part
    "parameters": "parameters",
    "FLOPs per token": "flops",
    "cache bytes per token": "cache_per_token",
    "cache bytes fixed": "cache_fixed",
}


@dataclass(frozen=True)
class Part:
    """The cost of one block, embedding or head, or of the remainder of a module outside its parts."""

    place: str  # path in the model, such as layers.0.branches.0.blocks.1
    step: str  # of the layer string, such as Attn(window=64) or 3 x […]; or the attribute name, such as head
    signs: tuple[str, ...]  # + and | that follow it in the layer string
    kind: str  # class of a block, such as Attention; or the attribute name
    settings: dict[str, Any]  # config values and options of a block
    shapes: dict[str, tuple[int, ...]]  # of its weights
    parameters: int  # without weights shared with an earlier part
    flops: float  # per token, forward
    cache_per_token: float  # bytes
    cache_fixed: float  # bytes, independent of T


@dataclass(frozen=True)
class Cost:
    """The cost of a model that reads T tokens."""

    T: int
    parts: tuple[Part, ...]
    training_forward: float  # FLOPs per token of a forward pass in training

    def total(self, quantity: str) -> float:
        """Sum a quantity of the parts, such as "parameters"."""
        return sum(getattr(part, quantity) for part in self.parts)

    parameters = property(lambda self: self.total("parameters"))
    flops = property(lambda self: self.total("flops"))  # per token, forward
    training_flops = property(lambda self: TRAINING * self.training_forward)  # per token, forward and backward
    cache_per_token = property(lambda self: self.total("cache_per_token"))  # bytes
    cache_fixed = property(lambda self: self.total("cache_fixed"))  # bytes, independent of T

    @property
    def cache(self) -> float:
        """Bytes of the cache after T tokens."""
        return self.cache_fixed + self.T * self.cache_per_token

    def by_kind(self, quantity: str) -> dict[str, float]:
        """Sum a quantity of the parts, such as "parameters", by kind, in the order of the model."""
        sums: Counter[str] = Counter()
        for part in self.parts:
            sums[part.kind] += getattr(part, quantity)
        return dict(sums)


class Position(NamedTuple):
    """Where a part is (see Part), its module, whether that contains other parts, and its weights outside of those."""

    place: str
    step: str
    signs: tuple[str, ...]
    options: dict[str, Any]
    module: nn.Module
    has_parts: bool
    weights: dict[str, nn.Parameter]


def model_cost(model: nn.Module, T: int | None = None) -> Cost:
    """Measure the cost of a model by running it on T tokens, by default the context length. The model stays as it is.

    Blocks with a memory get one of T tokens. A model without a cache, which reads everything again for each token, has no cache
    bytes.
    """
    T = T or model.config.max_seq_len
    positions = find_parts(model)
    device = next(model.parameters()).device
    tokens = torch.arange(T, device=device)[None] % model.vocab_size  # (1, T)
    kwargs = {}
    for position in positions:
        if position.module is not model and takes(position.module, "memory"):
            kwargs["memory"] = torch.ones(1, T, getattr(position.module, "memory_dim", model.config.dim), device=device)
    with torch.no_grad(), as_torch_does_it(model):
        flops = count_flops(model, [position.module for position in positions], tokens, kwargs)
        half, whole = cache_bytes(model, tokens, kwargs)
    counted: set[int] = set()
    parts = []
    for place, step, signs, options, module, has_parts, weights in positions:
        new = {id(weight): weight.numel() for weight in weights.values() if id(weight) not in counted}
        counted |= new.keys()
        if not has_parts or signs or "layer" in options or weights or flops[module] or whole[module]:
            per_token = (whole[module] - half[module]) / (T - T // 2)
            is_block = isinstance(module, LoggingModule)
            names = init_parameters(type(module)).keys() - {"layer"} if is_block else ()
            parts.append(Part(
                place, step, signs, kind=type(module).__name__ if is_block else step,
                settings={name: value for name, value in model.config.block_values(options).items() if name in names},
                shapes={name: tuple(weight.shape) for name, weight in weights.items()}, parameters=sum(new.values()),
                flops=flops[module] / T, cache_per_token=per_token, cache_fixed=whole[module] - per_token * T,
            ))  # fmt: skip
    return Cost(T, tuple(parts), training_forward(model, positions, tokens, kwargs))


def training_forward(model: nn.Module, positions: list[Position], tokens: Tensor, kwargs: dict[str, Tensor]) -> float:
    """FLOPs per token of a forward pass in training, of a copy of the model; the mean of several if they draw random numbers."""
    trial, totals = copy.deepcopy(model), []
    copies = dict(zip(model.modules(), trial.modules(), strict=True))
    parts = [copies[position.module] for position in positions]
    with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())), as_torch_does_it(trial):
        trial.train()
        torch.manual_seed(0)
        random_state = torch.get_rng_state()
        for draw in range(MOST_DRAWS):
            flops = count_flops(trial, parts, tokens, kwargs | {"targets": tokens})
            totals.append(sum(part / tokens.numel() for part in flops.values()))
            is_random = not torch.equal(random_state, torch.get_rng_state())
            if not is_random or (draw + 1 == FEWEST_DRAWS and len(set(totals)) == 1):
                break
    return fmean(totals)


def find_parts(model: nn.Module) -> list[Position]:
    """List all parts, outer before inner ones. Modules with layer strings inside are split, unless they count their FLOPs."""
    positions: dict[nn.Module, Position] = {}  # a module that is used in several positions is one part

    def walk(module: nn.Module, place: str, step: str, signs: tuple[str, ...] = (), **options):
        if module in positions:
            return
        split = contains_parts(module) or (module is model and not hasattr(model, "flops_per_token"))
        positions[module] = Position(place, step, signs, options, module, split, dict(module.named_parameters(recurse=not split)))
        if not split:
            return
        if isinstance(module, Branch):
            steps = zip(module.blocks, steps_with_signs(module.layer), strict=True)
            for number, (block, (name, options, signs)) in enumerate(steps):
                short = options | {"layer": "…"} if "layer" in options else options  # the layer in brackets is split, too
                walk(block, f"{place}.blocks.{number}".lstrip("."), format_step(name, short), signs, **options)
        for name, child in module.named_children():
            if not (isinstance(module, Branch) and child is module.blocks):
                walk(child, f"{place}.{name}".lstrip("."), name)

    walk(model, "", type(model).__name__)
    return list(positions.values())


def contains_parts(module: nn.Module) -> bool:
    is_container = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(isinstance(m, Branch) for m in module.modules())
    return is_container and not hasattr(module, "flops_per_token")


def steps_with_signs(layer: str) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """Parse 'Norm->Attn(window=64)->+' into [('Norm', {}, ()), ('Attn', {'window': 64}, ('+',))]."""
    steps: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
    for name, options in layer_steps(layer):
        if name not in "+|":
            steps.append((name, options, ()))
        elif steps:  # a leading | opens the skip that is open anyway
            block, block_options, signs = steps[-1]
            steps[-1] = block, block_options, (*signs, name)
    return steps


def config_of(
    spec: str | ModelConfig, plugins: tuple[str, ...] = (), sizes: str | ModelConfig | None = None
) -> tuple[ModelConfig, int]:
    """The architecture and vocabulary size of a run, a group of seeds, a preset, a config or a layer string.

    A run takes precedence over a preset of the same name; a config gets the vocabulary of the default tokenizer. A layer string
    gets all else from `sizes`, by default from the default config, and about as many layers. The plugins are added. Raises
    ValueError for an unknown name, and what Run raises for a damaged run.
    """
    config, vocab_size = named_config((sizes or ModelConfig()) if is_layer_string(spec) else spec)
    if is_layer_string(spec):
        layers = read_layers(spec)
        tile = len(layers) if isinstance(layers, tuple) else 1
        config = replace(config, layers=layers, num_layers=tile * max(1, round(config.num_layers / tile)))
    return replace(config, plugins=tuple(dict.fromkeys((*config.plugins, *plugins)))), vocab_size


def is_layer_string(spec: str | ModelConfig) -> bool:
    """Whether it is a layer string, or a list or tuple of them, and not a name."""
    return isinstance(spec, str) and ("->" in spec or "[" in spec or spec[:1] == "(")


def named_config(spec: str | ModelConfig) -> tuple[ModelConfig, int]:
    if isinstance(spec, ModelConfig):
        return spec, load_tokenizer(TrainConfig().tokenizer).vocab_size
    if spec in {*run_names(), *group_names()}:
        run = Run(group_members(spec)[0])
        return run.model_config, run.load("model.pth", {"vocab_size"})["vocab_size"]
    if spec not in PRESETS and "/" not in spec:
        names = list(dict.fromkeys([*PRESETS, *run_names(), *group_names()]))
        raise ValueError(f"{spec!r} is neither a preset nor a run.{did_you_mean(spec, names)} There are: {', '.join(names)}")
    model_config, train_config = preset(spec)
    return model_config, load_tokenizer(train_config.tokenizer).vocab_size


def tokenizer_of(spec: str | ModelConfig) -> str:
    """The name of the tokenizer of a run, group of seeds or preset; the default one of a config."""
    if isinstance(spec, ModelConfig):
        return TrainConfig().tokenizer
    if spec in {*run_names(), *group_names()}:
        return Run(group_members(spec)[0]).train_config.tokenizer
    return preset(spec).train.tokenizer


def cost_of(
    spec: str | ModelConfig, T: int | None = None, plugins: tuple[str, ...] = (), sizes: str | ModelConfig | None = None
) -> Cost:
    """Measure the cost for T tokens of whatever config_of takes. Raises as config_of and model_cost do."""
    config, vocab_size = config_of(spec, plugins, sizes)
    tokenizer = tokenizer_of((sizes or ModelConfig()) if is_layer_string(spec) else spec)
    with torch.random.fork_rng(devices=[]):
        return model_cost(build_model(config, vocab_size, tokenizer), T)


def num_parameters(model, embeddings: bool = True) -> int:
    """Number of parameters, with or without embeddings and head; a model's own method num_parameters takes precedence."""
    if hasattr(model, "num_parameters"):
        return model.num_parameters(embeddings)
    tables = [table for table in model.modules() if isinstance(table, nn.Embedding)]
    if isinstance(model, GPT):  # tables inside of blocks are not embeddings
        tables = [table for table in (model.embedding, model.position_embedding) if table is not None]
    excluded = {id(weight) for table in (*tables, getattr(model, "head", nn.Identity())) for weight in table.parameters()}
    return sum(weight.numel() for weight in model.parameters() if embeddings or id(weight) not in excluded)


def cost_table(*specs: str, T: int | None = None, plugins: tuple[str, ...] = ()):
    """Tabulate the cost of runs, presets and layer strings by kind of part and in total: a DataFrame with a column for each."""
    import pandas as pd

    sizes = sizes_for(specs)
    costs = {spec: cost_of(spec, T, plugins=plugins, sizes=sizes) for spec in specs}
    rows: dict[tuple[str, str], list[float]] = {("context", "tokens"): [cost.T for cost in costs.values()]}
    for label, quantity in QUANTITIES.items():
        by_kind = [cost.by_kind(quantity) for cost in costs.values()]
        for kind in dict.fromkeys(kind for sums in by_kind for kind in sums if sums[kind]):
            rows[label, kind] = [sums.get(kind, 0) for sums in by_kind]
        rows[label, "all"] = [getattr(cost, quantity) for cost in costs.values()]
        if quantity == "flops":
            rows[label, "all, in training"] = [cost.training_flops for cost in costs.values()]
    rows["cache bytes", "after the context"] = [cost.cache for cost in costs.values()]
    return pd.DataFrame(rows.values(), columns=list(costs), index=pd.MultiIndex.from_tuples(rows))


def sizes_for(specs: tuple[str | ModelConfig, ...]) -> str | ModelConfig | None:
    """What layer strings among these take their sizes from: the first that is none, if there is one."""
    return next((spec for spec in specs if not is_layer_string(spec)), None)


def block_costs(config: ModelConfig | None = None, T: int | None = None):
    """Tabulate the cost of every block of the registry.

    Parameters
    ----------
    config : ModelConfig, optional
        Sizes, and plugins to include; the default config if left out.
    T : int, optional
        Number of tokens; by default the context length.

    Returns
    -------
    pandas.DataFrame
        A row per block: the layer string that it was measured in, parameters, FLOPs and cache bytes per token. A block that
        does not fit the sizes has the reason in place of its layer string.

    Examples
    --------
    >>> block_costs().loc["Attn", "parameters"]  # doctest: +SKIP
    """
    import pandas as pd

    config, rows = config or ModelConfig(), {}
    for name, block in all_blocks(config).items():
        try:
            layer = layers_to_try(name, block)[0]
            part = last_part(name, cost_of(replace(config, num_layers=1, layers=layer), T))
            rows[name] = {"in": layer} | {label: getattr(part, quantity) for label, quantity in QUANTITIES.items()}
        except Exception as error:  # a block of a plugin may raise anything
            rows[name] = {"in": explain(error)}
    return pd.DataFrame.from_dict(rows, orient="index")


def step_name(step: str) -> str:
    """The name of a step as in Part: "Attn" of "Attn(window=64)", "Repeat" of "3 x […]"."""
    return "Repeat" if re.match(r"\d+ x ", step) else step.split("(")[0]


def last_part(name: str, cost: Cost) -> Part:
    """The last part that is a block of that name, with the cost of all that is inside."""
    part = [part for part in cost.parts if part.place.startswith("layers.") and step_name(part.step) == name][-1]
    inside = [other for other in cost.parts if f"{other.place}.".startswith(f"{part.place}.")]
    return replace(part, **{name: sum(getattr(other, name) for other in inside) for name in QUANTITIES.values()})


def main(arguments):
    """Run the command `cost`."""
    if arguments.specs:
        show(FrameTable(cost_table(*arguments.specs, T=arguments.T, plugins=arguments.plugins), number=",.0f"))
    if arguments.blocks:
        show(FrameTable(block_costs(ModelConfig(plugins=arguments.plugins), arguments.T), number=",.0f"))
