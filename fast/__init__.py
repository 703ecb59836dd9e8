"""The same numbers, sooner: C++ kernels for the CPU and a chunked loss, swapped into a plain model from outside."""

from fast.blocks import for_evaluation, is_used, register, undo, undone, use
from fast.build import BuildError

__all__ = ["BuildError", "for_evaluation", "is_used", "register", "undo", "undone", "use"]
