"""Evaluate a model on whole validation stories, in bits per byte.

Bits per byte count the bytes of the raw story that its tokens give back, so models compare if they are scored on the same raw
stories and their tokenizers keep the text, or normalise it in the same way.

A story is bos + text + eos. Every token after bos, eos included, is predicted once, with as much of the story as the context
holds: a story longer than the context is read in windows that overlap by half. If the data of the model have a memory
(data/plugin.py), the tokens that it is made from are predicted without it, and all others with it. The softmax of the logits is
taken here, so that the probabilities sum to one. A model with `story_nats` scores whole stories itself, exactly or by an upper
bound (modules/registry.py); metrics/audit/ tests whether the scores of a model can be right.

B batch, T time, V vocabulary.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fast
from model import GPT, IGNORE
from modules.randomness import seeded
from tokenizer import kept_bytes

MAX_LOGITS = 2**22  # per batch
BAR = {"desc": "scoring", "delay": 1.0, "leave": False, "disable": None}  # after a second, and only in a terminal


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a set of stories."""

    story_nats: Tensor  # (stories,) summed loss of each story, in nats
    story_tokens: Tensor  # (stories,) predicted tokens
    story_bytes: Tensor  # (stories,) UTF-8 bytes that the tokens give back
    story_hits: dict[int, Tensor]  # for each k: (stories,) tokens that were among the k most likely; empty without logits
    is_bound: bool = False  # the losses are upper bounds

    @property
    def top_k(self) -> dict[int, float]:
        """Share of all tokens that were among the k most likely, given the true text before them."""
        return {k: (hits.sum() / self.story_tokens.sum()).item() for k, hits in self.story_hits.items()}

    @property
    def loss(self) -> float:
        """Nats per token; only compares between models with the same tokenizer."""
        return (self.story_nats.sum() / self.story_tokens.sum()).item()

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()  # inf where math.exp would overflow

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text that the tokenizer gives back; inf if it gives back nothing."""
        return (self.story_nats.sum() / self.story_bytes.sum()).item() / math.log(2)


@dataclass(frozen=True)
class Window:
    """A window of a story: input tokens and their targets, IGNORE if another window scores them."""

    story: int
    inputs: list[int]
    targets: list[int]
    start: int  # position of its first token in the story
    prefix: list[int] | None = None  # what its memory is made from; None: it is read without a memory


def windows(stories: list[list[int]], max_seq_len: int) -> list[Window]:
    """Cut tokenised stories into windows of at most max_seq_len, each target scored once.

    With max_seq_len=4, a story of 7 tokens abcdefg is read as abcd, which scores bcde, and cdef, which scores fg.
    """
    pieces = []
    step = max(1, max_seq_len // 2)
    for story, tokens in enumerate(stories):
        start, scored = 0, 0  # first token of the window, number of tokens[1:] already scored
        while scored < len(tokens) - 1:
            inputs = tokens[start : start + max_seq_len][: len(tokens) - 1 - start]
            targets = tokens[start + 1 : start + 1 + len(inputs)]
            overlap = scored - start
            pieces.append(Window(story, inputs, [IGNORE] * overlap + targets[overlap:], start))
            scored = start + len(inputs)
            start += step
    return pieces


def windows_with_memory(stories: list[list[int]], max_seq_len: int, prefix: int) -> list[Window]:
    """Cut stories into windows without a memory, for their first `prefix` tokens, and with the memory of these for the others."""
    pieces = windows([tokens[:prefix] for tokens in stories], max_seq_len)
    for piece in windows(stories, max_seq_len):
        known = max(0, prefix - 1 - piece.start)  # targets that the memory is made from
        targets = [IGNORE] * min(known, len(piece.targets)) + piece.targets[known:]
        if any(target != IGNORE for target in targets):
            pieces.append(replace(piece, targets=targets, prefix=stories[piece.story][:prefix]))
    return pieces


def scores_itself(model: nn.Module) -> bool:
    """Whether a model is scored by its own story_nats. Raises ValueError for a model that cannot be scored at all."""
    name = type(model).__name__
    if hasattr(model, "story_nats"):
        if not isinstance(getattr(model, "is_bound", None), bool):
            raise ValueError(f"{name} has story_nats, but no is_bound: set it to True for an upper bound, False for exact losses")
        return True
    sees_future = [module for module in model.modules() if not getattr(module, "causal", True)]
    if sees_future and not getattr(model, "causal", False):
        what = name if sees_future[0] is model else f"{name} with {type(sees_future[0]).__name__}"
        raise ValueError(f"{what} sees the future (causal = False), so its logits predict nothing: give the model story_nats")
    return False


def gives_bound(model: nn.Module) -> bool:
    """Whether the losses of a model are upper bounds. Raises ValueError as scores_itself does."""
    return scores_itself(model) and model.is_bound


@contextmanager
def scoring(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Eval mode, no gradients, and a fixed seed, so that scores repeat; afterwards mode and random state are as before."""
    was_training = model.training
    model.eval()
    try:
        with seeded(seed), torch.no_grad():
            yield
    finally:
        model.train(was_training)


def predictions(
    model: GPT, tokenizer, tokenised: list[list[int]], batch_size: int = 32
) -> Iterator[tuple[list[Window], Tensor, Tensor]]:
    """Run the model on tokenised stories: yield batches of windows with their logits (B, T, V) and targets (B, T).

    A batch has at most batch_size windows, and fewer if their logits would take more than 16 MB. Raises ValueError if the model
    gives no logits, or others than those of its vocabulary.
    """
    if scores_itself(model):
        name = type(model).__name__
        raise ValueError(f"this needs the probabilities of the next token, and {name} gives none: it scores whole stories")
    source = getattr(model, "memory_source", None)
    if source is None:
        yield from predictions_of(model, tokenizer, windows(tokenised, model.config.max_seq_len), batch_size)
    else:
        pieces = windows_with_memory(tokenised, model.config.max_seq_len, source.prefix)
        for with_memory in (False, True):
            chosen = [piece for piece in pieces if (piece.prefix is not None) == with_memory]
            yield from predictions_of(model, tokenizer, chosen, batch_size)


def predictions_of(
    model: GPT, tokenizer, pieces: list[Window], batch_size: int
) -> Iterator[tuple[list[Window], Tensor, Tensor]]:
    """As `predictions`, of windows that are all with a memory, or all without."""
    device = next(model.parameters()).device
    pieces = sorted(pieces, key=lambda piece: len(piece.inputs))
    if pieces:
        batch_size = max(1, min(batch_size, MAX_LOGITS // (len(pieces[-1].inputs) * model.vocab_size)))
    for start in tqdm(range(0, len(pieces), batch_size), **BAR):
        batch = pieces[start : start + batch_size]
        width = max(len(piece.inputs) for piece in batch)
        inputs = torch.tensor([piece.inputs + [tokenizer.pad_id] * (width - len(piece.inputs)) for piece in batch])
        memory = {}
        if batch[0].prefix is not None:
            memory["memory"] = model.memory_source.memory([piece.prefix for piece in batch]).to(device)
        output = model(inputs.to(device), **memory)
        logits = checked_logits(output, (*inputs.shape, model.vocab_size), type(model).__name__)
        targets = torch.tensor([piece.targets + [IGNORE] * (width - len(piece.targets)) for piece in batch])
        yield batch, logits, targets.to(device)


def checked_logits(output, shape: tuple[int, int, int], name: str) -> Tensor:
    """The logits that a forward returned, in float32. Raises ValueError unless they are a float tensor of that shape."""
    logits = output[0] if isinstance(output, tuple) and len(output) == 2 else None
    if type(logits) is not Tensor or not logits.is_floating_point() or tuple(logits.shape) != shape:
        raise ValueError(f"the forward of {name} must return (logits, loss) with float logits {shape}, not {describe(logits)}")
    return logits.float()


def story_nats(model: nn.Module, tokenised: list[list[int]], batch_size: int = 32, seed: int = 0) -> Tensor:
    """The losses by the model's own story_nats, in nats; seed: of a model that seeds its own draws.  (stories,)

    Raises ValueError for anything but a number of at least 0 for each story.
    """
    nats, name = torch.zeros(len(tokenised), dtype=torch.float64), type(model).__name__
    order = sorted(range(len(tokenised)), key=lambda story: len(tokenised[story]))
    seeds = {"seed": seed} if "seed" in inspect.signature(model.story_nats).parameters else {}
    for start in tqdm(range(0, len(order), batch_size), **BAR):
        batch = order[start : start + batch_size]
        given = model.story_nats([list(tokenised[story]) for story in batch], **seeds)
        if type(given) is not Tensor or not given.is_floating_point() or given.shape != (len(batch),):
            raise ValueError(f"story_nats of {name} must return a float tensor of shape ({len(batch)},), not {describe(given)}")
        if (given < 0).any():
            raise ValueError(f"story_nats of {name} gave {given.min():.4g} nats: no story is more probable than 1, so give at "
                             "least 0. A density is no probability")  # fmt: skip
        nats[batch] = given.cpu().double()
    return nats


def describe(value) -> str:
    """'a torch.int64 tensor of shape (2, 3)', or 'a NoneType'."""
    if type(value) is Tensor:
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def check_tokens(tokenised: list[list[int]], tokenizer):
    """Raise ValueError unless the ids of each story are those of the vocabulary, from bos to eos."""
    for ids in tokenised:
        if len(ids) < 2 or ids[0] != tokenizer.bos_id or ids[-1] != tokenizer.eos_id:
            raise ValueError(f"{tokenizer.name} must encode a story with bos=True and eos=True as bos, text, eos: {ids[:3]} … "
                             f"{ids[-3:]} is not, with bos {tokenizer.bos_id} and eos {tokenizer.eos_id}")  # fmt: skip
        if not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            raise ValueError(f"{tokenizer.name} encodes to ids from {min(ids)} to {max(ids)}, outside of its vocab_size, "
                             f"{tokenizer.vocab_size}")  # fmt: skip


def evaluate(model: GPT, tokenizer, stories: list[str], batch_size: int = 32, top_k: tuple[int, ...] = ()) -> Evaluation:
    """Score whole stories in float32. The mode of the model (train or eval) and the random state stay as they are.

    Parameters
    ----------
    model : GPT
        The model.
    tokenizer : Tokenizer
        Its tokenizer.
    stories : list of str
        Texts to score, at least one.
    batch_size : int, default 32
        Maximum number of windows per batch, see `predictions`.
    top_k : tuple of int, default ()
        Also count how often the true token is among the k most likely; without effect on a model with story_nats.

    Returns
    -------
    Evaluation
        Losses by story, with the properties loss, perplexity, bits_per_byte and top_k.

    Raises
    ------
    ValueError
        If there are no stories, if the model sees the future and has no story_nats, or for logits, nats or token ids that cannot
        be scored.

    Examples
    --------
    >>> evaluate(*load_model("my_run"), ["Once upon a time, there was a cat."]).bits_per_byte  # doctest: +SKIP
    """
    if not stories:
        raise ValueError("there are no stories to evaluate on: give at least one")
    tokenised = tokenizer.encode_batch(stories, bos=True, eos=True)
    check_tokens(tokenised, tokenizer)
    with scoring(model), fast.for_evaluation(model, len(stories)):
        if scores_itself(model):
            nats, hits = story_nats(model, tokenised, batch_size), {}
        else:
            nats, hits = next_token_scores(model, tokenizer, tokenised, batch_size, top_k)
    num_tokens = torch.tensor([len(tokens) - 1 for tokens in tokenised])
    num_bytes = torch.tensor(count_bytes(tokenizer, stories, tokenised))
    return Evaluation(nats, num_tokens, num_bytes, hits, gives_bound(model))


def next_token_scores(model, tokenizer, tokenised, batch_size: int, top_k: tuple[int, ...]) -> tuple[Tensor, dict[int, Tensor]]:
    """Nats of each story, and for each k how many of its tokens were among the k most likely."""
    nats = torch.zeros(len(tokenised), dtype=torch.float64)
    hits = {k: torch.zeros(len(tokenised), dtype=torch.int64) for k in top_k}
    for batch, logits, targets in predictions(model, tokenizer, tokenised, batch_size):
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
        story = torch.tensor([piece.story for piece in batch])
        nats.index_add_(0, story, losses.view(targets.shape).sum(dim=1).cpu().double())
        if top_k:
            ranks = ranks_of(logits, targets)
            for k in top_k:
                hits[k].index_add_(0, story, (ranks < k).sum(dim=1).cpu())
    return nats, hits


def count_bytes(tokenizer, stories: list[str], tokenised: list[list[int]]) -> list[int]:
    """UTF-8 bytes of each raw story that decoding its tokens gives back; not counted by the tokenizer itself."""
    return [kept_bytes(story, tokenizer.decode(ids)) for story, ids in zip(stories, tokenised, strict=True)]


def ranks_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Rank of each target: how many other tokens are at least as likely.  (B, T, V), (B, T) -> (B, T)

    The rank is V if the target is IGNORE or its logit is NaN.
    """
    vocab_size = logits.shape[-1]
    target_logits = logits.gather(-1, targets.clamp(min=0)[..., None])  # (B, T, 1)
    lower = torch.lt(logits, target_logits, out=torch.empty_like(logits))  # (B, T, V) of 0 and 1, which sum faster as floats
    ranks = vocab_size - 1 - lower.sum(dim=-1).long()  # (B, T)
    return ranks.masked_fill((targets == IGNORE) | target_logits[..., 0].isnan(), vocab_size)
