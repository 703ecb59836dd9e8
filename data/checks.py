"""Checks of a DATA plugin before training: each mistake is one line.  B batch, T time, M tokens of memory, D model dim."""

from typing import Any

import torch

from config import IGNORE
from data.cache import digest, say
from data.dataset import Batch
from data.plugin import DataPlugin, failures_of

SIZE = 32  # rows of a batch
NUM_STORIES = 32  # validation stories whose memories are looked at
MAX_COPIED = 0.5  # share of the targets that may equal the input at their position


def check_rows(plugin: DataPlugin) -> str:
    """Check what `batch` and `memory` return, and digest it: the result changes with the rows, not with the code.

    Raises ValueError for rows that cannot be trained on; prints a warning for those that can, but look wrong.
    """
    try:
        memory = [] if plugin.memory is None else [checked_memory(plugin)]
        batches = [checked_batch(plugin, start) for start in (0, SIZE)]
        for start, batch in zip((0, SIZE), batches, strict=True):
            cure = "draw random numbers from a generator that is seeded by `seed` and the number of the row"
            require(equal(batch, batch_of(plugin, start)), f"{call(start)} gives other rows when it is called again: {cure}")
        warn_of_targets(plugin, batches[0])
        if equal(*batches):
            warn(plugin, f"{call(0)} and {call(SIZE)} are the same rows. Let them depend on `start`")
        parts = memory + [part for batch in batches for part in batch if part is not None]
    except ValueError as error:
        raise ValueError(f"data={plugin.name!r}: {error}") from error
    return digest(*(part.numpy().tobytes() for part in parts))


def require(condition: Any, problem: str):
    if not condition:
        raise ValueError(problem)


def warn(plugin: DataPlugin, problem: str):
    say(f"warning: data={plugin.name!r}: {problem}")


def call(start: int) -> str:
    return f"batch({start}, {SIZE}, seed=0)"


def equal(one: Batch, other: Batch) -> bool:
    return all(a is b or (a is not None and b is not None and a.equal(b)) for a, b in zip(one, other, strict=True))


def batch_of(plugin: DataPlugin, start: int) -> Batch:
    """A copy of a batch. Raises ValueError if it cannot be made, or changes the state that dropout draws from."""
    random_state = torch.get_rng_state()
    with failures_of(call(start)):
        batch = plugin.batch(start, SIZE, seed=0)
    is_untouched = torch.get_rng_state().equal(random_state)
    torch.set_rng_state(random_state)
    require(is_untouched, f"{call(start)} uses torch's global random state, as dropout does: draw from a torch.Generator or from "
            "numpy.random.default_rng((seed, row))")  # fmt: skip
    require(isinstance(batch, Batch), f"{call(start)} returns {type(batch).__name__}: return a Batch(inputs, targets)")
    return Batch(*(part.clone() if isinstance(part, torch.Tensor) else part for part in batch))


def checked_batch(plugin: DataPlugin, start: int) -> Batch:
    """A batch whose types, shapes and tokens are right. Raises ValueError."""
    batch, vocab_size = batch_of(plugin, start), plugin.tokenizer.vocab_size
    for name in ("inputs", "targets", "story_ids"):
        part = getattr(batch, name)
        if part is None and name == "story_ids":
            continue
        where = f"the {name} of {call(start)} are"
        dtype = getattr(part, "dtype", type(part).__name__)
        require(dtype == torch.long, f"{where} {dtype}: make them a tensor of torch.long")
        is_right = part.dim() == 2 and len(part) == SIZE and part.shape == batch.inputs.shape
        require(is_right, f"{where} of shape {tuple(part.shape)}: it must be ({SIZE}, T), with one T for all")
    T, scored = batch.inputs.shape[1], batch.targets != IGNORE
    require(1 <= T <= plugin.max_seq_len, f"{call(start)} has {T} tokens a row: give 1 to max_seq_len={plugin.max_seq_len}")
    require(scored.any(), f"{call(start)} has no targets: all are IGNORE")
    check_tokens(f"the inputs of {call(start)}", batch.inputs, vocab_size)
    check_tokens(f"the targets of {call(start)}, besides IGNORE = {IGNORE},", batch.targets[scored], vocab_size)
    require(batch.memory is None or plugin.memory is not None, f"{call(start)} has a memory, but the plugin has no method "
            "memory(prefixes), by which stories are scored and written")  # fmt: skip
    return batch


def check_tokens(what: str, tokens: torch.Tensor, vocab_size: int):
    wrong = tokens[(tokens < 0) | (tokens >= vocab_size)]
    require(not len(wrong), f"{what} hold {wrong[:1].tolist()}, but tokens go from 0 to {vocab_size - 1}")


def warn_of_targets(plugin: DataPlugin, batch: Batch):
    """Print a line for targets that the model is shown, or that are padding."""
    scored = batch.targets != IGNORE
    if (share := share_equal(batch.targets[scored], batch.inputs[scored])) > MAX_COPIED:
        warn(plugin, f"{share:.0%} of the targets equal the input at their position, so the model copies what it reads. "
             "The target of a position is the token after it")  # fmt: skip
    if (share := share_equal(batch.targets[scored], torch.tensor(plugin.tokenizer.pad_id))) > 0:
        warn(plugin, f"{share:.0%} of the targets are padding. Set them to IGNORE")


def share_equal(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one == other).float().mean().item()


def checked_memory(plugin: DataPlugin) -> torch.Tensor:
    """The memory of two stories, (2, M) or (2, M, D). Raises ValueError if it depends on more than the prefix of a story."""
    prefix, tokenizer = plugin.prefix, plugin.tokenizer
    is_right = isinstance(prefix, int) and 1 <= prefix < plugin.max_seq_len
    require(is_right, f"prefix={prefix!r}: give a number of tokens, from 1 to below max_seq_len={plugin.max_seq_len}")
    require(plugin.packing == "padded", "a memory belongs to one story: take --train.packing padded, which is one story a row")
    stories = [tokens for tokens in tokenizer.encode_batch(plugin.validation[:200], bos=True) if len(tokens) >= prefix]
    starts = [tokens[:prefix] for tokens in stories[:2]]
    require(len(starts) == 2, f"prefix={prefix}: hardly a story has as many tokens, so give fewer")
    with failures_of("memory(prefixes)"):
        memory, again, *alone = map(plugin.memory, (starts, starts, starts[:1], starts[1:]))
    shape, dtype = tuple(getattr(memory, "shape", ())), getattr(memory, "dtype", type(memory).__name__)
    is_right = len(shape) == {torch.long: 2, torch.float32: 3}.get(dtype) and shape[0] == 2 and shape[1] > 0
    cure = "return (2, M) tokens of torch.long or (2, M, D) of torch.float32"
    require(is_right, f"memory(prefixes) of two prefixes is {dtype} of shape {shape}: {cure}")
    if dtype == torch.long:
        check_tokens("the rows of memory(prefixes)", memory.flatten(), tokenizer.vocab_size)
    require(not memory.requires_grad, "memory(prefixes) needs a gradient, but only the model is trained: return memory.detach()")
    require(memory.equal(again), "memory(prefixes) gives something else when it is called again: seed what it draws")
    for row, other in zip(memory, alone, strict=True):
        is_right = other.shape[1:] == shape[1:] and other[0].equal(row)
        require(is_right, "memory(prefixes) of a story changes with those beside it: let it depend on its prefix, with one M")
    if dtype == torch.long:
        check_lookahead(plugin, stories[:NUM_STORIES])
    return memory


def as_text(tokens: list[int]) -> str:
    return f" {' '.join(map(str, tokens))} "


def check_lookahead(plugin: DataPlugin, stories: list[list[int]]):
    """The memory of a validation story does not hold what follows in it."""
    shown = 0
    for tokens, row in zip(stories, plugin.memory([tokens[: plugin.prefix] for tokens in stories]).tolist(), strict=True):
        following = tokens[plugin.prefix :][: max(8, len(row) - plugin.prefix)]
        shown += len(following) >= 8 and as_text(following) in as_text(row)
    problem = f"memory(prefixes) holds what follows in {shown} of {len(stories)} validation stories"
    require(shown <= len(stories) / 2, f"{problem}: make it from training stories, as those of data.take")
