"""Draw recorded calls as a tree: as text, in colors for a terminal, and as HTML that folds, for a notebook or a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest
from textwrap import TextWrapper
from typing import NamedTuple

from markupsafe import Markup

from pages import render
from shapes.comments import shapes_in
from shapes.tree import Call, Line, fold, given_lines, long_notes, parameter_label, shapes_label, value_notes

WIDE, PHONE = 110, 44  # columns of a tree in a notebook or on a page, and on a narrow screen
TWO_COLUMNS = 72  # from this width on, shapes stand beside their line and not below it
COLORS = {"name": "1;34", "shapes": "36", "quiet": "2", "wrong": "31"}  # ANSI codes
FIXED_SPACE = "\N{NO-BREAK SPACE}"

Span = tuple[str, str]  # style, text


@dataclass
class Row:
    """A call, a line or a note, and the rows inside it."""

    head: str  # branches of the tree before its first line of text
    tail: str  # and before the following ones
    name: str = ""
    text: str = ""
    shapes: str = ""
    letters: str = ""  # the shapes as the comment says them
    count: str = ""
    style: str = ""  # of text or shapes, if not the usual one
    place: str = ""  # file, line and comment
    is_open: bool = False
    below: list["Row"] = field(default_factory=list)

    @property
    def label(self) -> str:
        return self.name + self.text


class Columns(NamedTuple):
    """The widths of the columns; left is 0 if the shapes stand below their line."""

    left: int
    middle: int
    right: int
    width: int


def as_text(calls: list[Call], width: int = WIDE, color: bool = False) -> str:
    """Draw the calls as a tree with aligned columns."""
    rows, columns = lay_out(rows_of(fold(calls)), width)
    lines = [line for row in walk(rows) for line in lines_of(row, columns)]
    return "\n".join("".join(paint(style, text) if color else text for style, text in line).rstrip() for line in lines)


def paint(style: str, text: str) -> str:
    return f"\033[{COLORS[style]}m{text}\033[0m" if style else text


def as_html(calls: list[Call], *widths: int) -> Markup:
    """Draw the calls as a tree that folds without scripts, in each of these widths.

    Without its style, which some viewers of notebooks remove, it is the tree of as_text with the marks of <details>.
    """
    trees = []
    for width in widths:
        rows, columns = lay_out(rows_of(fold(calls)), width - 2)  # the first two are for the marks
        trees.append((width, rows, partial(lines_of, columns=columns)))
    return Markup(render("shapes/tree.jinja", trees=trees, phone=PHONE))


def as_page(calls: list[Call]) -> str:
    """Draw the calls as one self-contained HTML page, whose tree is narrower on a phone."""
    return render("pages/base.jinja", title=f"{calls[0].kind or calls[0].name}: shapes", content=as_html(calls, WIDE, PHONE))


def rows_of(nodes: list[Call | Line], indent: str | None = None, depth: int = 0) -> list[Row]:
    """The rows of nodes; the upper two levels are open, of repeated modules the first one."""
    rows, kinds = [], set()
    last_call = max((i for i, node in enumerate(nodes) if isinstance(node, Call)), default=-1)
    for i, node in enumerate(nodes):
        below = "" if indent is None else indent + ("│  " if i < last_call else "   ")
        times = f" × {node.times}".replace(" ", FIXED_SPACE) if node.times > 1 else ""
        notes = [Row(below, below, shapes=note, style="quiet") for note in value_notes(node)]
        notes += [Row(below + "   ", below + "   ", text=line, style="wrong" if note.startswith("✗") else "quiet")
                  for note in long_notes(node) for line in note.splitlines()]  # fmt: skip
        if isinstance(node, Line):
            letters = "" if node.problem else ", ".join(shapes_in(node.comment))
            place = f"{node.where}  {node.comment}".strip()
            rows += [Row(below, below + "    ", "", node.source + times, shapes_label(node), letters, place=place), *notes]
        else:
            inside = given_lines(node) + node.children
            branch = "" if indent is None else indent + ("├─ " if i < last_call else "└─ ")
            tail = below + ("│  " if any(isinstance(child, Call) for child in inside) else "   ")
            name, kind = (node.name, f"  {node.kind}" if node.kind else "") if node.name else (node.kind, "")
            is_open = bool(node.problem) or (depth < 2 and (kind or name) not in kinds)
            kinds.add(kind or name)
            rows.append(Row(branch, tail, name, kind + times, shapes_label(node), count=parameter_label(node),
                            is_open=is_open, below=notes + rows_of(inside, below, depth + 1)))  # fmt: skip
    return rows


def walk(rows: list[Row]) -> Iterator[Row]:
    for row in rows:
        yield row
        yield from walk(row.below)


def lay_out(rows: list[Row], width: int) -> tuple[list[Row], Columns]:
    """Add headings, and give the labels the room that the shapes leave, or 55% of the width if they need it."""
    with_shapes = [row for row in walk(rows) if row.shapes]
    right = max(len("parameters"), *(len(row.count) for row in with_shapes))
    if width < TWO_COLUMNS:
        return [Row("", "", count="parameters", style="quiet"), *map(with_thin_branches, rows)], Columns(0, 0, right, width)
    left = max(len(row.head + row.label) for row in with_shapes)
    middle = max(len(row.shapes) if row.count else len(row.shapes + row.letters) + 3 - right - 2 for row in with_shapes)
    room = width - right - 4
    left = min(left, max(room - middle, room * 11 // 20))
    return [Row("", "", shapes="shapes", count="parameters", style="quiet"), *rows], Columns(left, room - left, right, width)


def with_thin_branches(row: Row) -> Row:
    head, tail = row.head[::3] + " " * bool(row.head), row.tail[::3] + " "
    return replace(row, head=head, tail=tail, below=[with_thin_branches(inner) for inner in row.below])


def lines_of(row: Row, columns: Columns) -> list[list[Span]]:
    """The lines of a row: its label, with the shapes beside it, or below it if there is one column."""
    if not row.shapes and not row.count:
        return label_lines(row, columns.width)
    if not columns.left:
        return stacked_lines(row, columns)
    room = columns.middle if row.count else columns.middle + 2 + columns.right
    lines = []
    for label, shapes in zip_longest(label_lines(row, columns.left), shape_lines(row, room)):
        label = [("quiet", row.tail)] if label is None else label
        lines.append([*label, ("", " " * (columns.left + 2 - length(label))), *(shapes or [])])
    return with_count(lines, row, columns)


def stacked_lines(row: Row, columns: Columns) -> list[list[Span]]:
    labels = label_lines(row, columns.width - (len(row.count) + 2 if row.count else 0))
    shapes = shape_lines(row, columns.width - len(row.tail) - 2) if row.shapes else []
    if len(labels) == len(shapes) == 1 and length(labels[0] + shapes[0]) + 4 + len(row.count) <= columns.width:
        return with_count([[*labels[0], ("", "  "), *shapes[0]]], row, columns)
    return with_count(labels, row, columns) + [[("quiet", row.tail + "  "), *line] for line in shapes]


def with_count(lines: list[list[Span]], row: Row, columns: Columns) -> list[list[Span]]:
    """Add the number of parameters at the right end of the first line."""
    if row.count:
        lines[0].append((row.style, row.count.rjust(columns.width - length(lines[0]))))
    return lines


def label_lines(row: Row, width: int) -> list[list[Span]]:
    """The branches of the tree, name and text of a row, wrapped."""
    lines = []
    for line in fill(row.label, width, row.head, row.tail):
        start = len(row.tail if lines else row.head)
        end = start if lines else start + len(row.name)
        spans = [("quiet", line[:start]), ("name", line[start:end]), (row.style, line[end:])]
        lines.append([(style, text) for style, text in spans if text])
    return lines


def shape_lines(row: Row, room: int) -> list[list[Span]]:
    """The shapes, wrapped between them, and their letters behind or below."""
    lines = [[(row.style or "shapes", line)] for line in fill(unbroken(row.shapes), room, "", "  ")]
    letters = f" = {row.letters}" if row.letters else ""
    if length(lines[-1]) + len(letters) > room:
        return lines + [[("quiet", line)] for line in fill(unbroken(letters), room, "  ", "    ")]
    return [*lines[:-1], [*lines[-1], ("quiet", letters)]] if letters else lines


def unbroken(shapes: str) -> str:
    """Fix the spaces inside a shape, and between it and its name."""
    return re.sub(r"\([^()]*\)|(?<![,→ ]) (?![→ ])", fix_spaces, shapes)


def fix_spaces(match: re.Match) -> str:
    return match[0].replace(" ", FIXED_SPACE)


def fill(text: str, width: int, head: str, tail: str) -> list[str]:
    """Wrap text at its spaces, but not in short parentheses; and before methods of results, as in .view(B, T).transpose(1, 2)."""
    wrapper = TextWrapper(max(width, len(tail) + 8), initial_indent=head, subsequent_indent=tail, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"( +)|(?<=\))(?=\.)")
    lines = wrapper.wrap(re.sub(r"\([^()]{,12}\)", fix_spaces, text))
    return [line.replace(FIXED_SPACE, " ") for line in lines] or [head]


def length(spans: list[Span]) -> int:
    return sum(len(text) for _, text in spans)
