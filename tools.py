"""LoggingModule and show_shapes: print the tensor shapes inside a model, line by line.

While `with show_shapes(model):` runs, temporary hooks record every call of a submodule, and a tracer every line of the model's
own source files. Afterwards both are removed, so that a model costs nothing extra while nobody looks at it.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TextIO

import torch
from torch import nn

from shapes.drawing import WIDE, as_html, as_page, as_text
from shapes.recording import Recording
from shapes.tree import Call


class LoggingModule(nn.Module):
    """An nn.Module that can show its shapes: `block.show(x)`, or `with show_shapes(model): model(x)`."""

    def show(self, *inputs, values: bool = False, tensors: bool = False, lines: bool = True, html=None, **kwargs):
        """Call the module without gradients, print all shapes inside, and return its output.

        Parameters
        ----------
        *inputs, **kwargs
            Passed to forward.
        values, tensors, lines, html
            As in `show_shapes`.

        Returns
        -------
        The output of forward.

        Raises
        ------
        ValueError
            Without an input.

        Examples
        --------
        >>> from model import RMSNorm
        >>> y = RMSNorm(4).show(torch.ones(2, 3, 4), lines=False)  # doctest: +NORMALIZE_WHITESPACE
                 shapes                 parameters
        RMSNorm  (2, 3, 4) → (2, 3, 4)           4
        """
        if not inputs or inputs[0] is None:
            raise ValueError(f"{type(self).__name__}.show needs an input tensor, for example .show(torch.randn(2, 5, dim))")
        with torch.no_grad(), show_shapes(self, values=values, tensors=tensors, lines=lines, html=html):
            return self(*inputs, **kwargs)


@contextmanager
def show_shapes(model: nn.Module, *, values: bool = False, tensors: bool = False, lines: bool = True,
                html: str | Path | None = None, file: TextIO | None = None):
    """Print the shapes of all tensors when `model`, or a part of it, is called inside the `with` block.

    A notebook shows them as a tree that folds.

    Parameters
    ----------
    model : nn.Module
        What to watch.
    values : bool, default False
        Also print minimum, mean and maximum; layers that differ in them are then not merged.
    tensors : bool, default False
        Also print the tensors, if they have at most 64 numbers.
    lines : bool, default True
        Also show the tensors made inside the `forward` methods, with the source lines that made them.
    html : str or Path, optional
        Write one self-contained page there instead of printing.
    file : text file, optional
        Print there instead of to sys.stdout.

    Yields
    ------
    list of Call
        The recorded calls. If forward raises, the calls up to the failing line are shown, and the exception goes on.

    Raises
    ------
    RuntimeError
        If the model was not called.

    Examples
    --------
    >>> with show_shapes(nn.Linear(4, 8), lines=False) as calls:  # doctest: +SKIP
    ...     model(torch.ones(2, 4))
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
            draw(recording.calls, html, file)
        elif finished:
            raise RuntimeError("the model was not called inside show_shapes: write  with show_shapes(model): model(x)")


def draw(calls: list[Call], html: str | Path | None, file: TextIO | None):
    """Write a page if html names one; else display the calls in a notebook, or print them, in color on a terminal."""
    ipython = sys.modules.get("IPython")
    is_notebook = file is None and ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    is_terminal = (file or sys.stdout).isatty()

    # the tree, or a page and a link to it, which is not for saved notebooks
    if html is None:
        is_known = not is_notebook and (is_terminal or "COLUMNS" in os.environ)
        width = min(shutil.get_terminal_size((WIDE, 24)).columns, 160) if is_known else WIDE
        text = as_text(calls, width, color=is_terminal and "NO_COLOR" not in os.environ)
        rich = as_html(calls, WIDE) if is_notebook else ""
    else:
        Path(html).write_text(as_page(calls), encoding="utf-8")
        text = f"the shapes are in {html}"
        rich = f'the shapes are in <a href="{escape(str(html))}">{escape(str(html))}</a>'

    # a notebook keeps both forms, and each viewer of it shows the one that it can
    if is_notebook:
        metadata = {"tags": ["local_link"]} if html else {}
        ipython.display.display({"text/plain": text, "text/html": rich}, raw=True, metadata=metadata)
    else:
        encoding = getattr(file or sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "replace").decode(encoding), file=file)
