"""Packing stories into rows, numbering the stories of a row, and the order of the rows.  B batch, T time."""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MIN_PIECE = 16  # tokens; shorter tails are extended backwards for context


class FreeSpace:
    """Rows by the number of tokens that still fit. The tightest fit is found in the bits of one integer."""

    def __init__(self):
        self.rows, self.bits = defaultdict(list), 0

    def add(self, row: list, space: int) -> None:
        self.rows[space].append(row)
        self.bits |= 1 << space

    def take(self, space: int) -> list:
        row = self.rows[space].pop()
        if not self.rows[space]:
            self.bits ^= 1 << space
        return row

    def tightest(self, length: int) -> int | None:
        """The smallest space of at least length; None if there is none."""
        fitting = self.bits >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else None

    def widest(self) -> int:
        return max(self.bits.bit_length() - 1, 0)


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[tuple[int, int, int]]]:
    """Pack stories of these lengths into rows of capacity tokens. A row is a list of pieces (story, start, length).

    Every row begins with the start of a story. The first `capacity` tokens of each story appear once, in one piece. The rest of
    a long story, its tail, goes into the free space of other rows and is cut where a row ends; a piece starts with the last token
    of the previous one, so that every token is predicted once. What does not fit anywhere is left out. Whole stories are placed
    longest first, each in the tightest gap (best-fit decreasing; Ding et al. 2024, arXiv 2404.10830, compare it with cutting the
    stream into equal parts). Gaps that remain are filled with the start of a random story. Only the last piece of a row may stop
    before the end of its story, so that story_ids finds all boundaries.

    >>> pack([3, 9, 4], capacity=8)
    [[(1, 0, 8)], [(2, 0, 4), (1, 5, 4)], [(0, 0, 3), (1, 0, 5)]]
    """
    min_piece = max(2, min(MIN_PIECE, capacity // 2))
    longest_first = sorted(range(len(lengths)), key=lambda story: -lengths[story])
    long = [story for story in longest_first if lengths[story] > capacity]
    short = longest_first[len(long):]
    rows = [[(story, 0, capacity)] for story in long]

    # give each short story a row, and put the tails of the long ones into the free space of these rows
    free = FreeSpace()
    for story in short:
        free.add([(story, 0, lengths[story])], capacity - lengths[story])
    for story in long:
        start = capacity - 1
        while start < lengths[story] - 1:
            start = min(start, lengths[story] - min_piece)
            space = free.tightest(lengths[story] - start) or free.widest()
            if space < min_piece:
                break
            length = min(lengths[story] - start, space)
            free.add([*free.take(space), (story, start, length)], space - length)
            start += length - 1

    # merge the rows without a tail, longest story first, each into the tightest gap
    gaps, single = FreeSpace(), []
    for space, rows_with_space in free.rows.items():
        for row in rows_with_space:
            if len(row) == 1:
                single.append(row)
            else:
                rows.append(row)
                gaps.add(row, space)
    for row in sorted(single, key=lambda row: -row[0][2]):
        length = row[0][2]
        space = gaps.tightest(length)
        if space is None:
            rows.append(row)
            gaps.add(row, capacity - length)
        else:
            target = gaps.take(space)
            target += row
            gaps.add(target, space - length)

    # fill the remaining gaps with cropped stories; up to 3% of a row stays padding
    rng, min_crop = random.Random(seed), max(2, capacity // 32)
    for space, rows_with_space in gaps.rows.items():
        num_longer = bisect_left(longest_first, -space, key=lambda story: -lengths[story])
        if space >= min_crop and num_longer:
            for row in rows_with_space:
                row.append((longest_first[rng.randrange(num_longer)], 0, space))
    return rows


def story_ids(tokens, bos_id: int, eos_id: int):
    """Number the stories of each row: tokens (B, T) -> ids (B, T) from 0 up; padding counts as a story.

    A story ends with its eos. Where bos and eos are the same token, as in GPT-2, the first token of a row and the second of two
    in succession are bos, all others eos. A target with ids[:, 1:] != ids[:, :-1] is the first token of the next story, which
    cannot be predicted from the previous one.
    """
    ends = tokens == eos_id
    if bos_id == eos_id:
        ends[:, 1:] &= tokens[:, :-1] != eos_id
        ends[:, 0] = False
    ids = ends.cumsum(dim=1)
    ids[:, 1:] = ids[:, :-1].clone()
    ids[:, 0] = 0
    return ids


@lru_cache(maxsize=4)
def shuffled(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the rows in an epoch: a permutation of range(num_rows).  (num_rows,)"""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)
