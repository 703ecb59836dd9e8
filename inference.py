"""Load a trained run, and generate stories.

    python inference.py my_run "Once upon a time" "Lily saw a"

B batch, T time, V vocabulary.
"""

import sys

if __name__ == "__main__":  # before torch is imported, so that --help and typos return immediately
    from runs.command_line import parse_inference

    ARGUMENTS = parse_inference(sys.argv[1:])

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakSet

import torch
from torch import Tensor, nn

from config import MAX_SEED
from data.cache import say
from model import GPT, Cache
from modules.cached_decoding import find_inexact_cache
from modules.data_plugins import restore_memory
from modules.model_trial import is_causal
from modules.randomness import seeded
from modules.registry import build_model, takes
from runs.command_line import InferenceArguments
from runs.folder import Run
from runs.terminal import errors_in_one_line
from tokenizer import load_tokenizer, parse_tokenizer


def load_model(name: str, device: str = "cpu"):
    """Load the trained model of a run, and its tokenizer.

    Parameters
    ----------
    name : str
        A run in trained_models/, or EXPERIMENT/RUN.
    device : str, default "cpu"
        The torch device of the model.

    Returns
    -------
    model : nn.Module
        With its best weights, in eval mode.
    tokenizer : Tokenizer
        The one that it was trained with.

    Raises
    ------
    FileNotFoundError, ValueError
        If a file is missing, damaged or does not fit; names it and the cure.

    Examples
    --------
    >>> model, tokenizer = load_model("my_run")  # doctest: +SKIP
    """
    run = Run(name)
    config, saved = run.model_config, run.load("model.pth", {"model", "vocab_size", "tokenizer_fingerprint"})
    tokenizer = load_run_tokenizer(name)
    if tokenizer.fingerprint != saved["tokenizer_fingerprint"]:
        raise ValueError(f"the tokenizer {tokenizer.name!r} has changed since the run {name!r} was trained: restore the old one")
    model = build_model(config, saved["vocab_size"], tokenizer)
    load_weights(model, saved["model"], "model.pth", name)
    restore_memory(model, replace(run.train_config, data=run.data), tokenizer)
    return model.to(device).eval(), tokenizer


def load_run_tokenizer(name: str):
    """The tokenizer of a run: the copy in its folder, or, in a run of an older version, the one that its config names."""
    run = Run(name)
    tokenizer = run.train_config.tokenizer
    if not (run.folder / "tokenizer.json").exists():
        return load_tokenizer(tokenizer)
    return parse_tokenizer(tokenizer, run.read("tokenizer.json"), f"tokenizer.json of the run {name!r}")


def load_weights(model: nn.Module, weights: dict[str, Tensor], file: str, name: str):
    """Load weights from a file of a run into a model. Raises ValueError with the name of the file if they do not fit."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{file} of the run {name!r} does not fit its model_config.json: restore both") from error


@dataclass(frozen=True)
class Sampling:
    """How to draw the next token from the model's distribution. Raises ValueError for a value out of range."""

    temperature: float = 0.8  # lower is safer, higher is wilder, 0 is greedy
    top_k: int | None = None  # draw from the k most likely tokens
    top_p: float | None = None  # draw from the most likely tokens whose probabilities add up to p
    min_p: float | None = None  # draw from tokens at least p times as likely as the most likely one

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: give 0 for the most likely tokens, or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give a whole number of at least 1, or None")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name}={value}: give a number above 0 and up to 1, or None")


def next_token_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution of the next token.  logits (..., V) -> probabilities (..., V)

    Applies temperature, top_k, top_p (Holtzman et al. 2020, arXiv 1904.09751) and min_p (Nguyen et al. 2024, arXiv 2407.01082) in
    this order.

    >>> next_token_probabilities(torch.tensor([2.0, 1.0, 1.0]), Sampling(temperature=0))
    tensor([1., 0., 0.])
    """
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
    below_best = logits - logits.amax(dim=-1, keepdim=True)  # a small temperature does not overflow
    logits = (below_best.double() / sampling.temperature).type_as(logits)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p is not None:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered  # probability of all more likely tokens
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
    use_cache: bool | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts of different lengths together; yields at each step one token per prompt, or None.

    All rows are at the same position, so that no padding is needed: the common length is read at once, then a row that still has
    prompt tokens is given the next one, and the others the one that they have drawn. Row i stops after max_new_tokens[i], and is
    drawn with seed + i, which gives the same tokens as if it were alone. If the data of the model have a memory, it is made as
    soon as the rows are long enough, and they are read again with it. A model with a method `write` does it in its own way.
    """
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))]
    if hasattr(model, "write"):
        yield from model.write(prompts, eos_id, max_new_tokens, sampling, generators)
        return
    device = next(model.parameters()).device
    position = min(map(len, prompts))
    rows = [prompt[:position] for prompt in prompts]
    remaining = list(max_new_tokens)
    kwargs = {"cache": Cache()} if uses_cache(model, use_cache) else {}
    num_cached, source = 0, getattr(model, "memory_source", None)
    while any(remaining):
        if source is not None and "memory" not in kwargs and position >= source.prefix:
            kwargs["memory"] = source.memory([row[: source.prefix] for row in rows]).to(device)
            if "cache" in kwargs:  # its tokens were read without the memory
                kwargs["cache"], num_cached = Cache(), 0
        # read the tokens that are not in the cache, and predict the next one
        logits, _ = model(torch.tensor([row[num_cached:] for row in rows], device=device), **kwargs)
        num_cached = position if "cache" in kwargs else 0
        probabilities = next_token_probabilities(logits[:, -1].float().cpu(), sampling)

        # append to each row: the next token of its prompt, a drawn token, or eos if it is finished
        drawn = []
        for row, prompt, generator in zip(range(len(rows)), prompts, generators, strict=True):
            token = None
            if position < len(prompt):
                rows[row].append(prompt[position])
            elif remaining[row] == 0:
                rows[row].append(eos_id)
            else:
                token = torch.multinomial(probabilities[row], 1, generator=generator).item()
                remaining[row] = 0 if token == eos_id else remaining[row] - 1
                rows[row].append(token)
            drawn.append(None if token == eos_id else token)
        position += 1
        yield drawn


REPORTED: WeakSet[nn.Module] = WeakSet()  # models that are known to write without a cache


def uses_cache(model: nn.Module, use_cache: bool | None) -> bool:
    """Whether to generate with a cache: by default if the model, token by token, predicts what it predicts at once.

    That is known of a causal model without plugins. Raises ValueError if use_cache is True and the cache is wrong.
    """
    if use_cache is False or not takes(model, "cache"):
        return False
    is_known = is_causal(model) and not getattr(model.config, "plugins", ())
    inexact = None if is_known else find_inexact_cache(model)
    if inexact is not None and use_cache:
        raise ValueError(f"use_cache=True: {inexact.reason}. Leave use_cache out, or mend the cache")
    if inexact is not None and model not in REPORTED:
        REPORTED.add(model)
        say(f"generating without a cache, slower: {inexact.reason}")
    return inexact is None


def token_limits(model: GPT, prompts: list[list[int]], max_new_tokens: int | None) -> list[int]:
    """The maximum number of new tokens of each prompt: max_new_tokens, or what fits into the context."""
    context, longest = model.config.max_seq_len, max(map(len, prompts))
    room = context - longest + 1  # the last token is drawn, but not read
    if longest > context:
        raise ValueError(f"the prompt has {longest} tokens, but the model's max_seq_len is {context}: shorten it")
    if max_new_tokens is None:
        return [context - len(prompt) + 1 for prompt in prompts]
    if not 1 <= max_new_tokens <= room:
        raise ValueError(
            f"max_new_tokens={max_new_tokens}: after {longest} tokens of prompt, max_seq_len={context} has room for 1 to {room}"
        )
    return [max_new_tokens] * len(prompts)


def continue_prompts(
    model: GPT, tokenizer, prompts: list[str], *,
    max_new_tokens: int | None = None, seed: int = 0, use_cache: bool | None = None, **sampling,
) -> Iterator[list[list[int]]]:  # fmt: skip
    """The tokens of each prompt and its story so far, after every token: the same lists, which grow. Options as in `stream`."""
    if not prompts:
        raise ValueError("there is no prompt: give at least one, such as 'Once upon a time'")
    if not 0 <= seed <= MAX_SEED - len(prompts):
        raise ValueError(f"seed={seed}: give a whole number from 0 to {MAX_SEED - len(prompts)}")
    sampling = Sampling(**sampling)
    rows = [tokenizer.encode(prompt, bos=True) for prompt in prompts]
    limits = token_limits(model, rows, max_new_tokens)
    was_training = model.training
    model.eval()
    try:
        for drawn in generate_tokens(model, [row.copy() for row in rows], tokenizer.eos_id, limits, sampling, seed, use_cache):
            for row, token in zip(rows, drawn, strict=True):
                if token is not None:
                    row.append(token)
            yield rows
    finally:
        model.train(was_training)


def stream(model: GPT, tokenizer, prompts: list[str], **options) -> Iterator[list[str]]:
    """Generate stories token by token. A story ends at eos, after max_new_tokens, or when the context is full.

    Parameters
    ----------
    model, tokenizer : GPT, Tokenizer
        From `load_model`.
    prompts : list of str
        The starts of the stories, of any lengths.
    max_new_tokens : int, optional
        The most tokens to add to a prompt; by default as many as fit into the context.
    seed : int, default 0
        Prompt i is drawn with seed + i.
    use_cache : bool, optional
        Keep keys, values and states of earlier tokens; without it, all tokens are read again for each new one. By default a
        cache is used if it changes nothing, which is checked once for a model with plugins.
    temperature, top_k, top_p, min_p : optional
        See `Sampling`.

    Yields
    ------
    list of str
        Each prompt with its story so far, after every token.

    Raises
    ------
    ValueError
        For a prompt that is longer than the context, for options out of range, and for use_cache=True with a wrong cache.

    Examples
    --------
    >>> for stories in stream(model, tokenizer, ["Once upon a time", "Lily"], seed=3):  # doctest: +SKIP
    ...     print(stories)
    """
    for rows in continue_prompts(model, tokenizer, prompts, **options):
        yield [tokenizer.decode(row) for row in rows]


def generate(model: GPT, tokenizer, prompts: str | list[str], **options) -> str | list[str]:
    """Continue one prompt, or several together.

    Prompt i is drawn with seed + i: equal prompts give different stories, and a prompt gives the same story alone or with others.

    Parameters
    ----------
    model, tokenizer : GPT, Tokenizer
        From `load_model`.
    prompts : str or list of str
        The start of a story, or several, of any lengths.
    **options
        max_new_tokens, seed, use_cache, temperature, top_k, top_p, min_p: see `stream`.

    Returns
    -------
    str or list of str
        Each prompt with its story.

    Raises
    ------
    ValueError
        As `stream`.

    Examples
    --------
    >>> generate(model, tokenizer, "Once upon a time", temperature=0.5)  # doctest: +SKIP
    'Once upon a time, there was a little girl named Lily. ...'
    """
    if isinstance(prompts, str):
        return generate(model, tokenizer, [prompts], **options)[0]
    with seeded(options.get("seed", 0)):  # for a model that draws random numbers in its forward
        *_, rows = continue_prompts(model, tokenizer, prompts, **options)
    return [tokenizer.decode(row) for row in rows]


def main(arguments: InferenceArguments):
    """Continue prompts with a trained model, and print each token as soon as it is drawn."""
    model, tokenizer = load_model(arguments.name)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")}
    for number, prompt in enumerate(arguments.prompts or ["Once upon a time"]):
        printed = ""
        for (story,) in stream(model, tokenizer, [prompt], seed=arguments.seed + number, **options):
            story = story.rstrip("\ufffd")  # a character whose last bytes are still to come
            print(story[len(printed) :], end="", flush=True)
            printed = story
        print("\n")


if __name__ == "__main__":
    with errors_in_one_line():
        main(ARGUMENTS)
