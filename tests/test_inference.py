"""Promises of inference.py: what is generated is what the model says, with or without cache, alone or in company."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import references
import torch
from errors import one_line_error
from torch import nn

from config import ModelConfig, TrainConfig
from inference import Sampling, generate, next_token_probabilities, stream
from model import GPT
from modules.model_contract import cache_is_exact
from modules.registry import build_model
from runs.folder import Run
from runs.presets import preset
from tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
TINY = ModelConfig(dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=48)
PROMPTS = ["Once upon a time", "Lily", "", "The dog saw a big red ball.", "The"]
CONFIGS = {
    "rope": TINY,
    "learned": replace(TINY, positions="learned"),
    "sinusoidal": replace(TINY, positions="sinusoidal"),
    "none": replace(TINY, positions="none"),
    "grok_like": replace(preset("grok_like").model, dim=24, num_layers=1, num_heads=2, mlp_dim=16, max_seq_len=48),
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bpe_tokenizer_95")


def build(config: ModelConfig, vocab_size: int) -> GPT:
    """A model with random weights, large enough that it has clear opinions."""
    torch.manual_seed(0)
    model = build_model(config, vocab_size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(TINY, tokenizer.vocab_size)


OPTIONS = [{"temperature": 0.0}, {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 11}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_cached_equals_uncached_and_a_batch_one_by_one(config, options, tokenizer):
    model = build(config, tokenizer.vocab_size)
    together = generate(model, tokenizer, PROMPTS, **options)
    assert together == generate(model, tokenizer, PROMPTS, use_cache=False, **options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, tokenizer, prompt, **options | {"seed": options.get("seed", 0) + row})
        assert alone == together[row]
        assert alone.startswith(prompt)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_transformers(prompt, tokenizer):
    model = build(preset("llama3_like").model, tokenizer.vocab_size)
    tokens = torch.tensor([tokenizer.encode(prompt, bos=True)])
    expected = references.llama(model).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=30,
        eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id,
    )  # fmt: skip
    assert generate(model, tokenizer, prompt, temperature=0.0, max_new_tokens=30) == tokenizer.decode(expected[0].tolist())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.001},
        {"top_p": 0.5},
        {"top_p": 0.97},
        {"min_p": 0.001},
        {"min_p": 0.3},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    ],
)
def test_the_distribution_is_that_of_transformers(options):
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    logits = torch.randn(50, 98, generator=torch.Generator().manual_seed(0)) * 3
    expected = LogitsProcessorList(warpers[name](value) for name, value in options.items())(None, logits.clone()).softmax(-1)
    ours = next_token_probabilities(logits, Sampling(**{"temperature": 1.0} | options))
    torch.testing.assert_close(ours, expected)
    assert torch.equal(ours > 0, expected > 0)


def test_temperature_0_takes_the_most_likely():
    logits = torch.randn(50, 98, generator=torch.Generator().manual_seed(0))
    probabilities = next_token_probabilities(logits, Sampling(temperature=0.0, top_k=3, top_p=0.5, min_p=0.5))
    assert torch.equal(probabilities.argmax(-1), logits.argmax(-1))
    assert torch.equal(probabilities.amax(-1), torch.ones(50)) and torch.equal(probabilities.sum(-1), torch.ones(50))


@torch.no_grad()
def test_tokens_are_drawn_from_that_distribution(model, tokenizer):
    """Rows with neighbouring seeds are independent draws: the counts of 3,000 pass a chi-squared test."""
    count, sampling = 3000, Sampling(temperature=1.0, top_k=8)
    probabilities = next_token_probabilities(model.eval()(torch.tensor([[tokenizer.bos_id]]))[0][0, -1], sampling)
    drawn = generate(model, tokenizer, [""] * count, temperature=1.0, top_k=8, max_new_tokens=1)
    chi_squared = 0.0
    for token in probabilities.nonzero().flatten().tolist():
        expected = probabilities[token].item() * count
        chi_squared += (drawn.count(tokenizer.decode([token])) - expected) ** 2 / expected
    assert chi_squared < 26  # 7 degrees of freedom: more than this once in 2,000 seeds


class Successor(nn.Module):
    """A model that knows the alphabet: after token i comes token i + 1. It notes how much it was given to read."""

    def __init__(self, max_seq_len: int, vocab_size: int):
        super().__init__()
        self.config = SimpleNamespace(max_seq_len=max_seq_len)
        self.table = nn.Parameter(torch.eye(vocab_size).roll(1, dims=1) * 100)
        self.read = 0

    def forward(self, tokens, cache=None):
        start = cache.num_tokens if cache is not None else 0
        self.read = max(self.read, start + tokens.shape[1])
        if cache is not None:
            cache.num_tokens += tokens.shape[1]
        return self.table[tokens], None


@pytest.fixture
def alphabet():
    """A tokenizer of a to z, in which eos follows z."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return SimpleNamespace(
        bos_id=27, eos_id=26,
        encode=lambda text, bos=False: [27] * bos + [letters.index(letter) for letter in text],
        decode=lambda ids: "".join(letters[i] for i in ids if i < 26),
    )  # fmt: skip


@pytest.mark.parametrize("use_cache", [True, False])
class TestWhereStoriesEnd:
    def test_at_eos(self, alphabet, use_cache):
        model = Successor(40, 28)
        assert generate(model, alphabet, ["w", "abcz", "t"], temperature=0.0, use_cache=use_cache) == ["wxyz", "abcz", "tuvwxyz"]
        assert model.read < 12  # it stops when the last one has ended

    def test_after_max_new_tokens(self, alphabet, use_cache):
        stories = generate(Successor(40, 28), alphabet, ["a", "bcd", "y"], max_new_tokens=3, use_cache=use_cache)
        assert stories == ["abcd", "bcdefg", "yz"]

    def test_where_the_context_is_full(self, alphabet, use_cache):
        model = Successor(6, 28)  # bos and five letters can be read, and one more written
        stories = generate(model, alphabet, ["a", "abc", "bcdef"], use_cache=use_cache)
        assert stories == ["abcdef", "abcdef", "bcdefg"]
        assert model.read == 6
        assert generate(model, alphabet, "bcdef", max_new_tokens=1, use_cache=use_cache) == "bcdefg"

    def test_the_stream_grows_token_by_token(self, alphabet, use_cache):
        grown = list(stream(Successor(40, 28), alphabet, ["w", "abc"], use_cache=use_cache, max_new_tokens=4))
        assert grown[0] == ["wx", "abc"] and grown[-1] == ["wxyz", "abcdefg"]
        for before, after in itertools.pairwise(grown):
            for row in range(2):
                assert after[row].startswith(before[row]) and len(after[row]) <= len(before[row]) + 1


@pytest.mark.parametrize("block, reason", [
    ("TakesNoCache", "the block 'TakesNoCache' takes no `cache`, so token by token it misses the earlier ones"),
    ("ForgetsItsCache", "the model 'GPT' gives another result in its block 'ForgetsItsCache' with a cache, token by token"),
])  # fmt: skip
def test_a_wrong_cache_is_not_used(block, reason, tokenizer, capsys):
    layers, options = f"Norm->Attn->+->Norm->{block}->+", {"temperature": 0.0, "max_new_tokens": 20}
    model = build(replace(TINY, layers=layers, plugins=("broken_blocks",)), tokenizer.vocab_size)
    without = generate(model, tokenizer, PROMPTS, use_cache=False, **options)
    assert capsys.readouterr().err == ""
    assert [generate(model, tokenizer, PROMPTS, **options) for _ in range(2)] == [without] * 2
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert f"generating without a cache, slower: {reason}" in line and not cache_is_exact(model)
    one_line_error(lambda: generate(model, tokenizer, "a", use_cache=True), f"use_cache=True: {reason}", "Leave use_cache out")


@pytest.mark.parametrize("block", ["Mean", "Attn"])
def test_a_right_cache_of_a_plugin_is_used(block, tokenizer, capsys, monkeypatch):
    model = build(replace(TINY, layers=f"Norm->{block}->+", plugins=("broken_blocks",)), tokenizer.vocab_size)
    assert cache_is_exact(model)
    lengths = []
    model.register_forward_hook(lambda module, inputs, output: lengths.append(inputs[0].shape[1]))
    generate(model, tokenizer, "Lily", max_new_tokens=5, temperature=0.0)
    assert lengths == [5, 1, 1, 1, 1][: len(lengths)] and capsys.readouterr().err == ""


def test_the_same_seed_tells_the_same_story(model, tokenizer):
    def told(seed):
        torch.manual_seed(seed * 7 + 1)  # the global seed has no say
        return generate(model, tokenizer, ["Lily", "Lily"], temperature=1.0, seed=seed)

    assert told(3) == told(3)
    first, second = told(3)
    assert first != second
    assert told(4)[0] == second


def test_generating_leaves_everything_as_it_was(model, tokenizer):
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    prompts, random_state = [*PROMPTS], torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        generate(model, tokenizer, prompts, max_new_tokens=3)
        assert model.training is training
        growing = stream(model, tokenizer, prompts)
        next(growing)
        growing.close()  # a reader who has seen enough
        assert model.training is training
    assert prompts == PROMPTS
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(weight, weights[name]) and weight.grad is None for name, weight in model.named_parameters())


def test_dropout_is_off_while_generating(tokenizer):
    dropping = build(replace(TINY, dropout=0.5), tokenizer.vocab_size).train()
    assert generate(dropping, tokenizer, PROMPTS) == generate(build(TINY, tokenizer.vocab_size), tokenizer, PROMPTS)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -0.5}, ["temperature=-0.5", "positive"]),
        ({"temperature": math.nan}, ["temperature=nan"]),
        ({"temperature": math.inf}, ["temperature=inf"]),
        ({"top_k": 0}, ["top_k=0", "at least 1"]),
        ({"top_p": 0.0}, ["top_p=0.0", "up to 1"]),
        ({"top_p": 1.5}, ["top_p=1.5", "up to 1"]),
        ({"min_p": -0.1}, ["min_p=-0.1", "up to 1"]),
        ({"min_p": math.nan}, ["min_p=nan"]),
        ({"seed": 2**63}, ["seed=9223372036854775808", "from 0 to 9223372036854775805"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0", "max_seq_len=48", "1 to 44"]),
        ({"max_new_tokens": 45}, ["max_new_tokens=45", "max_seq_len=48", "1 to 44"]),
    ],
)
def test_options_that_make_no_sense_are_named(model, tokenizer, options, words):
    one_line_error(lambda: generate(model, tokenizer, ["Lily", "a"], **options), *words)


def test_prompts_that_do_not_fit_are_named(model, tokenizer):
    one_line_error(lambda: generate(model, tokenizer, []), "no prompt")
    one_line_error(lambda: generate(model, tokenizer, ["a", "a" * 48]), "49 tokens", "48")
    assert len(generate(model, tokenizer, "a" * 47, temperature=0.0)) in (47, 48)


@pytest.fixture
def run(tmp_path, monkeypatch, model, tokenizer):
    """A run called little_run, with random weights, in a folder of runs of its own."""
    monkeypatch.setenv("BASEGPT_RUNS", str(tmp_path))
    run = Run("little_run")
    run.create(TINY, TrainConfig(tokenizer="bpe_tokenizer_95"))
    content = {"model": model.state_dict(), "vocab_size": tokenizer.vocab_size, "tokenizer_fingerprint": tokenizer.fingerprint}
    run.save("model.pth", content)
    return run


def test_a_new_python_writes_what_generate_gives(run, model, tokenizer):
    """And nothing else, not even a warning."""
    options = ["--max_new_tokens", "20", "--top_k", "5", "--seed", "3", "--temperature", "0.9"]
    words = [sys.executable, "inference.py", "little_run", "Lily saw", "The", *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    stories = generate(model, tokenizer, ["Lily saw", "The"], max_new_tokens=20, top_k=5, seed=3, temperature=0.9)
    assert done.stdout == "".join(f"{story}\n\n" for story in stories)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_has_a_prompt_of_its_own(run, model, tokenizer, terminal):
    code, output, _ = terminal("inference.py", "little_run", "--temperature", "0", "--top_p", "0.9", "--min_p", "0.1")
    assert (code, output) == (0, generate(model, tokenizer, "Once upon a time", temperature=0.0) + "\n\n")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["litle_run", "Lily"], ["'litle_run'", "Did you mean 'little_run'"]),
        (["little_run", "Lily", "--top_p", "7"], ["top_p=7.0"]),
        (["little_run", "a" * 60], ["61 tokens", "48"]),
    ],
)
def test_the_command_line_says_errors_in_one_line(run, terminal, arguments, words):
    code, output, errors = terminal("inference.py", *arguments)
    assert code == 1 and output == "" and len(errors.splitlines()) == 1
    assert all(word in errors for word in words)


def test_the_command_line_names_a_plugin_that_is_gone(run, terminal):
    config = (run.folder / "model_config.json").read_text(encoding="utf-8")
    run.save_text("model_config.json", config.replace('"plugins": []', '"plugins": ["nobodys_idea"]'))
    code, _, errors = terminal("inference.py", "little_run", "Lily")
    assert code == 1 and "nobodys_idea" in errors and len(errors.splitlines()) == 1
