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
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, ModelConfig, all_steps, init_parameters
from data.cache import say
from model import Branch, Cache, rope_table, story_starts
from modules.blame import TOLERANCE, blame, first_difference, hidden_weights, record_calls, relative_error, takes_cache
from modules.explain import explain
from modules.registry import build_block, build_branch, find_block
from shapes.comments import ShapeComments
from tools import LoggingModule, show_shapes

CONFIG = ModelConfig(dim=24, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=24, max_seq_len=80)

B, T, M, VOCAB_SIZE = 2, 71, 5, 61
CHUNKS = (7, 1, 1, 30, 2, 30)  # the sequence in uneven pieces
STORIES = ((5, 1, 65), (33, 38))  # lengths of the stories in each row
WINDOW = 9
CUTS = (1, 12, 40, T - 1)  # where the future starts
DRAWS = 20  # training passes in which every weight of a block that draws random numbers must get a gradient

Swap = Callable[[nn.Module], None]  # swaps faster classes into a model, as those of fast/


class ContractError(ValueError):
    """A block or a model does not keep what it promises; the message is one line with its name."""


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
        problem = str(error) if isinstance(error, ContractError) else explain(error)
        cause = None if isinstance(error, ContractError) else error  # whose traceback says where in the block it was
        raise ContractError(f"the block {name!r} breaks the contract: {problem}") from cause


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
        """The output, as in GPT after `start` earlier tokens; given: story_start, window, cache, targets.  (B, T, D)"""
        end, branch = start + inputs.x.shape[1], branch or self.branch
        given["rope"] = tuple(table[None, start:end] for table in self.rope) if rope and self.rope else None
        shared = {"losses": defaultdict(float)} if shared is None else shared
        targets = F.pad(inputs.tokens[:, 1:], (0, 1), value=IGNORE) if branch.training else None
        given |= {"tokens": inputs.tokens, "memory": inputs.memory, "shared": shared}
        y = branch(inputs.x, **{"story_start": None, "window": None, "targets": targets} | given)
        require(isinstance(y, Tensor), f"its forward returns a {type(y).__name__}: return the tensor x alone")
        require(y.shape == inputs.x.shape, f"it makes {tuple(y.shape)} of {tuple(inputs.x.shape)}: keep the shape")
        same = y.dtype == inputs.x.dtype or torch.is_autocast_enabled("cpu")
        require(same, f"it makes {y.dtype} of {inputs.x.dtype}: keep the dtype, as by .type_as(x)")
        require(branch.training or not shared["losses"], "it adds a loss in eval, too: add it only where self.training")
        for name, loss in shared["losses"].items():
            is_number = isinstance(loss, Tensor) and loss.dim() == 0 and loss.isfinite()
            require(is_number, f"its loss {name!r} is {' '.join(repr(loss).split())}: add a finite tensor without axes")
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


def randomised(model: nn.Module, scale: float = 0.2) -> nn.Module:
    """Add noise to every weight, so that no gain of 1, no bias of 0 and no small matrix hides a mistake."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * scale)
    return model


def require_equal(ours: Tensor, expected: Tensor, problem: str):
    off = relative_error(ours, expected)
    require(off < TOLERANCE, f"{problem} (off by {off:.2g} of the largest number)")


@torch.no_grad()
def check_repeats(trial: Trial):
    """Two runs in eval give the same, and x is not changed in place."""
    trial = Trial(trial.layer, replace(trial.config, dropout=0.5))
    given = trial.inputs.x.clone()
    once, again = trial.run(trial.inputs), trial.run(trial.inputs)
    require(trial.inputs.x.equal(given), "it changes its input in place, but the skip connection needs that as it was")
    require(once.isfinite().all(), "its output is not finite")
    random_state = torch.get_rng_state()
    trial.run(trial.inputs)
    require(random_state.equal(torch.get_rng_state()), "it draws random numbers in eval: draw them only where self.training")
    require(once.equal(again), "it keeps something from call to call: in eval, only `cache` and `shared` may change")


def check_gradients(trial: Trial):
    """Gradients reach the input, the memory if it is read, and every weight; in bfloat16 they are finite, too."""
    for dtype in (torch.float32, torch.bfloat16):
        branch = trial.training_copy()
        x, memory = trial.inputs.x.clone().requires_grad_(), trial.inputs.memory.clone().requires_grad_()
        weights = {"its input": x, **dict(branch.blocks.named_parameters())}
        weights |= {"the memory": memory} if "memory" in trial.accepted else {}
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        for _ in range(DRAWS):
            shared, random_state = {"losses": defaultdict(float)}, torch.get_rng_state()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = trial.run(replace(trial.inputs, x=x, memory=memory), branch=branch, shared=shared)
            is_random = not random_state.equal(torch.get_rng_state())  # as a block that leaves itself out at times
            loss = sum(shared["losses"].values(), (y * torch.randn_like(y)).sum())
            require(loss.isfinite(), f"its output is not finite in {dtype}")
            loss.backward()
            without = [name for name, weight in weights.items() if weight.grad is None or not weight.grad.any()]
            if not (without and is_random):
                break
        require(not without, f"no gradient reaches {', '.join(without)}")
        for name, weight in weights.items():
            require(weight.grad.isfinite().all(), f"the gradient of {name} is not finite in {dtype}")
        check_numbers(branch)


@torch.no_grad()
def check_targets(trial: Trial):
    """Other targets change no output in training: only a loss may depend on them."""
    results = []
    for targets in (trial.inputs.tokens, (trial.inputs.tokens + 1) % VOCAB_SIZE):
        torch.manual_seed(0)  # the same dropout and noise
        results.append(trial.run(trial.inputs, branch=trial.training_copy(), targets=targets))
    require_equal(*results, "its output depends on `targets`, which are not there in eval: only its loss may")


NOT_SAVED = "saved and loaded again it gives another result: keep weights as nn.Parameter, and other tensors by register_buffer"


@torch.no_grad()
def check_saved(trial: Trial):
    """The state dict holds all that the block has learned."""
    for problem in hidden_weights(trial.branch):
        raise ContractError(problem)
    torch.manual_seed(1)
    loaded = build_branch(trial.layer, trial.config, VOCAB_SIZE).eval()
    loaded.load_state_dict(trial.branch.state_dict())
    require_equal(trial.run(trial.inputs, branch=loaded), trial.run(trial.inputs), NOT_SAVED)


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
            for read in in_chunks(trial, CHUNKS):
                read()
    for comment in comments.unchecked:
        say(f"warning: {comment}")
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
    small = replace(trial.inputs, x=0.2 * trial.inputs.x)  # with large numbers, a softmax may choose one token alone
    require_no_future(trial, trial.run, small, "")

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
    """With a cache, token by token and in chunks give what the sequence gives at once, unless a block takes no cache."""
    expected = record_calls(trial.branch, [partial(trial.run, trial.inputs)])
    for how, chunks in {"token by token": (1,) * T, "in chunks": CHUNKS, "one more": (T - 1, 1), "at once": (T,)}.items():
        ours = record_calls(trial.branch, in_chunks(trial, chunks))
        fault = first_difference(trial.branch, expected, ours, T)
        if fault is not None and takes_cache(blame(fault, trial.branch)):
            raise ContractError(f"with a cache, {how}, it gives another result than without")


def in_chunks(trial: Trial, chunks: tuple[int, ...]) -> list[Callable[[], Tensor]]:
    """Functions that read the sequence in pieces, one after another, with a cache; each gives its part of (B, T, D)."""
    cache, ends = Cache(), itertools.accumulate(chunks)

    def read(start: int, end: int) -> Tensor:
        cache.turns.clear()
        return trial.run(trial.inputs.times(slice(start, end)), cache=cache, start=start)

    return [partial(read, end - length, end) for end, length in zip(ends, chunks, strict=True)]


CHECKS = (
    check_repeats, check_gradients, check_targets, check_saved, check_batch, check_one_token_and_no_rope, check_future,
    check_cache, check_stories, check_swaps, check_shape_comments,
)  # fmt: skip
CAUSAL = (check_future, check_cache)  # not for a block with `causal = False`
