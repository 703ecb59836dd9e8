"""Promises to those who bring data: own rows, a memory, own stories, and own tokenizers, all checked before they are used."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import own_data
import pytest
import torch
import wrong_data
import wrong_tokenizers
from errors import one_line_error

from config import stories_of
from conftest import MODEL
from data.sources import portable_name
from evaluation.comparison import compare
from inference import generate, load_model
from metrics.audit import audit, reference_stories
from metrics.cost import cost_of
from metrics.scores import evaluate
from metrics.story_losses import read_losses
from model import IGNORE
from modules.data_plugins import attach_memory, load_training_data, open_data
from modules.registry import build_model
from runs.folder import Run
from runs.presets import PRESETS, Preset
from tokenizer import Tokenizer, load_tokenizer
from train import train

CROSS = replace(MODEL, plugins=("my_memory",), layers="Norm->Attn->+->Norm->CrossAttn->+->Norm->MLP->+")
OWN = replace(MODEL, plugins=("own_data", "my_data"))
DOCS = Path(__file__).parents[1] / "docs" / "data.md"


@pytest.fixture(scope="module", autouse=True)
def files_of_the_docs(tmp_path_factory):
    """my_data.py and the other files that docs/data.md shows, ready to be imported."""
    folder = tmp_path_factory.mktemp("files")
    for name, code in re.findall(r"(?ms)^```python\n# (\w+\.py)\n(.*?)^```", DOCS.read_text(encoding="utf-8")):
        (folder / name).write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture
def load(make_config, corpus, shared_cache, monkeypatch):
    """Load data by name, with CORPUS in it for the file of the corpus, through the entry point of a training."""
    monkeypatch.setenv("BASEGPT_CACHE", str(shared_cache))

    def load_it(data, model=OWN, tokenizer="bpe_tokenizer_128", **changes):
        config = make_config(data=data.replace("CORPUS", repr(corpus)), tokenizer=tokenizer, **changes)
        return load_training_data(config, model, load_tokenizer(tokenizer))

    return load_it


# Rows


@pytest.mark.parametrize("data", ["SpanCorruption(data=CORPUS, rate=0.2)", "Neighbour(data=CORPUS)", "Fables(count=500)"])
def test_own_data_train_and_resume_bit_for_bit(data, make_config, corpus, train_in_parts):
    model = CROSS if "Neighbour" in data else OWN
    config = make_config(data=data.replace("CORPUS", repr(corpus)), max_steps=9, packing="padded" if model is CROSS else "packed")
    whole, parts = train_in_parts(model, config, stop_at=5)
    assert [record.train_loss for record in parts] == [record.train_loss for record in whole[5:]]
    assert whole[-1].validation_loss < whole[0].train_loss
    assert Run("parts").train_config == config
    loaded, _ = load_model("parts")
    assert loaded.config == model and hasattr(loaded, "memory_source") == (model is CROSS)


def test_own_rows_compare_with_others_on_the_same_stories(tiny_run, make_config, corpus):
    list(train(OWN, make_config(data=f"PrefixLM(data={corpus!r})", max_steps=3), "prefix"))
    result = compare(tiny_run, "prefix")
    data = "little.txt (300 stories) and PrefixLM(data='little.txt') (300 stories)"
    assert any(f"trained on different data: {data}" in note for note in result.notes)
    assert len(result.verdicts) == 1 and read_losses("prefix")[1].data == "PrefixLM(data='little.txt')"


def test_a_curriculum_and_a_prefix_lm_are_what_they_say(load):
    short_first, pad = load("ShortFirst(data=CORPUS)", packing="padded"), load_tokenizer("bpe_tokenizer_128").pad_id
    num_rows = short_first.data.num_rows
    lengths = (short_first.batch(0, num_rows, seed=0).inputs != pad).sum(dim=1).tolist()
    assert lengths == sorted(lengths) and len(set(lengths)) > 5
    prefix_lm = load("PrefixLM(data=CORPUS, longest=0.9)")
    batch, plain = prefix_lm.batch(8, 16, seed=1), prefix_lm.data.batch(8, 16, seed=1)
    cut = (batch.targets != plain.targets).sum(dim=1)
    assert batch.inputs.equal(plain.inputs) and len(set(cut.tolist())) > 5
    assert all(row[-5:].equal(other[-5:]) for row, other in zip(batch.targets, plain.targets, strict=True))


def test_span_corruption_and_filling_in_put_the_rows_together_again(load):
    """What the two transformations take out of a row is what they predict behind it."""
    data = load("SpanCorruption(data=CORPUS, rate=0.3)", packing="padded")
    bos = data.data.tokenizer.bos_id
    batch, rows = data.batch(0, 8, seed=0), data.data.rows(0, 8, seed=0)
    for inputs, targets, row in zip(batch.inputs.tolist(), batch.targets.tolist(), rows.tolist(), strict=True):
        predicted = [token for token in targets if token != IGNORE]
        text, spans = inputs[: -len(predicted)], [bos, *predicted]
        together, span = [bos], 0
        for token in text[1:]:
            together += spans[4 * span + 1 : 4 * span + 4] if token == bos else [token]
            span += token == bos
        assert span == 5 and together == row[: len(together)] and len(together) == 39

    data = load("FillInTheMiddle(data=CORPUS)", tokenizer="own_data:Bytes(sentinels=3)", packing="padded")
    batch, rows = data.batch(0, 8, seed=0), data.data.rows(0, 8, seed=0)
    for inputs, target, row in zip(batch.inputs.tolist(), batch.targets[:, -1].tolist(), rows.tolist(), strict=True):
        one, two, three = (([*inputs, target]).index(mark) for mark in (259, 260, 261))
        whole = [*inputs[one + 1 : two], *inputs[three + 1 :], target, *inputs[two + 1 : three]]
        assert one == 0 and whole == row[:46]


def test_own_data_may_change_own_data(load):
    data = load("PrefixLM(data=\"ShortFirst(data=CORPUS)\", longest=0.9)", packing="padded")
    assert data.name == "PrefixLM(data=\"ShortFirst(data='little.txt')\", longest=0.9)"
    batch, inner = data.batch(0, 16, seed=0), data.data.batch(0, 16, seed=0)
    assert batch.inputs.equal(inner.inputs) and not batch.targets.equal(inner.targets)
    assert data.num_read(batch) == (batch.inputs != data.tokenizer.pad_id).sum() > (batch.targets != IGNORE).sum()


def test_own_data_keep_their_fingerprint_until_their_rows_change(load):
    one, again, other = (load(f"PrefixLM(data=CORPUS, longest={longest})") for longest in (0.5, 0.5, 0.6))
    assert one.fingerprint == again.fingerprint
    assert len({one.fingerprint, other.fingerprint, one.data.fingerprint}) == 3


def test_own_data_of_storyworld_are_graded_against_it(make_config):
    data = "PrefixLM(data='storyworld:300')"
    assert stories_of(data) == "storyworld:300" and make_config(data=data, grade_stories=4).grade_stories == 4
    assert open_data(data, OWN.plugins).name == "PrefixLM(data='storyworld')"
    assert open_data("PrefixLM(data='Fables(count=3)')", OWN.plugins).name == "PrefixLM(data='Fables(count=3)')"
    news = [reference_stories(open_data(each, OWN.plugins), [], 3, seed="0") for each in (data, "storyworld")]
    assert news[0] == news[1], "the audit tells new stories of the world"
    assert portable_name("PrefixLM(data='../a/b.txt', longest=0.1)") == "PrefixLM(data='b.txt', longest=0.1)"


@pytest.mark.parametrize("name", wrong_data.DATA)
def test_a_mistake_in_own_data_is_one_line(name, load, capsys):
    kind, packing, wrong = wrong_data.DATA[name], "packed", replace(MODEL, plugins=("wrong_data",))
    if issubclass(kind, wrong_data.Remembers) or name == "ScoresPadding":
        packing = "padded"
    data = f"{name}(data=CORPUS)" if hasattr(kind, "batch") else name
    expected = kind.__doc__.removeprefix("warning: ")
    if kind.__doc__.startswith("warning"):
        capsys.readouterr()
        load(data, wrong, packing=packing)
        warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
        assert len(warnings) == 1 and expected in warnings[0]
    else:
        one_line_error(lambda: load(data, wrong, packing=packing), expected)


@pytest.mark.parametrize(("data", "message"), [
    ("PrefixLM", "data='PrefixLM': say whose rows it changes, such as PrefixLM(data='tinystories')"),
    ("PrefixLM(data='auto')", "say whose rows it changes"),
    ("PrefixLM(data=CORPUS, longst=1)", "PrefixLM has no option 'longst'. Did you mean 'longest'?"),
    ("PrefixLM(data=CORPUS, longest='no')", "PrefixLM(longest='no'): it must be float"),
    ("PrefixLM('tinystories')", "cannot be read: write Name or Name(option=value)"),
    ("PrefixLN(data=CORPUS)", "no DATA is called 'PrefixLN'. Did you mean 'PrefixLM'?"),
    ("PrefixLN", "no DATA is called 'PrefixLN'. Did you mean 'PrefixLM'?"),
    ("Fables(number=1)", "Fables has no option 'number'"),
    ("Neighbour(data=CORPUS)", "take --train.packing padded, which is one story a row"),
])
def test_a_typo_in_the_name_of_own_data_is_one_line(data, message, load):
    plugins = (*OWN.plugins, *CROSS.plugins)
    one_line_error(lambda: load(data, replace(MODEL, plugins=plugins)), message)


def test_own_data_need_their_plugin_and_a_name_of_their_own(load, monkeypatch):
    one_line_error(lambda: load("PrefixLM(data=CORPUS)", model=MODEL), "Name the file that has DATA", "--model.plugins")
    monkeypatch.setitem(own_data.DATA, "storyworld", own_data.Fables)
    one_line_error(lambda: load("storyworld"), "'own_data' calls a data source 'storyworld', but that name is taken")


# Memory


@pytest.fixture
def reader(load):
    """A model with random weights that reads the memory of its data, and the tokenizer."""
    data, tokenizer = load("Neighbour(data=CORPUS)", CROSS, packing="padded"), load_tokenizer("bpe_tokenizer_128")
    torch.manual_seed(0)
    model = build_model(CROSS, tokenizer.vocab_size).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    attach_memory(model, data)
    return model, tokenizer, data


def slow_log_probs(model, data, tokens, position):
    """Of the token at a position, given those before it, and the memory of the first of them."""
    memory = data.memory([tokens[: data.prefix]]) if position >= data.prefix else None
    return model(torch.tensor([tokens[:position]]), memory=memory)[0][0, -1].log_softmax(dim=-1)


def test_a_model_with_a_memory_passes_the_audit(reader, stories):
    model, tokenizer, _ = reader
    assert not any(check.problem for check in audit(model, tokenizer, stories[:50], num_stories=8))


@torch.no_grad()
def test_each_token_is_scored_with_the_memory_of_those_before_it(reader, stories):
    model, tokenizer, data = reader
    texts = [*min(stories, key=len).split(". ")[:1], *sorted(stories, key=len)[:2]]
    expected = []
    for tokens in tokenizer.encode_batch(texts, bos=True, eos=True):
        assert len(tokens) <= model.config.max_seq_len
        places = range(1, len(tokens))
        expected.append(-sum(slow_log_probs(model, data, tokens, place)[tokens[place]].item() for place in places))
    score = evaluate(model, tokenizer, texts, top_k=(1,))
    torch.testing.assert_close(score.story_nats, torch.tensor(expected).double(), rtol=1e-5, atol=1e-4)
    del model.memory_source
    assert not torch.allclose(evaluate(model, tokenizer, texts).story_nats, score.story_nats)


@torch.no_grad()
def test_a_model_with_a_memory_writes_what_it_would_score_best(reader):
    model, tokenizer, data = reader
    prompts = ["", "Tom had a big hat. One", "Lily had a red ball. One day Lily found the"]
    texts = generate(model, tokenizer, prompts, temperature=0, max_new_tokens=6)
    assert texts == generate(model, tokenizer, prompts, temperature=0, max_new_tokens=6, use_cache=False)
    assert texts == [generate(model, tokenizer, prompt, temperature=0, max_new_tokens=6) for prompt in prompts]
    tokens = tokenizer.encode(texts[2], bos=True)
    for position in range(len(tokens) - 6, len(tokens)):
        assert slow_log_probs(model, data, tokens, position).argmax() == tokens[position]


def test_a_memory_is_made_from_the_first_tokens_of_a_story_alone(reader, stories, monkeypatch):
    model, tokenizer, data = reader
    prefixes, memory = [], data.memory
    monkeypatch.setattr(data, "memory", lambda starts: prefixes.extend(starts) or memory(starts))
    batches = [data.batch(start, 4, seed=0) for start in range(0, 32, 4)]
    evaluate(model, tokenizer, stories[:8])
    generate(model, tokenizer, ["Tom", stories[0]], max_new_tokens=1)
    assert {len(prefix) for prefix in prefixes} == {data.prefix} and len(prefixes) == 6 * 4 + 8 + 2
    assert [batch.memory is None for batch in batches] == [True, False, False, False] * 2
    for batch in batches:  # a token that the memory is made from is no target
        assert batch.memory is None or (batch.targets[:, : data.prefix - 1] == IGNORE).all()
        assert (batch.targets[:, data.prefix :] != IGNORE).any()


def test_a_memory_and_its_reader_need_each_other(load, capsys):
    data = load("Neighbour(data=CORPUS)", CROSS, packing="padded")
    attach_memory(build_model(CROSS, 131), data.data)
    assert "warning: CrossAttention reads a memory, but data='little.txt' have none" in capsys.readouterr().err
    trigram = build_model(replace(MODEL, model="Trigram", plugins=("own_models",)), 131)
    one_line_error(lambda: attach_memory(trigram, data), "have a memory, but forward of 'Trigram' takes none: add memory=None")
    attach_memory(build_model(MODEL, 131), data)
    assert "have a memory, but no block reads it, as CrossAttn does" in capsys.readouterr().err


# Tokenizers


def test_a_model_that_asks_for_the_tokenizer_gets_it(make_config, monkeypatch):
    model = replace(MODEL, model="Patches", plugins=("own_data",))
    config = make_config(tokenizer="own_data:Bytes", max_steps=3, packing="padded")
    records = list(train(model, config, "patches"))
    loaded, tokenizer = load_model("patches")
    assert loaded.space == 32 and loaded.tokenizer is tokenizer and type(tokenizer).__name__ == "Bytes"
    assert len(generate(loaded, tokenizer, "Tom", max_new_tokens=5, temperature=0)) >= 3
    validation = load_training_data(config, model, tokenizer).validation[:200]
    assert records[-1].bits_per_byte == pytest.approx(evaluate(loaded, tokenizer, validation).bits_per_byte)
    monkeypatch.setitem(PRESETS, "patches_preset", Preset(model, config))
    assert cost_of("patches").parameters == cost_of("patches_preset").parameters == sum(map(torch.numel, loaded.parameters()))
    message = "the model 'Patches' asks for the tokenizer, but there is none here: call build_model(config, vocab_size, tok"
    one_line_error(lambda: build_model(model, 259), message)


def test_an_own_tokenizer_is_one_of_bytes():
    text, tokenizer = "“Zoë”, 你 \ud83d", load_tokenizer("own_data:Bytes(sentinels=2)")
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == tokenizer.normalise(text) == "“Zoë”, 你 \ufffd"
    assert tokenizer.kept_bytes("Zoë") == 4 and tokenizer.lost_share([text[:-1]]) == 0 and tokenizer.vocab_size == 261
    assert "".join(tokenizer.tokens("Zoë 你!")) == "Zoë 你!" and len(tokenizer.tokens("Zoë")) == 4
    assert load_tokenizer("own_data:Bytes").fingerprint != tokenizer.fingerprint


def test_an_own_tokenizer_is_the_same_in_another_process():
    name, path = "my_tokenizer:Bytes", os.pathsep.join(sys.path)
    tokenizer = load_tokenizer(name)
    assert isinstance(tokenizer, Tokenizer) and tokenizer.encode("Zoë", bos=True) == [256, *"Zoë".encode()]
    code = f"from tokenizer import load_tokenizer; print(load_tokenizer({name!r}).fingerprint)"
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert other.stdout.split() == [tokenizer.fingerprint], other.stderr


@pytest.mark.parametrize("wrong", wrong_tokenizers.WRONG, ids=lambda wrong: wrong.__name__)
def test_a_mistake_in_an_own_tokenizer_is_one_line(wrong, capsys):
    name = f"wrong_tokenizers:{wrong.__name__}"
    if wrong.__doc__.startswith("loses"):
        load_tokenizer(name)
        assert capsys.readouterr().err == f"{name} {wrong.__doc__}\n"
    else:
        one_line_error(lambda: load_tokenizer(name), f"the tokenizer {name!r}: ", wrong.__doc__)


@pytest.mark.parametrize(("name", "error", "message"), [
    ("own_data:Byte", ValueError, "own_data has no Byte. Did you mean 'Bytes'?"),
    ("own_data:Bytes(sentinel=1)", ValueError, "it has no option 'sentinel'. Did you mean 'sentinels'?"),
    ("own_data:Bytes(3)", ValueError, "'Bytes(3)' cannot be read: write Name or Name(option=value)"),
    ("no_such_file:Bytes", ImportError, "ModuleNotFoundError: No module named 'no_such_file'. Put its file beside train.py"),
])
def test_a_typo_in_the_name_of_an_own_tokenizer_is_one_line(name, error, message):
    one_line_error(lambda: load_tokenizer(name), message, error=error)
