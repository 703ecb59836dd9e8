"""What a model costs: its parameters, and for each token its FLOPs and the bytes that its cache grows by.

    python -m evaluation cost 1m gemma2_like my_run    # presets and runs side by side
    python -m evaluation cost --blocks                # every block of the menu

FLOPs are those of matrix products and convolutions on the way forward, a multiply-add being two, as the mean over a sequence
of T tokens. Training takes three times as many, as the gradient of a product is two such products. Elementwise work (norms,
activations, softmax, sums) and tables are not counted, unless a block says what it takes.

Where a block has a method `flops_per_token(T)`, that is taken. It counts the pairs of tokens that see each other, so causal
attention has (T + 1) / 2 for a token. All other blocks are counted by torch while they read a sequence, with all the products
that torch does for them: attention that hides half of T² scores behind a mask would then be counted with all T².

Cache bytes are weighed: those of the tensors that a model keeps after T / 2 and after T tokens lie on a line. Its slope is the
bytes per token, where it begins are the fixed bytes of a state that does not grow.

B batch, T time, M tokens of memory, D model dim.
"""

import argparse
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fast
from config import ModelConfig, TrainConfig, did_you_mean, format_step, init_parameters, layer_steps
from model import GPT, Attention, Branch, Cache
from modules.contract import layers_to_try
from modules.registry import accepted_kwargs, all_blocks, build_model
from modules.windows import mean_visible
from runs.folder import Run, group_members, group_names, run_names
from runs.presets import PRESETS, preset
from tokenizer import load_tokenizer
from tools import LoggingModule

TRAINING = 3  # forward, and twice as much on the way back
QUANTITIES = {  # what they are called in tables
    "parameters": "parameters",
    "FLOPs per token": "flops",
    "cache bytes per token": "cache_per_token",
    "cache bytes fixed": "cache_fixed",
}


@dataclass(frozen=True)
class Part:
    """A block at its place in a model, or an embedding, a head, or what is left of the module around them."""

    place: str  # such as layers.0.branches.0.blocks.1
    step: str  # as the layer string has it, such as Attn(window=64); or the name it has in the model, such as head
    signs: tuple[str, ...]  # + and | that follow it in the layer string
    kind: str  # the class of a block, such as Attention; or that name
    settings: dict[str, Any]  # what a block asked the config for, and the options of its step
    shapes: dict[str, tuple[int, ...]]  # of its weights
    parameters: int  # those that no part before it has, too
    flops: float  # per token, forward
    cache_per_token: float  # bytes
    cache_fixed: float  # bytes that do not grow


@dataclass(frozen=True)
class Cost:
    """What a model costs when it reads T tokens."""

    T: int
    parts: tuple[Part, ...]

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def flops(self) -> float:
        """Per token, forward."""
        return sum(part.flops for part in self.parts)

    @property
    def training_flops(self) -> float:
        """Per token, forward and backward."""
        return TRAINING * self.flops

    @property
    def cache_per_token(self) -> float:
        """Bytes that each token adds to the cache."""
        return sum(part.cache_per_token for part in self.parts)

    @property
    def cache_fixed(self) -> float:
        """Bytes of the cache that do not grow."""
        return sum(part.cache_fixed for part in self.parts)

    @property
    def cache(self) -> float:
        """Bytes of the cache after T tokens."""
        return self.cache_fixed + self.T * self.cache_per_token

    def by_kind(self, quantity: str) -> dict[str, float]:
        """The sum of a number of the parts, such as "parameters", for each kind of them, in the order of the model."""
        sums: Counter[str] = Counter()
        for part in self.parts:
            sums[part.kind] += getattr(part, quantity)
        return dict(sums)


class Place(NamedTuple):
    """Where a part is, as Part says it; the module itself, whether there are parts inside it, and its weights without theirs."""

    place: str
    step: str
    signs: tuple[str, ...]
    options: dict[str, Any]
    module: nn.Module
    opened: bool
    weights: dict[str, nn.Parameter]


def model_cost(model: nn.Module, T: int | None = None) -> Cost:
    """The cost of a model that reads T tokens, by default as many as it can. It is run, and left as it was.

    Blocks that read a memory are given one of T tokens. What the model does beside its parts is a part of its own. A model
    without a cache, which reads all again for each token, keeps no bytes.
    """
    T = T or model.config.max_seq_len
    places = find_parts(model)
    device = next(model.parameters()).device
    tokens = torch.arange(T, device=device)[None] % model.vocab_size  # (1, T)
    needs = {}
    for place in places:
        if place.module is not model and accepted_kwargs(place.module, memory=None):
            needs["memory"] = torch.ones(1, T, getattr(place.module, "memory_dim", model.config.dim), device=device)
    with torch.no_grad(), as_torch_does_it(model):
        flops = count_flops(model, [place.module for place in places], tokens, needs)
        half, whole = weigh_cache(model, tokens, needs)
    counted: set[int] = set()
    parts = []
    for place, step, signs, options, module, opened, weights in places:
        new = {id(weight): weight.numel() for weight in weights.values() if id(weight) not in counted}
        counted |= new.keys()
        if not opened or weights or flops[module] or whole[module]:
            per_token = (whole[module] - half[module]) / (T - T // 2)
            is_block = isinstance(module, LoggingModule)
            wanted = init_parameters(type(module)) if is_block else ()
            parts.append(Part(
                place, step, signs, kind=type(module).__name__ if is_block else step,
                settings={name: value for name, value in model.config.block_values(options).items() if name in wanted},
                shapes={name: tuple(weight.shape) for name, weight in weights.items()}, parameters=sum(new.values()),
                flops=flops[module] / T, cache_per_token=per_token, cache_fixed=whole[module] - per_token * T,
            ))  # fmt: skip
    return Cost(T, tuple(parts))


def find_parts(model: nn.Module) -> list[Place]:
    """Every part, an outer one before those in it. A module with layer strings inside is opened, unless it tells its FLOPs."""
    places: dict[nn.Module, Place] = {}  # a module that stands in several places is one part

    def walk(module: nn.Module, place: str, step: str, signs: tuple[str, ...] = (), **options):
        if module in places:
            return
        opened = is_opened(module) or (module is model and not hasattr(model, "flops_per_token"))
        places[module] = Place(place, step, signs, options, module, opened, dict(module.named_parameters(recurse=not opened)))
        if not opened:
            return
        if isinstance(module, Branch):
            steps = zip(module.blocks, steps_with_signs(module.layer), strict=True)
            for number, (block, (name, options, signs)) in enumerate(steps):
                walk(block, f"{place}.blocks.{number}".lstrip("."), format_step(name, options), signs, **options)
        for name, child in module.named_children():
            if not (isinstance(module, Branch) and child is module.blocks):
                walk(child, f"{place}.{name}".lstrip("."), name)

    walk(model, "", type(model).__name__)
    return list(places.values())


def is_opened(module: nn.Module) -> bool:
    holds_others = isinstance(module, nn.ModuleList | nn.ModuleDict) or any(isinstance(m, Branch) for m in module.modules())
    return holds_others and not hasattr(module, "flops_per_token")


def steps_with_signs(layer: str) -> list[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """'Norm->Attn(window=64)->+'  becomes  [('Norm', {}, ()), ('Attn', {'window': 64}, ('+',))]"""
    steps: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
    for name, options in layer_steps(layer):
        if name not in "+|":
            steps.append((name, options, ()))
        elif steps:  # a | in front of all opens the skip that is open anyway
            block, given, signs = steps[-1]
            steps[-1] = block, given, (*signs, name)
    return steps


@contextmanager
def as_torch_does_it(model: nn.Module):
    """In eval, with formulas of torch that its counter sees, in place of fused kernels."""
    was_training = model.training
    fuses_recurrence, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
    try:
        with fast.undone(model), sdpa_kernel(SDPBackend.MATH):
            yield model.eval()
    finally:
        torch.backends.mkldnn.enabled = fuses_recurrence
        model.train(was_training)


def count_flops(model: nn.Module, parts: list[nn.Module], tokens: Tensor, needs: dict[str, Tensor]) -> dict[nn.Module, float]:
    """FLOPs of each part for all tokens (B, T), without those of the parts inside it: what it says of itself, or as counted."""
    flops = dict.fromkeys(parts, 0.0)
    under_way = []  # for each call of a part: what was counted when it began, and what the parts inside it took

    def before(module, inputs):
        under_way.append([counter.get_total_flops(), 0])

    def after(module, inputs, output):
        begin, inside = under_way.pop()
        taken = counter.get_total_flops() - begin
        if hasattr(module, "flops_per_token") or isinstance(module, Attention):
            B, T = inputs[0].shape[:2]
            per_token = module.flops_per_token if hasattr(module, "flops_per_token") else partial(attention_flops, module)
            flops[module] += B * T * per_token(T)
        else:
            flops[module] += taken - inside
        if under_way:
            under_way[-1][1] += taken

    hooks = [hook for part in parts for hook in (part.register_forward_pre_hook(before), part.register_forward_hook(after))]
    try:
        with FlopCounterMode(display=False) as counter:
            model(tokens, **needs)
    finally:
        for hook in hooks:
            hook.remove()
    return flops


def attention_flops(attention: Attention, T: int) -> float:
    """FLOPs per token: matrices, and the scores and weighted sums of the tokens that it sees.

    torch would count all T keys of each query; visible_per_token(T) of a block says how many there are, if not its window.
    """
    matrices = sum(layer.weight.numel() for layer in attention.modules() if isinstance(layer, nn.Linear))
    visible = mean_visible(T, attention.window)
    if hasattr(attention, "visible_per_token"):
        visible = attention.visible_per_token(T)
    return 2 * matrices + 4 * attention.num_heads * attention.head_dim * visible


def weigh_cache(model: nn.Module, tokens: Tensor, needs: dict[str, Tensor]) -> tuple[Counter, Counter]:
    """Bytes that each block keeps after half of the tokens (B, T), and after all of them; what no block keeps is the model's."""
    cache, weights = Cache(), [Counter(), Counter()]
    if not accepted_kwargs(model, cache=cache):
        return weights[0], weights[1]
    half = tokens.shape[1] // 2
    for piece in (tokens[:, :half], tokens[:, half:]):
        if piece.shape[1]:
            model(piece, cache=cache, **needs)
            seen: set[int] = set()
            weights.append(Counter({block: weigh(kept, seen) for block, kept in cache.blocks.items()}))
            weights[-1][model] += weigh(vars(cache), seen)
    return weights[-2], weights[-1]


def weigh(kept, seen: set[int]) -> int:
    """Bytes of the tensors in a value, in whatever it holds them, but not of those that were seen before."""
    if isinstance(kept, Tensor):
        is_new = id(kept) not in seen
        seen.add(id(kept))
        return kept.numel() * kept.element_size() * is_new
    if isinstance(kept, dict):
        return sum(weigh(value, seen) for value in kept.values())
    if isinstance(kept, list | tuple):
        return sum(weigh(value, seen) for value in kept)
    return weigh(vars(kept), seen) if hasattr(kept, "__dict__") and not isinstance(kept, nn.Module) else 0


def config_of(spec: str | ModelConfig) -> tuple[ModelConfig, int]:
    """The architecture that a run, a group of seeds, a preset or a config stands for, and the size of its vocabulary.

    A run goes before a preset of the same name; a config has the vocabulary of the default tokenizer. Raises ValueError for a
    name that is neither, and as Run does where a run is damaged.
    """
    if isinstance(spec, ModelConfig):
        return spec, load_tokenizer(TrainConfig().tokenizer).vocab_size
    if spec in {*run_names(), *group_names()}:
        run = Run(group_members(spec)[0])
        return run.model_config, run.load("model.pth", {"vocab_size"})["vocab_size"]
    if spec not in PRESETS and "/" not in spec:
        known = list(dict.fromkeys([*PRESETS, *run_names(), *group_names()]))
        raise ValueError(f"{spec!r} is neither a preset nor a run.{did_you_mean(spec, known)} There are: {', '.join(known)}")
    chosen = preset(spec)
    return chosen.model, load_tokenizer(chosen.train.tokenizer).vocab_size


def cost_of(spec: str | ModelConfig, T: int | None = None) -> Cost:
    """The cost of a run, a preset or a config that reads T tokens, by default as many as it can. Raises as config_of does."""
    config, vocab_size = config_of(spec)
    with torch.random.fork_rng(devices=[]):
        return model_cost(build_model(config, vocab_size), T)


def num_parameters(model, embeddings: bool = True) -> int:
    """Number of parameters, with or without embeddings and head; a model may count its own."""
    if hasattr(model, "num_parameters"):
        return model.num_parameters(embeddings)
    tables = [table for table in model.modules() if isinstance(table, nn.Embedding)]
    if isinstance(model, GPT):  # the tables of its blocks are theirs
        tables = [table for table in (model.embedding, model.position_embedding) if table is not None]
    excluded = {id(weight) for table in (*tables, getattr(model, "head", nn.Identity())) for weight in table.parameters()}
    return sum(weight.numel() for weight in model.parameters() if embeddings or id(weight) not in excluded)


def comparison(*specs: str, T: int | None = None):
    """A pandas DataFrame with a column for each run or preset: every cost, kind by kind and in all."""
    import pandas as pd

    costs = {spec: cost_of(spec, T) for spec in specs}
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


def block_costs(config: ModelConfig | None = None, T: int | None = None):
    """A pandas DataFrame with a row for each block of the menu: what one costs at the sizes of a config, or of the default."""
    import pandas as pd

    config, rows = config or ModelConfig(), {}
    for name, block in all_blocks(config).items():
        layer = layers_to_try(name, block)[0]
        part = block_cost(name, layer, config, T)
        rows[name] = {"in": layer} | {label: getattr(part, quantity) for label, quantity in QUANTITIES.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def block_cost(name: str, layer: str, config: ModelConfig, T: int | None = None) -> Part:
    """What the last block of that name in a layer string costs at the sizes of a config."""
    cost = cost_of(replace(config, num_layers=1, layers=layer), T)
    return [part for part in cost.parts if part.place.startswith("layers.") and part.step.split("(")[0] == name][-1]


def main(words: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m evaluation cost", description="What models and blocks cost: parameters, FLOPs and cache bytes per token."
    )
    parser.add_argument("specs", nargs="*", metavar="PRESET_OR_RUN", help="to set side by side")
    parser.add_argument("--blocks", action="store_true", help="every block of the menu, at the sizes of the default config")
    parser.add_argument("--T", type=int, help="tokens that are read; by default the context of the model")
    arguments = parser.parse_args(words)
    if not arguments.specs and not arguments.blocks:
        parser.error("name presets or runs, or take --blocks")
    if arguments.T is not None and arguments.T < 1:
        parser.error(f"--T {arguments.T}: give at least 1")
    if arguments.specs:
        print(comparison(*arguments.specs, T=arguments.T).to_string(float_format="{:,.0f}".format))
    if arguments.blocks:
        print(block_costs(T=arguments.T).to_string(float_format="{:,.0f}".format))
