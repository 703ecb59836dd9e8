"""Explain an error in a reader's own code in one line: what, in which file and line, and what to write instead."""

import linecache
import re
import traceback
from pathlib import Path
from types import TracebackType

import torch

# torch, Python's own, and what tries the optimizers and losses of plugins
LIBRARIES = (Path(torch.__file__).parent, Path(re.__file__).parents[1], Path(__file__).parents[1] / "training")
CHECKS = ("blame.py", "cached_decoding.py", "contract.py", "model_contract.py", "model_trial.py")
CHECKERS = {Path(__file__).with_name(name) for name in CHECKS}  # which run the code that they blame

NEW_TENSOR = "In-place changes break the gradient: write y = y + 1, which makes a new tensor, instead of y += 1 or y.add_(1)"
CURES = {  # what Python or torch says, and what helps
    r"before Module\.__init__\(\) call": "Write super().__init__() as the first line of its __init__",
    r"modified by an inplace operation|in an in-place operation|inplace arithmetic": NEW_TENSOR,
    r"backward through the graph a second time": "It uses a tensor of the previous step: keep that as tensor.detach()",
    r"support the deepcopy protocol": "It keeps a tensor with its gradient: keep that as tensor.detach()",
    r"does not require grad": "Nothing in it learns: keep weights as nn.Parameter, do not detach the loss",
    r"missing the required .forward. function": "Give it a forward(self, x)",
    r"same dtype|expected scalar type|[Ee]xpected .* dtype": "Keep the dtype of x: convert other tensors by .type_as(x)",
    r"view size is not compatible": "Write .reshape(...) in the place of .view(...)",
    r"[Tt]arget -100 is out|index -100 is out": "Leave targets that are IGNORE out: cross_entropy(..., ignore_index=IGNORE)",
    r"index out of range in self": "An embedding has no row for this token or target, such as IGNORE, which is -100",
    r"missing 1 required positional argument: 'targets'": "Generation has no targets: write targets=None in its forward",
    r"tensors to be on the same device": "Make new tensors on x.device, or keep them by register_buffer",
}


def explain(error: BaseException, trace: TracebackType | None = None) -> str:
    """Say in one line what an error is, where it came from, and what helps, if that is known.  trace: a part of its traceback.

    >>> explain(ZeroDivisionError("division by zero"))
    'ZeroDivisionError: division by zero'
    """
    place, source = "", ""
    for frame, line in traceback.walk_tb(trace or error.__traceback__):
        file, function = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        is_library = file.name.startswith("<") or file in CHECKERS or any(folder in file.parents for folder in LIBRARIES)
        if not is_library:
            place = f" ({file.name}, line {line}{f', in {function}' if function != '<module>' else ''})"
            source = linecache.getline(str(file), line).strip()
    problem = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, ValueError) and source.startswith("raise "):
        return problem  # somebody has written what is wrong
    problem = f"{type(error).__name__}: {problem}"
    cure = next((f". {cure}" for said, cure in CURES.items() if re.search(said, problem)), "")
    return f"{problem}{place}{cure}"
