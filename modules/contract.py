"""The contract of blocks, as checks: for those of the base model, of modules/ and of plugins alike.

    check_block("ShortConv")                              # the block alone, or in the layer strings of its `examples`
    check_block("ShortConv", layer="ShortConv(width=7)")  # in this layer string

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

from config import ModelConfig, all_steps, format_step, init_parameters, layer_steps
from data.cache import say
from model import Branch, Cache, Norm, rope_table, story_starts
from modules.registry import accepted_kwargs, build_block, build_branch, exported, find_block
from shapes.comments import ShapeComments
from tools import LoggingModule, show_shapes

CONFIG = ModelConfig(dim=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, max_seq_len=80)

B, T, M, VOCAB_SIZE = 2, 71, 5, 61
CHUNKS = (7, 1, 1, 30, 2, 30)  # the sequence in uneven pieces
STORIES = ((5, 1, 65), (33, 38))  # lengths of the stories in each row
WINDOW = 9
CUTS = (1, 12, 40, T - 1)  # where the future starts
DRAWS = 20  # training passes in which every weight must get a gradient
TOLERANCE = 1e-4  # relative to the largest number of a result

Swap = Callable[[nn.Module], None]  # swaps faster classes into a model, as those of fast/


class ContractError(AssertionError):
    """A block does not keep what it promises; the message is one line with its name."""


def check_block(name: str, config: ModelConfig = CONFIG, layer: str | None = None, swaps: tuple[Swap, ...] = ()):
    """Build a block by name and check the contract in CONTRIBUTING.md, on random weights and inputs.

    Parameters
    ----------
    name : str
        The block, of modules/ or of a plugin in the config.
    config : ModelConfig, optional
        The sizes, and the plugins.
    layer : str, optional
        The layer string to try it in; by default each of its class attribute `examples`, or the block alone.
    swaps : tuple of callables, optional
        Functions that swap faster classes into a model, such as `fast.use`; none of them may change a number.

    Raises
    ------
    ContractError
        One line with the block's name and the promise that it breaks.
    ValueError
        For an unknown block, or a context that is too short.

    Examples
    --------
    >>> check_block("MLP")
    """
    block = find_block(name, config)
    if config.max_seq_len < T:
        raise ValueError(f"max_seq_len={config.max_seq_len}: the contract reads {T} tokens, so give at least {T}")
    with torch.random.fork_rng(devices=[]), one_line(name):
        require(issubclass(block, LoggingModule), "it is no LoggingModule: derive it from tools.LoggingModule")
        require(vars(block).get("__doc__"), "it has no docstring: say what it does, and its shapes")
        if "layer" not in init_parameters(block):
            build_block(name, {}, config, VOCAB_SIZE)  # every option has a default
        for tried in [layer] if layer else layers_to_try(name, block):
            require(name in [step for step, *_ in all_steps(tried)], f"it does not stand in {tried!r}")
            check_layer(tried, config, swaps=swaps)


def layers_to_try(name: str, block: type) -> tuple[str, ...]:
    is_holder = "layer" in init_parameters(block)
    examples = vars(block).get("examples", (f"{name}([Norm->Attn->+->Norm->MLP->+])" if is_holder else name,))
    require(isinstance(examples, tuple), f"examples={examples!r}: give a tuple of layer strings, such as ({name!r},)")
    return examples


def check_layer(layer: str, config: ModelConfig, checks: tuple[Callable, ...] | None = None, swaps: tuple[Swap, ...] = ()):
    """Run all checks, or the given ones, on the blocks of a layer string. Raises ContractError."""
    trial = Trial(layer, config, swaps)
    for check in checks or CHECKS:
        if trial.causal or check not in CAUSAL:
            torch.manual_seed(0)
            check(trial)


@contextlib.contextmanager
def one_line(name: str):
    """Turn any error inside into a ContractError of one line that names the block."""
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
    """Inputs of a layer: x (B, T, D), tokens (B, T), memory (B, M, D)."""

    x: Tensor
    tokens: Tensor
    memory: Tensor

    def rows(self, rows: slice) -> "Inputs":
        return Inputs(self.x[rows], self.tokens[rows], self.memory[rows])

    def times(self, times: slice) -> "Inputs":
        return Inputs(self.x[:, times], self.tokens[:, times], self.memory)


class Trial:
    """The blocks of a layer string with randomised weights, and inputs for them."""

    def __init__(self, layer: str, config: ModelConfig, swaps: tuple[Swap, ...] = ()):
        torch.manual_seed(0)
        self.layer, self.config, self.swaps = layer, config, swaps
        self.branch = randomised(build_branch(layer, config, VOCAB_SIZE)).eval()
        self.branches = [module for module in self.branch.modules() if isinstance(module, Branch)]
        self.blocks = [block for branch in self.branches for block in branch.blocks]
        self.causal = all(getattr(block, "causal", True) for block in self.blocks)
        self.accepted = {name for branch in self.branches for names in branch.accepted if names is not None for name in names}
        self.rope = rope_table(T, config.block_values()["head_dim"], config.rope_theta) if config.positions == "rope" else None
        self.inputs = self.some_inputs()

    def some_inputs(self) -> Inputs:
        D = self.config.dim
        return Inputs(torch.randn(B, T, D), torch.randint(VOCAB_SIZE, (B, T)), torch.randn(B, M, D))

    def run(self, inputs: Inputs, *, branch: Branch | None = None, rope=True, shared=None, start=0, **given):
        """The output, as in GPT after `start` earlier tokens; given: story_start, window, cache.  (B, T, D)"""
        end = start + inputs.x.shape[1]
        given["rope"] = tuple(table[None, start:end] for table in self.rope) if rope and self.rope else None
        given |= {"tokens": inputs.tokens, "memory": inputs.memory, "shared": shared or {"losses": defaultdict(float)}}
        y = (branch or self.branch)(inputs.x, **{"story_start": None, "window": None} | given)
        require(y.shape == inputs.x.shape, f"it makes {tuple(y.shape)} of {tuple(inputs.x.shape)}: keep the shape")
        return y

    def training_copy(self) -> Branch:
        """A copy in training mode: a block may keep what it has counted there."""
        return copy.deepcopy(self.branch).train()


# what a token may see: the row so far, its story, or a window
VIEWS = {
    "": {},
    " (with several stories in a row)": {"story_start": story_starts(torch.stack([
        torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in STORIES
    ]))},
    " (with a window)": {"window": WINDOW},
}  # fmt: skip
PACKED = VIEWS[" (with several stories in a row)"]


def randomised(model: nn.Module) -> nn.Module:
    """Add noise to every weight, so that no gain of 1, no bias of 0 and no small matrix hides a mistake."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def require_equal(ours: Tensor, expected: Tensor, problem: str):
    off = (ours - expected).abs().max() / expected.abs().max().clamp(min=0.01)
    require(off < TOLERANCE, f"{problem} (off by {off:.2g} of the largest number)")


@torch.no_grad()
def check_repeats(trial: Trial):
    """Two runs in eval give the same, and x is not changed in place."""
    trial = Trial(trial.layer, replace(trial.config, dropout=0.5))
    given = trial.inputs.x.clone()
    once, again = trial.run(trial.inputs), trial.run(trial.inputs)
    require(trial.inputs.x.equal(given), "it changes its input in place, but the skip connection needs that as it was")
    require(once.isfinite().all(), "its output is not finite")
    require(once.equal(again), "it is not deterministic in eval: draw random numbers only where self.training")


def check_gradients(trial: Trial):
    """Gradients reach the input, the memory if it is read, and every weight; in bfloat16 they are finite, too."""
    for dtype in (torch.float32, torch.bfloat16):
        branch, x = trial.training_copy(), trial.inputs.x.clone().requires_grad_()
        memory = trial.inputs.memory.clone().requires_grad_()
        targets = {"its input": x, **dict(branch.blocks.named_parameters())}
        targets |= {"the memory": memory} if "memory" in trial.accepted else {}
        for _ in range(DRAWS):  # a block may skip some of its weights at random
            shared = {"losses": defaultdict(float)}
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = trial.run(replace(trial.inputs, x=x, memory=memory), branch=branch, shared=shared)
            loss = sum(shared["losses"].values(), (y * torch.randn_like(y)).sum())
            require(loss.isfinite(), f"its output is not finite in {dtype}")
            loss.backward()
            if all(weight.grad is not None and weight.grad.any() for weight in targets.values() if weight.requires_grad):
                break
        for name, weight in targets.items():
            if weight.requires_grad:
                require(weight.grad is not None and weight.grad.any(), f"no gradient reaches {name}")
                require(weight.grad.isfinite().all(), f"the gradient of {name} is not finite in {dtype}")
        check_numbers(branch)


def check_numbers(branch: Branch):
    """The optional methods of a block that has just been trained return finite numbers."""
    for block in branch.modules():
        if hasattr(block, "report"):
            for name, value in block.report().items():
                require(isinstance(name, str) and math.isfinite(value), f"report() says {name!r}: {value!r}: give finite numbers")
        if hasattr(block, "flops_per_token"):
            flops = block.flops_per_token(T)
            require(math.isfinite(flops) and flops >= 0, f"flops_per_token({T}) is {flops!r}: give a number of at least 0")


def check_swaps(trial: Trial):
    """Faster classes give the outputs and gradients of the plain ones."""
    for swap in trial.swaps:
        for where, view in VIEWS.items():
            results = []
            for branch in (trial.training_copy(), trial.training_copy()):
                if results:
                    swap(branch)
                torch.manual_seed(0)  # the same dropout and noise
                x = trial.inputs.x.clone().requires_grad_()
                y = trial.run(replace(trial.inputs, x=x), branch=branch, **view)
                y.square().sum().backward()
                leaves = [x, *branch.parameters()]
                gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
                results.append((y.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
            (expected, expected_gradients), (ours, gradients) = results
            require_equal(ours, expected, f"a faster class gives other numbers{where}")
            require_equal(gradients, expected_gradients, f"a faster class has other gradients{where}")


@torch.no_grad()
def check_batch(trial: Trial):
    """A row gives the same in a batch as alone."""
    together = trial.run(trial.inputs)
    for row in range(B):
        rows = slice(row, row + 1)
        require_equal(trial.run(trial.inputs.rows(rows)), together[rows], "a row gives another result in a batch than alone")


@torch.no_grad()
def check_one_token_and_no_rope(trial: Trial):
    require(trial.run(trial.inputs.times(slice(1))).isfinite().all(), "it is not finite for a single token")
    if "rope" in trial.accepted:
        require(trial.run(trial.inputs, rope=False).isfinite().all(), "it is not finite where rope is None")
    if "memory" in trial.accepted:
        try:
            trial.run(replace(trial.inputs, memory=None))
        except Exception as error:  # a reader's own code
            cure = "add nothing then, as for the tokens that the memory is made from"
            raise ContractError(f"it fails where memory is None ({error}): {cure}") from error


@torch.no_grad()
def check_stories(trial: Trial):
    """Packed stories give the same as each alone."""
    packed = trial.run(trial.inputs, **PACKED)
    for row, lengths in enumerate(STORIES):
        end = 0
        for length in lengths:
            start, end = end, end + length
            alone = trial.run(trial.inputs.rows(slice(row, row + 1)).times(slice(start, end)))
            cure = "" if "story_start" in trial.accepted else ": forward must ask for `story_start`"
            problem = f"stories of a row see each other: one that starts at {start} is not as alone{cure}"
            require_equal(packed[row, start:end], alone[0], problem)


@torch.no_grad()
def check_shape_comments(trial: Trial):
    """The shape comments in the blocks' files are right, and `show` shows the blocks."""
    classes = {base for block in trial.blocks for base in type(block).__mro__}
    files = {sys.modules[made.__module__].__file__ for made in classes if issubclass(made, LoggingModule)}
    with ShapeComments(*files) as comments:
        trial.run(trial.inputs)
        trial.run(trial.inputs, **PACKED)
        if trial.causal:
            in_chunks(trial, CHUNKS)
    require(not comments.wrong, comments.wrong and comments.wrong[0])
    rope = trial.rope and tuple(table[None] for table in trial.rope)
    given = {"tokens": trial.inputs.tokens, "memory": trial.inputs.memory, "shared": {"losses": defaultdict(float)}}
    with show_shapes(trial.branch, file=io.StringIO()) as calls:
        trial.branch(trial.inputs.x, rope=rope, **given)
    require(modules_in(calls) >= set(trial.blocks), "show() does not show it")


def modules_in(calls: list) -> set[nn.Module]:
    """The modules of recorded calls, inner ones included."""
    calls = [call for call in calls if hasattr(call, "children")]
    return {call.module for call in calls} | {module for call in calls for module in modules_in(call.children)}


@torch.no_grad()
def check_future(trial: Trial):
    """Later tokens change nothing before them, whatever a token may see, and in training neither."""
    for where, view in VIEWS.items():
        require_no_future(trial, lambda inputs, view=view: trial.run(inputs, **view), trial.inputs, where)

    def train(inputs: Inputs) -> Tensor:
        torch.manual_seed(0)  # the same dropout and noise
        return trial.run(inputs, branch=trial.training_copy())

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
    """With a cache, token by token and in chunks give the same as the whole sequence at once."""
    expected = trial.run(trial.inputs)
    for how, chunks in {"token by token": (1,) * T, "in chunks": CHUNKS, "one more": (T - 1, 1), "at once": (T,)}.items():
        cure = "" if "cache" in trial.accepted else ": a block that mixes tokens takes `cache`"
        require_equal(in_chunks(trial, chunks), expected, f"with a cache, {how}, it gives another result than without{cure}")


def in_chunks(trial: Trial, chunks: tuple[int, ...]) -> Tensor:
    """Read the sequence in pieces, with a cache.  (B, T, D)"""
    cache, parts, start = Cache(), [], 0
    for length in chunks:
        piece = trial.inputs.times(slice(start, start + length))
        parts.append(trial.run(piece, cache=cache, start=start))
        cache.turns.clear()
        start += length
    return torch.cat(parts, dim=1)


def try_out(model: nn.Module):
    """Check, before training, that a model runs and that the blocks of its plugins do not see what they must not.

    Prints a line for each mistake that would train all the same: a block that sees the future, other rows or other stories, a
    layer that ends without its skip. Raises ValueError with block and line if the model cannot run.
    """
    config = model.config
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        if config.plugins:
            run_once(model)
        for name, layer in plugin_layers(config):
            try:
                with one_line(name):
                    check_layer(layer, replace(config, max_seq_len=max(T, config.max_seq_len)), VISIBILITY)
            except ContractError as error:
                say(f"warning: {error}")
    for layer in dict.fromkeys(config.layer_strings):
        names = [name for name, _ in layer_steps(layer)]
        block = find_block(names[-1], config) if names[-1] not in "+|" else Norm  # a norm may be the last, as in post-norm
        if {"+", "|"} & set(names) and not issubclass(block, Norm) and "layer" not in init_parameters(block):
            say(f"warning: no + after {names[-1]}, the last block of a layer: its output replaces the whole residual stream")


def run_once(model: nn.Module):
    """Run a copy of the model forward and backward on a few tokens. Raises ValueError with block and line if that fails."""
    trial, entered = copy.deepcopy(model).train(), []
    tokens = torch.arange(2 * min(8, model.config.max_seq_len), device=next(model.parameters()).device).view(2, -1)
    tokens = tokens % model.vocab_size
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, _: entered.append(module))
    try:
        _, loss = trial(tokens, tokens, **accepted_kwargs(trial, story_ids=torch.zeros_like(tokens)))
        loss.backward()
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        blocks = {block for branch in trial.modules() if isinstance(branch, Branch) for block in branch.blocks}
        inside = next((type(module).__name__ for module in reversed(entered) if module in blocks), type(trial).__name__)
        torchs = Path(torch.__file__).parent
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if torchs not in Path(frame.filename).parents]
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}"
        cure = f"contract.check_block({inside!r}, config) tries it alone"
        raise ValueError(f"the model cannot be run, it fails in {inside} ({where}: {problem}). {cure}") from error
    finally:
        hook.remove()


def plugin_layers(config: ModelConfig) -> list[tuple[str, str]]:
    """Each block of a plugin that the config uses: its name, and a layer string to try it in."""
    own = {name: block for plugin in config.plugins for name, block in exported(plugin, "BLOCKS").items()}
    layers = [
        (name, layer)
        for name, options in itertools.chain(*map(layer_steps, config.layer_strings)) if name in own
        for layer in vars(own[name]).get("examples", (format_step(name, options),))
    ]  # fmt: skip
    return list(dict.fromkeys(layers))


CHECKS = (
    check_repeats, check_gradients, check_batch, check_one_token_and_no_rope, check_future, check_cache, check_stories,
    check_swaps, check_shape_comments,
)  # fmt: skip
CAUSAL = (check_future, check_cache)  # not for a block with `causal = False`
VISIBILITY = (check_batch, check_future, check_stories)
