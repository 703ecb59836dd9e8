"""Promises of data.py, sources.py and packing.py: every story once, nothing shared with validation, nothing lost in silence."""

import collections
import functools
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import dataset as data
from data import sources
from data.dataset import load_data, read_stories, story_ids
from data.packing import pack, shuffled
from model import IGNORE
from tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]


class Characters:
    """A stand-in tokenizer: one id a character below 256."""

    name, bos_id, eos_id, pad_id, vocab_size, fingerprint = "characters", 256, 257, 258, 259, "characters"

    def encode(self, text, bos=False, eos=False):
        return [self.bos_id] * bos + [min(ord(character), 255) for character in text] + [self.eos_id] * eos

    def encode_batch(self, texts, bos=False, eos=False):
        return [self.encode(text, bos, eos) for text in texts]

    def lost_share(self, texts):
        return 0.0


class OneEnd(Characters):
    """bos and eos are the same token, as in GPT-2."""

    bos_id, eos_id, fingerprint = 256, 256, "one end"


class Wide(Characters):
    """A vocabulary that does not fit into 16 bits."""

    bos_id, eos_id, pad_id, vocab_size, fingerprint = 70_000, 70_001, 70_002, 70_003, "wide"


def make_stories(count, seed=0, longest=300):
    """Distinct texts of many lengths that begin with their number, so that every piece can be told."""
    rng = random.Random(seed)
    return [f"{number} " + "".join(rng.choices("abcdefgh .", k=rng.randrange(5, longest))) + "!" for number in range(count)]


def write_jsonl(path, texts, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


def write_parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


@pytest.fixture
def folder(tmp_path):
    """A local data set with 400 training and 30 validation stories."""
    stories = make_stories(430)
    place = tmp_path / "stories"
    place.mkdir()
    write_jsonl(place / "train.jsonl", stories[:400])
    write_jsonl(place / "validation.jsonl", stories[400:])
    return place


def all_rows(opened):
    """Every row of an epoch, each once, as lists without padding."""
    rows = opened.rows(0, opened.num_rows, seed=3).tolist()
    return [[token for token in row if token != opened.tokenizer.pad_id] for row in rows]


# Packing


def realistic_lengths(count, seed=0):
    """Token counts as in TinyStories with a vocabulary of about a thousand: log-normal around 240, some up to 1500."""
    return np.clip(np.random.default_rng(seed).lognormal(5.45, 0.42, count), 20, 1500).astype(int).tolist()


@pytest.mark.parametrize("max_seq_len", [128, 256, 512])
def test_rows_hold_each_story_once_and_waste_under_3_percent(max_seq_len):
    lengths, capacity = realistic_lengths(8192), max_seq_len + 1
    rows = pack(lengths, capacity)
    whole, predicted = collections.Counter(), collections.Counter()
    for row in rows:
        assert row[0][1] == 0, "a row begins with the beginning of a story"
        assert sum(length for _, _, length in row) <= capacity
        for position, (story, start, length) in enumerate(row):
            assert 0 < length <= lengths[story] - start
            if start + length < lengths[story]:
                assert position == len(row) - 1, "a piece that does not end its story is the last of its row"
            if start == 0 and length == min(lengths[story], capacity):
                whole[story] += 1
            elif start > 0:
                predicted.update((story, place) for place in range(start + 1, start + length))
                assert start >= capacity - data_overlap(lengths[story], start, length)
    assert whole == collections.Counter(range(len(lengths))), "the first T + 1 tokens of every story come once, in one piece"
    filled = sum(length for row in rows for _, _, length in row)
    assert 1 - filled / (len(rows) * capacity) < 0.03
    repeated = sum(times - 1 for times in predicted.values())
    assert repeated <= 16 * len(lengths) * 0.1


def data_overlap(story_length, start, length):
    """A tail begins with the last token of the piece before; the last piece may begin up to 16 tokens before the end."""
    return 1 if length > 16 or start + length < story_length else 16


def test_tails_cover_whole_stories_where_there_is_room():
    lengths = [100, 40] + [10] * 30
    rows = pack(lengths, capacity=33)
    covered = {place for row in rows for story, start, length in row if story == 0 for place in range(start, start + length)}
    assert covered == set(range(100))


@pytest.mark.parametrize("capacity", [3, 4, 8, 17, 64])
def test_packing_ends_for_every_mixture_of_lengths(capacity):
    rng = random.Random(capacity)
    for _ in range(30):
        edges = [3, max(3, capacity - 1), capacity, capacity + 1]
        lengths = [rng.choice([*edges, rng.randrange(3, 6 * capacity)]) for _ in range(rng.randrange(1, 40))]
        rows = pack(lengths, capacity)
        heads = [story for row in rows for story, start, length in row if start == 0 and length == min(lengths[story], capacity)]
        assert sorted(heads) == list(range(len(lengths)))
        assert all(row[0][1] == 0 and sum(piece[2] for piece in row) <= capacity for row in rows)


# Batches


@pytest.mark.parametrize("size", [1, 2, 3, 10, 97, 1000, 4096])
def test_every_epoch_is_another_permutation(size):
    orders = [shuffled(size, seed, epoch).tolist() for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 90:
        assert all(sum(a == b for a, b in zip(one, two, strict=True)) < 10 for one, two in itertools.combinations(orders, 2))


def test_a_batch_is_a_function_of_its_arguments(folder, tmp_path):
    opened = load_data(str(folder), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    rows, batch = opened.rows(160, 32, seed=1), opened.batch(160, 32, seed=1)
    assert rows.shape == (32, 65) and rows.dtype == torch.long
    assert all(part.shape == (32, 64) and part.dtype == torch.long for part in batch[:3])
    again = load_data(str(folder), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert torch.equal(rows, again.rows(160, 32, seed=1))
    assert all(torch.equal(one, other) for one, other in zip(batch[:3], again.batch(160, 32, seed=1)[:3], strict=True))
    assert not torch.equal(rows, opened.rows(160, 32, seed=2))


def test_batches_go_through_all_rows_once_an_epoch(folder, tmp_path):
    opened = load_data(str(folder), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    epoch = sorted(opened.rows(0, opened.num_rows, seed=1).tolist())
    small = torch.cat([opened.rows(7 * index, 7, seed=1) for index in range(-(-2 * opened.num_rows // 7))])
    first, second = small[: opened.num_rows].tolist(), small[opened.num_rows : 2 * opened.num_rows].tolist()
    assert sorted(first) == sorted(second) == epoch and first != second


def slow_batch(row, tokenizer):
    """What is read, what is to be predicted, and the number of the story, token by token."""
    inputs, targets, ids, story = [], [], [], 0
    for at, (token, following) in enumerate(itertools.pairwise(row)):
        may_be_bos = tokenizer.bos_id == tokenizer.eos_id and (at == 0 or row[at - 1] == tokenizer.eos_id)
        is_end = token == tokenizer.eos_id and not may_be_bos
        inputs.append(token)
        ids.append(story)
        targets.append(IGNORE if is_end or following == tokenizer.pad_id else following)
        story += is_end
    return inputs, targets, ids


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("tokenizer", [Characters(), OneEnd(), Wide()], ids=lambda tokenizer: tokenizer.fingerprint)
def test_a_batch_is_inputs_targets_and_story_ids(folder, tmp_path, tokenizer, packing):
    """No target is padding, and none is of another story than the token before it."""
    opened = load_data(str(folder), tokenizer, 128, packing=packing, cache_dir=tmp_path / "cache", progress=False)
    rows, batch = opened.rows(3, 200, seed=0), opened.batch(3, 200, seed=0)
    wanted = (torch.tensor(part) for part in zip(*(slow_batch(row, tokenizer) for row in rows.tolist()), strict=True))
    for part, expected in zip(batch[:3], wanted, strict=True):
        assert torch.equal(part, expected)
    assert data.IGNORE == IGNORE and (batch.targets == tokenizer.eos_id).any(), "the end of a story is to be predicted"
    assert not (batch.targets == tokenizer.pad_id).any() and (batch.targets == IGNORE).any()

    scored = batch.targets != IGNORE
    ids = story_ids(rows, tokenizer.bos_id, tokenizer.eos_id)
    assert torch.equal(batch.targets[scored], rows[:, 1:][scored])
    assert torch.equal(scored, (rows[:, 1:] != tokenizer.pad_id) & (ids[:, 1:] == ids[:, :-1]))


@pytest.mark.parametrize("tokenizer", [Characters(), OneEnd(), Wide()], ids=lambda tokenizer: tokenizer.fingerprint)
def test_rows_say_what_the_stories_say(folder, tmp_path, tokenizer):
    opened = load_data(str(folder), tokenizer, 128, cache_dir=tmp_path / "cache", progress=False)
    texts = ["\x01" + text + "\x02" for text in read_stories(str(folder))]
    rows = opened.rows(0, opened.num_rows, seed=0)
    ids = story_ids(rows, tokenizer.bos_id, tokenizer.eos_id)
    begun = collections.Counter()
    for row, row_ids in zip(rows, ids, strict=True):
        assert row[0] == tokenizer.bos_id
        for story_id in row_ids.unique().tolist():
            piece = row[row_ids == story_id].tolist()
            if set(piece) == {tokenizer.pad_id}:
                continue
            assert tokenizer.pad_id not in piece
            ends = piece[-1] == tokenizer.eos_id
            begins = piece[0] == tokenizer.bos_id
            inner = piece[begins:len(piece) - ends]
            assert not {tokenizer.bos_id, tokenizer.eos_id} & set(inner)
            said = "\x01" * begins + "".join(map(chr, inner)) + "\x02" * ends
            owners = [text for text in texts if said in text]
            assert len(owners) == 1 or len(said) < 20, "each id's tokens come from one story"
            if begins and (ends or len(piece) == 129):
                begun[owners[0]] += 1
    assert begun == collections.Counter(texts)


def test_story_ids():
    bos, eos, pad = 7, 8, 9
    tokens = torch.tensor([[7, 1, 2, 8, 7, 1, 8, 3, 8, 9, 9], [7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    assert story_ids(tokens, bos, eos).tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3], [0] * 11]
    assert tokens[0, 0] == bos and tokens[0, -1] == pad, "the tokens stay as they were"
    same = torch.where(tokens == bos, eos, tokens)
    assert story_ids(same, eos, eos).tolist() == story_ids(tokens, bos, eos).tolist()


@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_share_of_targets_that_repeat_others(folder, tmp_path, capsys, packing):
    """Against the targets of all rows, less those of each story that are not left out."""
    opened = load_data(str(folder), Characters(), 128, packing=packing, cache_dir=tmp_path / "cache", progress=False)
    num_targets = (opened.batch(0, opened.num_rows, seed=0).targets != IGNORE).sum().item()
    distinct = opened.num_tokens * (1 - opened.left_out) - opened.num_stories  # no bos is a target
    assert opened.repeated == pytest.approx(1 - distinct / num_targets) and (opened.repeated > 0) == (packing == "packed")
    assert f"{opened.repeated:.1%} of the targets are repeated beginnings of stories" in capsys.readouterr().err


def test_padded_rows_hold_one_cropped_story_each(folder, tmp_path):
    opened = load_data(str(folder), Characters(), 100, packing="padded", cache_dir=tmp_path / "cache", progress=False)
    assert sorted(all_rows(opened)) == sorted(Characters().encode(text, True, True)[:101] for text in read_stories(str(folder)))
    assert 0 < opened.left_out < 1
    assert 0 < opened.wasted < 1


def test_a_corpus_larger_than_a_chunk(tmp_path):
    stories = make_stories(9_000, longest=60)
    write_parquet(tmp_path / "d" / "train.parquet", text=stories)
    opened = load_data(str(tmp_path / "d"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert opened.num_stories + len(opened.validation) == 9_000
    assert opened.wasted < 0.03
    tokens = collections.Counter("".join(chr(token) for token in row).split("ā")[0] for row in all_rows(opened))
    assert max(tokens.values()) == 1, "no row comes twice"


# Validation


def test_validation_does_not_depend_on_order_files_or_tokenizer(tmp_path):
    stories = make_stories(400)
    for name, order in [("one", stories), ("two", stories[::-1])]:
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "train.jsonl", ["a story", "another"])
        write_jsonl(tmp_path / name / "valid_1.jsonl", order[:100])
        write_jsonl(tmp_path / name / "valid_2.jsonl", [*order[100:], order[0], "  " + order[1] + "\n"])
    one = load_data(str(tmp_path / "one"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    two = load_data(str(tmp_path / "two"), Wide(), 32, cache_dir=tmp_path / "cache", progress=False)
    assert one.validation == two.validation
    assert sorted(one.validation) == sorted(stories), "exact duplicates come once"
    assert one.validation != stories


def test_at_most_3000_validation_stories(tmp_path):
    stories = make_stories(3500, longest=20)
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d" / "train.jsonl", ["a story", "another"])
    write_jsonl(tmp_path / "d" / "val.jsonl", stories)
    opened = load_data(str(tmp_path / "d"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    hashes = sorted(map(data.story_hash, stories))
    assert [data.story_hash(story) for story in opened.validation] == hashes[:3000]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (50, 25), (1000, 200), (25_000, 250)])
def test_without_a_validation_split_stories_are_held_out(tmp_path, count, held_out):
    stories = make_stories(count, longest=20)
    write_parquet(tmp_path / "stories.parquet", text=stories)
    opened = load_data(str(tmp_path / "stories.parquet"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert len(opened.validation) == held_out
    assert opened.num_stories == count - held_out
    assert set(opened.validation) < set(stories)


def test_training_and_validation_never_share_a_story(folder, tmp_path, capsys):
    validation = list(read_stories(str(folder), "validation"))
    train = list(read_stories(str(folder)))
    write_jsonl(folder / "train.jsonl", [*train, validation[0], validation[1].replace(" ", "  ") + "\n"])
    opened = load_data(str(folder), Characters(), 512, cache_dir=tmp_path / "cache", progress=False)
    assert opened.num_stories == 400
    assert "2 training stories dropped that are in validation too" in capsys.readouterr().err
    known = {"".join(map(chr, row)) for row in all_rows(opened)}
    assert not any(f"Ā{validation[0]}ā" in row for row in known)


# The cache


def test_the_second_time_nothing_is_tokenised_or_printed(folder, tmp_path, capsys):
    class Counted(Characters):
        calls = 0

        def encode_batch(self, *args, **kwargs):
            Counted.calls += 1
            return super().encode_batch(*args, **kwargs)

    first = load_data(str(folder), Counted(), 64, cache_dir=tmp_path / "cache", progress=False)
    calls = Counted.calls
    assert capsys.readouterr().err.startswith("stories: 400 stories, 0.1M tokens, ")
    second = load_data(str(folder), Counted(), 64, cache_dir=tmp_path / "cache", progress=True)
    assert capsys.readouterr().err == ""
    assert first.fingerprint == second.fingerprint
    longer = load_data(str(folder), Counted(), 128, cache_dir=tmp_path / "cache", progress=False)
    assert longer.fingerprint != first.fingerprint
    assert Counted.calls == calls, "another length packs again but does not tokenise again"


def test_the_cache_goes_by_content(folder, tmp_path):
    def fingerprint(place, tokenizer=None):
        return load_data(str(place), tokenizer or Characters(), 64, cache_dir=tmp_path / "cache", progress=False).fingerprint

    before = fingerprint(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(moved) == before
    assert fingerprint(moved, Wide()) != before
    train = (moved / "train.jsonl").read_text(encoding="utf-8")
    (moved / "train.jsonl").write_text(train.replace("a", "b", 1), encoding="utf-8")
    assert fingerprint(moved) != before


@pytest.mark.parametrize("entry", ["stories", "rows"])
@pytest.mark.parametrize("harm", ["truncated", "missing", "no info"])
def test_a_damaged_entry_is_built_again(folder, tmp_path, capsys, entry, harm):
    cache = tmp_path / "cache"
    before = load_data(str(folder), Characters(), 64, cache_dir=cache, progress=False).rows(0, 8, seed=0)
    place = next(cache.glob(f"{entry}-*"))
    victim = place / "info.json" if harm == "no info" else max(place.glob("*.bin"), key=lambda file: file.stat().st_size)
    if harm == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    capsys.readouterr()
    after = load_data(str(folder), Characters(), 64, cache_dir=cache, progress=False).rows(0, 8, seed=0)
    assert torch.equal(before, after)
    assert f"{place} is damaged ({victim.name}" in capsys.readouterr().err
    assert not list(cache.glob("building-*"))


def test_an_error_while_building_leaves_nothing_behind(folder, tmp_path):
    class Failing(Characters):
        def encode_batch(self, *args, **kwargs):
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        load_data(str(folder), Failing(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert not list((tmp_path / "cache").iterdir())


OPEN = """
import sys
from data.dataset import load_data
from tokenizer import load_tokenizer
tokenizer = load_tokenizer("bpe_tokenizer_95")
print("ready", flush=True)
sys.stdin.readline()
opened = load_data(sys.argv[1], tokenizer, 64, cache_dir=sys.argv[2], progress=False)
print(opened.fingerprint, opened.num_tokens, opened.num_rows)
"""


def test_two_processes_at_the_same_time_build_the_same(folder, tmp_path):
    words = [sys.executable, "-c", OPEN, str(folder), str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(words, cwd=ROOT, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    (one, error), (other, _) = (process.communicate(timeout=60) for process in processes)
    assert one == other != "", error
    assert len(list((tmp_path / "cache").iterdir())) == 2
    opened = load_data(str(folder), load_tokenizer("bpe_tokenizer_95"), 64, cache_dir=tmp_path / "cache", progress=False)
    assert one == f"{opened.fingerprint} {opened.num_tokens} {opened.num_rows}\n" and opened.num_stories == 400


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """Python's own allocations and numpy's, at their peak, for a corpus and for one four times as large."""
    monkeypatch.setattr(data, "MAX_VALIDATION", 100)
    monkeypatch.setattr(data, "_batches", functools.partial(data._batches, count=64))
    monkeypatch.setattr(data, "_write_rows", functools.partial(data._write_rows, chunk=256))
    peaks = []
    for count in (600, 1200, 4800):  # the first is for what is imported and kept once
        write_jsonl(tmp_path / f"{count}.jsonl", (f"{number} {'abc ' * 20}" for number in range(count)))
        tracemalloc.start()
        load_data(str(tmp_path / f"{count}.jsonl"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.1 * peaks[1]


# Sources


def test_local_files_of_every_kind_give_the_same_stories(tmp_path):
    stories = ["Once upon a time.\nThe end.", "Zoë said “hi”.", "A third one."]
    write_parquet(tmp_path / "a.parquet", text=stories)
    write_jsonl(tmp_path / "b.jsonl", stories)
    (tmp_path / "c.txt").write_bytes("<|endoftext|>\n".join(f"{story}\n" for story in stories).encode())
    (tmp_path / "d.txt").write_bytes("\n\n\n".join(stories).replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "e.txt").write_bytes(("<|endoftext|>" + "<|endoftext|>".join(stories)).encode())
    for name in ("a.parquet", "b.jsonl", "c.txt", "d.txt", "e.txt"):
        assert list(read_stories(str(tmp_path / name))) == stories, name


def test_a_copy_is_found_by_its_name_in_basegpt_data(folder, tmp_path, monkeypatch, capsys):
    """The name is portable; the fingerprint is that of the files, wherever they are."""
    folder.rename(tmp_path / "tinystories")
    monkeypatch.setenv("BASEGPT_DATA", str(tmp_path))
    by_path, by_name, by_auto = map(sources.open_source, (str(tmp_path / "tinystories"), "tinystories", "auto"))
    assert by_path.name == by_name.name == by_auto.name == "tinystories"
    assert by_path.fingerprint(tmp_path) == by_name.fingerprint(tmp_path) == by_auto.fingerprint(tmp_path)
    assert list(read_stories("tinystories", "validation")) == list(by_path.stories("validation", collections.Counter()))
    assert capsys.readouterr().err == "tinystories: the copy in BASEGPT_DATA is used\n"
    (tmp_path / "storyworld").mkdir()
    assert sources.open_source("storyworld").num_train == 50_000, "the built-in world cannot be replaced"
    monkeypatch.setenv("BASEGPT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"BASEGPT_DATA=.*nowhere: there is no such folder"):
        sources.open_source("tinystories")


@pytest.mark.parametrize(("source", "name"), [
    ("tinystories", "tinystories"), ("storyworld:300", "storyworld:300"), ("hub:owner/name", "hub:owner/name"),
    ("roneneldan/TinyStories", "roneneldan/TinyStories"), ("../data/mine.txt", "mine.txt"), ("/data/mine/", "mine"),
    ("C:\\data\\mine.txt", "mine.txt"), ("hub:/data/mine", "mine"), ("hub:../mine", "mine"),
])
def test_portable_names(source, name):
    assert sources.portable_name(source) == name


def test_files_about_the_stories_are_not_read(tmp_path):
    for name, text in {"stories.txt": "One day.\n\nTwo days.", "README.txt": "Read me.", "dataset_info.json": "{"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert list(read_stories(str(tmp_path))) == ["One day.", "Two days."]


def test_names_of_files_say_the_split(tmp_path, capsys):
    for name in ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "training_valid.parquet",
                 "x_test.parquet", ".hidden/train.parquet", "licence.parquet"):
        write_parquet(tmp_path / "d" / name, text=[name])
    assert list(read_stories(str(tmp_path / "d"))) == ["data/train-00000-of-00001.parquet"]
    assert "1 files not used, as their names say no split (such as licence.parquet)" in capsys.readouterr().err
    validation = list(read_stories(str(tmp_path / "d"), "validation"))
    assert validation == ["data/validation-00000-of-00001.parquet", "training_valid.parquet"]
    assert list(read_stories(str(tmp_path / "d"), "test")) == ["x_test.parquet"]
    with pytest.raises(ValueError, match=r"no split 'extra'. There are: "):
        next(read_stories(str(tmp_path / "d"), "extra"))


def test_the_text_column_is_text_or_the_only_one_of_strings(tmp_path):
    write_parquet(tmp_path / "a.parquet", title=["no"], text=["yes"])
    write_parquet(tmp_path / "b.parquet", number=[1], story=["yes"])
    write_jsonl(tmp_path / "c.jsonl", ["yes"], column="story")
    for name in ("a.parquet", "b.parquet", "c.jsonl"):
        assert list(read_stories(str(tmp_path / name))) == ["yes"]


def test_null_and_empty_rows_are_counted(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", text=["one", None, "two", "  ", None, "three", "four"])
    assert list(read_stories(str(tmp_path / "a.parquet"))) == ["one", "two", "three", "four"]
    assert capsys.readouterr().err == "a.parquet: 2 null rows skipped, 1 empty rows skipped\n"
    load_data(str(tmp_path / "a.parquet"), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert "2 null rows skipped, 1 empty rows skipped" in capsys.readouterr().err


def test_a_story_of_one_megabyte(tmp_path):
    long = "word " * 200_000
    write_jsonl(tmp_path / "a.jsonl", [long, *make_stories(100)])
    opened = load_data(str(tmp_path / "a.jsonl"), Characters(), 128, cache_dir=tmp_path / "cache", progress=False)
    assert opened.num_rows > 10


def test_large_files_are_hashed_once(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    path.write_bytes(b"a" * (64 * 2**20 + 1))
    first = sources._file_digest(path, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(sources.hashlib, "file_digest", None)
        assert sources._file_digest(path, tmp_path / "cache") == first
    path.write_bytes(b"b" * (64 * 2**20 + 2))
    assert sources._file_digest(path, tmp_path / "cache") != first


def _truncated(path):
    write_parquet(path, text=make_stories(100))
    os.truncate(path, path.stat().st_size // 2)


def _broken_inside(path):
    write_parquet(path, text=make_stories(2000))
    content = bytearray(path.read_bytes())
    content[200:4000] = bytes(3800)
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "make", "message"), [
    ("a.parquet", lambda path: write_parquet(path, one=["a"], two=["b"], three=[1]),
     r"a.parquet has no column called 'text', and 2 columns of strings. The columns are: one, two, three. Rename"),
    ("a.jsonl", lambda path: path.write_text('{"n": 1}\n'), "0 columns of strings. The columns are: n"),
    ("a.parquet", lambda path: write_parquet(path, text=[7, 8]), "a.parquet: one of the stories is 7. It has to be"),
    ("a.txt", lambda path: path.touch(), "a.txt is empty. "),
    ("a.txt", lambda path: path.write_text("\n\n \n"), "a.txt has 0 train stories, too few"),
    ("a.txt", lambda path: path.write_text("only one"), "a.txt has 1 train stories, too few"),
    ("a.txt", lambda path: path.write_bytes(b"fine\nnot \xff so\n"), r"a.txt is not UTF-8 at byte 9 \(0xff\). Save it as UTF-8"),
    ("a.jsonl", lambda path: path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n'), "a.jsonl, line 2, is not JSON in UTF-8"),
    ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": '), "a.jsonl, line 2, is not JSON"),
    ("a.jsonl", lambda path: path.write_text('["a"]\n'), "line 1, is not an object"),
    ("a.jsonl", lambda path: path.write_text('{"text": "a"}\n{"text": 5}'), "line 2: 'text' is 5. It has to be a string"),
    ("a.parquet", _truncated, "a.parquet is not a whole parquet file .*Copy or download it again"),
    ("a.parquet", _broken_inside, "a.parquet is not a whole parquet file .*Copy or download it again"),
    ("a.csv", lambda path: path.write_text("text\na\n"), "a.csv is of a kind that can't be read. Readable are: .parquet"),
    ("a.txt/", lambda path: path.mkdir(), "holds no file that can be read. Readable are: .parquet"),
])
def test_bad_files_are_named_with_the_cure(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        load_data(str(tmp_path / name), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "error", "message"), [
    ("tinystory", ValueError, "no data source is called 'tinystory'. Did you mean 'tinystories'?"),
    ("story_world", ValueError, "Did you mean 'storyworld'?"),
    ("missing/file.txt", FileNotFoundError, "no file, folder or data source is called 'missing/file.txt'. Give an existing path"),
    ("owner/name", FileNotFoundError, "or hub:owner/name for a data set of the Hugging Face hub"),
    ("storyworld:many", ValueError, "'storyworld:many' should be storyworld:COUNT"),
    ("", FileNotFoundError, "no file, folder or data source is called ''"),
    ("hub:", FileNotFoundError, "no file, folder or data source is called 'hub:'"),
    ("hub:not a name", FileNotFoundError, "no data set can be called 'not a name'. Write hub:owner/name"),
])
def test_unknown_sources(source, error, message):
    with pytest.raises(error, match=message):
        next(read_stories(source))


@pytest.mark.parametrize(("change", "message"), [
    ({"packing": "tight"}, "packing='tight': give 'packed' or 'padded'"),
    ({"max_seq_len": 1}, "max_seq_len=1: give at least 2"),
])
def test_bad_arguments(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_data(str(folder), Characters(), **{"max_seq_len": 64, "cache_dir": tmp_path, **change})


def test_a_folder_that_the_library_can_not_read(tmp_path):
    with pytest.raises(ValueError, match=r"`datasets` can't read .*doesn.t contain any data files. Train on the built-in"):
        next(read_stories(f"hub:{tmp_path}"))


def test_a_download_that_breaks_off_is_a_hub_out_of_reach(monkeypatch):
    import datasets

    def break_off(repo):
        raise RuntimeError("Server disconnected without sending a response.")  # the clients' errors share no base but Exception

    monkeypatch.setattr(sources, "_check_hub", lambda repo, cure: None)
    monkeypatch.setattr(datasets, "load_dataset", break_off)
    with pytest.raises(ConnectionError, match=r"no-owner/no-name could not be downloaded .*\(Server disconnected .* Try again"):
        next(read_stories("hub:no-owner/no-name"))


def test_null_rows_of_validation_are_counted_too(folder, tmp_path, capsys):
    with open(folder / "validation.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": null}\n')
    load_data(str(folder), Characters(), 64, cache_dir=tmp_path / "cache", progress=False)
    assert "stories: 1 null rows skipped\n" in capsys.readouterr().err


def test_special_tokens_inside_of_a_text_are_refused(folder, tmp_path):
    class Careless(Characters):
        def encode(self, text, bos=False, eos=False):
            return [257 if token == ord("!") else token for token in super().encode(text, bos, eos)]

    with pytest.raises(ValueError, match="reads as its own bos, eos or pad token"):
        load_data(str(folder), Careless(), 64, cache_dir=tmp_path / "cache", progress=False)


# The hub, without a network


def test_a_data_set_of_the_hub_is_read_from_its_cache(tmp_path, monkeypatch, capsys):
    """First the library reads it; then it is moved to where a download would lie, and read without asking the hub."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    write_parquet(tmp_path / "owner/name/data/train-00000-of-00001.parquet", text=["one", None, "two"])
    write_parquet(tmp_path / "owner/name/data/validation-00000-of-00001.parquet", text=["three"])
    assert list(read_stories("hub:owner/name")) == ["one", "two"]
    assert "1 null rows skipped" in capsys.readouterr().err
    cached = next((tmp_path / "hf").glob("name/*/*/*/dataset_info.json")).parent
    place = tmp_path / "hf/owner___name" / Path(*cached.parts[-3:])
    (tmp_path / "owner").rename(tmp_path / "gone")
    place.parent.mkdir(parents=True)
    cached.rename(place.with_name("0123456789abcdef"))
    monkeypatch.setattr(sources, "_check_hub", lambda *_: pytest.fail("the hub was asked"))
    assert list(read_stories("hub:owner/name")) == ["one", "two"]


# The settings of `datasets` are read when it is imported, so these are processes of their own.
READ = """
import sys, time
from data import sources
from data.storyworld import world
world.stories = lambda split, count, name: [f"{name} {split} {count}"]
sources.HUB_SECONDS = min(sources.HUB_SECONDS, float(sys.argv[1]))
for source in sys.argv[2:]:
    began = time.monotonic()
    try:
        print(*sources.read_stories(source), sep="|")
    except Exception as error:
        print(type(error).__name__, error)
    assert time.monotonic() - began < 10
"""


def read_from(endpoint, folder, *words):
    """What a new Python reads of the sources, a line each, and its standard error; words are the patience and the sources."""
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": endpoint}
    environment.pop("HF_HUB_OFFLINE", None)
    code = [sys.executable, "-c", READ, *words]
    done = subprocess.run(code, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines(), done.stderr


def test_without_the_hub_a_name_is_an_error_and_auto_storyworld(tmp_path):
    *errors, auto = ("tinystories", "hub:owner/name", "auto")
    (*read, stories), said = read_from("http://127.0.0.1:9", tmp_path, "99", *errors, auto)
    for line in read:
        assert line.startswith("ConnectionError") and "--train.data storyworld" in line
        assert "is not cached and the Hugging Face hub can't be reached" in line
    assert len(read) == 2 and stories == "storyworld_small train 20000"
    assert said == ("TinyStories is not cached and the Hugging Face hub can't be reached: "
                    "using storyworld_small instead, a built-in world of simple stories\n")


def test_a_hub_that_never_answers_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        (line,), said = read_from(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path, "0.5", "tinystories")
    assert line.startswith("ConnectionError roneneldan/TinyStories is not cached and the Hugging Face hub can't be reached")
    assert not said and sources.HUB_SECONDS < 10
