"""What all command lines share: sub-commands, one-line errors and exit codes.  No torch.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from io import TextIOWrapper

from config import look_up

FAILURES = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)  # ImportError: a missing plugin


class UsageError(ValueError):
    """Options that make no sense: exit code 2, as for an option that does not exist."""


@contextmanager
def errors_in_one_line(when_stopped: str = ""):
    """End the program with one line on stderr for a mistake or a failure."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # not in a notebook or a test
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks, such as → in cp1252, becomes a ?
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except FAILURES as error:
        sys.exit(f"error: {error}")  # exits with 1
    except KeyboardInterrupt:
        print(when_stopped, end="\n" if when_stopped else "", file=sys.stderr)
        sys.exit(130)  # as a shell does after Ctrl-C


def parse_command(commands: dict[str, Callable], words: list[str], prog: str, description: str, unknown: bool = False):
    """Parse a sub-command and its options by the dataclass, or call the function, of that name.

    unknown: also return the words that are not its options.
    """
    import tyro

    if not words:
        raise UsageError(f"name a command: {', '.join(commands)}. {prog} --help explains them")
    style = {"use_underscores": True, "config": (tyro.conf.FlagCreatePairsOff,)}  # --flag without --no_flag
    if words[0].startswith("-"):  # --help, or a completion script for all
        return tyro.extras.subcommand_cli_from_dict(commands, prog=prog, description=description, args=words, **style)
    try:
        command = look_up("command", words[0], commands)
    except ValueError as error:
        raise UsageError(error) from error
    return tyro.cli(command, prog=f"{prog} {words[0]}", args=words[1:], return_unknown_args=unknown, **style)
