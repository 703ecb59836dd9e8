"""Follow source code line by line while it runs (LineFollower), and check its shape comments (ShapeComments).

    q = self.w_q(x).view(B, T, self.num_heads, self.head_dim)  # (B, T, num_heads, head_dim)

A shape comment is written in names that are in scope, so that a test can compare it with the tensor.
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
    """A statement of a source file: its text on one line, the names it assigns, and its trailing comment."""

    node: ast.stmt
    line: int
    text: str
    targets: tuple[str, ...]
    comment: str
    comment_line: int


@functools.lru_cache(maxsize=256)
def statements(text: str) -> dict[int, Statement]:
    """The innermost statement on each line of a source text; a compound statement is its head alone."""
    lines = text.split("\n")
    comments = trailing_comments(text)
    by_line = {}
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
        by_line.update(dict.fromkeys(range(node.lineno, end + 1), statement))
    return by_line


def trailing_comments(text: str) -> dict[int, tuple[int, str]]:
    """{line: (column, comment)} of the comments that follow code on their line."""
    lines = text.split("\n")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        row, column = token.start
        if token.type == tokenize.COMMENT and lines[row - 1][:column].strip():
            comments[row] = (column, token.string)
    return comments


def assigned_names(node: ast.stmt) -> tuple[str, ...]:
    """The names that a statement assigns or changes in place.

    >>> [assigned_names(ast.parse(text).body[0]) for text in ("q, self.k = f(x)", "x[0] = 1", "x.mul_(2)", "f(x)")]
    [('q', 'self.k'), ('x',), ('x',), ()]
    """
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
    """The variables, and attributes of variables, that a statement reads, in their order."""
    heads = [part for part in ast.iter_child_nodes(statement.node) if not isinstance(part, ast.stmt)]
    read = [node for head in heads for node in ast.walk(head) if isinstance(getattr(node, "ctx", None), ast.Load)]
    read = [node for node in read if isinstance(node, ast.Name) or isinstance(getattr(node, "value", None), ast.Name)]
    read.sort(key=lambda node: (node.lineno, node.col_offset))
    names = [ast.unparse(node) for node in read if isinstance(node, ast.Name | ast.Attribute)]
    changed = statement.targets if isinstance(statement.node, ast.AugAssign) else ()
    return list(dict.fromkeys((*changed, *names)))


def value_of(name: str, variables: Mapping[str, Any]) -> Any:
    """The value of `x` or `self.x`, or None."""
    variable, *attributes = name.split(".")
    return functools.reduce(lambda value, attribute: getattr(value, attribute, None), attributes, variables.get(variable))


def tensors_in(name: str, value: Any, depth: int = 3) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, also in nested tuples, lists and dicts, with names such as cache[0]."""
    if isinstance(value, Tensor):
        yield name, value
    elif depth and isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from tensors_in(f"{name}[{key!r}]", item, depth - 1)


class LineFollower:
    """Follow functions statement by statement while the `with` block runs. Subclasses define the callbacks:

    should_follow(frame) picks the functions. on_call(frame) returns a token for a call. on_statement(token, frame, statement,
    values, error) gets the (name, value) pairs that a statement made, or read if it failed. on_return(token, value, error).
    """

    def __enter__(self):
        self.previous_trace = sys.gettrace()  # of a debugger or a coverage tool
        sys.settrace(self.trace_call)
        return self

    def __exit__(self, *exception):
        sys.settrace(self.previous_trace)

    def trace_call(self, frame, event, argument):
        resumable = inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
        if frame.f_code.co_flags & resumable or frame.f_code.co_name.startswith("<") or not self.should_follow(frame):
            return None
        linecache.checkcache(frame.f_code.co_filename)
        text = "".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals))
        return self.function_tracer(self.on_call(frame), statements(text), dict(frame.f_locals))

    def function_tracer(self, token, statement_at, variables):
        statement = returning = error = None

        def assigned(frame):
            nonlocal variables
            before, variables = variables, dict(frame.f_locals)
            changed = [name for name in variables if variables[name] is not before.get(name, before)]
            names = dict.fromkeys((*statement.targets, *changed))
            return [(name, value_of(name, variables)) for name in names]

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
                    self.on_statement(token, frame, statement, assigned(frame), None)
                statement, error = following, None
            elif event == "return":
                statement = returning or statement
                if statement and error:
                    read = [(name, value_of(name, frame.f_locals)) for name in names_read(statement)]
                    self.on_statement(token, frame, statement, read, error)
                elif statement:
                    values = [("return", argument)] if isinstance(statement.node, ast.Return) else assigned(frame)
                    self.on_statement(token, frame, statement, values, None)
                self.on_return(token, argument, error)
                variables = {}  # release the tensors
            return step

        return step


class ShapeComments(LineFollower):
    """Check the shape comments of source files while their code runs inside the `with` block.

        with ShapeComments("model.py") as comments:
            GPT(config, vocab_size=11)(tokens)
        assert not comments.wrong and not comments.never_ran

    A shape comment follows an assignment or a return and starts with a parenthesis, `# (B, T, num_heads * head_dim)`; text may
    follow. Names are ints in scope: local variables, attributes of self, globals. `...` is any number of axes. If a line makes
    several tensors, there is one shape for all, or one for each: `# (B, T, D), (B, T)`.
    The block can be entered again; results add up. Raises FileNotFoundError if there is no such file.
    """

    def __init__(self, *files: str | Path):
        self.files = {os.path.realpath(file): Path(file).name for file in files}
        self.wrong: list[str] = []
        self.unchecked: list[str] = []  # comments that are not written in names of sizes in scope
        self.waiting = {(path, line): comment for path in self.files
                        for line, (_, comment) in trailing_comments(Path(path).read_text(encoding="utf-8")).items()
                        if shapes_in(comment)}

    @property
    def never_ran(self) -> list[str]:
        """The shape comments whose line has not run."""
        return [f"{self.files[path]}:{line}: never ran: {comment}" for (path, line), comment in self.waiting.items()]

    def should_follow(self, frame):
        return real_path(frame.f_code.co_filename) in self.files

    def on_call(self, frame):
        return real_path(frame.f_code.co_filename)

    def on_statement(self, path, frame, statement, values, error):
        if error or not shapes_in(statement.comment) or (hasattr(statement.node, "body") and not values):
            return
        self.waiting.pop((path, statement.comment_line), None)
        if problem := wrong_comment(statement, frame, values):
            message = f"{self.files[path]}:{statement.line}: {problem}"
            problems = self.unchecked if "cannot be checked" in problem else self.wrong
            if message not in problems:
                problems.append(message)

    def on_return(self, path, value, error):
        pass


real_path = functools.cache(os.path.realpath)


def shapes_in(comment: str) -> list[str]:
    """The shapes that a comment starts with; a parenthesis without a comma is text.

    >>> shapes_in("# (B, T), (B, D) both of them")
    ['(B, T)', '(B, D)']
    """
    shapes, text = [], comment.lstrip("# ")
    while (match := re.match(r"\((?:[^()]|\([^()]*\))*\)", text)) and ("," in match[0] or match[0] in ("()", "(...)")):
        shapes.append(match[0])
        text = re.sub(r"^(,|\s+and\b)\s*", "", text[match.end():])
    return shapes


def wrong_comment(statement: Statement, frame, values: list[tuple[str, Any]]) -> str:
    """What is wrong with the shape comment of a statement that made these (name, value) pairs; "" if nothing is."""
    shapes = shapes_in(statement.comment)
    tensors = [item for name, value in values for item in tensors_in(name, value)]
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
            expected = ", ".join("..." if size is ... else str(size) for size in sizes)
            return f"the comment says {shape}, that is ({expected}), but {name} is {tuple(actual)}"
    return ""


def shape_parts(shape: str) -> list[ast.expr]:
    try:
        return ast.parse(shape, mode="eval").body.elts
    except (SyntaxError, AttributeError):
        raise ValueError("it is not a list of sizes in parentheses; start other comments without one") from None


def size_of(node: ast.expr, frame) -> Any:
    """The int that an entry of a shape comment stands for, or `...`; evaluates only names and arithmetic."""
    arithmetic = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}
    match node:
        case ast.Constant(value=int() | EllipsisType() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in arithmetic:
            return arithmetic[type(op)](size_of(left, frame), size_of(right, frame))
        case ast.Name() | ast.Attribute():
            name = ast.unparse(node)
            variables = frame.f_locals
            for value in (value_of(name, variables), value_of(f"self.{name}", variables), value_of(name, frame.f_globals)):
                if isinstance(value, int):
                    return value
            raise ValueError(f"{name} is not an int in scope (a local variable, attribute of self, or global)")
    raise ValueError(f"{ast.unparse(node)} is not a size")
