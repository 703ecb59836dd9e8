"""digests.txt of a run folder: a digest of every file as it was saved, so that a file that has changed since is recognised.

A line is appended before its file is replaced, and none is ever removed: wherever a process is killed, the file that is there has
its line, and several processes may write at once. Texts are digested without the line ends of Windows, which git may add.
"""

import os
import re
from pathlib import Path

from runs.code import digest, text_digest

FILE = "digests.txt"
HEADER = "# SHA-256 (16 digits) of each file as it was saved, later ones below; of texts without \\r"
TEXTS = (".json", ".csv", ".md", ".txt")


def digest_of(file: str, content: bytes) -> str:
    return text_digest(content) if file.endswith(TEXTS) else digest(content)


def recorded(folder: Path, file: str) -> set[str]:
    """The digests of all that was saved in a run folder as this file; empty for a run of an older version."""
    if not (folder / FILE).exists():
        return set()
    lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    return {match[1] for line in lines if (match := re.fullmatch(r"([0-9a-f]{16})  (.+)", line)) and match[2] == file}


def record(folder: Path, file: str, content: bytes):
    """Append the digest of a file that is about to be saved. Raises OSError."""
    line = digest_of(file, content)
    if line in recorded(folder, file):
        return
    with open(folder / FILE, "ab") as output:
        # the line break comes first, so that a line that a full disk has cut short does not spoil the next one
        output.write(f"{'' if output.tell() else HEADER}\n{line}  {file}".encode())
        output.flush()
        os.fsync(output.fileno())


def is_as_saved(folder: Path, file: str, content: bytes) -> bool:
    """Whether a file that was read holds what was saved; True if no digest of it was recorded."""
    digests = recorded(folder, file)
    return not digests or digest_of(file, content) in digests
