"""Training rows and validation stories: tokenising once to disk, and batches.

B batch, T max_seq_len, V vocabulary.  A row holds T + 1 tokens: a model reads row[:-1] and predicts row[1:].

On disk an entry of the cache is a folder: `stories-KEY` holds the tokens of the training stories end to end and the validation
stories as text, `rows-KEY` says which pieces of which stories make up each row. The keys are digests of the content of the source
and of the tokenizer (and of T and the packing for the rows), so another T packs again but does not tokenise again.
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
from tqdm import tqdm

from data.cache import default_cache_dir, digest, open_or_build, say
from data.packing import pack, shuffled, story_ids
from data.sources import SEPARATOR, Source, open_source, read_stories

__all__ = ["Data", "load_data", "read_stories", "story_ids"]

FORMAT = 1  # raised whenever the cache's content or layout changes, so that older entries are not opened
MAX_VALIDATION = 3000
IGNORE = -100  # a target that is not scored, as in model.py, which needs torch
PIECE = np.dtype([("start", "<u8"), ("length", "<u4")])


class Batch(NamedTuple):
    """What one step of training reads: LongTensors, each (B, T)."""

    inputs: Any
    targets: Any  # the next tokens; IGNORE where nothing is to be predicted
    story_ids: Any  # number the stories of a row


class Data:
    """Training rows on disk and validation stories.

    name: the source that was really used.  fingerprint: digest of source, tokenizer, T and packing.  num_rows: rows an epoch.
    num_stories, num_tokens: of training, before packing.  wasted: share of the rows' positions that are padding.  left_out: share
    of the training tokens that no row holds.  validation: at most 3000 whole stories, in the order of their content's hash.
    """

    def __init__(self, name: str, fingerprint: str, stories_dir: Path, rows_dir: Path, info: dict, capacity: int, tokenizer):
        self.name, self.fingerprint = name, fingerprint
        self.num_stories, self.num_tokens, self.num_rows = info["stories"], info["tokens"], info["rows"]
        self.wasted, self.left_out = info["wasted"], info["left_out"]
        self.validation: list[str] = json.loads((stories_dir / "validation.json").read_text(encoding="utf-8"))
        self._capacity = capacity
        self._bos_id, self._eos_id, self._pad_id = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        self._tokens = np.asarray(np.memmap(stories_dir / "tokens.bin", token_dtype(tokenizer.vocab_size), "r"))
        self._pieces = np.asarray(np.memmap(rows_dir / "pieces.bin", PIECE, "r"))
        self._first = np.asarray(np.memmap(rows_dir / "first.bin", "<u8", "r"))

    def batch(self, first: int, batch_size: int, seed: int) -> Batch:
        """batch_size rows of an infinite shuffled stream of rows, starting at row `first`.

        A pure function of its arguments. The stream goes through all rows once an epoch, each epoch in another order; a batch
        may hold the end of one epoch and the start of the next.
        """
        rows = self.rows(first, batch_size, seed)  # (B, T + 1)
        ids = story_ids(rows, self._bos_id, self._eos_id)
        # padding is not scored, and nor is the first token of the next story, which cannot be predicted from this one
        not_scored = (rows[:, 1:] == self._pad_id) | (ids[:, 1:] != ids[:, :-1])
        return Batch(rows[:, :-1], rows[:, 1:].masked_fill(not_scored, IGNORE), ids[:, :-1])

    def rows(self, first: int, batch_size: int, seed: int):
        """The tokens of these rows, pad_id where there is none: a LongTensor (B, T + 1)."""
        import torch

        batch = np.full((batch_size, self._capacity), self._pad_id, np.int64)
        for line, position in zip(batch, range(first, first + batch_size), strict=True):
            epoch, index = divmod(position, self.num_rows)
            row = shuffled(self.num_rows, seed, epoch)[index]
            at = 0
            for start, length in self._pieces[self._first[row]:self._first[row + 1]].tolist():
                line[at:at + length] = self._tokens[start:start + length]
                at += length
        return torch.from_numpy(batch)


def load_data(source: str, tokenizer, max_seq_len: int, *, packing: str = "packed", max_stories: int | None = None,
              cache_dir: str | Path | None = None, progress: bool = True) -> Data:
    """Tokenises and packs a source, or opens what an earlier call has left in the cache.

    source: see read_stories.  packing: "packed" (see packing.pack), or "padded", one story a row, cropped and padded, as
    classical loaders do.  max_stories: read so many training stories, the first of the source; None is all.
    cache_dir: see data/cache.py.  Raises FileNotFoundError, ConnectionError or ValueError with the cure. Data.validation
    never shares a story with training: training stories with the words of one of its stories are dropped, and counted.
    """
    if packing not in ("packed", "padded"):
        raise ValueError(f"packing={packing!r} should be 'packed' or 'padded'")
    if max_seq_len < 2:
        raise ValueError(f"max_seq_len={max_seq_len} should be at least 2, and 128 or more for stories")
    if tokenizer.pad_id in (tokenizer.bos_id, tokenizer.eos_id):
        raise ValueError(f"{tokenizer.name} pads with its bos or eos token ({tokenizer.pad_id}), which the loss would ignore. "
                         "Give it a pad token of its own")
    opened, cache_dir, capacity = open_source(source), Path(cache_dir or default_cache_dir()), max_seq_len + 1
    key = digest(FORMAT, opened.fingerprint(cache_dir), tokenizer.fingerprint, max_stories)
    fingerprint = digest(key, max_seq_len, packing)
    stories_dir, rows_dir = cache_dir / f"stories-{key}", cache_dir / f"rows-{fingerprint}"

    stories, tokenised = open_or_build(stories_dir, lambda folder: _tokenise(opened, tokenizer, max_stories, folder, progress))
    lengths = np.memmap(stories_dir / "lengths.bin", np.uint32, "r")
    rows, packed = open_or_build(rows_dir, lambda folder: _write_rows(lengths, capacity, packing, folder))
    if tokenised:
        opened.say(Counter(stories["skipped"]))
    if tokenised or packed:
        say(f"{opened.name}: {stories['stories']:,} stories, {stories['tokens'] / 1e6:.1f}M tokens, "
            f"{rows['wasted']:.1%} padding, {rows['left_out']:.1%} left out")
    return Data(opened.name, fingerprint, stories_dir, rows_dir, stories | rows, capacity, tokenizer)


def choose_validation(source: Source, skipped: Counter, progress: bool = False) -> list[str]:
    """At most 3000 distinct stories in the order of their content's hash: those with the smallest hashes of the validation split.

    Without such a split they are held out of training: 1% of it, at least 200, at most half. Adds to `skipped` what a validation
    split holds that is no story; a training split is read again, and counted then.
    """
    split = "validation" if "validation" in source.splits else "train"
    heap, chosen, count = [], set(), 0
    stories = source.stories(split, skipped if split == "validation" else Counter())
    for story in tqdm(stories, desc="choosing validation stories", unit=" stories", disable=not progress, leave=False):
        count += 1
        key = story_hash(story)
        if key in chosen or (len(heap) == MAX_VALIDATION and key > -heap[0][0]):
            continue
        heapq.heappush(heap, (-key, story))
        chosen.add(key)
        if len(heap) > MAX_VALIDATION:
            chosen.remove(-heapq.heappop(heap)[0])
    stories = [story for _, story in sorted(heap, reverse=True)]
    if split == "train":
        held_out = max(200, count // 100) if len(heap) == MAX_VALIDATION else min(max(200, count // 100), len(heap) // 2)
        stories = stories[:min(held_out, MAX_VALIDATION)]
    if not stories:
        raise ValueError(f"{source.name} has {count:,} {split} stories, too few to train on some and validate on others. "
                         f"Give it more (in a .txt {SEPARATOR} or blank lines separate them), or use another, such as storyworld")
    return stories


def story_hash(story: str) -> int:
    """A hash of the words of a story: copies that differ in white space alone count as the same."""
    words = " ".join(story.split()).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(words, digest_size=16).digest(), "big")


def fingerprint(stories: list[str]) -> str:
    """16 hex digits, equal for the same stories in the same order: losses on them can be compared."""
    return hashlib.sha256("\0".join(stories).encode(errors="surrogatepass")).hexdigest()[:16]


def _tokenise(source: Source, tokenizer, max_stories: int | None, folder: Path, progress: bool) -> dict:
    """Writes tokens.bin (bos story eos, bos story eos, ...), lengths.bin (uint32, one a story) and validation.json.

    One process: encode_batch already uses every core. On two of them processes of our own are 15% faster once they run (for 13 MB
    1.5 instead of 1.8 s), and lose that again to their start.
    """
    skipped, num_stories, num_tokens = Counter(), 0, 0
    validation = choose_validation(source, skipped, progress)
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
                raise ValueError(f"{source.name} holds text that {tokenizer.name} reads as its own bos, eos or pad token. "
                                 "Take it out of the stories or use another tokenizer")
            if len(replacement) == 1 and (replaced := int((tokens == replacement[0]).sum())):
                skipped[f"characters replaced that {tokenizer.name} does not know"] += replaced
            tokens_file.write(tokens)  # not tofile: it does not tell that the disk is full
            lengths_file.write(lengths)
            num_stories, num_tokens = num_stories + len(encoded), num_tokens + len(tokens)
            bar.update(len(stories))
    if not num_stories:
        raise ValueError(f"{source.name} has no training story that is not in validation as well. Give it more stories")
    return {"stories": num_stories, "tokens": num_tokens, "skipped": dict(+skipped)}


def _batches(stories: Iterable[str], count: int = 1024, characters: int = 2**22) -> Iterator[list[str]]:
    """Lists of at most `count` stories that end once they hold `characters`, which bounds memory."""
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
    """Writes pieces.bin (PIECE, places in tokens.bin) and first.bin (uint64, each row's first piece, and the end)."""
    offset, num_rows, num_pieces, filled, left_out = 0, 0, 0, 0, 0
    with open(folder / "pieces.bin", "wb") as pieces_file, open(folder / "first.bin", "wb") as first_file:
        for at in range(0, len(lengths), chunk):
            sizes = lengths[at:at + chunk].astype(np.int64)
            starts = offset + np.cumsum(sizes) - sizes
            if packing == "packed":
                rows = pack(sizes.tolist(), capacity, seed=at)
            else:
                rows = [[(story, 0, min(size, capacity))] for story, size in enumerate(sizes.tolist())]
            pieces = np.array(list(itertools.chain.from_iterable(rows)), np.int64)  # (pieces, 3): story, start, length
            written = np.empty(len(pieces), PIECE)
            written["start"], written["length"] = starts[pieces[:, 0]] + pieces[:, 1], pieces[:, 2]
            pieces_file.write(written)
            counts = np.fromiter(map(len, rows), np.uint64, len(rows))
            first_file.write((num_pieces + np.cumsum(counts) - counts).astype("<u8"))
            reached = np.zeros(len(sizes), np.int64)
            np.maximum.at(reached, pieces[:, 0], pieces[:, 1] + pieces[:, 2])
            left_out += int((sizes - reached).sum())
            filled += int(pieces[:, 2].sum())
            offset, num_rows, num_pieces = offset + int(sizes.sum()), num_rows + len(rows), num_pieces + len(pieces)
        first_file.write(np.array([num_pieces], "<u8"))
    return {"rows": num_rows, "wasted": 1 - filled / (num_rows * capacity), "left_out": left_out / offset}


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    return np.uint16 if vocab_size <= 2**16 else np.uint32
