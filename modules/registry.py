"""The registry: blocks and models by name, those of the base model, of modules/ and of plugins alike.

A plugin is any module with BLOCKS = {"MyBlock": MyBlock}, MODELS, or another of the KINDS, named in ModelConfig.plugins.

A model that differs from GPT in more than its blocks is a class in MODELS of a plugin, and config.model names it:

    Model(config: ModelConfig, vocab_size: int), a torch module with
    forward(tokens, targets=None, *, story_ids=None, window=None, cache=None) -> (logits, loss)

If its __init__ has an argument `blocks`, as GPT's, it is given all blocks by name; a subclass of GPT must pass them on. An
argument `tokenizer` is the one that it is trained with. tokens and targets (B, T) are integers; a target that is model.IGNORE is
not scored. The softmax of logits (B, T, V) predicts the next token; evaluation and generation read nothing else, but for
story_nats. loss is what training minimises, a mean over the targets, None without targets. While training with targets, logits
may be None.

Each of the keywords is optional. story_ids (B, T) number the stories of a row, which must not see each other: a model without
it trains with padded packing, or without mask_stories. window is how many recent tokens may be seen: without it there is no
window_start. cache, a model.Cache, lasts as long as a story is generated, and tokens are then only the new ones;
cache.blocks[self] is a dict for whatever the model keeps. Without a cache all tokens are read again for each new one. A keyword
memory is what DATA plugins supply (data/plugin.py), None without. Optional
attributes, used if present: num_parameters(embeddings) -> int; an output matrix called head, which Muon leaves to AdamW; losses,
the terms of the last training loss by name, detached, "next_token" among them: the log has a column for each; own_loss, None or
what --train.loss sets it to, a function (logits, targets) -> (name, loss) to minimise in place of the cross-entropy;
flops_per_token(T) -> float, where torch cannot count them (metrics/cost.py).

A model whose probabilities are not those of its logits is scored by a method of its own,

    story_nats(stories: list[list[int]]) -> Tensor (stories,)

the nats of all tokens after bos, eos included. The class attribute is_bound says whether they are upper bounds, which every table
marks by "≤", or exact. Exact ones are also asked for the starts of stories, without eos: the probabilities of all next tokens sum
to 1. A method that seeds its own draws takes a keyword `seed`, 0 by default. causal = False marks a model, or a block, that sees
later tokens, which the checks before training (modules/model_contract.py) stop otherwise: the model then needs story_nats to be
scored. metrics/audit/ tests the scores of every model of a plugin.

A model that does not write from left to right generates by a method of its own,

    write(prompts: list[list[int]], eos_id, max_new_tokens: list[int], sampling: Sampling, generators: list[torch.Generator])

an iterator that yields, at least once, a list with the next token of each prompt, None after its last one or at eos. Prompt i is
drawn with generators[i] alone. modules/canvas.py is a base class for such models.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Container
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from typeguard import TypeCheckError, check_type

import model
from config import (
    ModelConfig,
    did_you_mean,
    format_step,
    init_parameters,
    layer_steps,
    look_up,
    marking,
    method_parameters,
    name_and_options,
)  # fmt: skip
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
from modules.explain import explain
from runs.moved import moved_to
from tokenizer import Tokenizer, load_tokenizer

FAMILIES = (
    model, norms, attention, latent_attention, sparse_attention, cross_attention, linear_attention, deltanet, griffin, mamba,
    mamba2, moving_average, megalodon, moe, residual, repeat, depth, values, convolution, embeddings,
)  # fmt: skip
BLOCKS: dict[str, type[nn.Module]] = {name: block for family in FAMILIES for name, block in family.BLOCKS.items()}
MODELS: dict[str, type[nn.Module]] = {"GPT": model.GPT}


class Kind(NamedTuple):
    """A kind of things that a plugin may export, in a dict by name."""

    noun: str
    base: type  # of the classes; Callable for functions
    description: str


KINDS = {
    "BLOCKS": Kind("block", nn.Module, "classes of torch modules"),
    "MODELS": Kind("model", nn.Module, "classes of torch modules"),
    "OPTIMIZERS": Kind("optimizer", torch.optim.Optimizer, "classes of torch optimizers"),
    "SCHEDULES": Kind("schedule", Callable, "functions"),
    "LOSSES": Kind("loss", Callable, "functions"),
    "DATA": Kind("data source", object, "classes"),
}

# What a layer gives to a block whose forward names it; see GPT.forward, which makes them.
SUPPLIED = ("rope", "story_start", "window", "cache", "tokens", "targets", "memory", "shared")

PASSES_BLOCKS = "def __init__(self, config, vocab_size, blocks, ...) and super().__init__(config, vocab_size, blocks)"

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
                what = f"{'an' if kind == 'OPTIMIZERS' else 'a'} {KINDS[kind].noun} {name!r}"
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
        is_class, base = isinstance(value, type), KINDS[kind].base
        is_right = callable(value) and not is_class if base is Callable else is_class and issubclass(value, base)
        if not is_right:
            cure = f", so write {type(value).__name__} without ()" if isinstance(value, nn.Module) else ""
            what = " ".join(f"{value!r:.80}".split())
            raise ValueError(f"the plugin {plugin!r} calls {what} {name!r}: {kind} must name {KINDS[kind].description}{cure}")
        if not (isinstance(name, str) and name.isidentifier()):
            raise ValueError(f"the plugin {plugin!r} calls one of its {kind} {name!r}: take a name of letters, digits and _")
    return named


def find_with_options(
    kind: str, text: str, ours: dict[str, Any], config: ModelConfig, supplied: int, fixed: tuple[str, ...] = ()
) -> tuple[Any, dict[str, Any]]:
    """The class or function that `Name(option=value)` names among ours of a kind and those of plugins, and its options.

    The first `supplied` of its parameters, and the fixed ones, are no options. Raises ValueError with the nearest match for an
    unknown name or option.
    """
    name, options = name_and_options(text)
    value = look_up(KINDS[kind].noun, name, with_plugins(config, ours, kind))
    parameters = list(parameters_of(value).items())[supplied:]
    check_options(name, options, {parameter: each for parameter, each in parameters if parameter not in fixed})
    return value, options


def parameters_of(value: Callable) -> dict[str, inspect.Parameter]:
    """The named parameters of a function, or of the __init__ of a class."""
    if isinstance(value, type):
        return init_parameters(value)
    parameters = inspect.signature(value).parameters
    return {name: each for name, each in parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}


def import_plugin(plugin: str) -> ModuleType:
    """Import a plugin. Raises ImportError of one line with what is wrong in it, whatever that is."""
    dotted = re.sub(r"[/\\]", ".", plugin.removesuffix(".py"))
    if dotted != plugin:
        raise ImportError(f"the plugin {plugin!r} is a path, but Python imports modules by name: write {dotted}")
    try:
        return importlib.import_module(plugin)
    except (Exception, SystemExit) as error:  # a plugin is a reader's own code: anything may be wrong in it
        reason = explain(error, error.__traceback__.tb_next)
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


def build_model(config: ModelConfig, vocab_size: int, tokenizer: Tokenizer | str | None = None) -> nn.Module:
    """Build the model that config.model names; it has the attributes `config` and `vocab_size`.

    tokenizer is for models that ask for it, which then have it as an attribute; its name suffices, and is loaded only for these.

    Raises ValueError with the place of what is wrong in a layer string, with the nearest match for an unknown name or option, and
    what the model itself raises.
    """
    name, options = name_and_options(config.model)
    model_class, given = look_up("model", name, with_plugins(config, MODELS, "MODELS")), dict(options)
    parameters = init_parameters(model_class)
    check_signature(name, model_class, parameters)
    supplied = ("config", "vocab_size", "blocks", "tokenizer")
    validate_options(name, options, {key: value for key, value in parameters.items() if key not in supplied}, config)
    if "blocks" in parameters:
        given["blocks"] = all_blocks(config)
        for layer in dict.fromkeys(config.layer_strings):
            validate_layer(layer, config, given["blocks"])
    if "tokenizer" in parameters:
        if tokenizer is None:
            raise ValueError(f"the model {name!r} asks for the tokenizer, but there is none here: call build_model(config, "
                             "vocab_size, tokenizer), or take another model where there is no text, as in probes")  # fmt: skip
        given["tokenizer"] = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    try:
        built = model_class(config, vocab_size, **given)
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        if "no block is called" in str(error):  # although all of them are known here
            raise ValueError(f"the model {name!r} does not pass `blocks` on: write {PASSES_BLOCKS}") from error
        reason = explain(error)
        if reason == str(error) or "memory" in str(error) or not config.plugins:
            raise
        raise ValueError(f"the model {name!r} cannot be built: {reason}") from error
    built.config, built.vocab_size = config, vocab_size
    if "tokenizer" in given:
        built.tokenizer = given["tokenizer"]
    return built


def check_signature(name: str, model_class: type[nn.Module], parameters: dict[str, inspect.Parameter]):
    """Raise ValueError for a model whose __init__ does not take what every model is given."""
    takes = [*parameters][:2]
    if len(takes) < 2 or takes[0] in ModelConfig.__dataclass_fields__:
        problem = f"the __init__ of the model {name!r} takes ({', '.join(takes)}), but a model is given (config, vocab_size)"
        raise ValueError(f"{problem}: write def __init__(self, config, vocab_size), and config.dim for dim")
    if model_class.forward is nn.Module.forward:
        raise ValueError(f"the model {name!r} has no forward: give it def forward(self, tokens, targets=None)")
    if issubclass(model_class, model.GPT) and "blocks" not in parameters:
        problem = f"the __init__ of {name!r} takes no `blocks`, so those of modules/ and of plugins would be unknown to it"
        raise ValueError(f"{problem}: write {PASSES_BLOCKS}")


def accepted_kwargs(module: nn.Module, **kwargs) -> dict[str, Any]:
    """Keep only the keyword arguments that the module's forward names."""
    return {name: value for name, value in kwargs.items() if takes(module, name)}


def takes(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward names this argument."""
    return argument in forward_names(type(module))


@cache
def forward_names(module_class: type[nn.Module]) -> frozenset[str]:
    """The names of the arguments of its forward, looked up once: training asks in every step."""
    return frozenset(method_parameters(module_class, "forward"))


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
    parameters, inputs = init_parameters(block), method_parameters(block, "forward")
    if "layer" in options and "layer" not in parameters:
        raise ValueError(f"{name} does not hold a layer: write it without the brackets")
    signature = inspect.signature(block.forward).parameters.values()
    if "layer" in parameters and all(parameter.kind is not parameter.VAR_KEYWORD for parameter in signature):
        raise ValueError(f"the forward of {name} must take **inputs, and hand them on: self.layer(x, **inputs)")
    if block.forward is nn.Module.forward:
        raise ValueError(f"the block {name!r} has no forward: give it one, such as def forward(self, x)")
    validate_options(name, {option: value for option, value in options.items() if option != "layer"}, parameters, config)
    if config.positions == "rope" and "rope" in inputs and values["head_dim"] != config.block_values()["head_dim"]:
        raise ValueError(f"{name}(head_dim=...) does not fit RoPE: set the config's head_dim instead")
    for argument, parameter in [*inputs.items()][1:]:  # the first one is x
        if parameter.default is parameter.empty and argument not in SUPPLIED:
            raise ValueError(f"the forward of {name} asks for {argument!r}, but a layer supplies only {', '.join(SUPPLIED)}")
        if argument not in SUPPLIED and (similar := get_close_matches(argument, SUPPLIED, n=1, cutoff=0.8)):
            raise ValueError(f"the forward of {name} names {argument!r}, which no layer supplies. Did you mean {similar[0]!r}?")
    if "config" in parameters and "config" not in options:
        cure = "name the values that it needs, such as def __init__(self, dim)"
        raise ValueError(f"the __init__ of {name} takes the config, which a block is not given: {cure}")
    for argument, parameter in parameters.items():
        if argument not in {"vocab_size", *values} and parameter.default is parameter.empty:
            if argument == "layer":
                raise ValueError(f"{name} needs a layer in brackets: write {name}([Norm->MLP->+])")
            raise ValueError(f"{name} needs {argument!r}, which is no field of the config: write {name}({argument}=...)")


def validate_options(name: str, options: dict, parameters: dict[str, inspect.Parameter], config: ModelConfig):
    """Raises ValueError for an option that the block does not have, or with a value that it or the config would not take."""
    known = config.block_values()
    check_options(name, options, parameters, known)
    # the config knows what its own fields may be, and which go together; those that the block does not name do not matter
    unnamed = {name: value for name, value in FIT_ALL.items() if name not in parameters}
    replace(config, **unnamed | {option: value for option, value in options.items() if option in known})


def check_options(name: str, options: dict, parameters: dict[str, inspect.Parameter], unchecked: Container[str] = ()):
    """Raises ValueError for an option that is no parameter, or whose value is not of the annotated type, unless unchecked."""
    for option, value in options.items():
        if option not in parameters:
            there_are = ", ".join(parameters) or "none"
            raise ValueError(f"{name} has no option {option!r}.{did_you_mean(option, parameters)} There are: {there_are}")
        if option not in unchecked and (annotation := parameters[option].annotation) is not inspect.Parameter.empty:
            try:
                is_switch = bool in (annotation, *get_args(annotation))
                if isinstance(value, bool) and not is_switch:  # which Python would take for 0 or 1
                    raise TypeCheckError("a switch is no number")
                check_type(value, annotation)
            except TypeCheckError as error:
                expected = annotation.__name__ if isinstance(annotation, type) else annotation
                raise ValueError(f"{format_step(name, {option: value})}: it must be {expected}") from error
