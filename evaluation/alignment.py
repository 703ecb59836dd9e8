"""The differences between two architectures as data: which parts are equal, changed, or only in one of them.

Layers are aligned like the lines of two texts, by the names of their blocks, and so are the blocks of two aligned layers.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from itertools import groupby, takewhile

from config import ModelConfig
from metrics.cost import Cost, Part, step_name
from shapes.tree import joined_name

SAME, CHANGED, LEFT, RIGHT = "=", "≠", "←", "→"
TOTALS = {
    "parameters": "parameters",
    "flops": "FLOPs per token",
    "training_flops": "FLOPs per token in training",
    "cache_per_token": "cache bytes per token",
    "cache_fixed": "cache bytes of fixed size",
    "cache": "cache bytes after the context",
}


@dataclass(frozen=True)
class Row:
    """Two aligned parts; None if the other architecture has no counterpart."""

    left: Part | None
    right: Part | None

    @property
    def mark(self) -> str:
        if self.left is None or self.right is None:
            return RIGHT if self.left is None else LEFT
        return SAME if signature(self.left) == signature(self.right) else CHANGED


@dataclass(frozen=True)
class Group:
    """Aligned layers, or several such pairs with equal rows; or a part outside the layers."""

    left: list[str]  # names, such as layers.0 and layers.1
    right: list[str]
    rows: list[Row]

    @property
    def mark(self) -> str:
        marks = {row.mark for row in self.rows}
        return marks.pop() if len(marks) == 1 else CHANGED

    def title(self, side: str) -> str:
        """'layers.0–3 × 4'"""
        names = getattr(self, side)
        return joined_name(names) + (f" × {len(names)}" if len(names) > 1 else "") if names else ""


@dataclass(frozen=True)
class Side:
    """One of the two architectures."""

    title: str
    config: ModelConfig
    vocab_size: int
    cost: Cost


@dataclass(frozen=True)
class Diff:
    """The differences between two architectures."""

    left: Side
    right: Side

    @property
    def sides(self) -> tuple[Side, Side]:
        return self.left, self.right

    @property
    def config_rows(self) -> list[tuple[str, str, str]]:
        """Name, left and right value of each config field that differs."""
        rows = [(field.name, *(format_field(side.config, field.name) for side in self.sides)) for field in fields(ModelConfig)]
        rows.append(("vocabulary", *(f"{side.vocab_size:,}" for side in self.sides)))
        return [row for row in rows if row[1] != row[2]]

    @property
    def groups(self) -> list[Group]:
        """All parts of both, aligned, in model order; equal pairs of layers are merged into the first of them."""
        groups: dict[tuple, Group] = {}
        for left, right in align(*(layers_of(side.cost) for side in self.sides), lambda layer: step_names(layer[1]),
                                 lambda one, other: bool(set(step_names(one[1])) & set(step_names(other[1])))):  # fmt: skip
            (left_name, left_parts), (right_name, right_parts) = left or ("", ()), right or ("", ())
            rows = [Row(*pair) for pair in align(left_parts, right_parts, lambda part: step_name(part.step), related_parts)]
            names = (re.sub(r"\d+", "#", name) for name in (left_name, right_name))
            key = (*names, *((signature(row.left), signature(row.right)) for row in rows))
            group = groups.setdefault(key, Group([], [], rows))
            group.left.extend([left_name] * bool(left))
            group.right.extend([right_name] * bool(right))
        return list(groups.values())

    @property
    def totals(self) -> list[tuple[str, float, float]]:
        return [(label, *(getattr(side.cost, quantity) for side in self.sides)) for quantity, label in TOTALS.items()]

    @property
    def legend(self) -> str:
        left, right = self.sides
        T = " and ".join(dict.fromkeys(f"{side.cost.T:,}" for side in self.sides))
        return (
            f"{SAME} equal, {CHANGED} different, {LEFT} only in {left.title}, {RIGHT} only in {right.title}. FLOPs are forward, "
            f"per token, the mean over {T} tokens. Cache is bytes per token. Numbers are of one layer."
        )


def format_field(config, name: str) -> str:
    """The value of a config field; if blocks are given another value for it, that too: 'None (32)'."""
    value = getattr(config, name)
    derived = config.block_values()[name] if isinstance(config, ModelConfig) else value
    return str(value) if value == derived else f"{value} ({derived})"


def signature(part: Part | None) -> str:
    """A part without its place in the model, and without its signs, which have rows of their own."""
    return repr(part and replace(part, place="", signs=()))


def layers_of(cost: Cost) -> list[tuple[str, list[Part]]]:
    """The name and parts of each layer, with a row for each + and |; a part outside the layers is one by itself."""
    layers = []
    for name, parts in groupby(cost.parts, key=lambda part: layer_name(part.place)):
        branches = [(number, list(group)) for number, group in groupby(parts, key=lambda part: branch_number(part.place))]
        rows = []
        for number, group in branches:
            if number and len(branches) > 1:
                rows.append(heading(f"branch {number}"))
            rows += with_signs(group)
        layers.append((name or rows[0].step, rows))
    return layers


def with_signs(parts: list[Part]) -> list[Part]:
    """The parts and, after each and what is inside it, a row for each + and |; a ] closes a layer in brackets."""
    rows: list[Part] = []
    while parts:
        part, *others = parts
        inside = list(takewhile(lambda other, place=f"{part.place}.": other.place.startswith(place), others))
        closing = ["]"] if "[…]" in part.step else []
        rows += [part, *with_signs(inside), *map(heading, [*closing, *part.signs])]
        parts = others[len(inside) :]
    return rows


def layer_name(place: str) -> str:
    """'layers.2.branches.0.blocks.1' -> 'layers.2'"""
    match = re.match(r".*?\blayers\.\d+", place)
    return match[0] if match else place


def branch_number(place: str) -> int:
    """'layers.2.branches.0.blocks.1' -> 1, counted from 1; 0 outside of branches."""
    match = re.search(r"\bbranches\.(\d+)", place)
    return int(match[1]) + 1 if match else 0


def heading(text: str) -> Part:
    """A row that is not a module."""
    return Part("", text, (), text, {}, {}, 0, 0.0, 0.0, 0.0)


def step_names(parts: Sequence[Part]) -> tuple[str, ...]:
    return tuple(step_name(part.step) for part in parts)


def related_parts(left: Part, right: Part) -> bool:
    """Whether they have a weight of the same name, such as w_q."""
    return bool(left.shapes.keys() & right.shapes.keys() - {"weight", "bias"})


def align(left: Sequence, right: Sequence, key: Callable, related: Callable) -> Iterator[tuple]:
    """Pair items with equal keys, and between those related ones, in order; None where the other side has no counterpart.

    A common start is paired first: if one model is deeper, its last layers are the ones without counterpart.
    """
    start = sum(1 for _ in takewhile(lambda pair: key(pair[0]) == key(pair[1]), zip(left, right, strict=False)))
    yield from zip(left[:start], right[:start], strict=True)
    left, right = left[start:], right[start:]
    matcher = SequenceMatcher(None, [key(item) for item in left], [key(item) for item in right], autojunk=False)
    for operation, i, left_end, j, right_end in matcher.get_opcodes():
        for item in left[i:left_end]:
            partners = (k for k in range(j, right_end) if operation == "equal" or related(item, right[k]))
            partner = next(partners, None)
            if partner is None:
                yield item, None
            else:
                yield from ((None, other) for other in right[j:partner])
                yield item, right[partner]
                j = partner + 1
        yield from ((None, other) for other in right[j:right_end])
