"""The command line of train.py: parse it into configs, and write the command for given configs."""

import argparse
import ast
import inspect
import json
import re
import sys
from dataclasses import dataclass, fields, make_dataclass, replace
from textwrap import fill
from typing import Annotated

import tyro

from config import NAMES, Layers, ModelConfig, TrainConfig, look_up, name_and_options
from runs.folder import Run, group_members
from runs.presets import PRESETS, Preset, preset
from runs.terminal import UsageError, errors_in_one_line

LEAST_MEMORY = 1500 * 2**20  # bytes of address space that training the default preset takes
MOST_SEEDS = 1000  # of a group
COMMON = {  # options that --help shows
    "preset", "name", "resume", "continue_from", "seeds", "seeds_until_decided", "dim", "num_layers", "layers", "plugins",
    "data", "tokenizer", "batch_size", "max_steps", "max_minutes", "lr_max", "seed",
}  # fmt: skip
HELP = """Train a tiny language model. --help_all lists all options.

examples:
  python train.py
  python train.py --preset 1m --train.max_minutes 10 --name my_run
  python train.py --name my_run --resume
  python train.py --model.plugins my_ideas --train.optimizer "Lion(betas=(0.95, 0.98))"

A plugin is a file of yours with BLOCKS, MODELS, OPTIMIZERS, SCHEDULES, LOSSES or DATA, each a dict by name.

presets:
"""


@dataclass(frozen=True)
class Arguments:
    preset: str = "quick"  # a named architecture, or EXPERIMENT/PRESET; other options change it
    name: str | None = None  # name of the run in trained_models/, or EXPERIMENT/RUN; None is the preset and the time
    resume: bool = False  # go on with the stopped run --name
    continue_from: str | None = None  # start from the best weights of this run
    seeds: int = 1  # train this many seeds, from --train.seed up, as the runs NAME-seed0, NAME-seed1, …
    seeds_until_decided: str | None = None  # train as many seeds as this group has; add one to both until compare decides
    same_data: bool = False  # with --seeds: the same order of the data for all seeds
    group: str | None = None  # group of seeds that the run belongs to; set by --seeds
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


@dataclass(frozen=True)
class InferenceArguments:
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]  # a run in trained_models/
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[PROMPT ...]")] = ()  # starts of stories
    max_new_tokens: int | None = None  # the most tokens to add; None: until the story ends or the context is full
    temperature: float = 0.8  # lower is safer, higher is wilder, 0 is greedy
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # draw from the most likely tokens whose probabilities add up to p
    min_p: float | None = None  # draw from tokens at least p times as likely as the most likely one
    seed: int = 0  # random seed of the first story; each further one adds 1


def read_layers(text: str) -> Layers:
    """Read a layer string, or a Python list or tuple of them. Raises ValueError if it cannot be read."""
    if text[:1] not in ("[", "("):
        return text
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"layers={text!r} cannot be read ({error.msg}): write lists and tuples as in Python") from error


def write_layers(layers: Layers) -> str:
    """Write layers for `read_layers`, in double quotes, which survive the single ones of a shell."""
    if isinstance(layers, str):
        return layers
    text = json.dumps(layers)
    return f"({text[1:-1]},)" if isinstance(layers, tuple) else text


def layers_registry():
    """Teach tyro to read Layers."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def layers(info):
        if info.type != Layers:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="STR", is_instance=lambda value: isinstance(value, str | list | tuple),
            instance_from_str=lambda texts: read_layers(texts[0]),
            str_from_instance=lambda value: [write_layers(value)],
        )  # fmt: skip

    return registry


def parse(words: list[str]) -> Arguments:
    """Parse the command line. Options that are not given come from the preset, or from the run to go on with."""
    # find the defaults of all other options
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--name")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--continue_from", "--continue-from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seeds_until_decided", "--seeds-until-decided")
    early, _ = parser.parse_known_args(words)
    try:
        defaults = preset(early.preset or Arguments.preset)
    except ValueError as error:
        raise UsageError(error) from error
    if not 1 <= early.seeds <= MOST_SEEDS:
        raise UsageError(f"seeds={early.seeds}: give a whole number from 1 to {MOST_SEEDS}")
    resumes_one = early.resume and early.seeds == 1 and not early.seeds_until_decided
    if early.preset and (resumes_one or early.continue_from):
        raise UsageError("--resume and --continue_from keep the architecture of the run: leave --preset out")
    if early.resume and early.name is None:
        raise UsageError("--resume needs the name of the run to go on with: add --name")
    if resumes_one:
        run = Run(early.name)
        run.check_is_begun()
        defaults = Preset(run.model_config, run.train_config)
    elif early.resume and not early.preset and not early.continue_from:
        run = Run(min(group_members(early.name), key=lambda name: Run(name).train_config.seed))
        defaults = Preset(run.model_config, run.train_config)
    elif early.continue_from:
        run = Run(early.continue_from)
        defaults = continued(run.model_config, run.train_config)

    # parse all options
    arguments = tyro.cli(
        Arguments, args=words, default=Arguments(model=defaults.model, train=defaults.train), use_underscores=True,
        registry=layers_registry(), description="Every option of train.py; --help shows those that most people need.",
    )  # fmt: skip
    check_names(arguments)
    if resumes_one and (arguments.model, arguments.train) != defaults:
        raise UsageError("--resume keeps the options of the run: leave others out, or use --continue_from")
    return arguments


def check_names(arguments: Arguments):
    """Raise UsageError for an unknown optimizer, schedule or loss, before torch is imported; plugins may have others."""
    if arguments.model.plugins:
        return
    for field, names in NAMES.items():
        try:
            look_up(field, name_and_options(getattr(arguments.train, field))[0], dict.fromkeys(names))
        except ValueError as error:
            raise UsageError(error) from error


def parse_or_exit(words: list[str]) -> Arguments:
    """Parse the command line; exit with a one-line error for a mistake, or if the memory limit is too low."""
    with errors_in_one_line():
        check_memory_limit()
        if {"-h", "--help"} & {*words}:
            print_common_help()
        return parse(["--help" if word == "--help_all" else word for word in words])


def print_common_help():
    """Print examples, the presets and the options that most people need, and exit."""
    groups = {}
    for group, config in zip(("model", "train"), preset(Arguments.preset), strict=True):
        groups[group] = make_dataclass(type(config).__name__, common_options(config), frozen=True)
    nested = [(group, options, options()) for group, options in groups.items()]
    short = make_dataclass("Arguments", [*common_options(Arguments()), *nested], frozen=True)
    presets = fill(", ".join(PRESETS), 78, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    tyro.cli(short, args=["--help"], use_underscores=True, description=HELP + presets, registry=layers_registry())


def common_options(config: Arguments | ModelConfig | TrainConfig) -> list[tuple]:
    """The name, type with help, and value of each of the COMMON options, as `make_dataclass` takes them."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(type(config)), re.MULTILINE))
    return [(option.name, Annotated[option.type, tyro.conf.arg(help=comments[option.name])], getattr(config, option.name))
            for option in fields(config) if option.name in COMMON]  # fmt: skip


def parse_inference(words: list[str]) -> InferenceArguments:
    """Parse the command line of inference.py."""
    return tyro.cli(InferenceArguments, args=words, use_underscores=True, description="Continue prompts with a trained model.")


def check_memory_limit():
    """Raise MemoryError if the limit of this process is so low that importing libraries would crash."""
    if sys.platform == "win32":
        return
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < LEAST_MEMORY:
        raise MemoryError(
            f"this process may take {limit / 2**20:,.0f} MB (ulimit -v), but Python, torch and the data alone need about "
            f"{LEAST_MEMORY / 2**20:,.0f} MB: raise the limit"
        )


def continued(model_config: ModelConfig, train_config: TrainConfig) -> Preset:
    """The defaults for --continue_from: architecture, data and tokenizer of the run, all else from its preset."""
    default = next((known.train for known in PRESETS.values() if known.model == model_config), TrainConfig())
    kept_fields = {name: getattr(train_config, name) for name in ("data", "max_stories", "tokenizer")}
    return Preset(model_config, replace(default, **kept_fields))


def command(
    model_config: ModelConfig, train_config: TrainConfig, name: str | None = None, continued_from: str | None = None
) -> str:
    """The command that trains such a run: its preset, or the run it continues, and every option that differs.

    >>> command(ModelConfig(num_layers=5, mlp_dim=320), TrainConfig(max_steps=99), name="my_run")
    'python train.py --preset 1m --train.max_steps 99 --name my_run'
    """
    words = ["python train.py"]
    if continued_from is not None:
        defaults = continued(replace(model_config, plugins=()), train_config)  # the other run may have had no plugins
        words.append(f"--continue_from {continued_from}")
    else:
        known = next((known for known, preset in PRESETS.items() if preset.model == model_config), None)
        defaults = PRESETS[known or Arguments.preset]
        words += [f"--preset {known}"] if known else []
    for group, config, default in (("model", model_config, defaults.model), ("train", train_config, defaults.train)):
        for field in fields(config):
            value = getattr(config, field.name)
            if value == getattr(default, field.name):
                continue
            if field.type is bool:
                words.append(f"--{group}.{field.name}" if value else f"--{group}.no_{field.name}")
            else:
                values = value if field.name in ("betas", "plugins") else [value]
                words.append(" ".join([f"--{group}.{field.name}", *(quoted(str(value)) for value in values)]))
    return " ".join(words + ([f"--name {name}"] if name else []))


def quoted(word: str) -> str:
    """Quote a word for all shells, Windows included: in double quotes, unless it has only safe characters."""
    if re.fullmatch(r"[\w.:/+@-]+", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
