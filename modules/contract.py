"""What every block promises, checked: of the base model, of modules/ and of plugins alike.

    check_block("ShortConv")                              # the block alone, or in the layer strings of its `examples`
    check_block("ShortConv", layer="ShortConv(width=7)")  # in this one

B batch, T time, M tokens of memory, D model dim.
"""

import contextlib
import copy
import io
import itertools
import math
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from config import ModelConfig, layer_steps
from data.cache import say
from fast import ops as kernels
from model import Steps, first_of_story, rope_table
from modules.norms import NORMS
from modules.registry import build_block, exported, find_block, needs_of
from shapes.comments import ShapeComments
from tools import LoggingModule

CONFIG = ModelConfig(dim=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=40, max_seq_len=80)

B, T, M, VOCAB_SIZE = 2, 71, 5, 61
CHUNKS = (7, 1, 1, 30, 2, 30)  # the sequence in uneven pieces
STORIES = ((5, 1, 65), (33, 38))  # how long the stories of each row are
WINDOW = 9
CUTS = (1, 12, 40, T - 1)  # where the future begins
TOLERANCE = 1e-4  # of the largest number of a result


class ContractError(AssertionError):
    """A block does not keep what it promises; the message is one line with its name."""


def check_block(name: str, config: ModelConfig = CONFIG, layer: str | None = None):
    """Build the block of that name in the menu, and check what CONTRIBUTING.md asks of it, on random weights and inputs.

    It is tried in the layer string, by default in each of its class attribute `examples`, or alone. Raises ContractError with
    the block's name and the promise that it breaks; ValueError for a name that is not in the menu or a context that is too short.
    """
    block = find_block(name, config)
    if config.max_seq_len < T:
        raise ValueError(f"max_seq_len={config.max_seq_len}: the contract reads {T} tokens, so give at least {T}")
    with torch.random.fork_rng(devices=[]), one_line(name):
        require(issubclass(block, LoggingModule), "it is no LoggingModule: derive it from tools.LoggingModule")
        require(vars(block).get("__doc__"), "it has no docstring: say what it does, and its shapes")
        build_block(name, {}, config, VOCAB_SIZE)  # every option has a default
        for tried in [layer] if layer else layers_to_try(name, block):
            require(name in [step for step, _ in layer_steps(tried)], f"it does not stand in {tried!r}")
            check_layer(tried, config)


def layers_to_try(name: str, block: type) -> tuple[str, ...]:
    examples = vars(block).get("examples", (name,))
    require(isinstance(examples, tuple), f"examples={examples!r}: give a tuple of layer strings, such as ({name!r},)")
    return examples


def check_layer(layer: str, config: ModelConfig, checks: tuple[Callable, ...] | None = None):
    """Every promise, or those of the checks, for the blocks of a layer string. Raises ContractError."""
    trial = Trial(layer, config)
    for check in checks or CHECKS:
        if trial.causal or check not in CAUSAL:
            torch.manual_seed(0)
            check(trial)


@contextlib.contextmanager
def one_line(name: str):
    """Whatever goes wrong inside is told as a ContractError of one line that names the block."""
    try:
        yield
    except Exception as error:  # a block is a reader's own code: anything may be wrong in it
        problem = str(error) if isinstance(error, ContractError) else f"{type(error).__name__}: {error}"
        cause = None if isinstance(error, ContractError) else error  # whose traceback says where in the block it was
        raise ContractError(f"the block {name!r} breaks the contract: {' '.join(problem.split())}") from cause


def require(condition, problem: str):
    if not condition:
        raise ContractError(problem)


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: x (B, T, D), tokens (B, T), memory (B, M, D)."""

    x: Tensor
    tokens: Tensor
    memory: Tensor

    def rows(self, rows: slice) -> "Inputs":
        return Inputs(self.x[rows], self.tokens[rows], self.memory[rows])

    def times(self, times: slice) -> "Inputs":
        return Inputs(self.x[:, times], self.tokens[:, times], self.memory)


class Trial:
    """The blocks of a layer string, every weight away from where it begins, and inputs for them."""

    def __init__(self, layer: str, config: ModelConfig):
        torch.manual_seed(0)
        self.layer, self.config = layer, config
        self.steps = randomised(Steps(layer, config, num_residuals=1, vocab_size=VOCAB_SIZE)).eval()
        self.causal = all(getattr(block, "causal", True) for block in self.steps.blocks)
        self.asked_for = set().union(*self.steps.needs)
        self.rope = rope_table(T, config.block_values["head_dim"], config.rope_theta) if config.positions == "rope" else None
        self.inputs = self.some_inputs()

    def some_inputs(self) -> Inputs:
        D = self.config.dim
        return Inputs(torch.randn(B, T, D), torch.randint(VOCAB_SIZE, (B, T)), torch.randn(B, M, D))

    def run(self, inputs: Inputs, *, steps: Steps | None = None, first=None, cache=None, start=0, rope=True, shared=None):
        """The output, as GPT would ask for it; `start` tokens have been read before.  (B, T, D)"""
        end = start + inputs.x.shape[1]
        angles = tuple(table[None, start:end] for table in self.rope) if rope and self.rope else None
        shared = {} if shared is None else shared
        y = (steps or self.steps)(
            inputs.x, rope=angles, first=first, cache=cache, tokens=inputs.tokens, memory=inputs.memory, shared=shared
        )
        require(y.shape == inputs.x.shape, f"it makes {tuple(y.shape)} of {tuple(inputs.x.shape)}: keep the shape")
        return y

    def in_training(self) -> Steps:
        """A copy, as a block may keep what it has counted in training."""
        return copy.deepcopy(self.steps).train()

    def firsts(self) -> dict[str, Tensor | None]:
        """Which token is the first that each one may look at, as int32 (B, T): that of the row, its story, or its window."""
        places = torch.arange(T, dtype=torch.int32)
        return {
            "": None,
            " (with several stories in a row)": story_begins(),
            " (with a window)": (places - WINDOW + 1).clamp(min=0).expand(B, T),
        }


def randomised(model: nn.Module) -> nn.Module:
    """So that no gain of 1, no bias of 0 and no small matrix hides a mistake."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def story_begins() -> Tensor:
    """first (B, T) of rows that hold STORIES."""
    story_ids = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in STORIES])
    return first_of_story(story_ids).int()


def require_equal(ours: Tensor, expected: Tensor, problem: str):
    off = (ours - expected).abs().max() / expected.abs().max().clamp(min=0.01)
    require(off < TOLERANCE, f"{problem} (off by {off:.2g} of the largest number)")


@torch.no_grad()
def check_repeats(trial: Trial):
    """The same again gives the same, and x is left as it is."""
    trial = Trial(trial.layer, replace(trial.config, dropout=0.5))
    given = trial.inputs.x.clone()
    once, again = trial.run(trial.inputs), trial.run(trial.inputs)
    require(trial.inputs.x.equal(given), "it changes its input in place, but the skip connection needs that as it was")
    require(once.isfinite().all(), "its output is not finite")
    require(once.equal(again), "it is not deterministic in eval: draw random numbers only where self.training")


def check_gradients(trial: Trial):
    """They reach the input, the memory where it is read, and every weight; in bfloat16 they are finite, too."""
    for dtype in (torch.float32, torch.bfloat16):
        steps, shared = trial.in_training(), {}
        x, memory = trial.inputs.x.clone().requires_grad_(), trial.inputs.memory.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = trial.run(replace(trial.inputs, x=x, memory=memory), steps=steps, shared=shared)
        loss = sum(shared.get("losses", []), (y * torch.randn_like(y)).sum())
        require(loss.isfinite(), f"its output is not finite in {dtype}")
        loss.backward()
        wanted = {"its input": x, **dict(steps.blocks.named_parameters())}
        wanted |= {"the memory": memory} if "memory" in trial.asked_for else {}
        for name, weight in wanted.items():
            if weight.requires_grad:
                require(weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}")
                require(weight.grad.isfinite().all(), f"the gradient of {name} is not finite in {dtype}")
        check_numbers(steps)


def check_numbers(steps: Steps):
    """What the optional methods say of a block that has just been trained."""
    for block in steps.blocks:
        if hasattr(block, "report"):
            for name, value in block.report().items():
                require(isinstance(name, str) and math.isfinite(value), f"report() says {name!r}: {value!r}: give finite numbers")
        if hasattr(block, "flops_per_token"):
            flops = block.flops_per_token(T)
            require(math.isfinite(flops) and flops >= 0, f"flops_per_token({T}) is {flops!r}: give a number of at least 0")


@torch.no_grad()
def check_backends(trial: Trial):
    """Every implementation that a machine may choose gives what the written-out formula does, with and without a window."""
    steps = copy.deepcopy(trial.steps)
    blocks = [block for block in steps.modules() if hasattr(block, "backend")]
    if not blocks:
        return
    for where, first in trial.firsts().items():
        outputs = {}
        for backend in ("plain", "sdpa", *(("kernel",) if kernels.fingerprint() != "none" else ())):
            for block in blocks:
                block.backend = backend
            outputs[backend] = trial.run(trial.inputs, steps=steps, first=first)
            require_equal(outputs[backend], outputs["plain"], f"attention={backend!r} gives other numbers than 'plain'{where}")


@torch.no_grad()
def check_batch(trial: Trial):
    """A row gives in a batch what it gives alone."""
    together = trial.run(trial.inputs)
    for row in range(B):
        rows = slice(row, row + 1)
        require_equal(trial.run(trial.inputs.rows(rows)), together[rows], "a row gives another result in a batch than alone")


@torch.no_grad()
def check_one_token(trial: Trial):
    y = trial.run(trial.inputs.times(slice(1)))
    require(y.isfinite().all(), "it is not finite for a single token")


@torch.no_grad()
def check_without_rope(trial: Trial):
    if "rope" in trial.asked_for:
        require(trial.run(trial.inputs, rope=False).isfinite().all(), "it is not finite where rope is None")


@torch.no_grad()
def check_stories(trial: Trial):
    """Stories of a row give what each gives alone."""
    packed = trial.run(trial.inputs, first=story_begins())
    for row, lengths in enumerate(STORIES):
        end = 0
        for length in lengths:
            start, end = end, end + length
            alone = trial.run(trial.inputs.rows(slice(row, row + 1)).times(slice(start, end)))
            cure = "" if "first" in trial.asked_for else ": forward must ask for `first`"
            problem = f"stories of a row see each other: one that begins at {start} is not as alone{cure}"
            require_equal(packed[row, start:end], alone[0], problem)


@torch.no_grad()
def check_shape_comments(trial: Trial):
    """What stands behind the lines of the blocks' files is right, and `show` shows them."""
    classes = {base for block in trial.steps.blocks for base in type(block).__mro__}
    files = {sys.modules[made.__module__].__file__ for made in classes if issubclass(made, LoggingModule)}
    with ShapeComments(*files) as comments:
        trial.run(trial.inputs)
        trial.run(trial.inputs, first=story_begins())
        if trial.causal:
            in_chunks(trial, CHUNKS)
    require(not comments.wrong, comments.wrong and comments.wrong[0])
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        rope = trial.rope and tuple(table[None] for table in trial.rope)
        trial.steps.show(trial.inputs.x, rope=rope, tokens=trial.inputs.tokens, memory=trial.inputs.memory, shared={})
    for block in trial.steps.blocks:
        require(type(block).__name__ in shown.getvalue(), "show() does not show it")


@torch.no_grad()
def check_future(trial: Trial):
    """What comes later changes nothing before it, whatever a token may look at, and in training neither."""
    for where, first in trial.firsts().items():
        require_no_future(trial, lambda inputs, first=first: trial.run(inputs, first=first), trial.inputs, where)

    def train(inputs: Inputs) -> Tensor:
        torch.manual_seed(0)  # the same dropout and noise
        return trial.run(inputs, steps=trial.in_training())

    require_no_future(trial, train, trial.inputs.rows(slice(1)), " (in training)")


def require_no_future(trial: Trial, run: Callable[[Inputs], Tensor], inputs: Inputs, where: str):
    expected, other = run(inputs), trial.some_inputs().rows(slice(len(inputs.x)))
    for cut in CUTS:
        x, tokens = inputs.x.clone(), inputs.tokens.clone()
        x[:, cut:], tokens[:, cut:] = other.x[:, cut:], other.tokens[:, cut:]
        before = run(Inputs(x, tokens, inputs.memory))[:, :cut]
        require_equal(before, expected[:, :cut], f"it sees the future{where}: what comes from {cut} on changes what is before")


@torch.no_grad()
def check_cache(trial: Trial):
    """Token by token and in chunks is as at once."""
    expected = trial.run(trial.inputs)
    for how, chunks in {"token by token": (1,) * T, "in chunks": CHUNKS, "one more": (T - 1, 1), "at once": (T,)}.items():
        cure = "" if "cache" in trial.asked_for else ": a block that mixes tokens takes `cache`"
        require_equal(in_chunks(trial, chunks), expected, f"with a cache, {how}, it gives another result than without{cure}")


def in_chunks(trial: Trial, chunks: tuple[int, ...]) -> Tensor:
    """The sequence read in pieces, with a cache.  (B, T, D)"""
    cache, parts, start = defaultdict(dict), [], 0
    for length in chunks:
        piece = trial.inputs.times(slice(start, start + length))
        parts.append(trial.run(piece, cache=cache, start=start))
        start += length
    return torch.cat(parts, dim=1)


def try_out(model: nn.Module):
    """Before a model is trained: does it run, and do the blocks of its plugins see what they must not?

    Says a line for each mistake that would train all the same: a block that sees the future, other rows or other stories, a layer
    that ends without its skip. Raises ValueError with block and line where the model cannot be run.
    """
    config = model.config
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if config.plugins:
            run_once(model)
        for name, layer in plugin_layers(config):
            try:
                with one_line(name):
                    check_layer(layer, replace(config, max_seq_len=max(T, config.max_seq_len)), NOT_TO_BE_SEEN)
            except ContractError as error:
                say(f"warning: {error}")
    for branch in branches(config):
        last = branch[-1][0]
        if last not in ("+", "|", "Norm", *NORMS) and {"+", "|"} & {name for name, _ in branch}:  # post-norm ends with a norm
            say(f"warning: no + behind {last}, the last block of a layer: what it gives takes the place of the whole stream")


def run_once(model: nn.Module):
    """Forward and back through a copy of it, on a few tokens. Raises ValueError with block and line where that fails."""
    trial, entered = copy.deepcopy(model).train(), []
    tokens = torch.arange(2 * min(8, model.config.max_seq_len), device=next(model.parameters()).device).view(2, -1)
    tokens = tokens % model.vocab_size
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: entered.append(module))
    try:
        _, loss = trial(tokens, tokens, **needs_of(trial, story_ids=torch.zeros_like(tokens)))
        loss.backward()
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        blocks = {block for steps in trial.modules() if isinstance(steps, Steps) for block in steps.blocks}
        inside = next((type(module).__name__ for module in reversed(entered) if module in blocks), type(trial).__name__)
        torchs = Path(torch.__file__).parent
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if torchs not in Path(frame.filename).parents]
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        cure = f"contract.check_block({inside!r}, config) tries it alone"
        raise ValueError(f"the model cannot be run, it fails in {inside} ({where}: {problem}). {cure}") from error
    finally:
        hook.remove()


def branches(config: ModelConfig) -> list[list[tuple[str, dict]]]:
    """The steps of every layer string of a config, each string once."""
    strings = [branch for layer in config.depth_layers for branch in ([layer] if isinstance(layer, str) else layer)]
    return [layer_steps(branch) for branch in dict.fromkeys(strings)]


def plugin_layers(config: ModelConfig) -> list[tuple[str, str]]:
    """Name and layer string, to try it in, of each block of a plugin that the config uses."""
    own = {name: block for plugin in config.plugins for name, block in exported(plugin, "BLOCKS").items()}
    found = []
    for name, options in itertools.chain(*branches(config)):
        if name in own:
            written = f"{name}({', '.join(f'{option}={value!r}' for option, value in options.items())})"
            found += [(name, layer) for layer in vars(own[name]).get("examples", (written,))]
    return list(dict.fromkeys(found))


CHECKS = (
    check_repeats, check_backends, check_gradients, check_batch, check_one_token, check_without_rope, check_future, check_cache,
    check_stories, check_shape_comments,
)  # fmt: skip
CAUSAL = (check_future, check_cache)  # what a block with `causal = False` does not promise
NOT_TO_BE_SEEN = (check_backends, check_batch, check_future, check_stories)
