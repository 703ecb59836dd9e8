"""The menu of blocks and models: the base model's, those of modules/ and the plugins' alike, and how one is made by name.

A model that differs from GPT in more than its blocks is a class in MODELS of a plugin, and config.model names it:

    Model(config: ModelConfig, vocab_size: int), a torch module with
    forward(tokens, targets=None, *, story_ids=None, window=None, cache=None) -> (logits, loss)

tokens and targets (B, T) are integers; a target that is losses.IGNORE is not scored. The softmax of logits (B, T, V) is what may
come after each token: evaluation and generation see nothing else. loss is what training minimises, a mean over the targets; None
where there are none. While training with targets, logits may be None.

Each of the keywords may be missing. story_ids (B, T) number the stories of a row, which shall not see each other: a model
without them trains with padded packing, or without mask_stories. window is how many tokens back one may look: without it there
is no window_start. cache, a model.Cache, lasts as long as a story is written, and the tokens are then the new ones alone;
cache.blocks[self] is a dict, empty at first, for what is to be remembered. Without a cache all is read again for each token.
More is not asked for, but heeded: a method num_parameters(embeddings) -> int; a last matrix called head, which is not for Muon;
a method flops_per_token(T) -> float, where torch cannot count them (cost.py).
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any, get_args

from torch import nn
from typeguard import TypeCheckError, check_type

from config import ModelConfig, TrainConfig, did_you_mean

# What a layer can give to a block whose forward asks for it by name: see GPT.forward, which makes them.
SUPPLIED = ("rope", "first", "cache", "tokens", "memory", "shared")


def block_menu(config: ModelConfig) -> dict[str, type[nn.Module]]:
    """Every block that the layer string may name; `Norm` is the config's norm.

    Raises ImportError for a plugin that cannot be imported, ValueError for one without BLOCKS or with a name that is taken.
    """
    menu = merged(config, "BLOCKS")
    return {"Norm": menu[config.norm], **menu}


def merged(config: ModelConfig, kind: str) -> dict[str, type[nn.Module]]:
    """What the base model, modules/ and the plugins export under this name: BLOCKS or MODELS."""
    found, holders = {}, {}
    for plugin in ("model", "modules.blocks", *config.plugins):
        for name, made in exported(plugin, kind).items():
            if found.get(name, made) is not made or name == "Norm":
                holder = f"that of {holders[name]!r}" if name in holders else "the config's norm"
                what = f"a {kind.lower()[:-1]} {name!r}"
                raise ValueError(f"the plugin {plugin!r} calls {what}, but that name is taken: it is {holder}. Rename it")
            found[name], holders[name] = made, plugin
    return found


def exported(plugin: str, kind: str) -> dict[str, type[nn.Module]]:
    """The BLOCKS or MODELS of a module. Raises ImportError, or ValueError for what cannot be a menu."""
    module = import_plugin(plugin)
    if not hasattr(module, "BLOCKS") and not hasattr(module, "MODELS"):
        raise ValueError(f"the plugin {plugin!r} has no BLOCKS. Give it one, such as BLOCKS = {{'MyBlock': MyBlock}}")
    menu = getattr(module, kind, {})
    if not isinstance(menu, dict):
        raise ValueError(f"{kind} of the plugin {plugin!r} must be a dict, such as {kind} = {{'MyName': MyClass}}")
    for name, made in menu.items():
        if not (isinstance(made, type) and issubclass(made, nn.Module)):
            raise ValueError(f"the plugin {plugin!r} calls {made!r} {name!r}: that must be a class of torch modules")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"the plugin {plugin!r} calls a class {name!r}: take a name of letters, digits and _")
    return menu


def import_plugin(plugin: str) -> ModuleType:
    """The module of that name. Raises ImportError of one line with what is wrong in it, whatever that is."""
    try:
        return importlib.import_module(plugin)
    except (Exception, SystemExit) as error:  # a plugin is a reader's own code: anything may be wrong in it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ModuleNotFoundError) and error.name == plugin.split(".")[0]:
            reason += f". Put {error.name}.py, or the folder, beside train.py or where you start it"
        raise ImportError(f"the plugin {plugin!r} cannot be imported: {reason}") from error


def find_block(name: str, config: ModelConfig) -> type[nn.Module]:
    """The class of the block of that name. Raises as block_menu does, and ValueError with the nearest match."""
    menu = block_menu(config)
    if name not in menu:
        raise ValueError(f"no block is called {name!r}.{did_you_mean(name, menu)} There are: {', '.join(menu)}")
    return menu[name]


def build_block(name: str, options: dict, config: ModelConfig, vocab_size: int | None = None) -> nn.Module:
    """The block of that name: each argument of its __init__ is filled from the options, or else from the config.

    Raises ValueError for an unknown name or option, a value that the config would not take, or a need that nothing meets.
    """
    block = find_block(name, config)
    wanted = init_parameters(block)
    check_options(name, options, wanted, config)
    values = config.block_values | ({"vocab_size": vocab_size} if vocab_size else {}) | options
    needs = inspect.signature(block.forward).parameters
    if config.positions == "rope" and "rope" in needs and values["head_dim"] != config.block_values["head_dim"]:
        raise ValueError(f"{name}(head_dim=...) does not fit RoPE: set the config's head_dim instead")
    for need, parameter in needs.items():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty and need not in SUPPLIED:
            raise ValueError(f"the forward of {name} asks for {need!r}, but a layer supplies only {', '.join(SUPPLIED)}")
    for argument, parameter in wanted.items():
        if argument not in values and parameter.default is parameter.empty:
            raise ValueError(f"{name} needs {argument!r}, which is no field of the config: write {name}({argument}=...)")
    return block(**{argument: values[argument] for argument in wanted if argument in values})


def build_model(config: ModelConfig, vocab_size: int) -> nn.Module:
    """The model that config.model names. It knows its `config` and `vocab_size` from then on.

    Raises ValueError with the nearest match for an unknown name, and what the model itself raises.
    """
    menu = merged(config, "MODELS")
    if config.model not in menu:
        raise ValueError(f"no model is called {config.model!r}.{did_you_mean(config.model, menu)} There are: {', '.join(menu)}")
    model = menu[config.model](config, vocab_size)
    model.config, model.vocab_size = config, vocab_size
    return model


def needs_of(model: nn.Module, **needs) -> dict[str, Any]:
    """Those that the model's forward asks for by name."""
    wanted = arguments_of(type(model).forward)
    return {name: value for name, value in needs.items() if name in wanted}


@cache
def arguments_of(function: Callable) -> frozenset[str]:
    """The names of its arguments; looked up once, as a training asks in every step."""
    return frozenset(inspect.signature(function).parameters)


def make_ready(model: nn.Module, config: TrainConfig):
    """Have the model train as the config says. Raises ValueError for a way that needs more of the model than it has."""
    name = model.config.model
    if config.mask_stories and config.packing == "packed" and not needs_of(model, story_ids=None):
        raise ValueError(
            f"the model {name!r} does not ask for story_ids, so the stories of a row would see each other: "
            "--train.packing padded has one a row, --train.no_mask_stories lets them"
        )
    if config.window_start is not None and not needs_of(model, window=None):
        raise ValueError(f"window_start={config.window_start}: the model {name!r} does not ask for a window: leave it out")
    if config.gradient_checkpointing and not hasattr(model, "checkpoint_layers"):
        raise ValueError(f"gradient_checkpointing=True: the model {name!r} has no checkpoint_layers: leave it out")
    model.loss_chunk, model.checkpoint_layers = config.loss_chunk, config.gradient_checkpointing


def init_parameters(block: type) -> dict[str, inspect.Parameter]:
    """The arguments of a block's __init__, with those of its base class where it hands them on by **."""
    found: dict[str, inspect.Parameter] = {}
    for base in block.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(base.__init__).parameters.values()
            stars = {parameter.kind for parameter in own} & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
            found = {parameter.name: parameter for parameter in own if parameter.kind not in stars} | found
            if inspect.Parameter.VAR_KEYWORD not in stars:
                break
    return found


def check_options(name: str, options: dict, wanted: dict[str, inspect.Parameter], config: ModelConfig):
    """Raises ValueError for an option that the block does not have, or with a value that it or the config would not take."""
    for option, value in options.items():
        if option not in wanted:
            raise ValueError(f"{name} has no option {option!r}.{did_you_mean(option, wanted)} There are: {', '.join(wanted)}")
        if option not in config.block_values and (annotation := wanted[option].annotation) is not inspect.Parameter.empty:
            try:
                is_switch = bool in (annotation, *get_args(annotation))
                if isinstance(value, bool) and not is_switch:  # which Python would take for 0 or 1
                    raise TypeCheckError("a switch is no number")
                check_type(value, annotation)
            except TypeCheckError as error:
                expected = annotation.__name__ if isinstance(annotation, type) else annotation
                raise ValueError(f"{name}({option}={value!r}): it must be {expected}") from error
    # The config knows what its own fields may be, and which go together.
    replace(config, **{option: value for option, value in options.items() if option in config.block_values})
