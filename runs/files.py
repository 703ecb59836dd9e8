"""Write files that are whole or not there at all, and say what to do where one cannot be written.  No torch."""

import errno
import os
import secrets
from contextlib import suppress
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk, a quota, a limit on the size of files


def write_atomically(path: Path, content: bytes):
    """Write a file that is whole or not there at all, whenever the process or the machine stops. Raises OSError."""
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")  # another process has another name
    try:
        with open(unfinished, "xb") as output:
            output.write(content)
            output.flush()
            os.fsync(output.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def cure_of(error: OSError, folder: Path, variable: str) -> str:
    """What to do about a file that could not be written into a folder, in whose place an environment variable names another.

    >>> cure_of(OSError(errno.ENOSPC, "No space left on device"), Path("runs"), "BASEGPT_RUNS")
    'make room on the disk of runs'
    """
    if error.errno in FULL:
        return f"make room on the disk of {folder}"
    return f"make {folder} a folder that you may write to, or name another one by the environment variable {variable}"
