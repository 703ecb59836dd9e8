"""Record the calls of a model's modules, and the lines of its source files, for show_shapes."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapes.comments import LineFollower, tensors_in, wrong_comment
from shapes.tree import FAILED_INSIDE, Call, Line, Value

LARGEST_PRINTED_TENSOR = 64  # numbers


class Recording(LineFollower):
    """Record a tree of Calls: modules by hooks, and lines of their source files by tracing."""

    def __init__(self, model: nn.Module, values: bool, tensors: bool, lines: bool):
        self.values, self.tensors, self.lines = values, tensors, lines
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        classes = {base for module in model.modules() for base in type(module).__mro__}
        self.source_modules = {c.__module__ for c in classes if c.__module__.split(".")[0] not in ("torch", "tools", "builtins")}
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.reported: BaseException | None = None

    def __enter__(self):
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.callback(module.register_forward_pre_hook(self.before_module, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self.after_module, with_kwargs=True, always_call=True).remove)
            if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled, and importing it takes a second
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.lines:
                super().__enter__()
                stack.push(super().__exit__)
            self.cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self.cleanup.close()
        for call in self.open:
            call.problem = call.problem or "did not finish"
        counted = set()
        for call in self.calls:
            count_parameters(call, counted)

    def record(self, name: str, value: Any) -> tuple[Value, ...]:
        return tuple(record_tensor(n, t, self.values, self.tensors) for n, t in tensors_in(name, value))

    def before_module(self, module, args, kwargs):
        name = self.names[module]
        for outer in reversed(self.open):
            if outer.module is not None:
                name = name.removeprefix(self.names[outer.module] + ".")
                break
        named = tuple(value for key, item in kwargs.items() for value in self.record(key, item))
        inputs, pending_error = self.record("", args), sys.exc_info()[1]
        self.start(Call(name, type(module).__name__, inputs, named, module, pending_error=pending_error))

    def after_module(self, module, args, kwargs, output):
        call = next((call for call in reversed(self.open) if call.module is module), None)
        if call is None:  # another hook failed before the call began
            return
        error = sys.exc_info()[1]
        call.outputs = self.record("", output)
        call.kind = type(module).__name__  # a lazy module changes its class
        if error is not call.pending_error:
            call.problem = self.problem(error)
        self.end(call)

    def start(self, call):
        (self.open[-1].children if self.open else self.calls).append(call)
        self.open.append(call)

    def end(self, call):
        while self.open.pop() is not call:
            pass

    def problem(self, error: BaseException) -> str:
        """The error as one line where it was raised; FAILED_INSIDE for the calls around it."""
        if error is self.reported:
            return FAILED_INSIDE
        self.reported = error
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]

    def should_follow(self, frame):
        return bool(self.open) and frame.f_globals.get("__name__") in self.source_modules

    def on_call(self, frame):
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals.get(name) for name in names]
        call = self.open[-1]
        if code.co_name == "forward" and arguments and arguments[0] is call.module:
            return call
        inputs = tuple(value for name, item in zip(names, arguments, strict=True) for value in self.record(name, item))
        self.start(Call(f"{code.co_name}()", "", inputs))
        return self.open[-1]

    def on_statement(self, call, frame, statement, values, error):
        results = []
        for name, value in values:
            results += self.record(name, value)
            if isinstance(value, int | float) and name in statement.targets and not error:
                results.append(Value(name, None, number=f"{value:.4g}" if isinstance(value, float) else str(value)))
        problem = self.problem(error) if error else wrong_comment(statement, frame, values)
        if results or problem:
            where = f"{Path(frame.f_code.co_filename).name}:{statement.line}"
            call.children.append(Line(statement.text, tuple(results), where, statement.comment, problem))

    def on_return(self, call, value, error):
        if call.module is not None:
            return
        call.outputs = self.record("", value)
        call.problem = self.problem(error) if error else ""
        self.end(call)
        if not call.children and not call.outputs and not call.problem:
            self.open[-1].children.pop()


def record_tensor(name: str, tensor: Tensor, with_statistics: bool, with_content: bool) -> Value:
    is_readable = tensor.numel() and not tensor.is_meta and not tensor.is_complex() and tensor.layout == torch.strided
    statistics = content = ""
    with torch.no_grad():
        if with_statistics and is_readable:
            low, mean, high = (f(tensor.detach().double()).item() for f in (torch.min, torch.mean, torch.max))
            statistics = f"min {low:<9.3g} mean {mean:<9.3g} max {high:.3g}"
        if with_content:
            is_small = tensor.numel() <= LARGEST_PRINTED_TENSOR
            content = str(tensor.detach()) if is_small else f"{tensor.numel():,} numbers: too many to print"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Value(name, tuple(tensor.shape), dtype, statistics=statistics, content=content)


def count_parameters(call: Call, counted: set[int]) -> None:
    """Count every parameter once, in the call that uses it first."""
    own = {id(p): p.numel() for p in call.module.parameters()} if call.module is not None else {}
    call.parameters = sum(size for key, size in own.items() if key not in counted)
    call.shared = sum(own.values()) - call.parameters
    for child in call.children:
        if isinstance(child, Call):
            count_parameters(child, counted)
    counted.update(own)
