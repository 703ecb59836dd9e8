"""The registry: blocks and models by name, those of the base model, of modules/ and of plugins alike.

A plugin is any module with BLOCKS = {"MyBlock": MyBlock} or MODELS = {"MyModel": MyModel}, named in ModelConfig.plugins.

A model that differs from GPT in more than its blocks is a class in MODELS of a plugin, and config.model names it:

    Model(config: ModelConfig, vocab_size: int), a torch module with
    forward(tokens, targets=None, *, story_ids=None, window=None, cache=None) -> (logits, loss)

If its __init__ has an argument `blocks`, as GPT's, it is given all blocks by name. tokens and targets (B, T) are integers; a
target that is model.IGNORE is not scored. The softmax of logits (B, T, V) predicts the next token; evaluation and generation read
nothing else. loss is what training minimises, a mean over the targets, None without targets. While training with targets, logits
may be None.

Each of the keywords is optional. story_ids (B, T) number the stories of a row, which must not see each other: a model without
it trains with padded packing, or without mask_stories. window is how many recent tokens may be seen: without it there is no
window_start. cache, a model.Cache, lasts as long as a story is generated, and tokens are then only the new ones;
cache.blocks[self] is a dict for whatever the model keeps. Without a cache all tokens are read again for each new one. Optional
attributes, used if present: num_parameters(embeddings) -> int; an output matrix called head, which Muon leaves to AdamW; losses,
the terms of the last training loss by name, detached, "next_token" among them: the log has a column for each;
flops_per_token(T) -> float, where torch cannot count them (metrics/cost.py).

A model that does not write from left to right generates by a method of its own,

    write(prompts: list[list[int]], eos_id, max_new_tokens: list[int], sampling: Sampling, generators: list[torch.Generator])

an iterator that yields, at least once, a list with the next token of each prompt, None after its last one or at eos. Prompt i is
drawn with generators[i] alone. modules/canvas.py is a base class for such models.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, get_args

import torch
from torch import nn
from typeguard import TypeCheckError, check_type

import model
from config import ModelConfig, did_you_mean, format_step, init_parameters, layer_steps, look_up, marking, name_and_options
from modules import (
    attention,
    convolution,
    cross_attention,
    deltanet,
    depth,
    embeddings,
    griffin,
    latent_attention,
    linear_attention,
    mamba,
    mamba2,
    megalodon,
    moe,
    moving_average,
    norms,
    repeat,
    residual,
    sparse_attention,
    values,
)
from runs.moved import moved_to

FAMILIES = (
    model, norms, attention, latent_attention, sparse_attention, cross_attention, linear_attention, deltanet, griffin, mamba,
    mamba2, moving_average, megalodon, moe, residual, repeat, depth, values, convolution, embeddings,
)  # fmt: skip
BLOCKS: dict[str, type[nn.Module]] = {name: block for family in FAMILIES for name, block in family.BLOCKS.items()}
MODELS: dict[str, type[nn.Module]] = {"GPT": model.GPT}

# What a plugin may export, each a dict by name.
KINDS = {
    "BLOCKS": nn.Module, "MODELS": nn.Module, "OPTIMIZERS": torch.optim.Optimizer, "SCHEDULES": Callable, "LOSSES": Callable,
    "DATA": object,
}  # fmt: skip
DESCRIPTIONS = {
    "BLOCKS": "classes of torch modules", "MODELS": "classes of torch modules", "OPTIMIZERS": "classes of torch optimizers",
    "SCHEDULES": "functions", "LOSSES": "functions", "DATA": "classes",
}  # fmt: skip

# What a layer gives to a block whose forward names it; see GPT.forward, which makes them.
SUPPLIED = ("rope", "story_start", "window", "cache", "tokens", "targets", "memory", "shared")

FIT_ALL = {"num_kv_heads": 1, "head_dim": 2, "positions": "none"}  # values of config fields that go with any of the others


def all_blocks(config: ModelConfig) -> dict[str, type[nn.Module]]:
    """Every block that the layer string may name, plugins included; `Norm` is the config's norm.

    Raises ImportError for a plugin that cannot be imported, ValueError for one without BLOCKS or with a name that is taken.
    """
    blocks = with_plugins(config, BLOCKS, "BLOCKS")
    return {"Norm": blocks[config.norm], **blocks}


def with_plugins(config: ModelConfig, ours: dict[str, Any], kind: str) -> dict[str, Any]:
    """Ours of a kind, such as BLOCKS, and those of the plugins. Raises ValueError for a name that is taken."""
    merged, owners = dict(ours), dict.fromkeys(ours, "baseGPT")
    for plugin in config.plugins:
        for name, block in exported(plugin, kind).items():
            if merged.get(name, block) is not block or name == "Norm":
                owner = f"that of {owners[name]!r}" if name in owners else "the config's norm"
                what = f"a {kind.lower()[:-1]} {name!r}"
                raise ValueError(f"the plugin {plugin!r} calls {what}, but that name is taken: it is {owner}. Rename it")
            merged[name], owners[name] = block, plugin
    return merged


def exported(plugin: str, kind: str) -> dict[str, Any]:
    """What a plugin exports of a kind, by name. Raises ImportError, or ValueError if it is no dict of the right things."""
    module = import_plugin(plugin)
    if not any(hasattr(module, kind) for kind in KINDS):
        raise ValueError(f"the plugin {plugin!r} has no BLOCKS. Give it one, such as BLOCKS = {{'MyBlock': MyBlock}}")
    named = getattr(module, kind, {})
    if not isinstance(named, dict):
        raise ValueError(f"{kind} of the plugin {plugin!r} must be a dict, such as {kind} = {{'MyName': MyClass}}")
    for name, value in named.items():
        is_right = issubclass(value, KINDS[kind]) if isinstance(value, type) else KINDS[kind] is Callable and callable(value)
        if not is_right:
            raise ValueError(f"the plugin {plugin!r} calls {value!r} {name!r}: {kind} must name {DESCRIPTIONS[kind]}")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"the plugin {plugin!r} calls one of its {kind} {name!r}: take a name of letters, digits and _")
    return named


def import_plugin(plugin: str) -> ModuleType:
    """Import a plugin. Raises ImportError of one line with what is wrong in it, whatever that is."""
    try:
        return importlib.import_module(plugin)
    except (Exception, SystemExit) as error:  # a plugin is a reader's own code: anything may be wrong in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name == plugin.split(".")[0]:
            reason += f". Put {error.name}.py, or the folder, beside train.py or where you start it"
        raise ImportError(f"the plugin {plugin!r} cannot be imported: {reason}.{moved_to(error)}") from error


def find_block(name: str, config: ModelConfig) -> type[nn.Module]:
    """The class of the block of that name. Raises as all_blocks does, and ValueError with the nearest match."""
    return look_up("block", name, all_blocks(config))


def build_block(name: str, options: dict, config: ModelConfig, vocab_size: int) -> nn.Module:
    """Build one block by name. Raises ValueError as validate_step does."""
    blocks = all_blocks(config)
    validate_step(name, options, config, blocks)
    return model.build_block(name, options, config, blocks, vocab_size)


def build_branch(layer: str, config: ModelConfig, vocab_size: int) -> model.Branch:
    """Build the blocks of one layer string. Raises ValueError with the place of what is wrong in it."""
    blocks = all_blocks(config)
    validate_layer(layer, config, blocks)
    return model.Branch(layer, config, blocks, residual_scale=1.0, vocab_size=vocab_size)


def build_model(config: ModelConfig, vocab_size: int) -> nn.Module:
    """Build the model that config.model names; it has the attributes `config` and `vocab_size`.

    Raises ValueError with the place of what is wrong in a layer string, with the nearest match for an unknown name or option, and
    what the model itself raises.
    """
    name, options = name_and_options(config.model)
    model_class, given = look_up("model", name, with_plugins(config, MODELS, "MODELS")), dict(options)
    parameters = init_parameters(model_class)
    supplied = ("config", "vocab_size", "blocks")
    validate_options(name, options, {key: value for key, value in parameters.items() if key not in supplied}, config)
    if "blocks" in parameters:
        given["blocks"] = all_blocks(config)
        for layer in dict.fromkeys(config.layer_strings):
            validate_layer(layer, config, given["blocks"])
    built = model_class(config, vocab_size, **given)
    built.config, built.vocab_size = config, vocab_size
    return built


def accepted_kwargs(module: nn.Module, **kwargs) -> dict[str, Any]:
    """Keep only the keyword arguments that the module's forward names."""
    accepted = parameter_names(type(module).forward)
    return {name: value for name, value in kwargs.items() if name in accepted}


@cache
def parameter_names(function: Callable) -> frozenset[str]:
    """The names of a function's parameters, looked up once: training asks in every step."""
    return frozenset(inspect.signature(function).parameters)


def validate_layer(layer: str, config: ModelConfig, blocks: dict[str, type[nn.Module]]):
    """Raises ValueError with the place of the first step of a layer string, or of one in its brackets, that cannot be built."""
    for position, (name, options) in enumerate(layer_steps(layer)):
        if name not in "+|":
            with marking(layer, position):
                validate_step(name, options, config, blocks)
                if "layer" in options:
                    validate_layer(options["layer"], config, blocks)


def validate_step(name: str, options: dict, config: ModelConfig, blocks: dict[str, type[nn.Module]]):
    """Raises ValueError for an unknown name or option, a value that the config refuses, or an input that no layer supplies."""
    block, values = look_up("block", name, blocks), config.block_values(options)
    parameters, inputs = init_parameters(block), inspect.signature(block.forward).parameters
    if "layer" in options and "layer" not in parameters:
        raise ValueError(f"{name} does not hold a layer: write it without the brackets")
    if "layer" in parameters and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in inputs.values()):
        raise ValueError(f"the forward of {name} must take **inputs, and hand them on: self.layer(x, **inputs)")
    validate_options(name, {option: value for option, value in options.items() if option != "layer"}, parameters, config)
    if config.positions == "rope" and "rope" in inputs and values["head_dim"] != config.block_values()["head_dim"]:
        raise ValueError(f"{name}(head_dim=...) does not fit RoPE: set the config's head_dim instead")
    for argument, parameter in inputs.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and argument not in SUPPLIED:
            raise ValueError(f"the forward of {name} asks for {argument!r}, but a layer supplies only {', '.join(SUPPLIED)}")
    for argument, parameter in parameters.items():
        if argument not in {"vocab_size", *values} and parameter.default is parameter.empty:
            if argument == "layer":
                raise ValueError(f"{name} needs a layer in brackets: write {name}([Norm->MLP->+])")
            raise ValueError(f"{name} needs {argument!r}, which is no field of the config: write {name}({argument}=...)")


def validate_options(name: str, options: dict, parameters: dict[str, inspect.Parameter], config: ModelConfig):
    """Raises ValueError for an option that the block does not have, or with a value that it or the config would not take."""
    known = config.block_values()
    for option, value in options.items():
        if option not in parameters:
            there_are = ", ".join(parameters)
            raise ValueError(f"{name} has no option {option!r}.{did_you_mean(option, parameters)} There are: {there_are}")
        if option not in known and (annotation := parameters[option].annotation) is not inspect.Parameter.empty:
            try:
                is_switch = bool in (annotation, *get_args(annotation))
                if isinstance(value, bool) and not is_switch:  # which Python would take for 0 or 1
                    raise TypeCheckError("a switch is no number")
                check_type(value, annotation)
            except TypeCheckError as error:
                expected = annotation.__name__ if isinstance(annotation, type) else annotation
                raise ValueError(f"{format_step(name, {option: value})}: it must be {expected}") from error
    # the config knows what its own fields may be, and which go together; those that the block does not name do not matter
    unnamed = {name: value for name, value in FIT_ALL.items() if name not in parameters}
    replace(config, **unnamed | {option: value for option, value in options.items() if option in known})
