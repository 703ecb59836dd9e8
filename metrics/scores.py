"""Evaluate a model on whole validation stories, in bits per byte.

Bits per byte count the bytes that the tokenizer gives back, so models compare if they are scored on the same raw stories and
their tokenizers keep the text, or normalise it in the same way.

A story is bos + text + eos. Every token after bos, eos included, is predicted once, with as much of the story as the context
holds: a story longer than the context is read in windows that overlap by half. If the data of the model have a memory
(data/plugin.py), the tokens that it is made from are predicted without it, and all others with it.

B batch, T time, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fast
from model import GPT, IGNORE

MAX_LOGITS = 2**22  # per batch


@dataclass(frozen=True)
class Evaluation:
    """Scores of a model on a set of stories."""

    story_nats: Tensor  # (stories,) summed loss of each story, in nats
    story_tokens: Tensor  # (stories,) predicted tokens
    story_bytes: Tensor  # (stories,) UTF-8 bytes that the tokenizer gives back
    story_hits: dict[int, Tensor]  # for each k: (stories,) tokens that were among the k most likely

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


@torch.no_grad()
def predictions(
    model: GPT, tokenizer, tokenised: list[list[int]], batch_size: int = 32
) -> Iterator[tuple[list[Window], Tensor, Tensor]]:
    """Run the model on tokenised stories: yield batches of windows with their logits (B, T, V) and targets (B, T).

    A batch has at most batch_size windows, and fewer if their logits would take more than 16 MB.
    """
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
    bar = {"desc": "scoring", "delay": 1.0, "leave": False, "disable": None}  # after a second, and only in a terminal
    for start in tqdm(range(0, len(pieces), batch_size), **bar):
        batch = pieces[start : start + batch_size]
        width = max(len(piece.inputs) for piece in batch)
        inputs = torch.tensor([piece.inputs + [tokenizer.pad_id] * (width - len(piece.inputs)) for piece in batch])
        targets = torch.tensor([piece.targets + [IGNORE] * (width - len(piece.targets)) for piece in batch])
        memory = {}
        if batch[0].prefix is not None:
            memory["memory"] = model.memory_source.memory([piece.prefix for piece in batch]).to(device)
        logits, _ = model(inputs.to(device), **memory)
        yield batch, logits, targets.to(device)


def evaluate(model: GPT, tokenizer, stories: list[str], batch_size: int = 32, top_k: tuple[int, ...] = ()) -> Evaluation:
    """Score whole stories in float32. The model stays in its mode (train or eval).

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
        Also count how often the true token is among the k most likely.

    Returns
    -------
    Evaluation
        Losses by story, with the properties loss, perplexity, bits_per_byte and top_k.

    Raises
    ------
    ValueError
        If there are no stories.

    Examples
    --------
    >>> evaluate(*load_model("my_run"), ["Once upon a time, there was a cat."]).bits_per_byte  # doctest: +SKIP
    """
    if not stories:
        raise ValueError("there are no stories to evaluate on: give at least one")
    tokenised = tokenizer.encode_batch(stories, bos=True, eos=True)
    nats = torch.zeros(len(stories), dtype=torch.float64)
    hits = {k: torch.zeros(len(stories), dtype=torch.int64) for k in top_k}
    was_training = model.training
    model.eval()
    with fast.for_evaluation(model, len(stories)):
        for batch, logits, targets in predictions(model, tokenizer, tokenised, batch_size):
            losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none")
            story = torch.tensor([piece.story for piece in batch])
            nats.index_add_(0, story, losses.view(targets.shape).sum(dim=1).cpu().double())
            if top_k:
                ranks = ranks_of(logits, targets)
                for k in top_k:
                    hits[k].index_add_(0, story, (ranks < k).sum(dim=1).cpu())
    model.train(was_training)
    num_tokens = torch.tensor([len(tokens) - 1 for tokens in tokenised])
    num_bytes = torch.tensor([tokenizer.kept_bytes(story) for story in stories])
    return Evaluation(nats, num_tokens, num_bytes, hits)


def ranks_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Rank of each target: how many other tokens are at least as likely.  (B, T, V), (B, T) -> (B, T)

    The rank is V if the target is IGNORE or its logit is NaN.
    """
    vocab_size = logits.shape[-1]
    target_logits = logits.gather(-1, targets.clamp(min=0)[..., None])  # (B, T, 1)
    lower = torch.lt(logits, target_logits, out=torch.empty_like(logits))  # (B, T, V) of 0 and 1, which sum faster as floats
    ranks = vocab_size - 1 - lower.sum(dim=-1).long()  # (B, T)
    return ranks.masked_fill((targets == IGNORE) | target_logits[..., 0].isnan(), vocab_size)
