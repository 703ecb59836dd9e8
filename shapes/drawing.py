"""Draw recorded calls as a tree: as text, in colors for a terminal, and as HTML that folds, for a notebook or a page."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from textwrap import TextWrapper
from typing import NamedTuple

from markupsafe import Markup

from pages import render
from shapes.comments import shapes_in
from shapes.tree import Call, Line, fold, given_lines, long_notes, parameter_label, shapes_label, value_notes

WIDE, PHONE = 110, 44  # columns of a tree in a notebook or on a page, and on a narrow screen
SMALL = 60  # rows of a tree that is open
TWO_COLUMNS = 72  # from this width on, shapes stand beside their line and not below it
COLORS = {"name": "1;34", "shapes": "36", "branch": "2", "quiet": "2", "wrong": "31"}  # ANSI codes
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
    """The place of the shapes, 0 if there is no room for a column of them; the widths of the numbers and of all."""

    shapes: int
    count: int
    width: int


def as_text(calls: list[Call], width: int = WIDE, color: bool = False) -> str:
    """Draw the calls as a tree with aligned columns."""
    rows, columns = lay_out(rows_of(fold(calls)), width)
    lines = [line for row in walk(rows) for line in lines_of(row, columns)]
    return "\n".join("".join(paint(style, text) if color else text for style, text in line).rstrip() for line in lines)


def paint(style: str, text: str) -> str:
    return f"\033[{COLORS[style]}m{text}\033[0m" if style else text


def as_html(calls: list[Call], *widths: int, is_page: bool = False) -> Markup:
    """Draw the calls as a tree that folds without scripts, in each of these widths. A small one is open.

    Without its style, which some viewers of notebooks remove, it is the tree of as_text with the marks of <details>. A page has
    gray branches and names the place of a line, which in a notebook would double its size.
    """
    rows, trees = rows_of(fold(calls)), []
    if sum(1 for _ in walk(rows)) <= SMALL:
        for row in walk(rows):
            row.is_open = True
    for width in widths:
        tree, columns = lay_out(rows, width - 2)  # the first two are for the marks
        trees.append((width, tree, partial(lines_of, columns=columns)))
    return Markup(render("shapes/tree.jinja", trees=trees, phone=PHONE, is_page=is_page))


def as_page(calls: list[Call]) -> str:
    """Draw the calls as one self-contained HTML page, whose tree is narrower on a phone."""
    tree = as_html(calls, WIDE, PHONE, is_page=True)
    return render("pages/base.jinja", title=f"{calls[0].kind or calls[0].name}: shapes", content=tree)


def rows_of(nodes: list[Call | Line], indent: str | None = None, depth: int = 0) -> list[Row]:
    """The rows of nodes. The upper two levels are open; of repeated modules the first one is."""
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
    """Add headings, and place the shapes where the tree takes the fewest lines."""
    with_shapes = [row for row in walk(rows) if row.shapes]
    count = max(len("parameters"), *(len(row.count) for row in with_shapes)) + 2
    if width < TWO_COLUMNS:
        return [Row("", "", count="parameters", style="quiet"), *map(with_thin_branches, rows)], Columns(0, count, width)

    def height(place: int) -> int:
        rooms = (width - place - (count if row.count else 0) for row in with_shapes)
        lines = (ceil(len(row.shapes + row.letters) / room) for row, room in zip(with_shapes, rooms, strict=True))
        return sum(lines) + sum(len(row.head + row.label) > place - 2 for row in with_shapes)

    place = min(range(width // 4, width * 2 // 3), key=height)
    ends = [place + len(row.shapes + row.letters) + 3 * bool(row.letters) + count * bool(row.count) for row in with_shapes]
    width = min(width, max(*ends, *(len(row.head + row.label) for row in walk(rows))))
    return [Row("", "", shapes="shapes", count="parameters", style="quiet"), *rows], Columns(place, count, width)


def with_thin_branches(row: Row) -> Row:
    head, tail = row.head[::3] + " " * bool(row.head), row.tail[::3] + " "
    return replace(row, head=head, tail=tail, below=[with_thin_branches(inner) for inner in row.below])


def lines_of(row: Row, columns: Columns) -> list[list[Span]]:
    """The lines of a row: its label, and the shapes beside the end of it if they fit there, or below."""
    lines = label_lines(row, columns.width - (len(row.count) + 2 if row.count else 0))
    place = max(columns.shapes, len(row.tail) + 2)
    shapes = shape_lines(row, columns.width - place - (columns.count if row.count and columns.shapes else 0))
    end = length(lines[-1])
    if columns.shapes:
        is_beside, gap = end <= place - 2, place - end
    else:
        is_beside, gap = len(lines + shapes) == 2 and end + length(shapes[0]) + 4 + len(row.count) <= columns.width, 2
    if shapes and is_beside:
        lines[-1] += [("", " " * gap), *shapes.pop(0)]
    if row.count:
        lines[0].append((row.style, row.count.rjust(columns.width - length(lines[0]))))
    return lines + [[("branch", row.tail.ljust(place)), *line] for line in shapes]


def label_lines(row: Row, width: int) -> list[list[Span]]:
    """The branches of the tree, name and text of a row, wrapped."""
    lines = []
    for line in fill(row.label, width, row.head, row.tail):
        start = len(row.tail if lines else row.head)
        end = start if lines else start + len(row.name)
        spans = [("branch", line[:start]), ("name", line[start:end]), (row.style, line[end:])]
        lines.append([(style, text) for style, text in spans if text])
    return lines


def shape_lines(row: Row, room: int) -> list[list[Span]]:
    """The shapes, wrapped between them, and their letters behind or below."""
    if not row.shapes:
        return []
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
    """Wrap text at its spaces, but not in short brackets; and before methods of results, as in .view(B, T).transpose(1, 2)."""
    wrapper = TextWrapper(max(width, len(tail) + 8), initial_indent=head, subsequent_indent=tail, break_on_hyphens=False)
    wrapper.wordsep_simple_re = re.compile(r"( +)|(?<=\))(?=\.)")
    lines = wrapper.wrap(re.sub(r"[([][^()[\]]{,12}[)\]]", fix_spaces, text))
    return [line.replace(FIXED_SPACE, " ") for line in lines] or [head]


def length(spans: list[Span]) -> int:
    return sum(len(text) for _, text in spans)
