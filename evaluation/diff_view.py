"""A Diff as text for the terminal, and as HTML (diff.jinja) for a notebook or a page."""

import re
from collections.abc import Iterator
from itertools import zip_longest
from textwrap import wrap
from typing import NamedTuple

from markupsafe import Markup

from evaluation.alignment import CHANGED, LEFT, RIGHT, SAME, Diff, Group
from metrics.cost import Part
from pages import render
from shapes.tree import joined_name

NUMBERS = {"parameters": "parameters", "flops": "FLOPs", "cache_per_token": "cache"}
CLASSES = {SAME: "same", CHANGED: "changed", LEFT: "left", RIGHT: "right"}


class DiffView(Diff):
    """A Diff that `print` shows as text and a notebook as a table."""

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return render("evaluation/diff.jinja", diff=self, groups=[list(lines_of(group)) for group in self.groups],
                      labels=list(NUMBERS.values()), classes=CLASSES, changed=CHANGED, ratio=ratio)  # fmt: skip


class Cell(NamedTuple):
    """One side of a line; empty if the other side has no counterpart."""

    title: str
    numbers: list[str]  # by NUMBERS
    details: list[str]  # settings that differ, and shapes of weights


class Line(NamedTuple):
    mark: str
    left: Cell
    right: Cell
    is_group: bool = False  # the heading of a layer
    is_inside: bool = False  # a part of a layer


def lines_of(group: Group) -> Iterator[Line]:
    """A line for a layer, and for each of its parts, unless it is the same in both."""
    several = len(group.rows) > 1
    if several:
        yield Line(group.mark, group_cell(group, "left"), group_cell(group, "right"), is_group=True)
    if not several or group.mark != SAME:
        for row in group.rows:
            yield Line(row.mark, part_cell(row.left, row.right), part_cell(row.right, row.left), is_inside=several)


def group_cell(group: Group, side: str) -> Cell:
    parts = [part for row in group.rows if (part := getattr(row, side))]
    sums = [sum(getattr(part, quantity) for part in parts) for quantity in NUMBERS]
    return Cell(group.title(side), [f"{number:,.0f}" if number else "" for number in sums], [])


def part_cell(part: Part | None, other: Part | None) -> Cell:
    if part is None:
        return Cell("", [""] * len(NUMBERS), [])
    kind = f"  {part.kind}" if other and part.kind != other.kind else ""
    numbers = [f"{number:,.0f}" if (number := getattr(part, quantity)) else "" for quantity in NUMBERS]
    if part.cache_fixed:
        numbers[-1] = " + ".join(filter(None, [numbers[-1], f"{part.cache_fixed:,.0f} fixed"]))
    return Cell(part.step + kind, numbers, [*changed_settings(part, other), *weight_shapes(part)])


def changed_settings(part: Part, other: Part | None) -> list[str]:
    """['activation=GELU']: settings of both with different values, unless the step or the shapes show them."""
    if other is None:
        return []
    names = [name for name, value in part.settings.items() if value != other.settings.get(name, value) and name != "dim"]
    return [f"{name}={part.settings[name]}" for name in names if f"{name}=" not in part.step]


def weight_shapes(part: Part) -> list[str]:
    """['w_q 128×128', 'experts.0–7.w_in 344×128']"""
    names_of: dict[tuple, list[str]] = {}
    for name, shape in part.shapes.items():
        names_of.setdefault((re.sub(r"\d+", "#", name), shape), []).append(name.removesuffix(".weight"))
    return [f"{joined_name(names)} {'×'.join(map(str, shape)) or 'scalar'}" for (_, shape), names in names_of.items()]


def ratio(left: float, right: float) -> str:
    return "" if left == right else f"× {right / left:.2f}" if left else "new"


def as_text(diff: Diff) -> str:
    """For the terminal: a line for each part, and below it the details that differ."""
    text = [f"{diff.left.title}  {CHANGED}  {diff.right.title}", "", *wrap(diff.legend, 110), ""]
    width = max((len(name) for name, _, _ in diff.config_rows), default=0)
    for name, left, right in diff.config_rows:
        if len(left) + len(right) < 70:
            text.append(f"{name.ljust(width)}  {left}  {RIGHT}  {right}")
        else:
            for start, value in ((f"{name.ljust(width)}  {LEFT} ", left), (f"{' ' * width}  {RIGHT} ", right)):
                text += wrap(value, 120, initial_indent=start, subsequent_indent=" " * len(start))
    table = [("", *(heading for side in diff.sides for heading in (side.title, *NUMBERS.values())))]
    table += [row for group in diff.groups for line in lines_of(group) for row in text_rows(line)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    text.append("")
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        for number in (0, 1, 5):  # the columns of text
            cells[number] = row[number].ljust(widths[number])
        text.append("  ".join(cells).rstrip())
    text.append("")
    for label, left, right in diff.totals:
        text.append(f"{label:29} {left:14,.0f}  {RIGHT} {right:14,.0f}  {ratio(left, right)}".rstrip())
    return "\n".join(text)


def text_rows(line: Line) -> Iterator[tuple[str, ...]]:
    """The rows of the table for a line: the first with its numbers, the others with the rest of the title and the details."""
    indent = "  " * line.is_inside
    both = line.left.title and line.right.title
    blocks = []
    for cell, other in ((line.left, line.right), (line.right, line.left)):
        details = [detail for detail in cell.details if both and detail not in other.details]
        blocks.append([*wrap(cell.title, 44), *details] or [""])
    (left, *left_below), (right, *right_below) = blocks
    yield line.mark, f"{indent}{left}".rstrip(), *line.left.numbers, f"{indent}{right}".rstrip(), *line.right.numbers
    for pair in zip_longest(left_below, right_below, fillvalue=""):
        yield "", *(text for below in pair for text in (f"{indent}    {below}" if below else "", "", "", ""))


def as_page(diff: DiffView) -> str:
    """One self-contained HTML page, in the reader's light or dark mode."""
    title = f"{diff.left.title} {CHANGED} {diff.right.title}"
    return render("pages/base.jinja", title=title, content=Markup(diff._repr_html_()))
