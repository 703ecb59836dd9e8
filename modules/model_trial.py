"""Try a whole model: copies with noise on every weight, inputs, and errors of its code in one line.

B batch, T time, M tokens of memory, V vocabulary.
"""

import copy
import itertools
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from config import ModelConfig, format_step, layer_steps
from modules.blame import Call, blocks_of, enclosing_blocks, failing_block, first_difference, record_calls
from modules.contract import ContractError, randomised, require
from modules.explain import explain
from modules.registry import accepted_kwargs, exported, takes

B, M = 3, 5
SHORT, LONG = 23, 130  # tokens: for checks of every position, and of a few
NOISE = 0.05  # of the weights, so that none is zero


def is_causal(model: nn.Module) -> bool:
    """Whether neither the model nor a block in it has `causal = False`."""
    return all(getattr(module, "causal", True) for module in model.modules())


class ModelTrial:
    """Copies of a model with noise on every weight, and inputs for them."""

    def __init__(self, model: nn.Module):
        self.model, self.name, self.config = model, f"the model {model.config.model!r}", model.config
        self.short, self.long = min(SHORT, model.config.max_seq_len), min(LONG, model.config.max_seq_len)
        self.device = next(model.parameters(), torch.empty(0)).device
        memory_dims = [getattr(block, "memory_dim", model.config.dim) for block in blocks_of(model) if takes(block, "memory")]
        self.memory_dim = memory_dims[0] if memory_dims else None
        with errors_of(self):
            self.evaluated = self.copy().eval()

    def copy(self, scale: float = 1.0) -> nn.Module:
        torch.manual_seed(0)
        model = randomised(copy.deepcopy(self.model), NOISE)
        for weight in model.parameters():
            weight.data.mul_(scale)
        return model

    def tokens(self, rows: int, T: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self.model.vocab_size, (rows, T), generator=generator).to(self.device)

    def other_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens that differ from the given ones everywhere."""
        return (tokens + 1 + self.tokens(*tokens.shape, seed=1) % max(1, self.model.vocab_size - 1)) % self.model.vocab_size

    def run(self, model: nn.Module, tokens: Tensor, targets: Tensor | None = None, seed: int = 0, **kwargs) -> tuple:
        """Logits and loss of a model, with the random numbers of a seed. story_ids (T,) are those of every row."""
        torch.manual_seed(seed)
        if "story_ids" in kwargs:
            kwargs["story_ids"] = kwargs["story_ids"].to(self.device).expand(tokens.shape)
        if self.memory_dim is not None:
            memory = torch.randn(1, M, self.memory_dim, generator=torch.Generator().manual_seed(0))
            kwargs["memory"] = memory.expand(len(tokens), -1, -1).to(self.device)
        inputs = (tokens,) if targets is None else (tokens, targets)
        outputs = model(*inputs, **accepted_kwargs(model, **kwargs))
        kind, is_pair = type(outputs).__name__, isinstance(outputs, tuple) and len(outputs) == 2
        require(is_pair, f"the forward of {self.name} returns a {kind}: return (logits, loss), with loss=None without targets")
        logits, loss = outputs
        is_swapped = isinstance(loss, Tensor) and loss.dim() == 3 and (logits is None or logits.dim() == 0)
        require(not is_swapped, f"the forward of {self.name} returns (loss, logits): return (logits, loss), in this order")
        return logits, loss

    def drew_random_numbers(self, seed: int = 0) -> bool:
        """Whether the last run did."""
        get_state = torch.cuda.get_rng_state if self.device.type == "cuda" else torch.get_rng_state
        after = get_state()
        torch.manual_seed(seed)
        return not after.equal(get_state())

    def logits(self, tokens: Tensor, **kwargs) -> Tensor:
        return self.run(self.evaluated, tokens, **kwargs)[0]

    def parting(self, model: nn.Module, one: Callable, other: Callable, T: int = LONG, rows: slice = slice(None)) -> str:
        """The place where two runs of a model lead to different results for the first T tokens of these rows."""
        calls = [record_calls(model, [run]) for run in (one, other)]
        calls = [{place: Call(x[rows], y[rows]) for place, (x, y) in run.items()} for run in calls]
        return self.place(first_difference(model, *calls, T), model)

    def place(self, module: nn.Module | None, model: nn.Module) -> str:
        """Where something went wrong, such as " in its block 'Attn'"; "" for the model itself."""
        if module in (None, model):
            return ""
        names = enclosing_blocks(module, model).values()
        return f" in its block {' in '.join(map(repr, names))}" if names else f" in its {type(module).__name__}"


@contextmanager
def errors_of(trial: ModelTrial, where: str = ""):
    """Turn an error of the model's own code into a ContractError of one line that names the block."""
    try:
        yield
    except ContractError:
        raise
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        name = failing_block(error)
        inside = f", it fails in its block {name!r}" if name else ""
        cure = f". check_block({name!r}, config) tries it alone" if name else ""
        is_length = f"({trial.config.max_seq_len})" in str(error)
        cure = ". Any number of tokens up to max_seq_len must fit, not only all" if is_length else cure
        raise ContractError(f"{trial.name} cannot be run{where}{inside}: {explain(error)}{cure}") from error


@contextmanager
def watched_blocks(model: nn.Module):
    """Check at each call of a block that it returns a finite tensor like its input, and leaves that as it was."""
    versions: dict[nn.Module, int] = {}

    def before(block, inputs):
        versions[block] = inputs[0]._version

    def after(block, inputs, y):
        x, name = inputs[0], f"the block {names[block]!r}"
        require(isinstance(y, Tensor), f"{name} returns a {type(y).__name__}: return the tensor x alone")
        require(y.shape[:2] == x.shape[:2], f"{name} makes {tuple(y.shape)} of {tuple(x.shape)}: keep the shape")
        same = y.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        require(same, f"{name} makes {y.dtype} of {x.dtype}: keep the dtype, as by .type_as(x)")
        require(y.isfinite().all(), f"{name} makes numbers that are not finite, of random ones")
        in_place = x._version != versions[block]
        require(not in_place, f"{name} changes its input in place, which the skip connection needs as it was: write x = x + y")

    names = blocks_of(model)
    hooks = [hook for block in names for hook in (block.register_forward_pre_hook(before), block.register_forward_hook(after))]
    try:
        yield
    finally:
        for hook in hooks:
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
