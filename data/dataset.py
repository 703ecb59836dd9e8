"""The training set: stories tokenised once to disk, batches of packed rows, and validation stories.

B batch, T max_seq_len.  A row holds T + 1 tokens: the model reads row[:-1] and predicts row[1:].

An entry of the cache is a folder. `stories-KEY` holds the tokens of all training stories, end to end, and the validation stories
as text; `rows-KEY` holds the pieces of stories that make up each row. The keys are digests of the source's content and of the
tokenizer, and for rows also of T and the packing: another T packs again, but does not tokenise again.
"""

import hashlib
import heapq
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from config import IGNORE
from data.cache import default_cache_dir, digest, open_or_build, say
from data.packing import pack, shuffled, story_ids
from data.sources import SEPARATOR, Source, open_source, read_stories

__all__ = ["Data", "load_data", "read_stories", "story_ids"]

FORMAT = 1  # raise it when the content or layout of the cache changes, so that older entries are not opened
MAX_VALIDATION = 3000
MAX_LOST = 0.01  # share of the bytes that a tokenizer may lose for bits per byte to be compared
PIECE = np.dtype([("start", "<u8"), ("length", "<u4")])


class Batch(NamedTuple):
    """The input of a training step: LongTensors, the first three (B, T)."""

    inputs: Any
    targets: Any  # the next token of each input; IGNORE where it is not scored
    story_ids: Any = None  # numbers the stories of a row, which do not see each other; None: one story a row
    memory: Any = None  # (B, M) tokens or (B, M, D) floats for blocks that ask for `memory`; see data/plugin.py


class Data:
    """Training rows on disk, and validation stories.

    Attributes
    ----------
    name : str
        The source; for "auto", the one that was taken.
    fingerprint : str
        Digest of source, tokenizer, T and packing.
    num_stories, num_tokens, num_rows : int
        Training stories, their tokens before packing, and rows per epoch.
    wasted, left_out, repeated : float
        The fraction of positions that are padding, of training tokens that are in no row, and of targets that repeat others:
        beginnings of stories that fill gaps.
    validation : list of str
        At most 3000 whole stories, in the order of their hashes.
    tokenizer : Tokenizer
        The one of the rows.
    max_seq_len : int
        T.
    packing : str
        "packed" or "padded", see `load_data`.
    """

    def __init__(self, name: str, fingerprint: str, stories_dir: Path, rows_dir: Path, info: dict, tokenizer, max_seq_len: int,
                 packing: str):  # fmt: skip
        self.name, self.fingerprint = name, fingerprint
        self.tokenizer, self.max_seq_len, self.packing = tokenizer, max_seq_len, packing
        self.num_stories, self.num_tokens, self.num_rows = info["stories"], info["tokens"], info["rows"]
        self.wasted, self.left_out, self.repeated = info["wasted"], info["left_out"], info["repeated"]
        self.validation: list[str] = json.loads((stories_dir / "validation.json").read_text(encoding="utf-8"))
        self._tokens = np.asarray(np.memmap(stories_dir / "tokens.bin", token_dtype(tokenizer.vocab_size), "r"))
        self._pieces = np.asarray(np.memmap(rows_dir / "pieces.bin", PIECE, "r"))
        self._row_starts = np.asarray(np.memmap(rows_dir / "first.bin", "<u8", "r"))

    def batch(self, start: int, batch_size: int, seed: int) -> Batch:
        """batch_size rows of an infinite shuffled stream of rows, starting at row `start`; a pure function of its arguments.

        The stream goes through all rows once per epoch, in a new order each time. A batch may span two epochs.
        """
        return self.to_batch(self.rows(start, batch_size, seed))

    def rows(self, start: int, batch_size: int, seed: int):
        """The tokens of these rows of the stream, padded with pad_id: LongTensor (B, T + 1)."""
        places = (divmod(position, self.num_rows) for position in range(start, start + batch_size))
        return self.take([shuffled(self.num_rows, seed, epoch)[index] for epoch, index in places])

    def to_batch(self, rows) -> Batch:
        """Inputs, targets and story ids of rows of tokens, a LongTensor (B, T + 1)."""
        ids = story_ids(rows, self.tokenizer.bos_id, self.tokenizer.eos_id)
        # do not score padding, nor the first token of the next story, which cannot be predicted from this one
        not_scored = (rows[:, 1:] == self.tokenizer.pad_id) | (ids[:, 1:] != ids[:, :-1])
        return Batch(rows[:, :-1], rows[:, 1:].masked_fill(not_scored, IGNORE), ids[:, :-1])

    def num_read(self, batch: Batch) -> int:
        """The tokens of a batch that FLOPs are counted for: those that are predicted."""
        return (batch.targets != IGNORE).sum().item()

    def take(self, numbers: Iterable[int]):
        """Rows by their numbers, from 0 to num_rows - 1, padded with pad_id: LongTensor (B, T + 1)."""
        import torch

        numbers = list(numbers)
        rows = np.full((len(numbers), self.max_seq_len + 1), self.tokenizer.pad_id, np.int64)
        for number, row in zip(numbers, rows, strict=True):
            end = 0
            for offset, length in self._pieces[self._row_starts[number]:self._row_starts[number + 1]].tolist():
                row[end:end + length] = self._tokens[offset:offset + length]
                end += length
        return torch.from_numpy(rows)


def load_data(source: str | Source, tokenizer, max_seq_len: int, *, packing: str = "packed", max_stories: int | None = None,
              cache_dir: str | Path | None = None, progress: bool = True) -> Data:
    """Tokenise and pack a source, or open what an earlier call has left in the cache.

    Validation never shares a story with training: training stories with the words of a validation story are dropped, and counted.

    Parameters
    ----------
    source : str or Source
        A name as in `read_stories`, or what `open_source` returns.
    tokenizer : Tokenizer
        From `load_tokenizer`.
    max_seq_len : int
        T, the number of tokens that the model reads at once.
    packing : {"packed", "padded"}, default "packed"
        Fill rows with several stories (see `packing.pack`), or crop and pad each story to a row.
    max_stories : int, optional
        Read only the first training stories of the source.
    cache_dir : str or Path, optional
        By default that of data/cache.py.
    progress : bool, default True
        Show progress bars.

    Returns
    -------
    Data

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        If the source cannot be read, with the cure.

    Examples
    --------
    >>> from tokenizer import load_tokenizer
    >>> data = load_data("storyworld:200", load_tokenizer("bpe_tokenizer_1024"), max_seq_len=128, progress=False)
    >>> data.num_stories, data.batch(0, batch_size=4, seed=0).inputs.shape
    (200, torch.Size([4, 128]))
    """
    if packing not in ("packed", "padded"):
        raise ValueError(f"packing={packing!r}: give 'packed' or 'padded'")
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len={max_seq_len}: give at least 2, and 128 or more for stories")
    if tokenizer.pad_id in (tokenizer.bos_id, tokenizer.eos_id):
        raise ValueError(f"{tokenizer.name} pads with its bos or eos token ({tokenizer.pad_id}), which the loss would ignore. "
                         "Give it a pad token of its own")
    opened = open_source(source) if isinstance(source, str) else source
    cache_dir = Path(cache_dir or default_cache_dir())
    key, fingerprint = keys(opened, tokenizer, max_seq_len, packing, max_stories, cache_dir)
    stories_dir, rows_dir = cache_dir / f"stories-{key}", cache_dir / f"rows-{fingerprint}-2"  # 2: with `repeated`

    stories, tokenised = open_or_build(stories_dir, lambda folder: _tokenise(opened, tokenizer, max_stories, folder, progress))
    lengths = np.memmap(stories_dir / "lengths.bin", np.uint32, "r")
    rows, packed = open_or_build(rows_dir, lambda folder: _write_rows(lengths, max_seq_len + 1, packing, folder))
    if tokenised:
        opened.say(Counter(stories["skipped"]))
    if tokenised or packed:
        say(f"{opened.name}: {stories['stories']:,} stories, {stories['tokens'] / 1e6:.1f}M tokens, "
            f"{rows['wasted']:.1%} padding, {rows['left_out']:.1%} left out, "
            f"{rows['repeated']:.1%} of the targets are repeated beginnings of stories")
    return Data(opened.name, fingerprint, stories_dir, rows_dir, stories | rows, tokenizer, max_seq_len, packing)


def keys(source: Source, tokenizer, max_seq_len: int, packing: str, max_stories: int | None, cache_dir: Path) -> tuple[str, str]:
    """The digests of the tokenised stories, and of the rows that are packed from them."""
    key = digest(FORMAT, source.fingerprint(cache_dir), tokenizer.fingerprint, max_stories)
    return key, digest(key, max_seq_len, packing)


def choose_validation(source: Source, skipped: Counter, progress: bool = False) -> list[str]:
    """Choose at most 3000 distinct stories: those of the validation split with the smallest hashes, in their order.

    Without a validation split they are held out of training: 1% of it, at least 200, at most half. Adds the skipped rows of a
    validation split to `skipped`; those of a training split are counted when it is tokenised.
    """
    split = "validation" if "validation" in source.splits else "train"
    heap, hashes, count = [], set(), 0  # a heap of the negated hashes, so that the largest is in front
    stories = source.stories(split, skipped if split == "validation" else Counter())
    for story in tqdm(stories, desc="choosing validation stories", unit=" stories", disable=not progress, leave=False):
        count += 1
        key = story_hash(story)
        if key in hashes or (len(heap) == MAX_VALIDATION and key > -heap[0][0]):
            continue
        heapq.heappush(heap, (-key, story))
        hashes.add(key)
        if len(heap) > MAX_VALIDATION:
            hashes.remove(-heapq.heappop(heap)[0])
    stories = [story for _, story in sorted(heap, reverse=True)]
    if split == "train":
        most = MAX_VALIDATION if len(heap) == MAX_VALIDATION else len(heap) // 2
        stories = stories[:min(max(200, count // 100), most)]
    if not stories:
        raise ValueError(f"{source.name} has {count:,} {split} stories, too few to train on some and validate on others. "
                         f"Add more (in a .txt, {SEPARATOR} or blank lines separate them), or use another, such as storyworld")
    return stories


def story_hash(story: str) -> int:
    """Hash of the words of a story; copies that differ only in white space have the same hash."""
    words = " ".join(story.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "big")


def fingerprint(stories: list[str]) -> str:
    """16 hex digits that identify these stories in this order; losses with equal fingerprints can be compared."""
    return hashlib.sha256("\0".join(stories).encode(errors="surrogatepass")).hexdigest()[:16]


def _tokenise(source: Source, tokenizer, max_stories: int | None, folder: Path, progress: bool) -> dict:
    """Write tokens.bin (bos story eos, bos story eos, ...), lengths.bin (uint32, one per story) and validation.json.

    In one process, as encode_batch already uses every core.
    """
    skipped, num_stories, num_tokens = Counter(), 0, 0
    validation = choose_validation(source, skipped, progress)
    if (lost := tokenizer.lost_share(validation)) > MAX_LOST:
        say(f"{tokenizer.name} loses {lost:.1%} of the text of {source.name}, so its bits per byte will not be compared. "
            "Use a tokenizer that keeps the text, such as hf:openai-community/gpt2")
    held_out = {story_hash(story) for story in validation}
    (folder / "validation.json").write_text(json.dumps(validation), encoding="utf-8")
    dtype = token_dtype(tokenizer.vocab_size)
    replacement = tokenizer.encode("\ufffd")
    has_validation = "validation" in source.splits
    dropped = "training stories dropped that are in validation too" if has_validation else "stories held out for validation"

    def training_stories() -> Iterator[str]:
        for story in source.stories("train", skipped):
            if story_hash(story) in held_out:
                skipped[dropped] += 1
            else:
                yield story

    total = source.num_train and min(source.num_train, max_stories or source.num_train)
    with (open(folder / "tokens.bin", "wb") as tokens_file, open(folder / "lengths.bin", "wb") as lengths_file,
          tqdm(desc=source.name, total=total, unit=" stories", disable=not progress, leave=False) as bar):
        for stories in _batches(itertools.islice(training_stories(), max_stories)):
            encoded = [ids for ids in tokenizer.encode_batch(stories, bos=True, eos=True) if len(ids) > 2]
            skipped["stories without a token skipped"] += len(stories) - len(encoded)
            lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
            tokens = np.fromiter(itertools.chain.from_iterable(encoded), dtype, int(lengths.sum()))
            if np.isin(tokens, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)).sum() != 2 * len(encoded):
                raise ValueError(f"{source.name} has text that {tokenizer.name} reads as its own bos, eos or pad token. "
                                 "Remove it from the stories, or use another tokenizer")
            if len(replacement) == 1 and (replaced := int((tokens == replacement[0]).sum())):
                skipped[f"characters replaced that {tokenizer.name} does not know"] += replaced
            tokens_file.write(tokens)  # not tofile, which ignores a full disk
            lengths_file.write(lengths)
            num_stories, num_tokens = num_stories + len(encoded), num_tokens + len(tokens)
            bar.update(len(stories))
    if not num_stories:
        raise ValueError(f"{source.name} has no training story that is not in validation, too. Add more stories")
    return {"stories": num_stories, "tokens": num_tokens, "skipped": dict(+skipped)}


def _batches(stories: Iterable[str], count: int = 1024, characters: int = 2**22) -> Iterator[list[str]]:
    """Lists of at most `count` stories, and of about `characters` characters at most, to bound memory."""
    batch, size = [], 0
    for story in stories:
        batch.append(story)
        size += len(story)
        if len(batch) == count or size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write_rows(lengths: np.ndarray, capacity: int, packing: str, folder: Path, chunk: int = 8192) -> dict:
    """Write pieces.bin (PIECE, where in tokens.bin) and first.bin (uint64: the first piece of each row, and the end)."""
    offset, num_rows, num_pieces, num_targets, repeated, filled, left_out = 0, 0, 0, 0, 0, 0, 0
    with open(folder / "pieces.bin", "wb") as pieces_file, open(folder / "first.bin", "wb") as first_file:
        for start in range(0, len(lengths), chunk):
            sizes = lengths[start:start + chunk].astype(np.int64)
            if packing == "packed":
                rows = pack(sizes.tolist(), capacity, seed=start)
            else:
                rows = [[(story, 0, min(size, capacity))] for story, size in enumerate(sizes.tolist())]
            story, begin, length = np.array(list(itertools.chain.from_iterable(rows)), np.int64).T  # each (pieces,)
            pieces = np.empty(len(story), PIECE)
            pieces["start"], pieces["length"] = (offset + np.cumsum(sizes) - sizes)[story] + begin, length
            pieces_file.write(pieces)
            counts = np.fromiter(map(len, rows), np.uint64, len(rows))
            first_file.write((num_pieces + np.cumsum(counts) - counts).astype("<u8"))
            covered = np.zeros(len(sizes), np.int64)
            np.maximum.at(covered, story, begin + length)
            left_out += int((sizes - covered).sum())
            num_targets += int((length - 1).sum())
            repeated += int((length - 1).sum() - (covered - 1).sum())
            filled += int(length.sum())
            offset, num_rows, num_pieces = offset + int(sizes.sum()), num_rows + len(rows), num_pieces + len(pieces)
        first_file.write(np.array([num_pieces], "<u8"))
    return {"rows": num_rows, "wasted": 1 - filled / (num_rows * capacity), "left_out": left_out / offset,
            "repeated": repeated / num_targets}


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
