"""Follows source code line by line while it runs, and checks its shape comments.

    q = self.w_q(x).view(B, T, self.num_heads, self.head_dim)  # (B, T, num_heads, head_dim)

A shape comment is written in names that are in scope, so that a test can compare it with the tensor (ShapeComments).
tools.show_shapes uses the same LineFollower to print what every line of a forward method makes.
"""

import ast
import functools
import inspect
import io
import linecache
import operator
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Statement:
    """A statement of a source file: its text on one line, what it assigns, and the comment behind it."""

    node: ast.stmt
    line: int
    text: str
    targets: tuple[str, ...]
    comment: str
    comment_line: int


@functools.lru_cache(maxsize=256)
def statements(text: str) -> dict[int, Statement]:
    """The innermost statement on every line of a source text; of a compound statement only its head counts."""
    lines = text.split("\n")
    comments = trailing_comments(text)
    found = {}
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.stmt):
            continue
        end = node.end_lineno
        if hasattr(node, "body") or hasattr(node, "cases"):
            heads = [getattr(part, "context_expr", part) for part in ast.iter_child_nodes(node)]
            end = max([node.lineno] + [part.end_lineno for part in heads if isinstance(part, ast.expr)])
        parts = [lines[i - 1][: comments[i][0] if i in comments else None].strip() for i in range(node.lineno, end + 1)]
        source = re.sub(r"(?<=[(\[{])\n|,?\n(?=[)\]}])", "", "\n".join(parts)).replace("\n", " ")
        comment_line = end if end in comments else node.lineno
        comment = comments.get(comment_line, (0, ""))[1]
        statement = Statement(node, node.lineno, source, assigned_names(node), comment, comment_line)
        found.update(dict.fromkeys(range(node.lineno, end + 1), statement))
    return found


def trailing_comments(text: str) -> dict[int, tuple[int, str]]:
    """{line: (column, comment)} of the comments that stand behind code."""
    lines = text.split("\n")
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][:column].strip():
            found[row] = (column, token.string)
    return found


def assigned_names(node: ast.stmt) -> tuple[str, ...]:
    """`q, self.k = ...` gives ('q', 'self.k'); `x[0] = ...` and `x.mul_(...)` change x, so they give ('x',)"""
    match node:
        case ast.Assign(targets=targets):
            targets = list(targets)
        case ast.AugAssign(target=target) | ast.AnnAssign(target=target):
            targets = [target]
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=target, attr=name))) if re.search(r"[^_]_$", name):
            targets = [target]
        case _:
            return ()
    names = []
    while targets:
        match targets.pop(0):
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                targets = parts + targets
            case ast.Subscript(value=base) | ast.Starred(value=base):
                targets.insert(0, base)
            case (ast.Name() | ast.Attribute(value=ast.Name())) as target:
                names.append(ast.unparse(target))
    return tuple(dict.fromkeys(names))


def names_read(statement: Statement) -> list[str]:
    """The variables, and attributes of variables, that a statement reads, in order."""
    heads = [part for part in ast.iter_child_nodes(statement.node) if not isinstance(part, ast.stmt)]
    read = [node for head in heads for node in ast.walk(head) if isinstance(getattr(node, "ctx", None), ast.Load)]
    read = [node for node in read if isinstance(node, ast.Name) or isinstance(getattr(node, "value", None), ast.Name)]
    read.sort(key=lambda node: (node.lineno, node.col_offset))
    names = [ast.unparse(node) for node in read if isinstance(node, ast.Name | ast.Attribute)]
    changed = statement.targets if isinstance(statement.node, ast.AugAssign) else ()
    return list(dict.fromkeys((*changed, *names)))


def look_up(name: str, variables: Mapping[str, Any]) -> Any:
    """The value of `x` or of `self.x`; None when there is none."""
    first, *attributes = name.split(".")
    return functools.reduce(lambda value, attribute: getattr(value, attribute, None), attributes, variables.get(first))


def tensors_in(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value that may be a tensor, or tuples, lists and dicts of them, with names such as cache[0]."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from tensors_in(f"{name}[{key!r}]", item, depth - 1)


class LineFollower:
    """While its `with` block runs, follows the functions that `wanted` picks, statement by statement.

    A subclass says what to do: entered(frame) gives a token for the function's call; finished(token, frame, statement,
    found, error) comes after each statement, with the (name, value) pairs it made, or those it read if it failed;
    left(token, value, error) ends the call.
    """

    def __enter__(self):
        self.trace_before = sys.gettrace()  # a debugger's or a coverage tool's
        sys.settrace(self.called)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.trace_before)

    def called(self, frame, event, argument):
        resumable = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
        if frame.f_code.co_flags & resumable or frame.f_code.co_name.startswith("<") or not self.wanted(frame):
            return None
        linecache.checkcache(frame.f_code.co_filename)
        text = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
        return self.function_tracer(self.entered(frame), statements(text), dict(frame.f_locals))

    def function_tracer(self, token, statement_at, variables):
        statement = returning = error = None

        def made(frame):
            nonlocal variables
            before, variables = variables, dict(frame.f_locals)
            changed = [name for name in variables if variables[name] is not before.get(name, before)]
            names = dict.fromkeys((*statement.targets, *changed))
            return [(name, look_up(name, variables)) for name in names]

        def step(frame, event, argument):
            nonlocal statement, returning, error, variables
            if event == "exception" and not issubclass(argument[0], StopIteration):
                error = argument[1]
            elif event == "line":
                following = statement_at.get(frame.f_lineno)
                if following is statement:  # a statement of several lines
                    return step
                if isinstance(getattr(statement, "node", None), ast.Return):
                    returning = statement  # a `with` or `finally` around it still has to run
                elif statement and not error:
                    self.finished(token, frame, statement, made(frame), None)
                statement, error = following, None
            elif event == "return":
                statement = returning or statement
                if statement and error:
                    read = [(name, look_up(name, frame.f_locals)) for name in names_read(statement)]
                    self.finished(token, frame, statement, read, error)
                elif statement:
                    found = [("return", argument)] if isinstance(statement.node, ast.Return) else made(frame)
                    self.finished(token, frame, statement, found, None)
                self.left(token, argument, error)
                variables = {}  # lets go of the tensors
            return step

        return step


class ShapeComments(LineFollower):
    """Checks the shape comments of source files while code of these files runs inside the `with` block.

        with ShapeComments("model.py") as comments:
            GPT(config, vocab_size=11)(tokens)
        assert not comments.wrong and not comments.never_ran

    A shape comment stands behind an assignment or a return and starts with a parenthesis: `# (B, T, num_heads * head_dim)`,
    text may follow. Names are ints in scope: local variables, attributes of self, globals; `...` is any number of axes.
    Of several tensors each has the one shape, or there is one shape for each: `# (B, T, D), (B, T)`.
    The block can be entered again; what was found adds up. FileNotFoundError when there is no such file.
    """

    def __init__(self, *files: str | Path):
        self.files = {os.path.realpath(file): Path(file).name for file in files}
        self.wrong: list[str] = []
        self.waiting = {(path, line): comment for path in self.files
                        for line, (_, comment) in trailing_comments(Path(path).read_text(encoding="utf-8")).items()
                        if shapes_in(comment)}

    @property
    def never_ran(self) -> list[str]:
        """The shape comments that no run has checked."""
        return [f"{self.files[path]}:{line}: never ran: {comment}" for (path, line), comment in self.waiting.items()]

    def wanted(self, frame):
        return real_path(frame.f_code.co_filename) in self.files

    def entered(self, frame):
        return real_path(frame.f_code.co_filename)

    def finished(self, path, frame, statement, found, error):
        if error or not shapes_in(statement.comment) or (hasattr(statement.node, "body") and not found):
            return
        self.waiting.pop((path, statement.comment_line), None)
        if problem := wrong_comment(statement, frame, found):
            message = f"{self.files[path]}:{statement.line}: {problem}"
            if message not in self.wrong:
                self.wrong.append(message)

    def left(self, path, value, error):
        pass


real_path = functools.cache(os.path.realpath)


def shapes_in(comment: str) -> list[str]:
    """'# (B, T), (B, D) both of them'  becomes  ['(B, T)', '(B, D)'].  A parenthesis without comma is only text."""
    shapes, rest = [], comment.lstrip("# ")
    while (match := re.match(r"\((?:[^()]|\([^()]*\))*\)", rest)) and ("," in match[0] or match[0] in ("()", "(...)")):
        shapes.append(match[0])
        rest = re.sub(r"^(,|\s+and\b)\s*", "", rest[match.end():])
    return shapes


def wrong_comment(statement: Statement, frame, found: list[tuple[str, Any]]) -> str:
    """What is wrong with the shape comment behind a statement that made `found`; empty when nothing is."""
    shapes = shapes_in(statement.comment)
    tensors = [item for name, value in found for item in tensors_in(name, value)]
    if not shapes or (not tensors and hasattr(statement.node, "body")):
        return ""
    if not tensors:
        return f"the comment says {shapes[0]}, but this line makes no tensor"
    if len(shapes) not in (1, len(tensors)):
        return f"the comment names {len(shapes)} shapes, but the line makes {len(tensors)} tensors"
    for (name, tensor), shape in zip(tensors, shapes * (len(tensors) if len(shapes) == 1 else 1), strict=True):
        try:
            sizes = [size_of(part, frame) for part in shape_parts(shape)]
        except (ValueError, ArithmeticError) as error:
            return f"the comment {shape} cannot be checked: {error}"
        actual = list(tensor.shape)
        matches = sizes == actual
        if ... in sizes:
            head, tail = sizes[: sizes.index(...)], sizes[sizes.index(...) + 1:]
            matches = len(head + tail) <= len(actual) and actual[: len(head)] + actual[len(actual) - len(tail):] == head + tail
        if not matches:
            said = ", ".join("..." if size is ... else str(size) for size in sizes)
            return f"the comment says {shape}, that is ({said}), but {name} is {tuple(actual)}"
    return ""


def shape_parts(shape: str) -> list[ast.expr]:
    try:
        return ast.parse(shape, mode="eval").body.elts
    except (SyntaxError, AttributeError):
        raise ValueError("it is not a list of sizes in parentheses; a comment that is no shape should start otherwise") from None


def size_of(node: ast.expr, frame) -> Any:
    """The int that an entry of a shape comment stands for, or `...`; nothing but names and arithmetic is evaluated."""
    arithmetic = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
    match node:
        case ast.Constant(value=int() | EllipsisType() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in arithmetic:
            return arithmetic[type(op)](size_of(left, frame), size_of(right, frame))
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
            for value in (look_up(name, frame.f_locals), look_up(f"self.{name}", frame.f_locals), look_up(name, frame.f_globals)):
                if isinstance(value, int):
                    return value
            raise ValueError(f"{name} is no int in scope (no local variable, attribute of self or global)")
    raise ValueError(f"{ast.unparse(node)} is no size")
