"""DATA plugins: rows, memories and stories of one's own.

    class PrefixLM(DataPlugin):                      # other rows, of the stories of any source
        def __init__(self, data, share: float = 0.5): ...
        def batch(self, start, batch_size, seed): ...

    class Fables:                                    # other stories; validation stories are held out of them
        def stories(self): yield "Once upon a time ..."

    DATA = {"PrefixLM": PrefixLM, "Fables": Fables}  # --train.data "PrefixLM(data='Fables', share=0.7)"

modules/data_plugins.py finds them by name.  B batch, T time, M tokens of memory, D model dim.
"""

import hashlib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from config import IGNORE
from data.dataset import Batch, Data
from data.sources import Source

WITHOUT_MEMORY = 4  # one of so many batches has no memory: it trains the tokens that the memory is made from


class DataPlugin:
    """Training rows made from those of other data. The validation stories stay those of that data, so that scores compare.

    A subclass overrides `batch`, or gives a `memory`, or both.

    Attributes
    ----------
    data : Data
        Those of the option data=, with batch, rows, take, to_batch and num_rows.
    tokenizer, max_seq_len, packing
        Those of the rows.
    memory : callable, optional
        memory(prefixes: list of list of int) -> Tensor: for the first `prefix` tokens of each story a row of (B, M) tokens or of
        (B, M, D) floats, with the same M at every call. Nothing but these tokens can reach it, in training, scoring and writing
        alike: they are predicted without memory, and what follows them with it.
    prefix : int, default 16
        Tokens of a story that `memory` reads, bos included.
    """

    prefix = 16
    memory = None

    def __init__(self, data: Data):
        self.data = data
        self.name, self.fingerprint = data.name, data.fingerprint  # replaced when it is loaded
        self.num_stories, self.validation = data.num_stories, data.validation
        self.tokenizer, self.max_seq_len, self.packing = data.tokenizer, data.max_seq_len, data.packing

    def batch(self, start: int, batch_size: int, seed: int) -> Batch:
        """batch_size rows of an endless stream, from row `start` on: a pure function of its arguments.

        By default the rows of the data, three of four batches with a memory, if there is one.
        """
        batch = self.data.batch(start, batch_size, seed)
        return batch if self.memory is None or start // batch_size % WITHOUT_MEMORY == 0 else self.with_memory(batch)

    def with_memory(self, batch: Batch) -> Batch:
        """Add the memory of the first tokens of each row, and score only what follows them."""
        targets = batch.targets.clone()
        targets[:, : self.prefix - 1] = IGNORE
        return batch._replace(targets=targets, memory=self.memory(batch.inputs[:, : self.prefix].tolist()))

    def num_read(self, batch: Batch) -> int:
        """The tokens of a batch that FLOPs are counted for: all but padding, as few of them may be predicted."""
        return (batch.inputs != self.tokenizer.pad_id).sum().item()

    def __deepcopy__(self, memo) -> "DataPlugin":  # a copy of a model reads the same data
        return self


@contextmanager
def failures_of(what: str):
    """Turn any error of a plugin into a ValueError of one line with its place."""
    try:
        yield
    except Exception as error:  # a plugin is a reader's own code: anything may be wrong in it
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what} fails ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {reason})") from error


# Stories


def source_of(name: str, plugin: Any) -> Source:
    """The source of a plugin with a method `stories`, and perhaps `validation`: without it, stories are held out of training."""
    splits = {"train": plugin.stories} | ({"validation": plugin.validation} if hasattr(plugin, "validation") else {})

    def read(split: str) -> Iterator[str | None]:
        with failures_of(f"data={name!r}: {splits[split].__name__}()"):
            yield from splits[split]()

    def fingerprint(cache_dir: Path) -> str:
        """Digest all stories: nothing else shows that they have changed."""
        sha = hashlib.sha256(name.encode())
        for split in splits:
            if list(islice(read(split), 100)) != list(islice(read(split), 100)):
                method = splits[split].__name__
                raise ValueError(f"data={name!r}: {method}() gives other stories when it is called again. Make a new iterator at "
                                 "every call, and seed its random numbers")  # fmt: skip
            for story in read(split):
                sha.update(f"\0{split}\0{story}".encode(errors="surrogatepass"))
        return sha.hexdigest()

    return Source(name, {split: lambda split=split: read(split) for split in splits}, fingerprint)
