"""The tree of calls and lines that show_shapes records: folding of repetitions, and the labels of a row."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

FAILED_INSIDE = "failed"  # the problem of a call in which an inner call or line has reported the error
NUMBERS = r"\d+(?:(?:–|, )\d+)*"  # in a name: 3, or 0–2, 5 for merged calls
LONGEST_PERIOD = 64  # nodes in the longest repetition that is looked for


@dataclass(frozen=True)
class Value:
    """A recorded tensor, or a plain number, which has no shape."""

    name: str
    shape: tuple[int, ...] | None
    dtype: str = ""
    number: str = ""
    statistics: str = ""  # minimum, mean and maximum
    content: str = ""


@dataclass
class Line:
    """A statement of a forward method, or of a helper function, and the values that it made."""

    source: str
    results: tuple[Value, ...]
    where: str = ""
    comment: str = ""
    problem: str = ""
    times: int = 1


@dataclass
class Call:
    """A call of a module, or of a helper function (without a kind), and what happened inside, in order."""

    name: str
    kind: str
    inputs: tuple[Value, ...]
    kwargs: tuple[Value, ...] = ()
    module: nn.Module | None = None
    outputs: tuple[Value, ...] = ()
    parameters: int = 0
    shared: int = 0  # parameters that an earlier call has counted: tied weights
    problem: str = ""
    children: list["Call | Line"] = field(default_factory=list)
    times: int = 1
    pending_error: BaseException | None = None  # was being handled when the call began, so it is not the call's


def fold(nodes: list[Call | Line]) -> list[Call | Line]:
    """Merge repetitions of nodes that look the same, such as equal layers or the lines of a loop."""
    nodes = [replace(node, children=fold(node.children)) if isinstance(node, Call) else node for node in nodes]
    while repetition := longest_repetition(nodes):
        start, period, end = repetition
        nodes[start:end] = [merge(nodes[i:end:period]) for i in range(start, start + period)]
    return nodes


def longest_repetition(nodes: list[Call | Line]) -> tuple[int, int, int] | None:
    """(start, period, end) of the longest repetition; of equal ones, that with the shortest period, then that from a call on."""
    numbers: dict[tuple, int] = {}
    looks = [numbers.setdefault(look(node), len(numbers)) for node in nodes]
    candidates = []
    for period in range(1, min(len(nodes) // 2, LONGEST_PERIOD) + 1):
        for start in range(len(nodes) - 2 * period + 1):
            end = start + period
            while looks[end : end + period] == looks[start : start + period]:
                end += period
            if end - start > period:
                candidates.append((end - start, -period, isinstance(nodes[start], Call), -start))
    if not candidates:
        return None
    length, period, _, start = max(candidates)
    return -start, -period, length - start


def look(node: Call | Line) -> tuple:
    """Equal for nodes that are drawn as one: everything but the numbers in the name."""
    if isinstance(node, Line):
        return node.source, node.where, node.results, node.problem, node.times
    children = tuple(look(child) for child in node.children)
    size = (node.parameters + node.shared) // node.times
    name = re.sub(NUMBERS, "#", node.name)
    return name, node.kind, node.inputs, node.kwargs, node.outputs, size, node.problem, node.times, children


def without_repeats(nodes: list[Call | Line], visited: set[tuple]) -> list[Call | Line]:
    """Leave out what is inside calls that look like visited ones, and add the other calls to these."""
    shorter = []
    for node in nodes:
        if isinstance(node, Call) and len(node.children) > 1 and look(node) in visited:
            node = replace(node, children=[Line("as above", ())])
        elif isinstance(node, Call):
            visited.add(look(node))
            node = replace(node, children=without_repeats(node.children, visited))
        shorter.append(node)
    return shorter


def merge(nodes: list[Call | Line]) -> Call | Line:
    times = sum(node.times for node in nodes)
    if isinstance(nodes[0], Line):
        return replace(nodes[0], times=times)
    parameters, shared = sum(node.parameters for node in nodes), sum(node.shared for node in nodes)
    return replace(nodes[0], name=joined_name([node.name for node in nodes]), times=times, parameters=parameters, shared=shared)


def joined_name(names: list[str]) -> str:
    """One name for all, with ranges for their numbers.

    >>> joined_name(["layers.0", "layers.1", "layers.3"])
    'layers.0–1, 3'
    """
    parts = [re.split(f"({NUMBERS})", name) for name in dict.fromkeys(names)]
    for i in range(1, len(parts[0]), 2):
        spans = [span.partition("–") for part in parts for span in part[i].split(", ")]
        runs: list[list[int]] = []
        for number in sorted({n for low, _, high in spans for n in range(int(low), int(high or low) + 1)}):
            if runs and number == runs[-1][1] + 1:
                runs[-1][1] = number
            else:
                runs.append([number, number])
        parts[0][i] = ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)
    return "".join(parts[0])


def parameter_label(node: Call) -> str:
    if node.times > 1 and node.parameters and not node.shared:
        return f"{node.times} × {node.parameters // node.times:,}"
    if node.parameters or not node.shared:
        return f"{node.parameters:,}" if node.parameters else ""
    return f"{node.shared // node.times:,} shared"


def shape_label(value: Value, named: bool = True) -> str:
    text = value.number if value.shape is None else f"{value.shape}" + (f" {value.dtype}" if value.dtype != "float32" else "")
    return f"{value.name} {text}" if named else text


def shapes_label(node: Call | Line) -> str:
    if isinstance(node, Line):
        return "✗ " * bool(node.problem) + ", ".join(map(shape_label, node.results))
    inputs, outputs = (", ".join(shape_label(value, named=False) for value in side) for side in (node.inputs, node.outputs))
    return f"{inputs} → {'✗' if node.problem else outputs}"


def given_lines(call: Call) -> list[Line]:
    """A line for the keyword arguments, except those that are passed on to a call inside, where they are shown."""
    passed_on, calls = set(), [child for child in call.children if isinstance(child, Call)]
    while calls:
        inner = calls.pop()
        passed_on.update(inner.kwargs)
        calls += [child for child in inner.children if isinstance(child, Call)]
    given = tuple(value for value in call.kwargs if value not in passed_on)
    return [Line("given", given)] if given else []


def value_notes(node: Call | Line) -> list[str]:
    """The statistics of the tensors of a line, or of a call that has no lines."""
    if isinstance(node, Line):
        values = [value for value in node.results if value.statistics]
        return [f"{value.name}: {value.statistics}" if len(values) > 1 else value.statistics for value in values]
    if any(isinstance(child, Line) for child in node.children):
        return []
    return [f"→ {value.statistics}" for value in node.outputs if value.statistics]


def long_notes(node: Call | Line) -> Iterator[str]:
    """The contents of the same tensors, and the error."""
    if isinstance(node, Line) or not any(isinstance(child, Line) for child in node.children):
        for value in node.results if isinstance(node, Line) else node.outputs:
            label = f"{value.name}: " if isinstance(node, Line) else "→ "
            if value.content:
                yield label + value.content.replace("\n", "\n" + " " * len(label))
    if node.problem and node.problem != FAILED_INSIDE:
        yield f"✗ {node.problem}"
