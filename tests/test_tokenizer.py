"""The tokenizers: against a slow reference, against Hugging Face's own ids, and against bad input."""

import html
import json
import pickle
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import tokenizer as module
from tokenizer import ALPHABET, REPLACEMENT, WORD, count_replacements, kept_bytes, load_tokenizer, normalise, train_tokenizer

SIZES = [95, 128, 256, 512, 1024, 2048]
STORY = """Once upon a time, there was a little dog named Max. Max had 12 red balls; he couldn't count them!
"Let's play," said Lily. "The ball is under the tree." So they ran and ran, and Max found the ball.
They were happy (very happy) all day. The end. aaaa aaaaa bananana The theme of the other mother
"""


# The slow reference counts every pair anew before every merge.


def join(pieces, left, right):
    result, i = [], 0
    while i < len(pieces):
        both = i + 1 < len(pieces) and (pieces[i], pieces[i + 1]) == (left, right)
        result.append(left + right if both else pieces[i])
        i += 2 if both else 1
    return result


def reference_train(texts, vocab_size):
    words = Counter(word for text in texts for word in re.findall(WORD, normalise(text)))
    pieces = {word: list(word) for word in words}
    ids = {character: index for index, character in enumerate(ALPHABET)}
    merges = []
    while len(ids) < vocab_size:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(pieces[word]):
                pairs[pair] += count
        left, right = max(pairs, key=lambda pair: (pairs[pair], -ids[pair[0]], -ids[pair[1]]))
        assert pairs[left, right] >= 2
        merges.append((left, right))
        ids.setdefault(left + right, len(ids))
        pieces = {word: join(parts, left, right) for word, parts in pieces.items()}
    return merges, ids


def reference_encode(text, merges, ids):
    result = []
    for word in re.findall(WORD, normalise(text)):
        pieces = list(word)
        for left, right in merges:
            pieces = join(pieces, left, right)
        result += [ids[piece] for piece in pieces]
    return result


def random_words(seed, count=300):
    """Short words of few letters: many pairs are equally frequent, and letters repeat."""
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("aabBc", k=rng.randint(1, 7))) for _ in range(count))


@pytest.mark.parametrize(
    "texts, vocab_size", [([STORY * 3], 150), (["aaaa aaa aaaaaaa aa"], 97), ([STORY, "“Naïve” 😀 `~`"], 110)]
)
def test_reference_learns_the_same_merges_and_gives_the_same_ids(texts, vocab_size):
    merges, ids = reference_train(texts, vocab_size)
    fast = train_tokenizer(texts, vocab_size, "fast")
    assert fast.merges == merges
    for text in [*texts, "Lily's aaaaa\n\n  dog – 99 dogs. Quite another matter", random_words(0)]:
        assert fast.encode(text) == reference_encode(text, merges, ids)


@pytest.mark.parametrize("seed", range(20))
def test_reference_breaks_ties_in_the_same_way(seed):
    text = random_words(seed)
    merges, ids = reference_train([text], 160)
    fast = train_tokenizer([text], 160, "fast")
    assert fast.merges == merges
    assert fast.encode(random_words(seed + 1000)) == reference_encode(random_words(seed + 1000), merges, ids)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("“Don’t,” she said — ‘no’…", "\"Don't,\" she said - 'no'..."),
        ("na\u00efve caf\u00e9 cafe\u0301 Åse Øre Łódź Straße œuvre ﬁn", "naive cafe cafe Ase Ore Lodz Strasse oeuvre fin"),
        ("a\u00a0b\u2003c\td", "a b c d"),
        ("one\r\ntwo\rthree\u2028four", "one\ntwo\nthree\nfour"),
        ("`code` ~5 −3 non\u2011stop ½", "'code' -5 -3 non-stop 1/2"),
        ("a 😀 b 한 c Ω \x00 \ud83d", f"a {REPLACEMENT} b {REPLACEMENT} c {REPLACEMENT} {REPLACEMENT} {REPLACEMENT}"),
        (f"kept {REPLACEMENT}", f"kept {REPLACEMENT}"),
        (ALPHABET, ALPHABET),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_no_character_vanishes_and_all_end_in_the_alphabet():
    assert len(set(ALPHABET)) == 95
    alphabet = set(ALPHABET)
    table = module.CharacterTable()
    for code in range(sys.maxunicode + 1):
        result = table.ascii_for(chr(code))
        assert alphabet.issuperset(result)
        assert result or unicodedata.combining(chr(code)) or code == 0x34F, hex(code)


def test_replacements_are_counted():
    assert count_replacements("“plain” café") == 0
    assert count_replacements(["a 😀", "", f"{REPLACEMENT} 漢字"]) == 4


def byte_level(special_tokens):
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special_tokens, show_progress=False)
    engine.train_from_iterator([STORY], trainer)
    engine.post_processor = processors.ByteLevel(trim_offsets=True)
    engine.enable_padding(length=64)
    engine.enable_truncation(3)
    return engine


def word_piece():
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(lowercase=True)
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    engine.train_from_iterator([STORY], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False))
    cls, sep = ("[CLS]", 2), ("[SEP]", 3)
    engine.post_processor = processors.BertProcessing(sep, cls)
    return engine


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """Folders with a tokenizer.json like GPT-2's, one with no special token, one like Llama's, and one like BERT's."""
    root = tmp_path_factory.mktemp("hugging_face")
    engines = {
        "gpt2": byte_level(["<|endoftext|>"]),
        "bare": byte_level([]),
        "llama": byte_level(["<unk>", "<s>", "</s>"]),
        "bert": word_piece(),
    }
    for name, engine in engines.items():
        (root / name).mkdir()
        engine.save(str(root / name / "tokenizer.json"))
    return root


@pytest.fixture(params=[f"bpe_tokenizer_{size}" for size in SIZES] + ["gpt2", "bare", "llama", "bert"])
def any_tokenizer(request, hugging_face):
    ours = request.param.startswith("bpe_")
    return load_tokenizer(request.param if ours else f"hf:{hugging_face / request.param}")


def odd_texts():
    rng = random.Random(0)
    for size in (1, 3, 10, 100):
        yield "".join(chr(rng.randrange(sys.maxunicode + 1)) for _ in range(size))
        yield "".join(chr(rng.randrange(0x3000)) for _ in range(size))
        yield "".join(rng.choices(ALPHABET, k=size))
    yield from ["", " ", "\n\n", "  two  spaces ", STORY, "<bos> <eos><pad> <s> </s> <|endoftext|> [CLS] [SEP] [PAD]"]


def test_decode_of_encode_is_normalise(any_tokenizer):
    for text in odd_texts():
        assert any_tokenizer.decode(any_tokenizer.encode(text)) == any_tokenizer.normalise(text)


def test_batch_bos_and_eos(any_tokenizer):
    t = any_tokenizer
    texts = list(odd_texts())
    plain = t.encode_batch(texts)
    assert plain == [t.encode(text) for text in texts]
    assert t.encode_batch(texts, bos=True, eos=True) == [[t.bos_id, *ids, t.eos_id] for ids in plain]
    assert t.encode("a", bos=True)[0] == t.bos_id and t.encode("a", eos=True)[-1] == t.eos_id
    assert t.decode([t.bos_id, *t.encode("ran"), t.eos_id, t.pad_id, t.pad_id]) == t.decode(t.encode("ran"))
    assert max(map(max, filter(None, plain))) < t.vocab_size > max(t.bos_id, t.eos_id, t.pad_id)


def test_text_never_becomes_a_special_token(any_tokenizer):
    t = any_tokenizer
    for text in ["<bos>", "a<eos>b", "<pad>", "<|endoftext|>", "<s></s>", "[CLS] [SEP] [PAD]"]:
        assert not {t.bos_id, t.eos_id, t.pad_id} & set(t.encode(text)), text


def test_there_is_one_displayed_token_for_each_id(any_tokenizer):
    for text in [STORY, "“naïve” 😀😀 x"]:
        assert len(any_tokenizer.tokens(text)) == len(any_tokenizer.encode(text))


def test_html_shows_the_borders_of_tokens_without_styles(any_tokenizer):
    pieces = re.sub("<[^>]*>", "", any_tokenizer.to_html("Max & Lily")).split("│")
    assert pieces == [html.escape(piece) for piece in any_tokenizer.tokens("Max & Lily")]


def test_a_copy_through_pickle_is_the_same(any_tokenizer):
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    assert copy.fingerprint == any_tokenizer.fingerprint and copy.vocab_size == any_tokenizer.vocab_size
    assert copy.encode("<bos>" + STORY) == any_tokenizer.encode("<bos>" + STORY)


def test_ids_outside_the_vocabulary_are_refused(any_tokenizer):
    for wrong in (-1, any_tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"{wrong}: its ids go from 0 to"):
            any_tokenizer.decode([0, wrong])


@pytest.mark.parametrize("size", SIZES)
def test_committed_tokenizers(size):
    t = load_tokenizer(f"bpe_tokenizer_{size}")
    assert (t.vocab_size, t.bos_id, t.eos_id, t.pad_id) == (size + 3, size, size + 1, size + 2)
    assert t.encode(ALPHABET[-1]) == [94] and "".join(t.decode([i]) for i in range(95)) == ALPHABET
    assert "".join(t.tokens("“Naïve” 😀")) == normalise("“Naïve” 😀")
    engine = Engine.from_file(str(module.TOKENIZERS_DIR / f"bpe_tokenizer_{size}.model"))
    assert engine.encode(STORY + "😀").ids == t.encode(STORY + "😀")


def test_each_size_is_a_prefix_of_the_next():
    family = [load_tokenizer(f"bpe_tokenizer_{size}") for size in SIZES]
    for small, large in pairwise(family):
        assert large.merges[: len(small.merges)] == small.merges
        assert [small.decode([i]) for i in range(small.bos_id)] == [large.decode([i]) for i in range(small.bos_id)]
        assert large.bytes_per_token([STORY]) > small.bytes_per_token([STORY])
    assert len({t.fingerprint for t in family}) == len(SIZES)


def test_a_cut_is_what_training_to_that_size_gives():
    texts = [random_words(seed) for seed in range(5)]
    large = train_tokenizer(texts, 180, "large")
    for size in (95, 96, 120, 180):
        assert large.cut(size, "cut").fingerprint == train_tokenizer(reversed(texts), size, "direct").fingerprint
    with pytest.raises(ValueError, match="vocab_size=181: large has only 180"):
        large.cut(181, "cut")


def test_saved_and_loaded_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TOKENIZERS_DIR", tmp_path)
    saved = train_tokenizer([STORY * 2], 120, "mine")
    path = saved.save()
    for name in ("mine", str(path), path):
        loaded = load_tokenizer(name)
        assert loaded.fingerprint == saved.fingerprint and loaded.encode(STORY) == saved.encode(STORY)
    with pytest.raises(FileExistsError, match="called 'mine' already: choose another name, or overwrite it"):
        saved.save()
    saved.save(overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.model"]


def test_hugging_face_ids_are_those_of_its_library(hugging_face):
    for name in ("gpt2", "bare", "llama", "bert"):
        engine = Engine.from_file(str(hugging_face / name / "tokenizer.json"))
        engine.no_padding()
        engine.no_truncation()
        for path in (f"hf:{hugging_face / name}", hugging_face / name, hugging_face / name / "tokenizer.json"):
            t = load_tokenizer(path)
            assert t.encode(STORY) == engine.encode(STORY, add_special_tokens=False).ids


def test_hugging_face_special_tokens_are_found_or_appended(hugging_face):
    gpt2, bare, llama, bert = (load_tokenizer(hugging_face / name) for name in ("gpt2", "bare", "llama", "bert"))
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.vocab_size) == (0, 0, 300, 301)
    assert (bare.bos_id, bare.eos_id, bare.pad_id, bare.vocab_size) == (300, 301, 302, 303)
    assert (llama.bos_id, llama.eos_id, llama.pad_id, llama.vocab_size) == (1, 2, 300, 301)
    assert (bert.bos_id, bert.eos_id, bert.pad_id) == (2, 3, 0)


def test_byte_level_tokenizers_keep_every_text(hugging_face):
    gpt2 = load_tokenizer(hugging_face / "gpt2")
    for text in odd_texts():
        assert gpt2.normalise(text) == re.sub("[\ud800-\udfff]", REPLACEMENT, text)
    assert "".join(gpt2.tokens("The 😀 ran  “away”\n")) == "The 😀 ran  “away”\n"


@pytest.mark.parametrize(("name", "text", "kept"), [
    ("bpe_tokenizer_95", "Tom ran.", "Tom ran."), ("bpe_tokenizer_95", "“Да”, Zoë", ", Zo"),
    ("bpe_tokenizer_95", f"a {REPLACEMENT} 漢", f"a {REPLACEMENT} "), ("gpt2", "“Да”, Zoë 😀", "“Да”, Zoë 😀"),
    ("gpt2", "half \ud83d", "half "), ("bert", "Tom's cat\nran.", "om's catran."),
])  # fmt: skip
def test_bytes_that_are_changed_or_dropped_are_lost(hugging_face, name, text, kept):
    tokenizer = load_tokenizer(name if name.startswith("bpe_") else hugging_face / name)
    assert tokenizer.kept_bytes(text) == len(kept.encode())
    assert tokenizer.lost_share([text, text]) == pytest.approx(1 - len(kept.encode()) / len(text.encode("utf-8", "replace")))
    assert tokenizer.bytes_per_token([text]) == len(kept.encode()) / len(tokenizer.encode(text))


def test_kept_bytes_are_those_of_the_longest_common_subsequence():
    def reference(text, decoded):
        table = [[0] * (len(decoded) + 1) for _ in range(len(text) + 1)]
        for i, one in enumerate(text):
            for j, other in enumerate(decoded):
                size = len(one.encode("utf-8", "replace"))
                table[i + 1][j + 1] = table[i][j] + size if one == other else max(table[i][j + 1], table[i + 1][j])
        return table[-1][-1]

    generator = random.Random(0)
    for _ in range(200):
        text, decoded = ("".join(generator.choices("ab é漢\ud83d“" + REPLACEMENT, k=generator.randrange(12))) for _ in range(2))
        assert kept_bytes(text, decoded) == reference(text, decoded)
    assert kept_bytes(STORY, "".join(sorted(STORY))) < 0.3 * len(STORY)


def test_unknown_names_get_the_nearest_match(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Did you mean 'bpe_tokenizer_1024'\? There are: bpe_tokenizer_95, bpe_tok"):
        load_tokenizer("bpe_tokenizer_1000")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer file .*missing\.model"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "GGUF\x00\x01", "[1, 2]", "{}", '{"model": 3}', '{"model": {"vocab": {"a": 0}}}', "null"]
)
def test_damaged_and_foreign_files(tmp_path, content):
    path = tmp_path / "bad.model"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"bad\.model is (damaged or not a tokenizer|JSON, but not of a tokenizer)"):
        load_tokenizer(path)


def test_truncated_and_binary_files(tmp_path):
    whole = (module.TOKENIZERS_DIR / "bpe_tokenizer_256.model").read_bytes()
    for content in (whole[: len(whole) // 2], b"\x80\x02}q\x00.\xff\xfe"):
        (tmp_path / "cut.model").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load_tokenizer(tmp_path / "cut.model")


@pytest.mark.parametrize("name", ["a/b", "a\\b", "..", "", " x", "nul", "COM1.x", "a:b", "é"])
def test_unsafe_names_are_refused(name):
    with pytest.raises(ValueError, match="can't be a tokenizer's name"):
        module.check_new_name(name)


def test_training_says_what_is_wrong():
    with pytest.raises(ValueError, match="vocab_size=94 is too small: give at least 95"):
        train_tokenizer([STORY], 94, "x")
    with pytest.raises(
        ValueError, match=r"vocab_size=1000 can't be reached: after 97 tokens no pair occurs twice .* vocab_size=97"
    ):
        train_tokenizer(["ab ab ab"], 1000, "x")
    for nothing in ([], [""]):
        with pytest.raises(ValueError, match="there is no text to learn a tokenizer from"):
            train_tokenizer(nothing, 100, "x")
    with pytest.raises(ValueError, match="give at least one that is not empty"):
        load_tokenizer("bpe_tokenizer_95").bytes_per_token([""])


def test_importing_is_light():
    code = "import sys, tokenizer; print([m for m in ('tokenizers', 'torch', 'datasets', 'huggingface_hub') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(module.__file__).parent, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]" and not result.stderr


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "TOKENIZERS_DIR", tmp_path / "tokenizers")
    (tmp_path / "stories.jsonl").write_text(
        "".join(json.dumps({"text": f"{STORY} {random_words(seed)} 😀"}) + "\n" for seed in range(10)), encoding="utf-8"
    )
    module.main(data=str(tmp_path / "stories.jsonl"), vocab_size=140, name="mine")
    printed = capsys.readouterr().out
    made = load_tokenizer("mine")
    assert made.vocab_size == 143
    assert repr("".join(made.merges[-1])) in printed and "bytes per token:" in printed and "characters replaced" in printed
    with pytest.raises(FileExistsError):
        module.main(data=str(tmp_path / "stories.jsonl"), vocab_size=140, name="mine")
