"""A Diff as text for the terminal, and as HTML (diff.jinja) for a notebook or a page."""

import itertools
import re
from collections.abc import Iterator
from textwrap import wrap
from typing import NamedTuple

from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from evaluation.alignment import CHANGED, LEFT, RIGHT, SAME, Diff, Group
from metrics.cost import Part
from pages import render
from runs.tables import new_table, plain
from shapes.tree import joined_name

NUMBERS = {"parameters": "parameters", "flops": "FLOPs", "cache_per_token": "cache"}
CLASSES = {SAME: "same", CHANGED: "changed", LEFT: "left", RIGHT: "right"}


class DiffView(Diff):
    """A Diff that `print` shows as text and a notebook as a table."""

    def __rich_console__(self, console, options) -> Iterator:
        title = f"{self.left.title}  {CHANGED}  {self.right.title}"
        yield from (Text(title, style="bold"), "", *wrap(self.legend, options.max_width), "")
        yield from (table_of_config(self), "", table_of_parts(self), "", table_of_totals(self))

    def __repr__(self) -> str:
        return plain(self)

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


def wrapped(details: list[str], width: int = 36) -> list[str]:
    """Lines of details, none of which is broken."""
    lines = wrap(", ".join(detail.replace(" ", "\xa0") for detail in details), width, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def table_of_config(diff: Diff) -> Table:
    table = new_table(show_header=False)
    for style in ("", "red", "", "green"):
        table.add_column(style=style, overflow="fold")
    for name, left, right in diff.config_rows:
        table.add_row(name, left, RIGHT, right)
    return table


def table_of_parts(diff: Diff) -> Table:
    """A row for each part that is equal, and two for one that differs: left, then right."""
    table = new_table()
    table.add_column("")
    table.add_column("", overflow="fold", ratio=1)
    for heading in NUMBERS.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for line in itertools.chain(*map(lines_of, diff.groups)):
        indent = "  " * line.is_inside
        if line.left == line.right:
            table.add_row(line.mark, indent + line.left.title, *line.left.numbers)
            continue
        pairs = ((LEFT, "red", line.left, line.right), (RIGHT, "green", line.right, line.left))
        for arrow, style, cell, other in pairs:
            if cell.title:
                mark = arrow if line.mark in (LEFT, RIGHT) else line.mark + arrow
                details = [detail for detail in cell.details if other.title and detail not in other.details]
                lines = [cell.title, *(f"  {text}" for text in wrapped(details))]
                title = "\n".join(indent + text for text in lines)
                table.add_row(mark, title, *cell.numbers, style="" if line.mark == SAME else style)
    return table


def table_of_totals(diff: Diff) -> Table:
    table = new_table(show_header=False)
    for justify in ("left", "right", "left", "right", "left"):
        table.add_column(justify=justify)
    for label, left, right in diff.totals:
        table.add_row(label, f"{left:,.0f}", RIGHT, f"{right:,.0f}", ratio(left, right))
    return table


def as_page(diff: DiffView) -> str:
    """One self-contained HTML page, in the reader's light or dark mode."""
    title = f"{diff.left.title} {CHANGED} {diff.right.title}"
    return render("pages/base.jinja", title=title, content=Markup(diff._repr_html_()))
