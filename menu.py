"""The menu of blocks and models: the base model's, those of modules/ and the plugins' alike, and how one is made by name."""

import importlib
import inspect
from dataclasses import replace
from types import ModuleType

from torch import nn
from typeguard import TypeCheckError, check_type

from config import ModelConfig, did_you_mean

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
    merged = {}
    for plugin in ("model", "modules", *config.plugins):
        module = import_plugin(plugin)
        if not hasattr(module, "BLOCKS") and not hasattr(module, "MODELS"):
            raise ValueError(f"the plugin {plugin!r} has no BLOCKS. Give it one, such as BLOCKS = {{'MyBlock': MyBlock}}")
        for name, made in getattr(module, kind, {}).items():
            if merged.get(name, made) is not made or name == "Norm":
                raise ValueError(f"the plugin {plugin!r} calls a {kind.lower()[:-1]} {name!r}, but that name is taken. Rename it")
            merged[name] = made
    return merged


def import_plugin(plugin: str) -> ModuleType:
    """The module of that name. Raises ImportError with what is wrong in it, whatever that is."""
    try:
        return importlib.import_module(plugin)
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        raise ImportError(f"the plugin {plugin!r} cannot be imported: {type(error).__name__}: {error}") from error


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


def init_parameters(block: type) -> dict[str, inspect.Parameter]:
    """The arguments of a block's __init__, with those of its base class where it hands them on by **."""
    found: dict[str, inspect.Parameter] = {}
    for base in block.__mro__:
        if "__init__" in vars(base):
            _, *own = inspect.signature(base.__init__).parameters.values()
            found = {parameter.name: parameter for parameter in own} | found
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in own):
                break
    stars = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: parameter for name, parameter in found.items() if parameter.kind not in stars}


def check_options(name: str, options: dict, wanted: dict[str, inspect.Parameter], config: ModelConfig):
    """Raises ValueError for an option that the block does not have, or with a value that it or the config would not take."""
    for option, value in options.items():
        if option not in wanted:
            raise ValueError(f"{name} has no option {option!r}.{did_you_mean(option, wanted)} There are: {', '.join(wanted)}")
        if option in config.block_values:  # then the config knows what a value may be
            replace(config, **{option: value})
        elif (annotation := wanted[option].annotation) is not inspect.Parameter.empty:
            try:
                if isinstance(value, bool) and annotation is not bool:  # which Python would take for 0 or 1
                    raise TypeCheckError("a switch is no number")
                check_type(value, annotation)
            except TypeCheckError as error:
                expected = annotation.__name__ if isinstance(annotation, type) else annotation
                raise ValueError(f"{name}({option}={value!r}): it must be {expected}") from error
