"""Load a trained run, and let it tell stories.

    python inference.py my_run "Once upon a time" "Lily saw a"

B batch, T time, V vocabulary.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import GPT, Cache
from modules.registry import accepted_kwargs, build_model
from runs.folder import Run
from tokenizer import load_tokenizer


def load_model(name: str, device: str = "cpu"):
    """Load the trained model of a run, ready to use, and its tokenizer.

    Parameters
    ----------
    name : str
        A run in trained_models/, or EXPERIMENT/RUN.
    device : str, default "cpu"
        The torch device to put the model on.

    Returns
    -------
    model : nn.Module
        In eval mode, with its best weights.
    tokenizer : Tokenizer
        The one it was trained with.

    Raises
    ------
    FileNotFoundError, ValueError
        Names the file and the cure where something is missing, damaged or does not fit.
    """
    run = Run(name)
    config, saved = run.model_config, run.load("model.pth", {"model", "vocab_size", "tokenizer_fingerprint"})
    tokenizer = load_tokenizer(run.train_config.tokenizer)
    if tokenizer.fingerprint != saved["tokenizer_fingerprint"]:
        raise ValueError(f"the tokenizer {tokenizer.name!r} has changed since the run {name!r} was trained: restore the old one")
    model = build_model(config, saved["vocab_size"])
    load_weights(model, saved["model"], "model.pth", name)
    return model.to(device).eval(), tokenizer


def load_weights(model: nn.Module, weights: dict[str, Tensor], file: str, name: str):
    """Load the weights from a file of a run into a model. Raises ValueError with the name of the file where they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{file} of the run {name!r} does not fit its model_config.json: restore both") from error


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the model's distribution. Raises ValueError for what makes no sense."""

    temperature: float = 0.8  # below 1 is safer, above 1 is wilder, 0 always takes the most likely token
    top_k: int | None = None  # only the k most likely tokens
    top_p: float | None = None  # only the most likely tokens that make up a share p together
    min_p: float | None = None  # only tokens at least p times as likely as the most likely one

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give 0 for the most likely tokens, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give a whole number of at least 1, or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value}: give a share above 0 and up to 1, or None")


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that the next token is drawn from.  (..., V) logits → (..., V) probabilities

    Temperature first, then top_k, top_p (Holtzman et al. 2020, arXiv 1904.09751) and min_p (Nguyen et al. 2024,
    arXiv 2407.01082), each on what the one before has left.
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # so that no small temperature overflows
    logits = (below_best.double() / sampling.temperature).type_as(logits)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # the share of all more likely tokens
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(dropped, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if sampling.min_p is not None:
        floor = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < floor, 0.0)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompts: list[list[int]],
    eos_id: int,
    max_new_tokens: list[int],
    sampling: Sampling,
    seed: int,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue prompts of any lengths together: yields at each step a token for each prompt, None where there is none.

    All rows stand at the same position: the shortest prompt is read at once, then a row that still has prompt left is
    given its next token, and the others the one they have drawn. So there is no padding, which not every block could bear.
    Row i writes at most max_new_tokens[i] and draws from a stream of its own, seeded with seed + i: as on its own with that seed.
    """
    streams = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    device = next(model.parameters()).device
    position = min(map(len, prompts))
    rows = [prompt[:position] for prompt in prompts]
    left = list(max_new_tokens)
    needs = accepted_kwargs(model, cache=Cache()) if use_cache else {}
    read = 0  # tokens that are remembered
    while any(left):
        logits, _ = model(torch.tensor([row[read:] for row in rows], device=device), **needs)
        read = position if needs else 0
        probabilities = next_token_probabilities(logits[:, -1].float().cpu(), sampling)
        drawn = []
        for row, prompt, stream in zip(range(len(rows)), prompts, streams, strict=True):
            if position < len(prompt):
                rows[row].append(prompt[position])
                drawn.append(None)
            elif left[row] == 0:
                rows[row].append(eos_id)
                drawn.append(None)
            else:
                token = torch.multinomial(probabilities[row], 1, generator=stream).item()
                left[row] = 0 if token == eos_id else left[row] - 1
                rows[row].append(token)
                drawn.append(None if token == eos_id else token)
        position += 1
        yield drawn


def room_for_new_tokens(model: GPT, prompts: list[list[int]], max_new_tokens: int | None) -> list[int]:
    """How many tokens to write at most behind each prompt: what is asked for, or what fits into the context."""
    context, longest = model.config.max_seq_len, max(map(len, prompts))
    room = context - longest + 1  # the last token that is drawn need not be read again
    if longest > context:
        raise ValueError(f"the prompt has {longest} tokens, but the model's max_seq_len is {context}: shorten it")
    if max_new_tokens is None:
        return [context - len(prompt) + 1 for prompt in prompts]
    if not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: behind {longest} tokens of prompt max_seq_len={context} has room for 1 to {room}"
        )
    return [max_new_tokens] * len(prompts)


def written_tokens(
    model: GPT, tokenizer, prompts: list[str], *,
    max_new_tokens: int | None = None, seed: int = 0, use_cache: bool = True, **sampling,
) -> Iterator[list[list[int]]]:  # fmt: skip
    """The tokens of each prompt with what has been written so far, after every token: the same lists, which grow.

    Options and errors are those of `stream`.
    """
    if not prompts:
        raise ValueError("there is no prompt: give at least one, such as 'Once upon a time'")
    drawing = Sampling(**sampling)
    tokens = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    room = room_for_new_tokens(model, tokens, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        for drawn in generate_tokens(model, [row.copy() for row in tokens], tokenizer.eos_id, room, drawing, seed, use_cache):
            for row, token in zip(tokens, drawn, strict=True):
                if token is not None:
                    row.append(token)
            yield tokens
    finally:
        model.train(was_training)


def stream(model: GPT, tokenizer, prompts: list[str], **options) -> Iterator[list[str]]:
    """The stories as they grow: yields, after every token, the text of each prompt with what has been written so far.

    A story ends at eos, after max_new_tokens, or where the context is full. Further options: seed, use_cache=False to read all
    again for each token, and how tokens are drawn (temperature=0.5, top_k=40, ...), see Sampling. Raises ValueError for a prompt
    that is longer than the context and for options that make no sense.
    """
    for tokens in written_tokens(model, tokenizer, prompts, **options):
        yield [tokenizer.decode(row) for row in tokens]


def generate(model: GPT, tokenizer, prompts: str | list[str], **options) -> str | list[str]:
    """Continue one prompt, or many of different lengths at once: the prompts with their stories. Options: see `stream`.

    Row i is drawn with seed + i, so equal prompts give different stories and a batch gives what its prompts give alone.
    """
    if isinstance(prompts, str):
        return generate(model, tokenizer, [prompts], **options)[0]
    *_, tokens = written_tokens(model, tokenizer, prompts, **options)
    return [tokenizer.decode(row) for row in tokens]


def main(
    name: str,
    prompts: list[str],
    /,
    max_new_tokens: int | None = None,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
):
    """Let a trained model continue prompts.

    Args:
        name: a run in trained_models/
        prompts: beginnings of stories
        max_new_tokens: how much to write at most; by default until the story ends or the context is full
        temperature: below 1 is safer, above 1 is wilder, 0 always takes the most likely token
        top_k: draw from the k most likely tokens
        top_p: draw from the most likely tokens that make up a share p together
        min_p: draw from tokens at least p times as likely as the most likely one
        seed: another seed tells another story
    """
    model, tokenizer = load_model(name)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for number, prompt in enumerate(prompts or ["Once upon a time"]):
        shown = ""
        for (story,) in stream(model, tokenizer, [prompt], seed=seed + number, **options):
            story = story.rstrip("\ufffd")  # a character whose last bytes are still to come
            print(story[len(shown) :], end="", flush=True)
            shown = story
        print("\n")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main, use_underscores=True)
    except (ValueError, OSError, ImportError) as error:  # ImportError: a plugin of the run is not there
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)  # the shell's own code for Ctrl-C
