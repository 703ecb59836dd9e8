"""What show_shapes records: the calls of a model's modules, and the lines of its source files."""

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shapes.comments import LineFollower, tensors_in, wrong_comment
from shapes.tree import FAILED_INSIDE, Call, Line, Seen

LARGEST_PRINTED_TENSOR = 64  # numbers; more than that no one reads


class Recording(LineFollower):
    """Records the calls of a model's modules (with hooks) and the lines of its source files into a tree of Calls."""

    def __init__(self, model: nn.Module, values: bool, tensors: bool, lines: bool):
        self.values, self.tensors, self.lines = values, tensors, lines
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        classes = {base for module in model.modules() for base in type(module).__mro__}
        foreign = {"tools", "builtins"}  # of LoggingModule and object
        self.source_modules = {c.__module__ for c in classes if c.__module__.split(".")[0] != "torch"} - foreign
        self.calls: list[Call] = []
        self.open: list[Call] = []
        self.reported: BaseException | None = None

    def __enter__(self):
        with ExitStack() as stack:
            for module in self.model.modules():
                stack.callback(module.register_forward_pre_hook(self.before_module, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self.after_module, with_kwargs=True, always_call=True).remove)
            if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it takes a second
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

    def see(self, name: str, value: Any) -> tuple[Seen, ...]:
        return tuple(seen_tensor(n, t, self.values, self.tensors) for n, t in tensors_in(name, value))

    def before_module(self, module, inputs, needs):
        name = self.names[module]
        for outer in reversed(self.open):
            if outer.module is not None:
                name = name.removeprefix(self.names[outer.module] + ".")
                break
        given_by_name = tuple(seen for need, value in needs.items() for seen in self.see(need, value))
        self.start(Call(name, type(module).__name__, self.see("", inputs), given_by_name, module, handling=sys.exc_info()[1]))

    def after_module(self, module, inputs, needs, output):
        call = next((call for call in reversed(self.open) if call.module is module), None)
        if call is None:  # somebody else's hook failed before the call began
            return
        error = sys.exc_info()[1]
        call.returned = self.see("", output)
        call.kind = type(module).__name__  # a lazy module has changed its class
        if error is not call.handling:
            call.problem = self.problem(error)
        self.end(call)

    def start(self, call):
        (self.open[-1].children if self.open else self.calls).append(call)
        self.open.append(call)

    def end(self, call):
        while self.open.pop() is not call:
            pass

    def problem(self, error: BaseException) -> str:
        """What went wrong, said once, where it went wrong; further out it only says that it did."""
        if error is self.reported:
            return FAILED_INSIDE
        self.reported = error
        return f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]

    def wanted(self, frame):
        return bool(self.open) and frame.f_globals.get("__name__") in self.source_modules

    def entered(self, frame):
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals.get(name) for name in names]
        call = self.open[-1]
        if code.co_name == "forward" and arguments and arguments[0] is call.module:
            return call
        given = tuple(seen for name, value in zip(names, arguments, strict=True) for seen in self.see(name, value))
        self.start(Call(f"{code.co_name}()", "", given))
        return self.open[-1]

    def finished(self, call, frame, statement, found, error):
        seen = []
        for name, value in found:
            seen += self.see(name, value)
            if isinstance(value, int | float) and name in statement.targets and not error:
                seen.append(Seen(name, None, number=f"{value:.4g}" if isinstance(value, float) else str(value)))
        problem = self.problem(error) if error else wrong_comment(statement, frame, found)
        if seen or problem:
            where = f"{Path(frame.f_code.co_filename).name}:{statement.line}"
            call.children.append(Line(statement.text, tuple(seen), where, statement.comment, problem))

    def left(self, call, value, error):
        if call.module is not None:
            return
        call.returned = self.see("", value)
        call.problem = self.problem(error) if error else ""
        self.end(call)
        if not call.children and not call.returned and not call.problem:
            self.open[-1].children.pop()


def seen_tensor(name: str, tensor: Tensor, values: bool, content: bool) -> Seen:
    readable = tensor.numel() and not tensor.is_meta and not tensor.is_complex() and tensor.layout == torch.strided
    numbers = content_text = ""
    with torch.no_grad():
        if values and readable:
            low, mean, high = (f(tensor.detach().double()).item() for f in (torch.min, torch.mean, torch.max))
            numbers = f"min {low:<9.3g} mean {mean:<9.3g} max {high:.3g}"
        if content:
            small = tensor.numel() <= LARGEST_PRINTED_TENSOR
            content_text = str(tensor.detach()) if small else f"{tensor.numel():,} numbers: too many to print"
    return Seen(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "", numbers, content_text)


def count_parameters(call: Call, counted: set[int]) -> None:
    """Counts every parameter once, where it is first used."""
    own = {id(p): p.numel() for p in call.module.parameters()} if call.module is not None else {}
    call.parameters = sum(size for key, size in own.items() if key not in counted)
    call.shared = sum(own.values()) - call.parameters
    for child in call.children:
        if isinstance(child, Call):
            count_parameters(child, counted)
    counted.update(own)
