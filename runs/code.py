"""Digests of the code that a run was trained with, to recognise runs that were trained with other code."""

import hashlib
from importlib.util import find_spec
from pathlib import Path

CODE = (
    "model.py tokenizer.py train.py data/*.py data/storyworld/*.py fast/* metrics/scores.py modules/*.py "
    "training/checkpoint.py training/losses.py training/optim.py training/schedules.py"
)  # the files that affect the result of a training


def code_digests(plugins: tuple[str, ...] = ()) -> dict[str, str]:
    """The digest of each file in CODE, by path, and of each plugin, by module name."""
    home = Path(__file__).parents[1]
    paths = sorted(path for pattern in CODE.split() for path in home.glob(pattern) if path.is_file())
    files = {path.relative_to(home).as_posix(): path for path in paths}
    for plugin in plugins:
        spec = find_spec(plugin)
        if spec is not None and spec.origin:
            files[plugin] = Path(spec.origin)
    return {name: text_digest(path.read_bytes()) for name, path in files.items()}


def digest(content: bytes) -> str:
    """16 hex digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:16]


def text_digest(content: bytes) -> str:
    """The digest of a text, the same with the line ends of Windows."""
    return digest(content.replace(b"\r\n", b"\n"))
