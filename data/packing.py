"""How stories become rows: packing them, telling them apart again, and the order in which the rows come.

B batch, T time.
"""

import random
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

MIN_PIECE = 16  # tokens of a tail: a shorter one is lengthened backwards, as it would say too little


class FreeSpace:
    """Rows by how many tokens still fit into them. The tightest fit is found in the bits of one integer."""

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
        """The smallest space that is at least length."""
        fitting = self.bits >> length
        return length + (fitting & -fitting).bit_length() - 1 if fitting else None

    def widest(self) -> int:
        return max(self.bits.bit_length() - 1, 0)


def pack(lengths: Sequence[int], capacity: int, seed: int = 0) -> list[list[tuple[int, int, int]]]:
    """Packs stories into rows of capacity tokens. A row is a list of pieces (story, start, length).

    Every row begins with a story's beginning, and the first `capacity` tokens of every story appear once, in one piece. What a
    longer story has beyond them, its tail, goes into the free space behind other stories, cut where a row ends; a piece begins
    with the last token of the piece before, so that every token is predicted once. What finds no place is left out. Then the rows
    are filled up, longest story first, each into the tightest gap (best-fit decreasing; on why best fit beats cutting the stream
    of stories into equal parts see Ding et al. 2024, arXiv 2404.10830), and gaps that remain with the cropped beginning of a
    story drawn at random. A piece that does not end its story is always the last of its row, so story_ids finds all boundaries.
    """
    least = max(2, min(MIN_PIECE, capacity // 2))
    longest_first = sorted(range(len(lengths)), key=lambda story: -lengths[story])
    long = [story for story in longest_first if lengths[story] > capacity]
    short = longest_first[len(long):]
    rows = [[(story, 0, capacity)] for story in long]

    behind = FreeSpace()
    for story in short:
        behind.add([(story, 0, lengths[story])], capacity - lengths[story])
    for story in long:
        start = capacity - 1
        while start < lengths[story] - 1:
            start = min(start, lengths[story] - least)
            space = behind.tightest(lengths[story] - start) or behind.widest()
            if space < least:
                break
            length = min(lengths[story] - start, space)
            behind.add([*behind.take(space), (story, start, length)], space - length)
            start += length - 1

    gaps = FreeSpace()
    alone = []
    for space, found in behind.rows.items():
        for row in found:
            if len(row) == 1:
                alone.append(row)
            else:
                rows.append(row)
                gaps.add(row, space)
    for row in sorted(alone, key=lambda row: -row[0][2]):
        length = row[0][2]
        space = gaps.tightest(length)
        if space is None:
            rows.append(row)
            gaps.add(row, capacity - length)
        else:
            fitting = gaps.take(space)
            fitting += row
            gaps.add(fitting, space - length)

    random_state, least_crop = random.Random(seed), max(2, capacity // 32)  # shorter gaps stay padding: at most 3% of a row
    for space, found in gaps.rows.items():
        longer = bisect_left(longest_first, -space, key=lambda story: -lengths[story])
        if space >= least_crop and longer:
            for row in found:
                row.append((longest_first[random_state.randrange(longer)], 0, space))
    return rows


def story_ids(tokens, bos_id: int, eos_id: int):
    """Which story of its row a token belongs to: tokens (B, T) -> ids (B, T), counted from 0, padding an id of its own.

    A story ends with its eos; in packed rows a piece without eos is always the last. Where bos and eos are the same token, as in
    GPT-2, the first token of a row and a second one in succession are bos, all others eos. What follows an eos is the next story:
    a loss over packed rows that should equal that of single stories leaves out the targets with ids[:, 1:] != ids[:, :-1].
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
