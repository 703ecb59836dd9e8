"""Text to token ids and back: the character-pair tokenizer, any Hugging Face tokenizer, and classes of one's own.

    python tokenizer.py --data ../stories.txt --vocab_size 1024 --name my_tokenizer

The character-pair tokenizer is byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) over 95 characters instead of bytes:
newline, 93 printable ASCII characters, and U+FFFD for everything that `normalise` can't write in ASCII. Text is first split into
words, each with the space before it, and single other characters; merges stay inside of these. Hugging Face's `tokenizers` learns
and applies the merges; a tokenizer file is its JSON.
"""

import difflib
import hashlib
import html
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice, pairwise
from pathlib import Path

from data.cache import in_words_of_here
from data.tokenizer_class import load_class
from runs.files import write_atomically

TOKENIZERS_DIR = Path(__file__).resolve().parent / "tokenizers"
REPLACEMENT = "\ufffd"
ALPHABET = "".join(sorted(["\n", *(chr(code) for code in range(0x20, 0x7F) if chr(code) not in "`~"), REPLACEMENT]))
WORD = r" ?[A-Za-z]+|[^A-Za-z]"

# Usual names of the special tokens; a tokenizer without one gets the first name of the list.
BOS_NAMES = ["<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]", "<|endoftext|>"]
EOS_NAMES = ["<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]"]
PAD_NAMES = ["<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|padding|>"]

# Characters that NFKD does not bring to ASCII. U+00AD is the soft hyphen; U+0085, U+2028 and U+2029 are line ends.
TO_ASCII = {"~": "-", "\u2212": "-", "\u00ad": "-", "\u2044": "/", "\u2026": "...", "ß": "ss", "ẞ": "SS", "ı": "i"}
TO_ASCII |= {"æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
TO_ASCII |= dict.fromkeys("\t\v\f", " ") | dict.fromkeys("\r\u0085\u2028\u2029", "\n")
TO_ASCII |= dict.fromkeys("`\u00b4\u2018\u2019\u201a\u201b\u2032\u2039\u203a", "'")
TO_ASCII |= dict.fromkeys("\u00ab\u00bb\u201c\u201d\u201e\u201f\u2033", '"')


class CharacterTable(dict):
    """A table for `str.translate` that is filled as characters come up."""

    def __missing__(self, code: int) -> str:
        self[code] = result = self.ascii_for(chr(code))
        return result

    def ascii_for(self, character: str) -> str:
        if character in ALPHABET:
            return character
        if character in TO_ASCII:
            return TO_ASCII[character]
        if "\u0300" <= character <= "\u036f":  # a combining accent
            return ""
        category = unicodedata.category(character)
        if category in ("Zs", "Pd"):
            return " " if category == "Zs" else "-"
        parts = unicodedata.normalize("NFKD", character)
        if parts == character or " " in parts:
            return REPLACEMENT
        result = "".join(map(self.ascii_for, parts))
        return REPLACEMENT if REPLACEMENT in result or not result else result


_CHARACTERS = CharacterTable()


def normalise(text: str) -> str:
    """Write a text in the 95 characters of ALPHABET.

    Quotes become straight, dashes and the tilde '-', spaces and tabs ' ', line ends '\\n', '…' '...'; letters with accents,
    ligatures and full-width forms become plain letters (NFKD). Any other character becomes U+FFFD.

    >>> normalise("“Café” – a crêpe…")
    '"Cafe" - a crepe...'
    """
    return text.replace("\r\n", "\n").translate(_CHARACTERS)


def count_replacements(texts: str | Iterable[str]) -> int:
    """The number of U+FFFD in the normalised texts: the characters that a character-pair tokenizer loses."""
    return sum(normalise(text).count(REPLACEMENT) for text in ([texts] if isinstance(texts, str) else texts))


def kept_bytes(text: str, decoded: str) -> int:
    """UTF-8 bytes of the characters of a text that a tokenizer gives back, in their order: the longest common subsequence.

    By bits, a row of the table in one number (Hyyro 2004, "Bit-parallel LCS-length computation revisited").

    >>> kept_bytes("“Hi”, Zoë", '"Hi", Zoe')  # all but the quotes and the ë
    6
    """
    if text == decoded:
        return len(text.encode("utf-8", "replace"))
    text, decoded = ("".join(char * len(char.encode("utf-8", "replace")) for char in each) for each in (text, decoded))
    positions: dict[str, int] = defaultdict(int)  # of each character in the text, as bits
    for position, character in enumerate(text):
        positions[character] |= 1 << position
    row = whole = (1 << len(text)) - 1
    for character in decoded:
        matches = row & positions.get(character, 0)
        row = (row + matches | row - matches) & whole
    return len(text) - row.bit_count()


class Tokenizer:
    """Base class of all tokenizers. Your own sets four numbers and writes two methods, which know nothing of bos, eos and pad:

        class Bytes(Tokenizer):
            vocab_size, bos_id, eos_id, pad_id = 259, 256, 257, 258

            def ids_of(self, text: str) -> list[int]:
                return list(text.encode())

            def text_of(self, ids: list[int]) -> str:
                return bytes(ids).decode(errors="replace")

    Only `bos=True` and `eos=True` put the special tokens into the ids: "<bos>" in a text is ordinary text.
    """

    name: str = ""  # what load_tokenizer was given
    fingerprint: str  # of what it does; load_tokenizer makes it for a class of your own
    vocab_size: int  # bos, eos and pad included
    bos_id: int
    eos_id: int
    pad_id: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size})"

    def _prepare(self, text: str) -> str:
        return re.sub("[\ud800-\udfff]", REPLACEMENT, text)  # lone surrogates, which UTF-8 does not allow

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of a text."""
        return self.encode_batch([text], bos, eos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        """The ids of each text; with `tokenizers` much faster than one call per text."""
        return [[self.bos_id] * bos + list(self.ids_of(self._prepare(text))) + [self.eos_id] * eos for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, without bos, eos and pad. Raises ValueError for an id outside of the vocabulary."""
        ids = [int(index) for index in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise ValueError(f"{self.name} has no token {wrong}: its ids go from 0 to {self.vocab_size - 1}")
        special = (self.bos_id, self.eos_id, self.pad_id)
        return self.text_of([index for index in ids if index not in special])

    def normalise(self, text: str) -> str:
        """The text after encoding and decoding: decode(encode(text))."""
        return self.decode(self.encode(text))

    def tokens(self, text: str) -> list[str]:
        """The piece of text of each id, for display. A character made of several ids is shown with the last."""
        ids = self.encode(text)
        ends = [len(self.decode(ids[:end]).rstrip(REPLACEMENT)) for end in range(len(ids))] + [None]
        whole = self.decode(ids)
        return [whole[start:end] for start, end in pairwise(ends)]

    def kept_bytes(self, text: str) -> int:
        """UTF-8 bytes of the characters of a text that `decode` gives back; those that it changes or drops are lost.

        >>> load_tokenizer("bpe_tokenizer_1024").kept_bytes("“Да”, Zoë")  # of 16 bytes: the comma, the space, Z and o
        4
        """
        return kept_bytes(text, self.normalise(text))

    def lost_share(self, texts: Sequence[str]) -> float:
        """Share of the UTF-8 bytes of the texts that `decode` does not give back."""
        return 1 - sum(map(self.kept_bytes, texts)) / sum(len(text.encode("utf-8", "replace")) for text in texts)

    def bytes_per_token(self, texts: Sequence[str]) -> float:
        """UTF-8 bytes that `decode` gives back, per token. Raises ValueError if there are no tokens."""
        num_tokens = sum(map(len, self.encode_batch(texts)))
        if num_tokens == 0:
            raise ValueError(f"the {len(texts)} texts have no tokens: give at least one that is not empty")
        return sum(map(self.kept_bytes, texts)) / num_tokens

    def to_html(self, text: str) -> str:
        """The text as HTML for a notebook: a background colour for each token, or bars between them where styles are stripped."""
        colours = ("#cde7ff", "#ffe3b8", "#d5f0c9", "#f5d0e2", "#e3d9fb")
        pieces = [html.escape(piece).replace("\n", "<br>") for piece in self.tokens(text)]
        spans = [
            f'<span style="background:{colours[i % len(colours)]}; color:black">{piece}</span>' for i, piece in enumerate(pieces)
        ]
        bar = '<span style="display:none">│</span>'
        return f'<div style="white-space:pre-wrap; font-family:monospace; line-height:1.6">{bar.join(spans)}</div>'


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers`, from its JSON.

    bos, eos and pad are added tokens with one of the usual names, or are appended.
    """

    def __init__(self, name: str, content: str):
        from tokenizers import Tokenizer as Engine

        self.name, self.content = name, content
        self.engine = Engine.from_str(content)
        self.engine.no_truncation()
        self.engine.no_padding()
        self.engine.post_processor = None
        self.bos_id = self._special_id(BOS_NAMES)
        self.eos_id = self._special_id(EOS_NAMES)
        self.pad_id = self._special_id(PAD_NAMES)
        self.engine.encode_special_tokens = True
        self.vocab_size = max(self.engine.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = _fingerprint(json.loads(content))

    def _special_id(self, names: list[str]) -> int:
        added = {token.content: index for index, token in self.engine.get_added_tokens_decoder().items()}
        for name in names:
            if name in added:
                return added[name]
        self.engine.add_special_tokens([names[0]])
        return self.engine.token_to_id(names[0])

    def __reduce__(self):
        return type(self), (self.name, self.content)

    def encode_batch(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        encodings = self.engine.encode_batch_fast([self._prepare(text) for text in texts], add_special_tokens=False)
        return [[self.bos_id] * bos + encoding.ids + [self.eos_id] * eos for encoding in encodings]

    def text_of(self, ids: list[int]) -> str:
        return self.engine.decode(ids, skip_special_tokens=True)

    def tokens(self, text: str) -> list[str]:
        """The piece of text of each id, for display. A character made of several ids is shown with the first."""
        text, pieces, end = self._prepare(text), [], 0
        for start, stop in self.engine.encode(text, add_special_tokens=False).offsets:
            pieces.append(text[max(start, end) : stop])
            end = max(end, stop)
        return pieces


class CharacterPairTokenizer(HuggingFaceTokenizer):
    """Ids: ALPHABET (0 to 94), the merges in the order in which they were learned, bos, eos, pad."""

    def _prepare(self, text: str) -> str:
        return normalise(text)

    def normalise(self, text: str) -> str:
        """The function `normalise`; decode(encode(text)) == normalise(text) for every text."""
        return normalise(text)

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The merged pairs, in the order in which they were learned."""
        return [tuple(pair) for pair in json.loads(self.content)["model"]["merges"]]

    def cut(self, vocab_size: int, name: str) -> "CharacterPairTokenizer":
        """The tokenizer as it was when it had learned `vocab_size` tokens (without bos, eos and pad)."""
        _check_vocab_size(vocab_size)
        if vocab_size > self.bos_id:
            raise ValueError(f"vocab_size={vocab_size}: {self.name} has only {self.bos_id} tokens, so give at most that")
        vocabulary, merges = list(ALPHABET), []
        for left, right in self.merges:
            if len(vocabulary) == vocab_size:
                break
            merges.append((left, right))
            if left + right not in vocabulary:
                vocabulary.append(left + right)
        return _assemble(name, vocabulary, merges)

    def save(self, overwrite: bool = False) -> Path:
        """Write tokenizers/`name`.model and return its path. Raises FileExistsError if it exists, unless overwrite."""
        path = check_new_name(self.name, overwrite)
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, f"{self.content}\n".encode())
        except OSError as error:
            raise OSError(f"could not write {path} ({error.strerror}): make room, or make {path.parent} writable") from error
        return path


def _fingerprint(parsed: dict) -> str:
    content = {key: parsed.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()[:16]


def _assemble(name: str, vocabulary: list[str], merges: list[tuple[str, str]]) -> CharacterPairTokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges, unk_token=REPLACEMENT))
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    engine.decoder = decoders.Fuse()
    engine.add_special_tokens([BOS_NAMES[0], EOS_NAMES[0], PAD_NAMES[0]])
    return CharacterPairTokenizer(name, engine.to_str(pretty=True))


def train_tokenizer(texts: Iterable[str], vocab_size: int, name: str, progress: bool = False) -> CharacterPairTokenizer:
    """Learn a character-pair tokenizer: merge the most frequent pair of neighbours into a token, again and again.

    The same texts give the same tokenizer in any order: of equally frequent pairs, the one with the smallest ids is merged.

    Parameters
    ----------
    texts : iterable of str
        What to learn from; read once.
    vocab_size : int
        Number of characters (95) and merges; bos, eos and pad come on top.
    name : str
        Its name, under which `save` writes it.
    progress : bool, default False
        Show a progress bar.

    Returns
    -------
    CharacterPairTokenizer

    Raises
    ------
    ValueError
        If vocab_size is below 95, if there is no text, or if too few pairs occur twice in it.

    Examples
    --------
    >>> train_tokenizer(["the cat and the hat"], vocab_size=97, name="my_tokenizer").merges
    [('a', 't'), ('h', 'e')]
    """
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Engine

    # read and normalise the texts, and count their characters
    _check_vocab_size(vocab_size)
    num_characters = 0

    def normalised():
        nonlocal num_characters
        for text in texts:
            num_characters += len(text)
            yield normalise(text)

    # learn the merges
    engine = Engine(models.BPE())
    engine.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, initial_alphabet=list(ALPHABET), show_progress=progress)
    engine.train_from_iterator(normalised(), trainer)
    if num_characters == 0:
        raise ValueError("there is no text to learn a tokenizer from: give data with at least one story")

    # number the tokens, and check that there are enough
    model = json.loads(engine.to_str())["model"]
    if len(model["vocab"]) < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} can't be reached: after {len(model['vocab'])} tokens no pair occurs twice in the "
            f"{num_characters:,} characters of text. Give more text, or vocab_size={len(model['vocab'])}"
        )
    merges = [(left, right) for left, right in model["merges"]]
    return _assemble(name, sorted(model["vocab"], key=model["vocab"].get), merges)


def _check_vocab_size(vocab_size: int) -> None:
    if vocab_size < len(ALPHABET):
        raise ValueError(f"vocab_size={vocab_size} is too small: give at least {len(ALPHABET)}, one for each character")


def check_new_name(name: str, overwrite: bool = False) -> Path:
    """The path of a new tokenizer. Raises ValueError or FileExistsError if the name can't be used."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) or re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name):
        raise ValueError(f"{name!r} can't be a tokenizer's name: use letters, digits, '_', '-' and '.', such as my_tokenizer")
    path = TOKENIZERS_DIR / f"{name}.model"
    if path.exists() and not overwrite:
        cure = in_words_of_here("choose another name, or overwrite it (--overwrite)")
        raise FileExistsError(f"there is a tokenizer called {name!r} already: {cure}")
    return path


def available_tokenizers() -> list[str]:
    """The names of the tokenizers in tokenizers/, in the order of the numbers in them."""
    numbers = re.compile(r"\d+")
    names = (path.stem for path in TOKENIZERS_DIR.glob("*.model"))
    return sorted(names, key=lambda name: (numbers.sub("", name), [int(number) for number in numbers.findall(name)]))


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer by name or path.

    Parameters
    ----------
    name : str
        A name in tokenizers/ ("bpe_tokenizer_1024"), a .model or tokenizer.json file, a folder with one, "hf:" and a name
        on the Hugging Face hub ("hf:gpt2") or a local path, or your own class ("my_module:Bytes", "my_module:Bytes(size=1)").

    Returns
    -------
    Tokenizer
        A CharacterPairTokenizer for a file of ours.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        If there is no such tokenizer, its file is damaged, or its class makes a mistake.

    Examples
    --------
    >>> tokenizer = load_tokenizer("bpe_tokenizer_1024")
    >>> tokenizer.tokens("Once upon a time")
    ['Once', ' upon', ' a', ' time']
    >>> tokenizer.decode(tokenizer.encode("Once upon a time"))
    'Once upon a time'
    """
    if re.fullmatch(r"(?!hf:)[\w.]+:[^\W\d]\w*(\(.*\))?", str(name)):
        return load_class(str(name), Tokenizer)
    path = _find_tokenizer(str(name))
    return parse_tokenizer(str(name), path.read_bytes(), str(path))


def parse_tokenizer(name: str, content: bytes, file: str) -> Tokenizer:
    """The tokenizer of that name, from the content of its file. Raises ValueError with the name of the file if it is damaged."""
    try:
        text = content.decode("utf-8")
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is damaged or not a tokenizer ({error}): copy it again, or make a new one") from error
    try:
        vocabulary = parsed["model"]["vocab"]
        is_ours = isinstance(vocabulary, dict) and sorted(vocabulary, key=vocabulary.get)[: len(ALPHABET)] == list(ALPHABET)
        return (CharacterPairTokenizer if is_ours else HuggingFaceTokenizer)(name, text)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{file} is JSON, but not of a tokenizer ({error!r}): give a file that `tokenizers` wrote") from error


def _find_tokenizer(name: str) -> Path:
    saved, path = TOKENIZERS_DIR / f"{name}.model", Path(name.removeprefix("hf:"))
    if not name.startswith("hf:") and saved.is_file():
        return saved
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        raise FileNotFoundError(f"the folder {path} holds no tokenizer.json: give the folder of a Hugging Face tokenizer")
    if path.exists():
        return path / "tokenizer.json" if path.is_dir() else path
    if name.startswith("hf:"):
        return _download(name.removeprefix("hf:"))
    if path.suffix in (".model", ".json") or len(path.parts) > 1:
        raise FileNotFoundError(f"there is no tokenizer file {path}: check the path")
    names = available_tokenizers()
    close = difflib.get_close_matches(name, names, n=1, cutoff=0)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    raise FileNotFoundError(
        f"no tokenizer is called {name!r}. {hint}There are: {', '.join(names)}; of the hub: hf:gpt2; or your own: module:Class"
    )


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(repository, "tokenizer.json"))
    except Exception as error:  # the network, the repository or the file: many types, one cure
        raise FileNotFoundError(
            f"can't get tokenizer.json of {repository!r} from the Hugging Face hub ({type(error).__name__}): check the name and "
            f"the network, or give a local folder as hf:FOLDER"
        ) from error


def main(
    data: str = "auto",
    vocab_size: int = 1024,
    name: str = "my_tokenizer",
    num_stories: int = 100_000,
    overwrite: bool = False,
) -> None:
    """Learn a character-pair tokenizer and save it in tokenizers/.

    Args:
        data: Source of the stories, as in training: tinystories, storyworld, hub:owner/name, a file or a folder.
        vocab_size: Number of characters (95) and merges; bos, eos and pad come on top.
        name: Name of the new tokenizer, for --train.tokenizer NAME.
        num_stories: Learn from at most this many stories.
        overwrite: Replace a tokenizer of this name.
    """
    from data.dataset import read_stories

    check_new_name(name, overwrite)
    _check_vocab_size(vocab_size)
    stories = list(islice(read_stories(data, split="train"), num_stories))
    tokenizer = train_tokenizer(stories, vocab_size, name, progress=True)
    path = tokenizer.save(overwrite)
    print("merges learned:", " ".join(repr(left + right) for left, right in tokenizer.merges))
    print(f"bytes per token: {tokenizer.bytes_per_token(stories[:2000]):.3f} (on the first {min(2000, len(stories))} stories)")
    print(f"characters replaced by U+FFFD: {count_replacements(stories)}")
    print(f"saved as {path}")


if __name__ == "__main__":
    import tyro

    from runs.terminal import errors_in_one_line

    with errors_in_one_line():
        tyro.cli(main, use_underscores=True, config=(tyro.conf.FlagCreatePairsOff,))
