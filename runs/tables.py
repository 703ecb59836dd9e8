"""Tables that fit the terminal, in colour where it has some."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from rich.console import Console
from rich.table import Table

BOUND = "≤ "  # marks a loss that is an upper bound, in every table and sentence
WIDTH = 80  # of text that does not go to a terminal
NAME_WIDTH, TEXT_WIDTH, HEADING_WIDTH = 30, 44, 9  # longer names, texts and headings wrap


@dataclass(frozen=True)
class FrameTable:
    """A pandas DataFrame. Names and headings wrap; columns that do not fit follow below, each time with the names."""

    frame: object
    number: str = ",.4f"  # format of numbers that are no whole ones
    formats: dict[str, Callable] = field(default_factory=dict)  # other formats, by column

    def __rich_console__(self, console, options) -> Iterator[Table | str]:
        names = self.names()
        name_widths = [min(NAME_WIDTH, max(map(len, level))) for level in names]
        blocks, room = [], 0
        for column in self.frame.columns:
            cells = [self.text(value, column) for value in self.frame[column]]
            words = max(min(len(str(column)), HEADING_WIDTH), *map(len, str(column).split()))
            width = max(words, min(TEXT_WIDTH, max(map(len, cells))))
            room -= width + 2
            if not blocks or room < 0:
                room = options.max_width - sum(name_widths) - 2 * len(name_widths) - width
                blocks.append([])
            blocks[-1].append((str(column), width, cells))
        for number, block in enumerate(blocks):
            table = new_table()
            for width in name_widths:
                table.add_column("", width=width, overflow="fold", style="cyan")
            for heading, width, cells in block:
                is_text = any(cell[:1].isalpha() for cell in cells)
                table.add_column(heading, width=width, overflow="fold", justify="left" if is_text else "right")
            for row in zip(*names, *(cells for _, _, cells in block), strict=True):
                table.add_row(*row)
            yield from ([""] if number else []) + [table]

    def names(self) -> list[list[str]]:
        """The texts of each level of the index; repeated ones of all but the last level are left out."""
        rows = [row if isinstance(row, tuple) else (row,) for row in self.frame.index]
        levels = [[str(name) for name in level] for level in zip(*rows, strict=True)]
        for level in levels[:-1]:
            level[1:] = ["" if name == before else name for before, name in pairwise(level)]
        return levels

    def text(self, value, column) -> str:
        if value is None or value != value:  # NaN
            return "–"
        if column in self.formats:
            return self.formats[column](value)
        if isinstance(value, str):
            return value
        return f"{value:,}" if isinstance(value, int) else f"{value:{self.number}}"


def at_most(value: float, is_bound: bool, number: str = ".4f") -> str:
    """A loss as text; an upper bound is marked.

    >>> at_most(1.25, is_bound=True, number=".3f")
    '≤ 1.250'
    """
    return f"{BOUND * is_bound}{value:{number}}"


def marked(value: float, is_bound: bool) -> float | str:
    """A loss for a table: a number, or the text of an upper bound."""
    return at_most(value, is_bound) if is_bound else value


def new_table(**options) -> Table:
    return Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", **options)


def paragraphs(*parts: list) -> Iterator:
    """The lines and tables of each part that is not empty, with a line between two parts."""
    for number, lines in enumerate(filter(None, parts)):
        yield from [""] * (number > 0) + lines


def plain(*parts) -> str:
    """Texts and tables without colour, one below the other. Only tables wrap."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False)
    console.print(*parts, sep="\n", soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def show(*parts):
    """Print texts and tables one below the other: as wide as the terminal and in colour, or plainly into a file."""
    console = Console(markup=False, highlight=False, emoji=False)
    if console.is_terminal:
        console.print(*parts, sep="\n")
    else:
        print(plain(*parts), flush=True)
