"""A ladder of sizes: an architecture, made narrower or wider until its parameters come nearest to each of some numbers; trained.

The depth, the layer strings and all other fields stay. Heads keep about their width, so that there are more or fewer of them, and
the MLP keeps its share of the width. Widths that stand in the layer string itself stay as they are.

Parameters are all that are learned, embeddings and every expert too, as cost.py counts them. Kaplan et al. (2020, arXiv
2001.08361, section 1.3) left the embeddings out. That bends the law where they are much of the model, as in ours: fitted to small
models the total gives the law of large ones, the rest does not (Pearce and Song 2024, arXiv 2406.12907).
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass, fields, replace
from functools import cache

import numpy as np
import torch

from config import Layers, ModelConfig, TrainConfig
from data.cache import say
from data.sources import open_source
from metrics.cost import config_of
from modules.registry import build_model
from runs.command_line import Arguments
from runs.folder import Run, is_safe, run_names
from runs.presets import preset
from tokenizer import load_tokenizer
from training.optim import growing_batch_size
from training.seeds import member_names, members, run_in_turn, train_members

STEP = 4  # dim is a multiple of it
FURTHEST = 0.15  # a rung may miss its size by this share
FEWEST_SIZES = 3
LARGEST = 100_000_000  # parameters: what is larger is no model for a laptop
WIDTHS = re.compile(r"\b\w*(?:dim|rank|heads)=\d+")  # options of a layer string that would grow with dim

NO_MATTER = {  # in what two ways of training may differ without a word
    "max_steps", "max_minutes", "eval_every", "checkpoint_every", "seed", "data_seed", "device", "dtype", "compile", "threads",
    "micro_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """An architecture at one size."""

    architecture: str  # the name it goes by
    wanted: int  # parameters
    parameters: int  # that it has
    config: ModelConfig

    @property
    def label(self) -> str:
        return size_label(self.wanted)

    def __str__(self) -> str:
        config, values = self.config, self.config.block_values()
        heads = f"{config.num_heads} head{'s' * (config.num_heads > 1)} of {values['head_dim']}"
        missed = f"{self.parameters / self.wanted - 1:+.1%}"
        return (f"{self.architecture} at {self.label}: {self.parameters:,} parameters ({missed}): dim {config.dim}, {heads}, "
                f"mlp_dim {values['mlp_dim']}, {config.num_layers} layers")  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """What each rung may spend: so many "steps", "minutes" or "tokens_per_parameter"."""

    kind: str
    amount: float

    def __post_init__(self):
        if not (self.amount > 0 and np.isfinite(self.amount)) or (self.kind == "steps" and self.amount != int(self.amount)):
            raise ValueError(f"--{self.kind} {self.amount:g}: give a positive {'whole ' * (self.kind == 'steps')}number")

    def __str__(self) -> str:
        return f"{self.amount:.10g}{self.kind}"

    def apply(self, config: TrainConfig, rung: Rung) -> TrainConfig:
        """The config that spends it. Tokens are those that are read, in sequences as long as the context."""
        if self.kind == "minutes":
            return replace(config, max_steps=None, max_minutes=float(self.amount))
        steps = self.amount
        if self.kind == "tokens_per_parameter":
            sequences = np.mean([growing_batch_size(done, config) for done in np.linspace(0, 1, 1000, endpoint=False)])
            steps = self.amount * rung.parameters / (sequences * rung.config.max_seq_len)
        return replace(config, max_steps=max(1, round(steps)), max_minutes=None)


EQUAL_STEPS = Budget("steps", 2000)


@dataclass(frozen=True)
class Plan:
    """What is to be trained: for each rung a group of runs, one for each seed."""

    rungs: list[Rung]
    groups: list[Arguments]  # of each rung
    budget: Budget
    notes: list[str]


def read_size(text: str) -> int:
    """'0.25m' and '250k' become 250000. Raises ValueError for what is no size."""
    found = re.fullmatch(r"(\d+\.?\d*|\.\d+)([km]?)", text.strip().lower())
    size = float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2]] if found else 0
    if size < 1:
        raise ValueError(f"--sizes {text}: write a number of parameters, such as 250k, 0.5m or 2m")
    if size > LARGEST:
        raise ValueError(f"--sizes {text}: give at most {size_label(LARGEST)} parameters, which is a lot for a small machine")
    return round(size)


def size_label(size: int) -> str:
    """250000 becomes '0.25m'"""
    return f"{size / 1e6:.10g}m"


def ladder(architecture: str, config: ModelConfig, vocab_size: int, sizes: list[int]) -> list[Rung]:
    """The architecture at each of these sizes. Raises ValueError for a size that it does not come near."""

    @cache
    def parameters(dim: int) -> int | None:
        """How many there are at that width; None where the architecture cannot be that wide."""
        try:
            with torch.random.fork_rng(devices=[]):
                model = build_model(at_width(config, dim), vocab_size)
        except ValueError:  # a width that heads or groups do not divide
            return None
        return sum(weight.numel() for weight in model.parameters())

    with torch.random.fork_rng(devices=[]):
        build_model(config, vocab_size)  # what is wrong with it at any width is said here
    rungs = []
    for size in sizes:
        dim = nearest_width(config.dim, size, parameters)
        there = parameters(dim)
        if abs(there / size - 1) > FURTHEST:
            raise ValueError(f"{architecture} cannot have {size_label(size)} parameters: the nearest is {size_label(there)}, by "
                             f"dim={dim}. Take that size, or an architecture of another depth")  # fmt: skip
        rungs.append(Rung(architecture, size, there, at_width(config, dim)))
    for rung, other in itertools.combinations(rungs, 2):
        if rung.parameters == other.parameters:
            raise ValueError(f"{architecture} is the same at {rung.label} and {other.label}: leave one of them out")
    return rungs


def nearest_width(dim: int, size: int, parameters: Callable[[int], int | None]) -> int:
    """The dim whose parameters are nearest to a size, beginning at some dim.

    They grow at least as fast as dim and at most as its square, so that steps by the square root come nearer and never go beyond:
    no model is built that is much larger than what is wanted.
    """
    seen: set[int] = set()
    dim = possible_width(dim, parameters)
    while dim not in seen:
        seen.add(dim)
        dim = possible_width(dim * math.sqrt(size / parameters(dim)), parameters)
    reach = max(4 * STEP, round(0.1 * dim / STEP) * STEP)
    near = [other for other in range(max(STEP, dim - reach), dim + reach + 1, STEP) if parameters(other)]
    return min(near, key=lambda dim: abs(math.log(parameters(dim) / size)))


def possible_width(dim: float, parameters: Callable[[int], int | None]) -> int:
    """The multiple of STEP that is nearest to dim and that the architecture can have. Raises ValueError where none is near."""
    middle = max(1, round(dim / STEP))
    for place in (middle + sign * away for away in range(64) for sign in (-1, 1)):
        if place > 0 and parameters(STEP * place):
            return STEP * place
    raise ValueError(f"the architecture can have no dim near {STEP * middle}, as its blocks do not divide it: take other sizes")


def at_width(config: ModelConfig, dim: int) -> ModelConfig:
    """The same architecture with another dim, and heads and MLP that fit it; the MLP a multiple of 8 wide.

    Query heads share keys and values as they did, as far as there are enough of them. Where the config names head_dim it stays;
    else it is dim / num_heads, to the nearest even number.
    """
    head_dim, share = config.block_values()["head_dim"], dim / config.dim
    group = config.num_heads // config.num_kv_heads
    wanted = config.num_heads * share
    if config.num_kv_heads == 1:
        num_heads = max(1, round(wanted))
    else:
        num_heads = group * max(1, round(wanted / group)) if wanted >= group / 2 else max(1, round(wanted))
    num_kv_heads = 1 if config.num_kv_heads == 1 else max(1, num_heads // group)
    if config.head_dim is None:
        head_dim = max(2, 2 * round(dim / num_heads / 2))
    same = config.head_dim is None and head_dim * num_heads == dim
    mlp_dim = None if config.mlp_dim is None else 8 * max(1, round(config.mlp_dim * share / 8))
    return replace(
        config, dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=None if same else head_dim, mlp_dim=mlp_dim
    )


def kept_widths(layers: Layers) -> list[str]:
    """The widths that stand in layer strings, and so are the same at all sizes: "Norm->Attn(num_heads=2)->+" has num_heads=2."""
    if isinstance(layers, str):
        return list(dict.fromkeys(WIDTHS.findall(layers)))
    return list(dict.fromkeys(width for layer in layers for width in kept_widths(layer)))


def plan(specs: tuple[str, ...], sizes: tuple[str, ...], seeds: int = 1, budget: Budget = EQUAL_STEPS,
         train: TrainConfig | None = None, name: str = "scaling") -> Plan:  # fmt: skip
    """The runs of all rungs, by names that say what they are: NAME-ARCHITECTURE-SIZE-BUDGET-seed0. Raises as scaling does."""
    wanted = sorted(map(read_size, sizes))
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"--sizes {' '.join(sizes)}: name each size once")
    if len(wanted) < FEWEST_SIZES:
        raise ValueError(f"--sizes {' '.join(sizes)}: a law needs at least three sizes, and better four or more")
    if not specs or len(set(specs)) < len(specs):
        raise ValueError("name one or more architectures, each once")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give a whole number of at least 1")
    if not is_safe(name):
        raise ValueError(f"--name {name}: use letters, digits, '_', '-' and '.', such as my_ladder")
    ways = {spec: architecture(spec) for spec in specs}
    train = train or ways[specs[0]][1]
    vocab_size = load_tokenizer(train.tokenizer).vocab_size
    rungs, groups, notes = [], [], list(differing(ways))
    for spec, (config, _) in ways.items():
        for rung in ladder(spec, replace(config, max_seq_len=ways[specs[0]][0].max_seq_len), vocab_size, wanted):
            *experiment, own = spec.split("/")
            run_name = "/".join([*experiment, f"{name}-{own}-{rung.label}-{budget}"])
            rungs.append(rung)
            groups.append(Arguments(name=run_name, seeds=seeds, model=rung.config, train=budget.apply(train, rung)))
        if kept := kept_widths(config.layers):
            notes.append(f"{spec}: its layer strings set {', '.join(kept)}, which stay the same at all sizes")
    if train.data == "auto":  # all shall have what the first of them took
        begun = [Run(run) for group in groups for run in member_names(group) if Run(run).folder.exists()]
        data = begun[0].train_config.data if begun else open_source("auto").name
        groups = [replace(group, train=replace(group.train, data=data)) for group in groups]
    for group in groups:
        try:
            members(resumed(group))
        except ValueError as error:
            raise ValueError(f"{error}, or take another --name") from error
    return Plan(rungs, groups, budget, notes)


def resumed(group: Arguments) -> Arguments:
    """The group, to be gone on with where it was begun."""
    return replace(group, resume=any(Run(run).folder.exists() for run in member_names(group)))


def architecture(spec: str) -> tuple[ModelConfig, TrainConfig]:
    """The architecture of a run, of a group of runs, or of a preset, in this order, and how that is trained by itself."""
    groups = {Run(run).group: run for run in reversed(run_names())}
    run = spec if spec in run_names() else groups.get(spec)
    if run is not None:
        return Run(run).model_config, Run(run).train_config
    config, _ = config_of(spec)  # which names what there is, where there is no such preset
    return config, preset(spec).train


def differing(ways: dict[str, tuple[ModelConfig, TrainConfig]]) -> Iterator[str]:
    """A line for each architecture that is otherwise trained, or reads otherwise, by itself than the first is."""
    (first, (model, train)), *others = ways.items()
    for spec, (own_model, own_train) in others:
        changed = [f"{field.name}={getattr(own_train, field.name)!r}" for field in fields(TrainConfig)
                   if field.name not in NO_MATTER and getattr(own_train, field.name) != getattr(train, field.name)]  # fmt: skip
        if changed:
            yield f"{spec} is trained as {first} is, though by itself it has {', '.join(changed)}"
        if own_model.max_seq_len != model.max_seq_len:
            yield f"{spec} reads {model.max_seq_len} tokens at once as {first} does, though by itself {own_model.max_seq_len}"


def train_all(planned: Plan) -> bool:
    """Train what is not finished, the smallest first. False where Ctrl-C came: all is saved then, and the same call goes on.

    A run that diverges is left as it is. Raises ChildProcessError where one fails otherwise.
    """
    rungs = zip(planned.rungs, map(resumed, planned.groups), strict=True)
    for _, group in sorted(rungs, key=lambda pair: pair[0].parameters):
        todo = members(group)
        if not todo:
            continue
        say(f"{group.name}: {len(todo)} of {group.seeds} to train")
        if planned.budget.kind == "minutes":  # side by side, a minute of one would not be worth that of another
            failed, stopped = run_in_turn(todo, train_quietly)
        else:
            failed, stopped = train_members(group, todo, train_quietly)
        if stopped:
            return False
        if broken := {run: why for run, why in failed.items() if Run(run).diverged is None}:
            raise ChildProcessError("; ".join(f"{run}: {why}" for run, why in broken.items()))
    return True


def train_quietly(arguments: Arguments) -> bool:
    """Train a run with a progress bar, and write its report, which is where its stories are. False where it was stopped."""
    from train import train_one

    with redirect_stdout(io.StringIO()):
        return train_one(arguments, "python")
