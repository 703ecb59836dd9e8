"""The cache folder, and entries that are built once and checked when they are opened; small helpers. No torch.

An entry is a folder of files and an info.json with their sizes and whatever its builder returned.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from runs.files import FULL, cure_of, write_atomically

CACHE = "BASEGPT_CACHE"  # the environment variable that names another cache folder


def default_cache_dir() -> Path:
    """$BASEGPT_CACHE, or else basegpt in %LOCALAPPDATA% on Windows, and in $XDG_CACHE_HOME or ~/.cache elsewhere."""
    if folder := os.environ.get(CACHE):
        return Path(folder)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home() / "AppData/Local") / "basegpt"
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "basegpt"


def home() -> Path:
    """The home folder. Raises OSError if this account has none."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise OSError("this account has no home folder: set the environment variable BASEGPT_CACHE to a folder") from error


def open_or_build(folder: Path, build: Callable[[Path], dict]) -> tuple[dict, bool]:
    """Open an entry, or build it if it is missing or damaged; returns (info, whether it was built).

    `build` fills the folder that it is given and returns the info. The folder is temporary and is moved into place in one step,
    so that an interrupted run leaves no half entry. Of two processes that build at once, the second uses the entry of the first.
    """
    if (problem := find_damage(folder)) is None:
        return json.loads((folder / "info.json").read_text(encoding="utf-8"))["info"], False
    with writing_into(folder.parent):
        if folder.exists():
            say(f"the cache entry {folder} is damaged ({problem}): building it again")
        folder.parent.mkdir(parents=True, exist_ok=True)
        for unfinished in folder.parent.glob("building-*"):
            with suppress(FileNotFoundError):  # another process has just removed its own
                if time.time() - unfinished.stat().st_mtime > 24 * 60 * 60:
                    shutil.rmtree(unfinished, ignore_errors=True)
        building = tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent, ignore_cleanup_errors=True)
    with building as name:
        draft = Path(name, folder.name)
        draft.mkdir()
        with writing_into(folder.parent, FULL):
            info = build(draft)
        sizes = {file.name: file.stat().st_size for file in draft.iterdir()}
        (draft / "info.json").write_text(json.dumps({"info": info, "sizes": sizes}), encoding="utf-8")
        if folder.exists() and find_damage(folder) is not None:
            os.replace(folder, Path(name, "damaged"))
        try:
            os.replace(draft, folder)
        except OSError:
            if find_damage(folder) is not None:
                raise
    return info, True


@contextmanager
def writing_into(folder: Path, errors: tuple[int, ...] | None = None):
    """Give an OSError the path of the cache and the cure; if `errors` is given, only one with such a number."""
    try:
        yield
    except OSError as error:
        if errors is not None and error.errno not in errors:
            raise  # it may be about a file that is read
        raise OSError(f"could not write into the cache {folder} ({error.strerror}): {cure_of(error, folder, CACHE)}") from error


def keep(path: Path, text: str):
    """Keep a measurement in the cache for the next time. Where it cannot be written, say so and go on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode())
    except OSError as error:
        say(f"measured again next time, as {path} could not be written ({error.strerror}): {cure_of(error, path.parent, CACHE)}")


def find_damage(folder: Path) -> str | None:
    """What is wrong with an entry: a missing file, or one whose size has changed. None if it is whole."""
    try:
        sizes = json.loads((folder / "info.json").read_text(encoding="utf-8"))["sizes"]
    except (OSError, ValueError, KeyError) as error:
        return f"info.json: {first_line(error)}"
    for name, size in sizes.items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if (actual := (folder / name).stat().st_size) != size:
            return f"{name} has {actual:,} bytes instead of {size:,}"
    return None


def say(line: str) -> None:
    """Print a line without breaking a progress bar: to stderr, or to stdout in a notebook, where stderr looks like an error."""
    from tqdm import tqdm

    if in_notebook():
        tqdm.write(in_notebook_words(line), file=sys.stdout)
    else:
        tqdm.write(line, file=sys.stderr)


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "IPython" in sys.modules and hasattr(sys.modules["IPython"].get_ipython(), "kernel")


def in_words_of_here(message: str) -> str:
    """A message with the options of the command line, or in a notebook with variables."""
    return in_notebook_words(message) if in_notebook() else message


def in_notebook_words(message: str) -> str:
    """A message with the variables of a notebook in place of the options of the command line.

    >>> in_notebook_words("Lower --train.lr_max, or go on by --resume")
    'Lower lr_max, or go on by resume = True'
    >>> in_notebook_words("take --train.fast False, or --train.data storyworld")
    "take fast = False, or data = 'storyworld'"
    """
    def assignment(option: re.Match) -> str:
        name, value = option.groups()
        return f"{name} = {value}" if re.fullmatch(r"[\d.]+|True|False|None", value) else f"{name} = {value!r}"

    message = re.sub(r"--name (\S+) --resume\b", r"name = '\1' and resume = True", message)
    message = re.sub(r"--(resume|overwrite)\b", r"\1 = True", message)
    message = re.sub(r"--(?:train\.|model\.)no_(\w+)", r"\1 = False", message)
    a_value = r"(?!(?:or|and|to|with)\b)(\w[\w:/-]*(?:\.\w+)*)"
    message = re.sub(rf"--(?:(?:train|model)\.)(\w+) {a_value}", assignment, message)
    message = re.sub(rf"--(continue_from|name) {a_value}", assignment, message)
    return re.sub(r"--(train\.|model\.)?(?=\w)", "", message)


def digest(*parts: object) -> str:
    """24 hex digits of the SHA-256 of the parts, which are bytes or are taken as text."""
    return hashlib.sha256(b"\0".join(part if isinstance(part, bytes) else str(part).encode() for part in parts)).hexdigest()[:24]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
