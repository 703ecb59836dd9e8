"""A ladder of sizes: scale the width of an architecture to match given parameter counts, and train every rung.

Depth, layer strings and all other fields are unchanged. The number of heads scales with dim, so that their width stays about the
same, and the MLP keeps its ratio to dim. Widths set in a layer string are not scaled.

Parameter counts include embeddings and all experts, as in metrics/cost.py. Kaplan et al. (2020, arXiv 2001.08361, section 1.3)
excluded embeddings. This distorts the law if embeddings are a large share, as in small models: there, total counts recover the
law of large models and non-embedding counts do not (Pearce and Song 2024, arXiv 2406.12907).
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
from training.schedules import growing_batch_size
from training.seeds import member_names, members, run_in_turn, train_members

STEP = 4  # dim is a multiple of this
MAX_ERROR = 0.15  # maximum relative error of a rung's size
MIN_SIZES = 3
SEEDS = 3  # runs of each size by default
MAX_SIZE = 100_000_000  # parameters: the limit for a laptop
WIDTHS = re.compile(r"\b\w*(?:dim|rank|heads)=\d+")  # widths in a layer string, which are not scaled

UNREPORTED = {  # training options whose differences are not reported
    "max_steps", "max_minutes", "eval_every", "checkpoint_every", "seed", "data_seed", "device", "dtype", "compile", "threads",
    "micro_batch_size",
}  # fmt: skip


@dataclass(frozen=True)
class Rung:
    """An architecture at one size."""

    architecture: str  # its name
    target: int  # parameters
    parameters: int  # actual
    config: ModelConfig

    @property
    def label(self) -> str:
        return format_size(self.target, digits=10)

    def __str__(self) -> str:
        config, values = self.config, self.config.block_values()
        heads = f"{config.num_heads} head{'s' * (config.num_heads > 1)} of {values['head_dim']}"
        error = f"{self.parameters / self.target - 1:+.1%}"
        return (f"{self.architecture} at {self.label}: {self.parameters:,} parameters ({error}): dim {config.dim}, {heads}, "
                f"mlp_dim {values['mlp_dim']}, {config.num_layers} layers")  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """Training budget of each rung.  kind: "steps", "minutes" or "tokens_per_parameter"."""

    kind: str
    amount: float

    def __post_init__(self):
        if not (self.amount > 0 and np.isfinite(self.amount)) or (self.kind == "steps" and self.amount != int(self.amount)):
            raise ValueError(f"--{self.kind} {self.amount:g}: give a positive {'whole ' * (self.kind == 'steps')}number")

    def __str__(self) -> str:
        return f"{self.amount:.10g}{self.kind}"

    def apply(self, config: TrainConfig, rung: Rung) -> TrainConfig:
        """Set the budget in a config. Tokens are counted in sequences of max_seq_len."""
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
    """The runs to train: a group per rung, a run per seed."""

    rungs: list[Rung]
    groups: list[Arguments]  # one per rung
    budget: Budget
    notes: list[str]


def read_size(text: str) -> int:
    """Parse a size: '0.25m' and '250k' are 250000. Raises ValueError if invalid."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([km]?)", text.strip().lower())
    size = float(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]] if match else 0
    if size < 1:
        raise ValueError(f"--sizes {text}: write a number of parameters, such as 250k, 0.5m or 2m")
    if size > MAX_SIZE:
        raise ValueError(f"--sizes {text}: give at most {format_size(MAX_SIZE)} parameters, which is a lot for a small machine")
    return round(size)


def format_size(size: float, digits: int = 3) -> str:
    """Format 1234567 as '1.23m'."""
    return f"{size / 1e6:.{digits}g}m"


def ladder(
    architecture: str, config: ModelConfig, vocab_size: int, sizes: list[int], tokenizer: str | None = None
) -> list[Rung]:
    """Scale the architecture to each size. Raises ValueError for a size it cannot match."""

    @cache
    def parameters(dim: int) -> int | str:
        """Count the parameters at this dim; if a block does not accept the dim, the reason."""
        try:
            with torch.random.fork_rng(devices=[]):
                model = build_model(at_width(config, dim), vocab_size, tokenizer)
        except ValueError as error:
            return str(error)
        return sum(weight.numel() for weight in model.parameters())

    with torch.random.fork_rng(devices=[]):
        build_model(config, vocab_size, tokenizer)  # raise errors that do not depend on dim
    rungs = []
    for size in sizes:
        dim = nearest_width(config.dim, size, parameters)
        count = parameters(dim)
        if abs(count / size - 1) > MAX_ERROR:
            raise ValueError(f"{architecture} cannot have {format_size(size)} parameters: the nearest is {format_size(count)}, "
                             f"with dim={dim}. Take that size, or an architecture of another depth")  # fmt: skip
        rungs.append(Rung(architecture, size, count, at_width(config, dim)))
    for rung, other in itertools.combinations(rungs, 2):
        if rung.parameters == other.parameters:
            raise ValueError(f"{architecture} is the same at {rung.label} and {other.label}: leave one of them out")
    return rungs


def nearest_width(dim: int, size: int, parameters: Callable[[int], int | str]) -> int:
    """Find the dim with the parameter count nearest to size, starting from dim.

    The count grows between linearly and quadratically in dim, so scaling dim by the square root of the ratio converges without
    overshooting: no model much larger than size is built.
    """
    visited: set[int] = set()
    dim = possible_width(dim, parameters)
    while dim not in visited:
        visited.add(dim)
        dim = possible_width(dim * math.sqrt(size / parameters(dim)), parameters)
    reach = max(4 * STEP, round(0.1 * dim / STEP) * STEP)
    near = range(max(STEP, dim - reach), dim + reach + 1, STEP)
    near = [other for other in near if isinstance(parameters(other), int)]
    return min(near, key=lambda dim: abs(math.log(parameters(dim) / size)))


def possible_width(dim: float, parameters: Callable[[int], int | str]) -> int:
    """Round dim to the nearest multiple of STEP that is valid for the architecture. Raises ValueError if there is none."""
    middle = max(1, round(dim / STEP))
    for multiple in (middle + sign * offset for offset in range(64) for sign in (-1, 1)):
        if multiple > 0 and isinstance(parameters(STEP * multiple), int):
            return STEP * multiple
    raise ValueError(f"no dim near {STEP * middle} is valid ({parameters(STEP * middle)}): take other sizes")


def at_width(config: ModelConfig, dim: int) -> ModelConfig:
    """Change dim, and scale the number of heads and mlp_dim (a multiple of 8) with it.

    The number of query heads per KV head is kept if there are enough heads. A head_dim set in the config is kept; otherwise it is
    dim / num_heads, rounded to an even number.
    """
    head_dim, share = config.block_values()["head_dim"], dim / config.dim
    group = config.num_heads // config.num_kv_heads
    target = config.num_heads * share
    if config.num_kv_heads > 1 and target >= group / 2:
        num_heads = group * max(1, round(target / group))
    else:
        num_heads = max(1, round(target))
    num_kv_heads = 1 if config.num_kv_heads == 1 else max(1, num_heads // group)
    if config.head_dim is None:
        head_dim = max(2, 2 * round(dim / num_heads / 2))
    is_default = config.head_dim is None and head_dim * num_heads == dim
    mlp_dim = None if config.mlp_dim is None else 8 * max(1, round(config.mlp_dim * share / 8))
    head_dim = None if is_default else head_dim
    return replace(config, dim=dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, mlp_dim=mlp_dim)


def fixed_widths(layers: Layers) -> list[str]:
    """List the widths set in layer strings, which are not scaled: num_heads=2 in "Norm->Attn(num_heads=2)->+"."""
    if isinstance(layers, str):
        return list(dict.fromkeys(WIDTHS.findall(layers)))
    return list(dict.fromkeys(width for layer in layers for width in fixed_widths(layer)))


def plan(specs: tuple[str, ...], sizes: tuple[str, ...], seeds: int = SEEDS, budget: Budget = EQUAL_STEPS,
         train: TrainConfig | None = None, name: str = "scaling") -> Plan:  # fmt: skip
    """Plan the runs, named NAME-ARCHITECTURE-SIZE-BUDGET-seed0. Raises ValueError for an invalid option or size."""
    targets = sorted(map(read_size, sizes))
    if len(set(targets)) < len(targets):
        raise ValueError(f"--sizes {' '.join(sizes)}: name each size once")
    if len(targets) < MIN_SIZES:
        raise ValueError(f"--sizes {' '.join(sizes)}: a law needs at least three sizes, and better four or more")
    if not specs or len(set(specs)) < len(specs):
        raise ValueError("name one or more architectures, each once")
    if seeds < 1:
        raise ValueError(f"--seeds {seeds}: give a whole number of at least 1")
    if not is_safe(name):
        raise ValueError(f"--name {name}: use letters, digits, '_', '-' and '.', such as my_ladder")
    architectures = {spec: architecture(spec) for spec in specs}
    context, train = architectures[specs[0]][0].max_seq_len, train or architectures[specs[0]][1]
    vocab_size = load_tokenizer(train.tokenizer).vocab_size
    rungs, groups, notes = [], [], list(differences(architectures))
    if seeds == 1:
        notes.append("--seeds 1: a single seed gives estimates, without intervals and verdicts")
    for spec, (config, _) in architectures.items():
        for rung in ladder(spec, replace(config, max_seq_len=context), vocab_size, targets, train.tokenizer):
            *experiment, own = spec.split("/")
            run_name = "/".join([*experiment, f"{name}-{own}-{rung.label}-{budget}"])
            rungs.append(rung)
            groups.append(Arguments(name=run_name, seeds=seeds, model=rung.config, train=budget.apply(train, rung)))
        if widths := fixed_widths(config.layers):
            notes.append(f"{spec}: its layer strings set {', '.join(widths)}, which are the same at all sizes")
    if train.data == "auto":  # use the same data for all runs
        existing = [Run(run) for group in groups for run in member_names(group) if Run(run).is_begun]
        data = existing[0].train_config.data if existing else open_source("auto").name
        groups = [replace(group, train=replace(group.train, data=data)) for group in groups]
    for group in groups:
        try:
            members(resumed(group))
        except ValueError as error:
            raise ValueError(f"{error}, or take another --name") from error
    return Plan(rungs, groups, budget, notes)


def resumed(group: Arguments) -> Arguments:
    """Set resume if any run of the group has been begun."""
    return replace(group, resume=any(Run(run).is_begun for run in member_names(group)))


def architecture(spec: str) -> tuple[ModelConfig, TrainConfig]:
    """Look up the architecture and training config of a run, a group of runs, or a preset, in this order."""
    groups = {Run(run).group: run for run in reversed(run_names())}
    run = spec if spec in run_names() else groups.get(spec)
    if run is not None:
        return Run(run).model_config, Run(run).train_config
    config, _ = config_of(spec)  # an unknown name raises an error that lists the presets
    return config, preset(spec).train


def differences(architectures: dict[str, tuple[ModelConfig, TrainConfig]]) -> Iterator[str]:
    """Report architectures whose own training options or context differ from those of the first."""
    (first, (model, train)), *others = architectures.items()
    for spec, (own_model, own_train) in others:
        own = [f"{field.name}={getattr(own_train, field.name)!r}" for field in fields(TrainConfig)
               if field.name not in UNREPORTED and getattr(own_train, field.name) != getattr(train, field.name)]  # fmt: skip
        if own:
            yield f"{spec} is trained with the options of {first}, not its own {', '.join(own)}"
        if own_model.max_seq_len != model.max_seq_len:
            yield f"{spec} has the context of {first}, {model.max_seq_len} tokens, not its own {own_model.max_seq_len}"


def train_all(planned: Plan) -> bool:
    """Train the unfinished runs, smallest first. Returns False on Ctrl-C: runs are saved, and the same call resumes them.

    Diverged runs are skipped. Raises ChildProcessError if a run fails for another reason.
    """
    rungs = zip(planned.rungs, map(resumed, planned.groups), strict=True)
    for _, group in sorted(rungs, key=lambda pair: pair[0].parameters):
        unfinished = members(group)
        if not unfinished:
            continue
        say(f"{group.name}: {len(unfinished)} of {group.seeds} to train")
        if planned.budget.kind == "minutes":  # parallel runs would slow each other down
            failed, stopped = run_in_turn(unfinished, train_quietly)
        else:
            failed, stopped = train_members(group, unfinished, train_quietly)
        if stopped:
            return False
        if broken := {run: why for run, why in failed.items() if Run(run).diverged is None}:
            raise ChildProcessError("; ".join(f"{run}: {why}" for run, why in broken.items()))
    return True


def train_quietly(arguments: Arguments) -> bool:
    """Train a run, showing only a progress bar. Returns False if stopped."""
    from train import train_one

    with redirect_stdout(io.StringIO()):
        return train_one(arguments, "python")
