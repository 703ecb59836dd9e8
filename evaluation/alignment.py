"""What differs between two architectures, as data: their parts, aligned, and what is equal, changed, or only in one of them.

Layers are aligned as the lines of two texts are, by the names of their blocks, and so are the blocks of two layers.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import groupby, takewhile

from config import ModelConfig
from metrics.cost import Cost, Part
from shapes.tree import joined_name

SAME, CHANGED, LEFT, RIGHT = "=", "≠", "←", "→"
SIGNS = {"+": "adds the skip", "|": "opens a skip"}
TOTALS = {
    "parameters": "parameters",
    "flops": "FLOPs per token",
    "training_flops": "FLOPs per token in training",
    "cache_per_token": "cache bytes per token",
    "cache_fixed": "cache bytes that do not grow",
    "cache": "cache bytes after the context",
}


@dataclass(frozen=True)
class Row:
    """A part of the one and the part of the other that stands in its place; None where there is none."""

    left: Part | None
    right: Part | None

    @property
    def mark(self) -> str:
        if self.left is None or self.right is None:
            return RIGHT if self.left is None else LEFT
        return SAME if content(self.left) == content(self.right) else CHANGED


@dataclass(frozen=True)
class Group:
    """A layer of the one and a layer of the other, or several such pairs that are alike; or what is no layer."""

    left: tuple[str, ...]  # names, such as layers.0 and layers.1
    right: tuple[str, ...]
    rows: tuple[Row, ...]

    @property
    def mark(self) -> str:
        marks = {row.mark for row in self.rows}
        return marks.pop() if len(marks) == 1 else CHANGED

    def title(self, side: str) -> str:
        """'layers.0–3 × 4'"""
        names = getattr(self, side)
        return joined_name(list(names)) + (f" × {len(names)}" if len(names) > 1 else "") if names else ""

    def parts(self, side: str) -> list[Part]:
        return [part for row in self.rows if (part := getattr(row, side))]


@dataclass(frozen=True)
class Side:
    """One of the two architectures."""

    title: str
    config: ModelConfig
    vocab_size: int
    cost: Cost


@dataclass(frozen=True)
class Diff:
    """What differs between two architectures."""

    left: Side
    right: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.left, self.right

    @property
    def config_rows(self) -> list[tuple[str, str, str]]:
        """Each field of the config that differs, and what it is here and there."""
        names = [field.name for field in fields(ModelConfig)]
        rows = [(name, *(shown_field(side.config, name) for side in self.sides)) for name in names]
        rows.append(("vocabulary", *(f"{side.vocab_size:,}" for side in self.sides)))
        return [row for row in rows if row[1] != row[2]]

    @property
    def groups(self) -> list[Group]:
        """All parts of both, aligned, in the order of the models; pairs of layers that are alike stand at the first of them."""
        return groups_of(self.left.cost, self.right.cost)

    @property
    def totals(self) -> list[tuple[str, float, float]]:
        return [(label, *(getattr(side.cost, quantity) for side in self.sides)) for quantity, label in TOTALS.items()]

    @property
    def legend(self) -> str:
        left, right = self.sides
        read = " and ".join(dict.fromkeys(f"{side.cost.T:,}" for side in self.sides))
        return (
            f"{SAME} alike, {CHANGED} differs, {LEFT} only in {left.title}, {RIGHT} only in {right.title}. FLOPs are forward and "
            f"per token, the mean over {read} tokens. Cache is the bytes that each token adds. Numbers are of one layer."
        )


def shown_field(config: ModelConfig, name: str) -> str:
    """The value of a field; where that is None, also what blocks are given in its place."""
    value, given = getattr(config, name), config.block_values()[name]
    return str(value) if value == given else f"{value} ({given})"


def content(part: Part) -> tuple:
    """All of a part but its place, and but its signs, which have rows of their own."""
    told = {field.name: getattr(part, field.name) for field in fields(part) if field.name not in ("place", "signs")}
    return tuple(str(value) if isinstance(value, dict) else value for value in told.values())


def groups_of(left: Cost, right: Cost) -> list[Group]:
    """All parts of both, aligned, in the order of the models; pairs of layers that are alike stand at the first of them."""
    found: dict[tuple, Group] = {}
    layers = [layers_of(cost) for cost in (left, right)]
    for here, there in aligned(*layers, key=lambda layer: step_names(layer[1]), related=related_layers):
        pairs = aligned(here[1] if here else (), there[1] if there else (), key=step_name, related=related_parts)
        group = Group((here[0],) if here else (), (there[0],) if there else (), tuple(Row(*pair) for pair in pairs))
        same = found.get(looks(group), Group((), (), ()))
        found[looks(group)] = replace(group, left=same.left + group.left, right=same.right + group.right)
    return list(found.values())


def layers_of(cost: Cost) -> list[tuple[str, tuple[Part, ...]]]:
    """Name and parts of each layer, with its signs as parts of their own; what is in no layer stands alone."""
    layers = []
    for name, parts in groupby(cost.parts, key=lambda part: layer_name(part.place)):
        parts = list(parts)
        branches = list(dict.fromkeys(branch_name(part.place) for part in parts))
        rows = []
        for branch in branches:
            inside = [part for part in parts if branch_name(part.place) == branch]
            if len(branches) > 1 and branch:
                rows.append(heading(f"branch {branch}", "side by side"))
            for part in inside:
                rows += [part, *(heading(sign, SIGNS[sign]) for sign in part.signs)]
        layers.append((name or parts[0].step, tuple(rows)))
    return layers


def layer_name(place: str) -> str:
    """'layers.2.branches.0.blocks.1'  becomes  'layers.2'"""
    found = re.match(r".*?\blayers\.\d+", place)
    return found[0] if found else place


def branch_name(place: str) -> str:
    found = re.search(r"\bbranches\.(\d+)", place)
    return str(int(found[1]) + 1) if found else ""


def heading(step: str, kind: str) -> Part:
    """A row that is no module."""
    return Part("", step, (), kind, {}, {}, 0, 0.0, 0.0, 0.0)


def step_name(part: Part) -> str:
    return part.step.split("(")[0]


def step_names(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(map(step_name, parts))


def aligned(left: Sequence, right: Sequence, key: Callable, related: Callable) -> Iterator[tuple]:
    """Pairs of equal keys, and between them of what is related, in order; None where the other side has nothing.

    What is equal from the beginning belongs together, so that of two depths the last layers are those that only one has.
    """
    same = sum(1 for _ in takewhile(lambda pair: key(pair[0]) == key(pair[1]), zip(left, right, strict=False)))
    yield from zip(left[:same], right[:same], strict=True)
    left, right = left[same:], right[same:]
    matcher = SequenceMatcher(None, [key(item) for item in left], [key(item) for item in right], autojunk=False)
    for operation, left_start, left_end, right_start, right_end in matcher.get_opcodes():
        if operation == "equal":
            yield from zip(left[left_start:left_end], right[right_start:right_end], strict=True)
            continue
        for item in left[left_start:left_end]:
            partner = next((place for place in range(right_start, right_end) if related(item, right[place])), None)
            if partner is None:
                yield item, None
                continue
            yield from ((None, other) for other in right[right_start:partner])
            yield item, right[partner]
            right_start = partner + 1
        yield from ((None, other) for other in right[right_start:right_end])


def related_layers(left: tuple[str, Sequence[Part]], right: tuple[str, Sequence[Part]]) -> bool:
    return bool({*step_names(left[1])} & {*step_names(right[1])})


def related_parts(left: Part, right: Part) -> bool:
    """Do they have weights of the same name, such as w_q?"""
    return bool(left.shapes.keys() & right.shapes.keys() - {"weight", "bias"})


def looks(group: Group) -> tuple:
    """What has to be equal for two groups to be drawn as one."""
    names = tuple(tuple({re.sub(r"\d+", "#", name) for name in side}) for side in (group.left, group.right))
    return names, tuple(tuple(part and content(part) for part in (row.left, row.right)) for row in group.rows)
