"""Where stories come from: the Hugging Face hub, local files, the built-in storyworld."""

import codecs
import difflib
import hashlib
import itertools
import json
import os
import re
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.cache import digest, first_line, say

HUB_NAMES = {
    "tinystories": "roneneldan/TinyStories",
    "tinystories_v2": "noanabeshima/TinyStoriesV2",
    "tinystories_gpt4_clean": "karpathy/tinystories-gpt4-clean",
}
HUB_SECONDS = 6  # how long the hub may take to answer before it counts as unreachable
SEPARATOR = "<|endoftext|>"
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class Source:
    """Raw stories by split, None where the data has a null.

    fingerprint(cache_dir) is a digest of the content, which may keep notes in the cache.
    """

    name: str
    splits: dict[str, Callable[[], Iterable[str | None]]]
    fingerprint: Callable[[Path], str]
    num_train: int | None = None  # where it is known beforehand, for the progress bar
    note: str = ""  # what the reader should know about the choice of files

    def stories(self, split: str, skipped: Counter) -> Iterator[str]:
        """Stripped, non-empty stories; what is skipped is counted. SEPARATOR inside a text starts another story."""
        for text in self.splits[split]():
            if not isinstance(text, str | None):
                raise ValueError(f"{self.name}: the column of the stories holds {text!r:.40}. It has to be strings")
            stories = [story for part in (text or "").split(SEPARATOR) if (story := part.strip())]
            if not stories:
                skipped["null rows skipped" if text is None else "empty rows skipped"] += 1
            yield from stories

    def say(self, skipped: Counter) -> None:
        """Tells what was not used, if anything."""
        if remarks := [f"{count:,} {what}" for what, count in skipped.items()] + [self.note] * bool(self.note):
            say(f"{self.name}: {', '.join(remarks)}")


def read_stories(source: str, split: str = "train") -> Iterator[str]:
    """Streams the stories of a source, without white space at both ends, in the order of the source.

    source: "tinystories", "tinystories_v2", "tinystories_gpt4_clean" or their hub ids; "hub:owner/name" (anything that
    `datasets.load_dataset` takes and that has a text column); "storyworld" or "storyworld:COUNT"; a folder or file of .parquet,
    .jsonl or .txt (stories separated by <|endoftext|>, lacking that by blank lines); "auto" is TinyStories where the hub or its
    cache can be reached and else storyworld, which is said. Raises FileNotFoundError, ConnectionError or ValueError.
    """
    opened = open_source(source)
    if split not in opened.splits:
        raise ValueError(f"{opened.name} has no split {split!r}. There are: {', '.join(opened.splits)}")
    skipped = Counter()
    yield from opened.stories(split, skipped)
    opened.say(skipped)


def open_source(source: str) -> Source:
    """Finds out what a source's name means. Only "auto" may become something else than what it says."""
    if source == "auto":
        try:
            return _hub_source("tinystories", HUB_NAMES["tinystories"])
        except ConnectionError:
            say("TinyStories is not cached and the Hugging Face hub can't be reached: using the built-in storyworld instead")
            return _storyworld_source("storyworld")
    if source in ("", "hub:"):
        return _unknown_source(source)
    if source.split(":")[0] == "storyworld":
        return _storyworld_source(source)
    if source in HUB_NAMES:
        return _hub_source(source, HUB_NAMES[source])
    if source in HUB_NAMES.values() and not Path(source).exists():
        return _hub_source(next(name for name, repo in HUB_NAMES.items() if repo == source), source)
    if source.startswith("hub:"):
        repo = source.removeprefix("hub:")
        return _hub_source(Path(repo).name if Path(repo).is_dir() else repo, repo)
    if Path(source).exists():
        return _local_source(Path(source))
    return _unknown_source(source)


def _unknown_source(source: str) -> Source:
    menu = ["auto", *HUB_NAMES, "storyworld"]
    is_path = "/" in source or "\\" in source
    if not is_path and (close := difflib.get_close_matches(source, menu, n=1)):
        raise ValueError(f"no data source is called {source!r}. Did you mean {close[0]!r}? There are: {', '.join(menu)}, "
                         "hub:owner/name, or a local folder or file")
    hint = f", or hub:{source} for a data set of the Hugging Face hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    raise FileNotFoundError(f"no file, folder or data source is called {source!r}. Give an existing path{hint}, or one of: "
                            f"{', '.join(menu)}")


def _storyworld_source(source: str) -> Source:
    from data.storyworld import world as storyworld

    count = source.partition(":")[2] or "50000"
    if not count.isdigit() or int(count) < 2:
        raise ValueError(f"{source!r} should be storyworld:COUNT with COUNT at least 2, for instance storyworld:50000")
    counts = {"train": int(count), "validation": min(int(count), 3000)}
    splits = {split: lambda split=split: storyworld.stories(split, counts[split]) for split in counts}

    def fingerprint(cache_dir: Path) -> str:
        """Digest the first stories of both splits, not the code: it changes if and only if the world tells other stories."""
        told = [story for split in counts for story in storyworld.stories(split, 100)]
        return digest("storyworld", count, *told)

    return Source("storyworld", splits, fingerprint, counts["train"])


def _hub_source(name: str, repo: str) -> Source:
    """A data set of the hub, or a local folder as `datasets.load_dataset` reads it."""
    dataset = _load_dataset(repo)
    roles = {SPLIT_WORDS.get(split, split): split for split in dataset}
    if "train" not in roles:
        if len(roles) > 1:
            raise ValueError(f"{repo} has no split train, only: {', '.join(dataset)}. Save the one you want as a local file")
        roles = {"train": next(iter(dataset))}
    features = dataset[roles["train"]].features
    columns = {column: getattr(kind, "dtype", "") in ("string", "large_string") for column, kind in features.items()}
    column = _text_column(columns, repo)

    def rows(split: str) -> Iterator[str | None]:
        for batch in dataset[split].select_columns([column]).with_format("arrow").iter(batch_size=1000):
            yield from batch[column].to_pylist()

    prints = [dataset[split]._fingerprint for split in roles.values()]
    splits = {role: lambda split=split: rows(split) for role, split in roles.items()}
    return Source(name, splits, lambda cache_dir: digest("hub", repo, *prints), len(dataset[roles["train"]]))


def _load_dataset(repo: str):
    """What `datasets` has in its cache if it has it (so every run sees the same revision), else from the hub.

    Raises ConnectionError within 10 seconds when the hub can't be reached.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.packaged_modules.cache.cache import Cache

    cure = "Train on the built-in stories with --train.data storyworld, or on a local folder or file with --train.data PATH"
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        if Path(repo).is_dir():
            return datasets.load_dataset(repo)
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
            raise FileNotFoundError(f"no data set can be called {repo!r}. Write hub:owner/name. {cure}")
        try:
            return Cache(dataset_name=repo.split("/")[-1], repo_id=repo, version="auto", hash="auto").as_dataset()
        except (ValueError, FileNotFoundError):  # not cached, or the download was broken off
            _check_hub(repo, cure)
        say(f"downloading {repo} from the Hugging Face hub, once, into {datasets.config.HF_DATASETS_CACHE}")
        return datasets.load_dataset(repo)
    except (datasets.exceptions.DatasetsError, EmptyDatasetError, ValueError) as error:
        raise ValueError(f"`datasets` can't read {repo}: {first_line(error)}. {cure}") from error
    except OSError:
        raise
    except Exception as error:  # of the hub's clients for HTTP and Xet: many types, one cure
        raise ConnectionError(f"{repo} could not be downloaded from the hub ({first_line(error)}). Try again. {cure}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _check_hub(repo: str, cure: str) -> None:
    """Asks the hub for a data set in a thread of its own: name look-up and proxies can hang beyond any timeout of the client."""
    import huggingface_hub

    answer = []

    def ask() -> None:
        try:
            answer.append(huggingface_hub.HfApi().dataset_info(repo, timeout=HUB_SECONDS))
        except Exception as error:  # handed over to the caller's thread, which raises it
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answer and isinstance(answer[0], huggingface_hub.errors.RepositoryNotFoundError):
        raise FileNotFoundError(f"the hub has no data set {repo!r} that may be read without permission. {cure}") from answer[0]
    if not answer or isinstance(answer[0], Exception):
        why = first_line(answer[0]) if answer else f"no answer in {HUB_SECONDS} s"
        raise ConnectionError(f"{repo} is not cached and the Hugging Face hub can't be reached ({why}). {cure}")


def _local_source(path: Path) -> Source:
    """A file is all training; of a folder's files the names say the split, as on the hub: train-00000-of-00001.parquet."""
    inside = [
        file for file in path.rglob("*")
        if not any(part.startswith(".") for part in file.relative_to(path).parts) and not ABOUT.match(file.name)
    ]  # fmt: skip
    files = [path] if path.is_file() else sorted(file for file in inside if file.suffix.lower() in READERS)
    kinds = ", ".join(READERS)
    if not files:
        raise ValueError(f"{path} holds no file that can be read. Readable are: {kinds}")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is of a kind that can't be read. Readable are: {kinds}")
    roles = defaultdict(list)
    for file in files:
        words = re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower()) if path.is_dir() else []
        roles[next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "other")].append(file)
    others, note = roles.pop("other", []), ""
    if "train" not in roles:
        if not others:
            named = ", ".join(file.name for file in files[:5])
            raise ValueError(f"{path} has no file to train on, only {named}. Add a train.* file")
        roles["train"] = others
    elif others:
        note = f"{len(others)} files not used, as their names say no split (such as {others[0].name})"
    splits = {role: lambda files=files: itertools.chain.from_iterable(map(_read_file, files)) for role, files in roles.items()}

    def fingerprint(cache_dir: Path) -> str:
        return digest("local", *(f"{role} {_file_digest(file, cache_dir)}" for role in sorted(roles) for file in roles[role]))

    return Source(path.resolve().name, splits, fingerprint, note=note)


def _read_file(path: Path) -> Iterator[str | None]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Delete it or put stories into it")
    yield from READERS[path.suffix.lower()](path)


def _read_parquet(path: Path) -> Iterator[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            string_types = (pa.string(), pa.large_string(), pa.string_view())
            columns = {field.name: field.type in string_types for field in file.schema_arrow}
            for batch in file.iter_batches(1024, columns=[_text_column(columns, path)]):
                yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a whole parquet file ({first_line(error)}). Copy or download it again") from error


def _read_jsonl(path: Path) -> Iterator[str | None]:
    column = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}, is not JSON in UTF-8 ({first_line(error)}). Write one object a line, "
                                 'such as {"text": "Once upon a time ..."}') from error
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number}, is not an object. Write one a line, such as {{"text": "Once ..."}}')
            column = column or _text_column({key: isinstance(value, str) for key, value in row.items()}, path)
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{path}, line {number}: {column!r} is {text!r}. It has to be a string")
            yield text


def _read_txt(path: Path) -> Iterator[str]:
    """Line by line: SEPARATOR ends a story if it is anywhere in the file, else a blank line does."""
    def lines() -> Iterator[str]:
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                try:
                    yield line.decode("utf-8").replace("\r\n", "\n").removeprefix("\ufeff" if offset == 0 else "")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x}). "
                                     "Save it as UTF-8") from error
                offset += len(line)

    has_separator = any(SEPARATOR in line for line in lines())
    story = []
    for line in itertools.chain(lines(), [SEPARATOR]):
        ended, found, rest = line.rpartition(SEPARATOR)
        if found or (not has_separator and not line.strip()):
            if text := "".join([*story, ended]).strip():
                yield text
            story = []
        story.append(rest)


ABOUT = re.compile(r"(readme|licen[cs]e).*\.txt$|(dataset_infos?|state)\.json$", re.IGNORECASE)  # not stories
READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_jsonl, ".txt": _read_txt}


def _text_column(columns: dict[str, bool], where: object) -> str:
    """The column of the stories, from the columns' names and whether they hold strings: `text`, else the only one of strings."""
    strings = [name for name, is_string in columns.items() if is_string]
    if "text" in columns or len(strings) == 1:
        return "text" if "text" in columns else strings[0]
    raise ValueError(f"{where} has no column called 'text', and {len(strings)} columns of strings. The columns are: "
                     f"{', '.join(columns)}. Rename the one with the stories to 'text'")


def _file_digest(path: Path, cache_dir: Path) -> str:
    """Digest of a file's bytes. Above 64 MB it is remembered under the file's path, size and time of change."""
    stat = path.stat()
    note = cache_dir / "files" / digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if stat.st_size > 64 * 2**20 and note.exists():
        return note.read_text(encoding="utf-8")
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 64 * 2**20:
        note.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False, encoding="utf-8") as draft:
            draft.write(content)
        os.replace(draft.name, note)
    return content
