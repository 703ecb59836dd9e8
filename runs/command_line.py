"""The command line of train.py, both ways: read into configs, and written for configs."""

import argparse
import ast
import re
import sys
from dataclasses import dataclass, fields, replace

from config import Layers, ModelConfig, TrainConfig
from runs.folder import Run, group_members
from runs.presets import PRESETS, Preset, preset

LEAST_MEMORY = 1500 * 2**20  # bytes of addresses: what a training of the default takes


@dataclass(frozen=True)
class Arguments:
    preset: str = "0.5m_short_and_thick"  # a named architecture, or EXPERIMENT/PRESET; the options below change it
    name: str | None = None  # of the run folder in trained_models/, or EXPERIMENT/RUN; by default the preset and the time
    resume: bool = False  # go on with the run called --name where it was stopped
    continue_from: str | None = None  # begin with the best weights of this run
    seeds: int = 1  # train the same with so many seeds, from --train.seed on, as the runs NAME-seed0, NAME-seed1, …
    same_data: bool = False  # with --seeds: all of them see the data in the same order
    group: str | None = None  # the group of seeds that the run belongs to, which --seeds fills in
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()


def read_layers(text: str) -> Layers:
    """A layer string as it is; a list or a tuple of them as Python writes it. Raises ValueError where that cannot be read."""
    if text[:1] not in ("[", "("):
        return text
    try:
        return ast.literal_eval(text)
    except SyntaxError as error:
        raise ValueError(f"layers={text!r} cannot be read ({error.msg}): write lists and tuples as in Python") from error


def parse(words: list[str]) -> Arguments:
    """The command line as Arguments. The preset, or the run to go on with, gives the values of all that is not named."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def layers(info):
        if info.type != Layers:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="STR", is_instance=lambda value: isinstance(value, str | list | tuple),
            instance_from_str=lambda texts: read_layers(texts[0]),
            str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--name")
    first.add_argument("--resume", action="store_true")
    first.add_argument("--continue_from", "--continue-from")
    first.add_argument("--seeds", type=int, default=1)
    early, _ = first.parse_known_args(words)
    chosen = preset(early.preset or Arguments.preset)
    if early.seeds < 1:
        raise ValueError(f"seeds={early.seeds}: give a whole number of at least 1")
    resumes_one = early.resume and early.seeds == 1
    if early.preset and (resumes_one or early.continue_from):
        raise ValueError("--resume and --continue_from keep the architecture of the run: leave --preset out")
    if early.resume and early.name is None:
        raise ValueError("--resume needs the name of the run to go on with: add --name")
    if resumes_one:
        chosen = Preset(Run(early.name).model_config, Run(early.name).train_config)
    elif early.resume and not early.preset and not early.continue_from:
        begun = Run(min(group_members(early.name), key=lambda name: Run(name).train_config.seed))
        chosen = Preset(begun.model_config, begun.train_config)
    elif early.continue_from:
        old = Run(early.continue_from)
        chosen = continued(old.model_config, old.train_config)
    arguments = tyro.cli(
        Arguments, args=words, default=Arguments(model=chosen.model, train=chosen.train), use_underscores=True,
        registry=registry, description="Train a tiny language model.",
    )  # fmt: skip
    if resumes_one and (arguments.model, arguments.train) != chosen:
        raise ValueError("--resume goes on with the options of the run: leave the others out, or use --continue_from")
    return arguments


def parse_or_exit(words: list[str]) -> Arguments:
    """As parse, but a mistake, or too tight a limit of memory, ends the program with its one line."""
    try:
        arguments = parse(words)
        check_memory_limit()
    except (ValueError, OSError, ImportError, MemoryError) as error:  # ImportError: the presets of an experiment
        sys.exit(f"error: {error}")
    return arguments


def check_memory_limit():
    """Raises MemoryError where the limit of this process is so tight that libraries die of it, each with words of its own."""
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
    """What --continue_from begins with: the architecture, data and tokenizer of the run, all else as in its preset."""
    fresh = next((known.train for known in PRESETS.values() if known.model == model_config), TrainConfig())
    kept = {name: getattr(train_config, name) for name in ("data", "max_stories", "tokenizer")}
    return Preset(model_config, replace(fresh, **kept))


def command(
    model_config: ModelConfig, train_config: TrainConfig, name: str | None = None, continued_from: str | None = None
) -> str:
    """The command that trains such a run: the preset or the run it began with, and every option that differs from that."""
    if continued_from is not None:
        known = continued(model_config, train_config)
        words = ["python train.py", f"--continue_from {continued_from}"]
    else:
        named = next((named for named, known in PRESETS.items() if known.model == model_config), None)
        known = PRESETS[named or Arguments.preset]
        words = ["python train.py", *([f"--preset {named}"] if named else [])]
    for group, config, default in (("model", model_config, known.model), ("train", train_config, known.train)):
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
    """The word as every shell, cmd on Windows too, reads it: in double quotes where it holds more than safe characters."""
    if re.fullmatch(r"[\w.:/+@-]+", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
