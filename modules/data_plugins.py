"""DATA plugins by name: TrainConfig.data may be "SpanCorruption(data='tinystories', rate=0.15)". See data/plugin.py."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from config import ModelConfig, TrainConfig, did_you_mean, format_step, init_parameters, look_up, name_and_options
from data.cache import digest, say
from data.checks import check_rows
from data.dataset import Data, load_data
from data.plugin import DataPlugin, failures_of, source_of
from data.sources import HUB_NAMES, SIZES, Source, open_source
from model import Branch
from modules.registry import takes, validate_options, with_plugins

OURS = dict.fromkeys(("auto", *HUB_NAMES, *SIZES))


def open_data(data: str, plugins: tuple[str, ...]) -> Source:
    """Open the stories of TrainConfig.data, which names a source or DATA of a plugin. Raises as `open_source`."""
    name, options = plugin_options(data, plugins)
    if name is None:
        return open_source(data)
    if takes_data(data_classes(plugins)[name]):
        inner = open_data(inner_data(name, options), plugins)
        return replace(inner, name=format_step(name, options | {"data": inner.name}))
    return source_of(format_step(name, options), build_plugin(name, options, plugins))


def load_training_data(train: TrainConfig, config: ModelConfig, tokenizer) -> Data | DataPlugin:
    """Load the rows of TrainConfig.data: tokenised and packed, changed by DATA plugins of the config, and checked.

    Raises ValueError or OSError with the cure.
    """
    name, options = plugin_options(train.data, config.plugins)
    if name is None or not takes_data(data_classes(config.plugins)[name]):
        source = train.data if name is None else open_data(train.data, config.plugins)
        return load_data(source, tokenizer, config.max_seq_len, packing=train.packing, max_stories=train.max_stories)
    inner = load_training_data(replace(train, data=inner_data(name, options)), config, tokenizer)
    plugin = build_plugin(name, options | {"data": inner}, config.plugins)
    if type(plugin).memory is None and getattr(plugin, "memory", None) is not None:
        raise ValueError(f"data={train.data!r}: write `memory` as a method")
    if getattr(plugin, "validation", None) is not inner.validation:
        raise ValueError(f"data={train.data!r}: call super().__init__(data), and leave `validation` as it is, as scores on other "
                         "stories would not compare")  # fmt: skip
    plugin.name = format_step(name, options | {"data": inner.name})
    own = {key: value for key, value in options.items() if key != "data"}
    plugin.fingerprint = digest(inner.fingerprint, format_step(name, own), check_rows(plugin))
    return plugin


def plugin_options(data: str, plugins: tuple[str, ...]) -> tuple[str | None, dict[str, Any]]:
    """The name and the options of the DATA plugin that `data` names; (None, {}) for a source. Raises ValueError for a typo."""
    classes, name = data_classes(plugins), data.partition("(")[0]
    if name in classes:
        return name_and_options(data)
    is_call = re.fullmatch(r"\w+\(.*\)", data)
    if (is_call or (name not in OURS and did_you_mean(name, classes))) and not Path(data).exists():
        if not classes:
            raise ValueError(f"data={data!r}: the plugins export no DATA. Name the file that has DATA = {{{name!r}: …}} by "
                             "--model.plugins")  # fmt: skip
        look_up("DATA", name, classes)
    return None, {}


def data_classes(plugins: tuple[str, ...]) -> dict[str, type]:
    """The DATA of plugins by name. Raises ValueError for a name that is taken."""
    everything = with_plugins(ModelConfig(plugins=plugins), OURS, "DATA")
    return {name: plugin for name, plugin in everything.items() if name not in OURS}


def takes_data(plugin: type) -> bool:
    """Whether it changes the rows of other data; otherwise it tells stories. Raises ValueError if it does neither."""
    if issubclass(plugin, DataPlugin):
        if "data" not in init_parameters(plugin):
            raise ValueError(f"{plugin.__name__} is a DataPlugin, so its __init__ takes the `data` whose rows it changes")
        return True
    if not callable(getattr(plugin, "stories", None)) or "data" in init_parameters(plugin):
        raise ValueError(f"{plugin.__name__} is no DATA: derive it from data.plugin.DataPlugin if it takes `data`, or give it a "
                         "method stories()")  # fmt: skip
    return False


def inner_data(name: str, options: dict[str, Any]) -> str:
    """The option data=, which names what a plugin changes. Raises ValueError without it."""
    data = options.get("data")
    if not isinstance(data, str) or data == "auto":
        raise ValueError(f"data={format_step(name, options)!r}: say whose rows it changes, such as {name}(data='tinystories')")
    return data


def build_plugin(name: str, options: dict[str, Any], plugins: tuple[str, ...]) -> Any:
    """Build a plugin from its options. Raises ValueError for an unknown or a missing option, and for what fails in it."""
    plugin = data_classes(plugins)[name]
    parameters = init_parameters(plugin)
    literals = {key: value for key, value in options.items() if not isinstance(value, Data | DataPlugin)}
    validate_options(name, literals, parameters, ModelConfig())
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ValueError(f"{name} needs {parameter.name!r}: write {name}({parameter.name}=...)")
    with failures_of(f"data={name!r}"):
        return plugin(**options)


# Memory


def attach_memory(model: nn.Module, data: Data | DataPlugin):
    """Let a model be scored and write with the memory of its data, as model.memory_source.

    Raises ValueError if the model takes no memory; warns if no block of a GPT reads it, or one reads what is not there.
    """
    has_memory = getattr(data, "memory", None) is not None
    branches = [module for module in model.modules() if isinstance(module, Branch)]
    readers = [block for branch in branches for block in branch.blocks if takes(block, "memory")]
    if model.config.model == "GPT" and has_memory != bool(readers):
        say(f"warning: data={data.name!r} have a memory, but no block reads it, as CrossAttn does" if has_memory else
            f"warning: {type(readers[0]).__name__} reads a memory, but data={data.name!r} have none (docs/data.md)")  # fmt: skip
    if has_memory and not takes(model, "memory"):
        raise ValueError(f"data={data.name!r} have a memory, but forward of {model.config.model!r} takes none: add memory=None")
    if has_memory:
        model.memory_source = data


def restore_memory(model: nn.Module, train: TrainConfig, tokenizer):
    """Attach the memory of the data that a model was trained with, if they had one."""
    name, _ = plugin_options(train.data, model.config.plugins)
    if name is not None and getattr(data_classes(model.config.plugins)[name], "memory", None) is not None:
        attach_memory(model, load_training_data(train, model.config, tokenizer))
