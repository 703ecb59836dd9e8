"""LoggingModule and show_shapes: watch the tensor shapes go through a model, line by line.

Blocks are plain nn.Module code that derives from LoggingModule. While `with show_shapes(model):` runs, temporary
hooks see every call of a submodule, and a LineFollower sees every line of the model's own source files; afterwards
both are gone, so a model that nobody is looking at pays nothing.
"""

from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from shapes.recording import Recording
from shapes.tree import as_html, as_text


class LoggingModule(nn.Module):
    """An nn.Module that can show its shapes: `block.show(x)`, or `with show_shapes(model): model(x)`."""

    def show(self, *inputs, values: bool = False, tensors: bool = False, lines: bool = True, html=None, **needs):
        """Calls the module without gradients, prints every shape on the way and returns the module's output.

        inputs and needs (rope=..., memory=...) go to forward as they are; the options are those of show_shapes.
        """
        if not inputs or inputs[0] is None:
            raise ValueError(f"{type(self).__name__}.show needs an input tensor, for example .show(torch.randn(2, 5, dim))")
        with torch.no_grad(), show_shapes(self, values=values, tensors=tensors, lines=lines, html=html):
            return self(*inputs, **needs)


@contextmanager
def show_shapes(model: nn.Module, *, values: bool = False, tensors: bool = False, lines: bool = True,
                html: str | Path | None = None, file: TextIO | None = None):
    """Prints what happens to the shapes when `model` (or a part of it) is called inside the `with` block.

    values:  also minimum, mean and maximum; layers that differ in them are then not folded into one
    tensors: also the tensors themselves, up to 64 numbers each
    lines:   also the tensors made inside the `forward` methods, with the source line that made each
    html:    write one self-contained page there instead of printing
    file:    print there instead of to sys.stdout

    `with show_shapes(model) as calls` gives the list of recorded Calls. When forward raises, the trace up to the
    failing line is shown and the exception goes on. RuntimeError when the model was not called at all.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"show_shapes needs a torch.nn.Module, but got {model!r:.80}")
    recording = Recording(getattr(model, "_orig_mod", model), values, tensors, lines)
    finished = False
    try:
        with recording:
            yield recording.calls
        finished = True
    finally:
        if recording.calls:
            if html is None:
                print(as_text(recording.calls), file=file)
            else:
                Path(html).write_text(as_html(recording.calls), encoding="utf-8")
                print(f"the shapes are in {html}", file=file)
        elif finished:
            raise RuntimeError("the model was not called inside show_shapes: write  with show_shapes(model): model(x)")
