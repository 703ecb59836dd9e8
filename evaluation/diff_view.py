"""How what differs between two architectures is drawn: as text, as a table for a notebook, as a page."""

import re
from collections.abc import Iterator
from html import escape
from itertools import zip_longest
from textwrap import wrap

from evaluation.alignment import CHANGED, LEFT, RIGHT, SAME, Diff, Group, Row
from metrics.cost import Part
from shapes.tree import joined_name

NUMBERS = {"parameters": "parameters", "flops": "FLOPs", "cache_per_token": "cache"}


class DiffView(Diff):
    """A Diff that a notebook shows as a table and `print` as text; `as_page` makes it a page."""

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_table(self)


def weight_shapes(part: Part) -> list[str]:
    """['w_q 128×128', 'experts.0–7.w_in 344×128']"""
    alike: dict[tuple, list[str]] = {}
    for name, shape in part.shapes.items():
        alike.setdefault((re.sub(r"\d+", "#", name), shape), []).append(name.removesuffix(".weight"))
    return [f"{joined_name(names)} {'×'.join(map(str, shape)) or 'a number'}" for (_, shape), names in alike.items()]


def changed_settings(part: Part, other: Part | None) -> list[str]:
    """['activation=GELU']: what both were given, but not the same. What the step or all shapes say is left out."""
    if other is None:
        return []
    names = [name for name, value in part.settings.items() if value != other.settings.get(name, value) and name != "dim"]
    return [f"{name}={part.settings[name]}" for name in names if f"{name}=" not in part.step]


def number(part: Part | None, quantity: str) -> str:
    """With what does not grow of a cache behind what does; nothing where there is nothing."""
    if part is None:
        return ""
    value = getattr(part, quantity)
    fixed = f"{part.cache_fixed:,.0f} fixed" if quantity == "cache_per_token" and part.cache_fixed else ""
    return " + ".join(text for text in (f"{value:,.0f}" if value else "", fixed) if text)


def ratio(left: float, right: float) -> str:
    return "" if left == right else f"× {right / left:.2f}" if left else "new"


def as_text(compared: Diff) -> str:
    """For the terminal: a line for each part, with lines for the weights where they differ."""
    told = [f"{compared.left.title}  {CHANGED}  {compared.right.title}", "", *wrap(compared.legend, 110), ""]
    width = max((len(name) for name, _, _ in compared.config_rows), default=0)
    for name, left, right in compared.config_rows:
        if len(left) + len(right) < 70:
            told.append(f"{name.ljust(width)}  {left}  {RIGHT}  {right}")
        else:
            for start, value in ((f"{name.ljust(width)}  {LEFT} ", left), (f"{' ' * width}  {RIGHT} ", right)):
                told += wrap(value, 120, initial_indent=start, subsequent_indent=" " * len(start))
    lines = [("", *(text for side in compared.sides for text in (side.title, *NUMBERS.values())))]
    for group in compared.groups:
        if len(group.rows) > 1:
            lines.append((group.mark, *(text for side in ("left", "right") for text in (group.title(side), "", "", ""))))
        if len(group.rows) == 1 or group.mark != SAME:
            lines += [line for row in group.rows for line in text_lines(row, "  " * (len(group.rows) > 1))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told.append("")
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        for place in (0, 1, 5):  # what is no number
            cells[place] = line[place].ljust(widths[place])
        told.append("  ".join(cells).rstrip())
    told.append("")
    for label, left, right in compared.totals:
        told.append(f"{label:29} {left:14,.0f}  {RIGHT} {right:14,.0f}  {ratio(left, right)}".rstrip())
    return "\n".join(told)


def text_lines(row: Row, indent: str) -> Iterator[tuple[str, ...]]:
    cells, continued = [], []
    for part, other in ((row.left, row.right), (row.right, row.left)):
        kind = f"  {part.kind}" if part and other and part.kind != other.kind else ""
        step, *rest = wrap(part.step, 44) if part else [""]
        cells += [indent * bool(part) + step + kind, *(number(part, name) for name in NUMBERS)]
        continued.append(rest)
    yield row.mark, *cells
    if row.left and row.right:
        left, right = (
            [*changed_settings(part, other), *weight_shapes(part)]
            for part, other in ((row.left, row.right), (row.right, row.left))
        )
        continued[0] += [shape for shape in left if shape not in right]
        continued[1] += [shape for shape in right if shape not in left]
    for pair in zip_longest(*continued, fillvalue=""):
        yield "", *(text for line in pair for text in (f"{indent}    {line}" if line else "", "", "", ""))


STYLE = """
.architecture-diff { font: 13px/1.45 system-ui, sans-serif; color: inherit; overflow-x: auto }
.architecture-diff table { border-collapse: collapse; margin: 0 0 1.2em; font-size: 13px; width: auto }
.architecture-diff th, .architecture-diff td { padding: 2px 8px; vertical-align: top; white-space: normal }
.architecture-diff.architecture-diff :is(th, td) { text-align: left }
.architecture-diff.architecture-diff .number { text-align: right }
.architecture-diff.architecture-diff .mark { text-align: center }
.architecture-diff td { max-width: 34em; overflow-wrap: anywhere }
.architecture-diff table tr:nth-child(n) { background: none; border: 0; border-bottom: 1px solid #8883 }
.architecture-diff thead th { border-bottom: 2px solid #8888; vertical-align: bottom }
.architecture-diff .number { white-space: nowrap; font-variant-numeric: tabular-nums }
.architecture-diff .mark { font-weight: 700; border-left: 1px solid #8885; border-right: 1px solid #8885 }
.architecture-diff .group td { border-top: 2px solid #8885; font-weight: 600 }
.architecture-diff .inside td:first-child, .architecture-diff .inside .mark + td { padding-left: 2em }
.architecture-diff .quiet { opacity: .65; font-weight: 400 }
.architecture-diff .details { font: 11px/1.4 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace }
.architecture-diff .other { font-weight: 700; border-bottom: 2px solid #e8a300; opacity: 1 }
.architecture-diff .arrow, .architecture-diff .details span { white-space: nowrap }
.architecture-diff .changed .mark, .architecture-diff .changed .other { background: #e8a30038 }
.architecture-diff .left .mark, .architecture-diff .left .one { background: #d9443a2e }
.architecture-diff .right .mark, .architecture-diff .right .one { background: #2e9e4f30 }
"""
CLASSES = {SAME: "same", CHANGED: "changed", LEFT: "left", RIGHT: "right"}


def as_table(compared: Diff) -> str:
    """For a notebook: tables of the config, the parts and the totals. Marks tell what the colours tell."""
    titles = [escape(side.title) for side in compared.sides]
    config = "".join(
        f"<tr><th>{name}</th><td>{breakable(left)}</td><td>{breakable(right)}</td></tr>"
        for name, left, right in compared.config_rows
    )
    numbers = "".join(f'<th class="number">{label}</th>' for label in NUMBERS.values())
    body = "".join(f"<tbody>{html_group(group)}</tbody>" for group in compared.groups)
    totals = "".join(
        f'<tr><th>{label}</th><td class="number">{left:,.0f}</td><td class="number">{right:,.0f}</td>'
        f'<td class="number">{ratio(left, right)}</td></tr>'
        for label, left, right in compared.totals
    )
    sides = "".join(f"<th>{title}</th>" for title in titles)
    number_sides = "".join(f'<th class="number">{title}</th>' for title in titles)
    return f"""<div class="architecture-diff"><style>{STYLE}</style>
<p class="quiet">{escape(compared.legend)}</p>
<table><thead><tr><th>config</th>{sides}</tr></thead><tbody>{config or "<tr><td>alike</td></tr>"}</tbody></table>
<table><thead><tr><th>{titles[0]}</th>{numbers}<th class="mark"></th><th>{titles[1]}</th>{numbers}</tr></thead>
{body}</table>
<table><thead><tr><th>in all</th>{number_sides}<th></th></tr></thead><tbody>{totals}</tbody></table>
</div>"""


def breakable(text: str) -> str:
    """HTML of a layer string that may go on in the next line behind an arrow, but not inside one."""
    return escape(text).replace("-&gt;", '<span class="arrow">-&gt;</span><wbr>')


def html_group(group: Group) -> str:
    if len(group.rows) == 1:
        return html_row(group.rows[0], "")
    cells = []
    for side in ("left", "right"):
        parts = group.parts(side)
        steps = f' <span class="quiet">{escape(" → ".join(part.step for part in parts))}</span>' if group.mark == SAME else ""
        sums = [sum(getattr(part, quantity) for part in parts) for quantity in NUMBERS]
        numbers = "".join(f'<td class="number">{f"{value:,.0f}" if value else ""}</td>' for value in sums)
        cells.append(f"<td>{escape(group.title(side))}{steps}</td>{numbers}")
    heading = f'<tr class="group {CLASSES[group.mark]}">{cells[0]}<td class="mark">{group.mark}</td>{cells[1]}</tr>'
    return heading + "".join(html_row(row, "inside") for row in group.rows if group.mark != SAME)


def html_row(row: Row, place: str) -> str:
    left, right = html_cells(row.left, row.right), html_cells(row.right, row.left)
    return f'<tr class="{place} {CLASSES[row.mark]}">{left}<td class="mark">{row.mark}</td>{right}</tr>'


def html_cells(part: Part | None, other: Part | None) -> str:
    """The cells of one side; what differs from the other side is set off."""
    if part is None:
        return "<td></td>" * (1 + len(NUMBERS))
    alone = " one" if other is None else ""

    def marked(text: str, others: str, also: str = "") -> str:
        return f'<span class="{also}{" other" * (other is not None and text != others)}">{escape(text)}</span>'

    step = marked(part.step, other.step if other else "")
    kind = marked(part.kind, other.kind if other else "", "quiet") if part.kind != part.step else ""
    theirs = weight_shapes(other) if other else []
    details = [marked(setting, "") for setting in changed_settings(part, other)]
    details += [marked(shape, shape if shape in theirs else "") for shape in weight_shapes(part)]
    what = f"{step} {kind}" + (f'<br><span class="details">{", ".join(details)}</span>' if details else "")
    numbers = "".join(
        f'<td class="number{alone}">{marked(number(part, quantity), number(other, quantity))}</td>' for quantity in NUMBERS
    )
    return f'<td class="{alone}">{what}</td>{numbers}'


def as_page(compared: Diff) -> str:
    """One self-contained page, light or dark as the reader has it."""
    title = escape(f"{compared.left.title} {CHANGED} {compared.right.title}")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>:root {{ color-scheme: light dark }} body {{ margin: 2em auto; max-width: 1400px; padding: 0 1em }}
h1 {{ font: 600 20px system-ui, sans-serif }}</style>
</head>
<body>
<h1>{title}</h1>
{as_table(compared)}
</body>
</html>
"""
