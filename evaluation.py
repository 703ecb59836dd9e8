"""How good is a model? Losses on whole validation stories, in units that do not depend on the tokenizer.

A story is bos + text + eos. Every token after bos is predicted once, eos too, from all of the story that the context
holds: a story longer than the context is read in windows that overlap by half.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT, IGNORE

MAX_LOGITS = 2**22  # that exist at once


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a set of stories."""

    story_nats: Tensor  # (stories,) summed loss of each story, in nats
    story_tokens: Tensor  # (stories,) predicted tokens
    story_bytes: Tensor  # (stories,) length of the text in UTF-8, before the tokenizer normalises it
    top_k: dict[int, float]  # share of tokens that were among the k most likely, given the true text before them

    @property
    def loss(self) -> float:
        """Nats per token: to compare models of one tokenizer."""
        return (self.story_nats.sum() / self.story_tokens.sum()).item()

    @property
    def perplexity(self) -> float:
        return torch.tensor(self.loss, dtype=torch.float64).exp().item()  # inf where math.exp would overflow

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: to compare any two models."""
        return (self.story_nats.sum() / self.story_bytes.sum()).item() / math.log(2)


@dataclass(frozen=True)
class Window:
    """A piece of a story: the tokens to read, and for each the next token, or IGNORE where another window scores it."""

    story: int
    inputs: list[int]
    targets: list[int]


def windows(stories: list[list[int]], max_seq_len: int) -> list[Window]:
    """Cut tokenised stories into windows of at most max_seq_len, each target scored once.

    With max_seq_len=4, a story of 7 tokens abcdefg is read as abcd, which scores bcde, and cdef, which scores fg.
    """
    pieces = []
    step = max(1, max_seq_len // 2)
    for story, tokens in enumerate(stories):
        start, scored = 0, 0  # the window's first token, and how many of tokens[1:] are scored already
        while scored < len(tokens) - 1:
            inputs = tokens[start : start + max_seq_len][: len(tokens) - 1 - start]
            targets = tokens[start + 1 : start + 1 + len(inputs)]
            seen = scored - start
            pieces.append(Window(story, inputs, [IGNORE] * seen + targets[seen:]))
            scored = start + len(inputs)
            start += step
    return pieces


@torch.no_grad()
def evaluate(model: GPT, tokenizer, stories: list[str], batch_size: int = 32, top_k: tuple[int, ...] = ()) -> Evaluation:
    """Score whole stories, in float32 whatever the model was trained in. Leaves the model in the mode it was in.

    At most batch_size windows at once, fewer where their logits would take more than 16 MB.
    Raises ValueError where there are no stories.
    """
    if not stories:
        raise ValueError("there are no stories to evaluate on: give at least one")
    device = next(model.parameters()).device
    tokenised = tokenizer.encode_batch(stories, bos=True, eos=True)
    pieces = sorted(windows(tokenised, model.config.max_seq_len), key=lambda piece: len(piece.inputs))
    nats = torch.zeros(len(stories), dtype=torch.float64)
    hits = dict.fromkeys(top_k, 0)
    if pieces:
        batch_size = max(1, min(batch_size, MAX_LOGITS // (len(pieces[-1].inputs) * model.vocab_size)))
    was_training = model.training
    model.eval()
    for first in range(0, len(pieces), batch_size):
        batch = pieces[first : first + batch_size]
        width = max(len(piece.inputs) for piece in batch)
        inputs = torch.tensor([piece.inputs + [tokenizer.pad_id] * (width - len(piece.inputs)) for piece in batch])
        targets = torch.tensor([piece.targets + [IGNORE] * (width - len(piece.targets)) for piece in batch])
        logits, _ = model(inputs.to(device))
        wanted = targets.to(device).flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), wanted, ignore_index=IGNORE, reduction="none").view(targets.shape)
        nats.index_add_(0, torch.tensor([piece.story for piece in batch]), losses.sum(dim=1).cpu().double())
        scored = targets != IGNORE
        if top_k:
            best = logits.topk(max(top_k), dim=-1).indices.cpu() == targets[..., None]
            for k in top_k:
                hits[k] += best[scored][:, :k].any(dim=-1).sum().item()
    model.train(was_training)
    num_tokens = torch.tensor([len(tokens) - 1 for tokens in tokenised])
    num_bytes = torch.tensor([len(story.encode(errors="replace")) for story in stories])
    return Evaluation(nats, num_tokens, num_bytes, {k: count / num_tokens.sum().item() for k, count in hits.items()})
