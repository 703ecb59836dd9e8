"""Sources of stories: the Hugging Face hub, local files, and the built-in storyworld."""

import codecs
import difflib
import errno
import hashlib
import itertools
import json
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from config import format_step, name_and_options, stories_of
from data.cache import digest, first_line, in_words_of_here, keep, say
from runs.files import FULL, cure_of

HUB_NAMES = {
    "tinystories": "roneneldan/TinyStories",
    "tinystories_v2": "noanabeshima/TinyStoriesV2",
    "tinystories_gpt4_clean": "karpathy/tinystories-gpt4-clean",
}
SIZES = {"storyworld": (50_000, 3000), "storyworld_small": (20_000, 1000)}  # stories for training and for validation
HUB_SECONDS = 6  # without an answer in this time, the hub is unreachable
SEPARATOR = "<|endoftext|>"
SPLIT_WORDS = {"train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
               "dev": "validation", "test": "test", "testing": "test"}


@dataclass(frozen=True)
class Source:
    """Raw texts by split, None for a null. fingerprint(cache_dir) is a digest of the content; it may use the cache."""

    name: str
    splits: dict[str, Callable[[], Iterable[str | None]]]
    fingerprint: Callable[[Path], str]
    num_train: int | None = None  # for the progress bar, if known
    note: str = ""  # on the choice of files

    def stories(self, split: str, skipped: Counter) -> Iterator[str]:
        """The non-empty stories, stripped; skipped rows are counted. SEPARATOR in a text starts another story."""
        for text in self.splits[split]():
            if not isinstance(text, str | None):
                raise ValueError(f"{self.name}: one of the stories is {text!r:.40}. It has to be a string")
            stories = [story for part in (text or "").split(SEPARATOR) if (story := part.strip())]
            if not stories:
                skipped["null rows skipped" if text is None else "empty rows skipped"] += 1
            yield from stories

    def say(self, skipped: Counter) -> None:
        """Print what was not used, if anything."""
        remarks = [f"{count:,} {reason}" for reason, count in skipped.items()] + [self.note] * bool(self.note)
        if remarks:
            say(f"{self.name}: {', '.join(remarks)}")


def read_stories(source: str, split: str = "train") -> Iterator[str]:
    """Stream the stories of a source in its order, stripped of white space.

    Parameters
    ----------
    source : str
        "tinystories", "tinystories_v2", "tinystories_gpt4_clean" or their names on the hub;
        "hub:owner/name", any data set of the hub with a text column, or a local folder as `datasets.load_dataset` reads it;
        "storyworld", or "storyworld_small" with fewer plots and words; or either with ":COUNT";
        a file or folder of .parquet, .jsonl or .txt (stories separated by <|endoftext|>, or else by blank lines);
        the name of a file or folder in the folder $BASEGPT_DATA, also for a copy of tinystories;
        "auto" is tinystories if it is here or the hub can be reached, else storyworld_small, and a line says so.
    split : str, default "train"
        Which split to read.

    Yields
    ------
    str
        A story.

    Raises
    ------
    FileNotFoundError, ConnectionError, ValueError
        If the source cannot be read, with the cure.

    Examples
    --------
    >>> next(read_stories("storyworld"))[:16]
    'Once upon a time'
    """
    opened = open_source(source)
    if split not in opened.splits:
        raise ValueError(f"{opened.name} has no split {split!r}. There are: {', '.join(opened.splits)}")
    skipped = Counter()
    yield from opened.stories(split, skipped)
    opened.say(skipped)


def open_source(source: str) -> Source:
    """Open a source by its name, see `read_stories`."""
    if source == "auto":
        try:
            return open_source("tinystories")
        except ConnectionError:
            say("TinyStories is not cached and the Hugging Face hub can't be reached: using storyworld_small instead, "
                "a built-in world of simple stories")
            return _storyworld_source("storyworld_small")
    if source in ("", "hub:"):
        return _unknown_source(source)
    if source.split(":")[0] in SIZES:
        return _storyworld_source(source)
    if copy := _local_copy(source):
        return copy
    if source in HUB_NAMES:
        return _hub_source(source, HUB_NAMES[source])
    if source in HUB_NAMES.values() and not Path(source).exists():
        return _hub_source(next(name for name, repo in HUB_NAMES.items() if repo == source), source)
    if source.startswith("hub:"):
        repo = source.removeprefix("hub:")
        return _hub_source(Path(repo).name if Path(repo).is_dir() else repo, repo)
    if Path(source).exists():
        return _local_source(Path(source))
    return _local_copy(portable_name(source)) or _unknown_source(source)


def portable_name(source: str) -> str:
    """A source by a name that means the same on another machine: the last part of a path, which BASEGPT_DATA finds again.

    >>> portable_name("../my_stories"), portable_name("hub:owner/name"), portable_name("PrefixLM(data='../my_stories')")
    ('my_stories', 'hub:owner/name', "PrefixLM(data='my_stories')")
    """
    if stories_of(source) != source:  # DATA of a plugin
        name, options = name_and_options(source)
        return format_step(name, options | {"data": portable_name(options["data"])})
    if source in HUB_NAMES.values() or re.fullmatch(r"hub:(\w[\w.-]*/)?\w[\w.-]*", source):
        return source
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1].removeprefix("hub:")


def from_anywhere(source: str) -> str:
    """A source by a name for every working directory: local files and folders by their whole path, all others as they are.

    >>> from_anywhere("storyworld:300")
    'storyworld:300'
    """
    if stories_of(source) != source:  # DATA of a plugin
        name, options = name_and_options(source)
        return format_step(name, options | {"data": from_anywhere(options["data"])})
    hub, path = ("hub:", source.removeprefix("hub:")) if source.startswith("hub:") else ("", source)
    is_name = source in ("", "auto", "hub:", *HUB_NAMES) or source.split(":")[0] in SIZES or _local_copy(source)
    return source if is_name or not Path(path).exists() else f"{hub}{Path(path).resolve()}"


def _local_copy(name: str) -> Source | None:
    """The file or folder of this name in the folder that the environment variable BASEGPT_DATA names, if there is one."""
    folder = os.environ.get("BASEGPT_DATA")
    if not folder or not re.fullmatch(r"\w[\w .-]*", name):
        return None
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"BASEGPT_DATA={folder}: there is no such folder. Name the one that holds your data, or unset it")
    if not Path(folder, name).exists():
        return None
    copy = _local_source(Path(folder, name))
    return replace(copy, name=name, note=", ".join(["the copy in BASEGPT_DATA is used", *filter(None, [copy.note])]))


def _unknown_source(source: str) -> Source:
    names = ["auto", *HUB_NAMES, *SIZES]
    is_path = "/" in source or "\\" in source
    if not is_path and (close := difflib.get_close_matches(source, names, n=1)):
        raise ValueError(f"no data source is called {source!r}. Did you mean {close[0]!r}? There are: {', '.join(names)}, "
                         "hub:owner/name, or a local folder or file")
    hint = f", or hub:{source} for a data set of the Hugging Face hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", source) else ""
    raise FileNotFoundError(f"no file, folder or data source is called {source!r}. Give an existing path (seen from "
                            f"{Path.cwd()}), or set BASEGPT_DATA to the folder that holds {portable_name(source)!r}{hint}, or "
                            f"give one of: {', '.join(names)}")


def _storyworld_source(source: str) -> Source:
    from data.storyworld import world as storyworld

    name, _, count = source.partition(":")
    most_train, most_validation = SIZES[name]
    count = count or str(most_train)
    if not count.isdigit() or int(count) < 2:
        raise ValueError(f"{source!r} should be {name}:COUNT with a COUNT of at least 2, such as {name}:{most_train}")
    counts = {"train": int(count), "validation": min(int(count), most_validation)}
    splits = {split: lambda split=split: storyworld.stories(split, counts[split], name) for split in counts}

    def fingerprint(cache_dir: Path) -> str:
        """Digest the first stories of both splits, not the code, so that it changes only with the stories."""
        return digest(name, count, *(story for split in counts for story in storyworld.stories(split, 100, name)))

    return Source(name, splits, fingerprint, counts["train"])


def _hub_source(name: str, repo: str) -> Source:
    """Open a data set of the hub, or a local folder, with `datasets`."""
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
    """Load from the cache of `datasets`, so that every run has the same revision, or else from the hub.

    Raises ConnectionError within 10 seconds if the hub can't be reached.
    """
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.packaged_modules.cache.cache import Cache

    cure = in_words_of_here("Train on the built-in stories with --train.data storyworld, or on a local folder or file with "
                            "--train.data PATH, or put a copy into the folder that BASEGPT_DATA names")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        if Path(repo).is_dir():
            return datasets.load_dataset(repo)
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
            raise FileNotFoundError(f"no data set can be called {repo!r}. Write hub:owner/name. {cure}")
        try:
            return Cache(dataset_name=repo.split("/")[-1], repo_id=repo, version="auto", hash="auto").as_dataset()
        except (ValueError, FileNotFoundError):  # not cached, or an incomplete download
            _check_hub(repo, cure)
        say(f"downloading {repo} from the Hugging Face hub, once, into {datasets.config.HF_DATASETS_CACHE}")
        return datasets.load_dataset(repo)
    except (datasets.exceptions.DatasetsError, EmptyDatasetError, ValueError) as error:
        raise ValueError(f"`datasets` can't read {repo}: {first_line(error)}. {cure}") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, *FULL):
            raise
        folder = Path(datasets.config.HF_DATASETS_CACHE)
        message = f"{repo} could not be written into {folder} ({error.strerror})"
        raise OSError(f"{message}: {cure_of(error, folder, 'HF_HOME')}. {cure}") from error
    except Exception as error:  # the hub's HTTP and Xet clients raise many types
        raise ConnectionError(f"{repo} could not be downloaded from the hub ({first_line(error)}). Try again. {cure}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)


def _check_hub(repo: str, cure: str) -> None:
    """Check that the hub has a data set, in a thread, as name look-up and proxies can hang beyond the client's timeout."""
    import huggingface_hub

    answer = []

    def ask() -> None:
        try:
            answer.append(huggingface_hub.HfApi().dataset_info(repo, timeout=HUB_SECONDS))
        except Exception as error:  # raised in the caller's thread
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if answer and isinstance(answer[0], huggingface_hub.errors.RepositoryNotFoundError):
        raise FileNotFoundError(f"the hub has no data set {repo!r} that may be read without permission. {cure}") from answer[0]
    if not answer or isinstance(answer[0], Exception):
        reason = first_line(answer[0]) if answer else f"no answer in {HUB_SECONDS} s"
        raise ConnectionError(f"{repo} is not cached and the Hugging Face hub can't be reached ({reason}). {cure}")


def _local_source(path: Path) -> Source:
    """A file is all training data; in a folder, names such as train-00000-of-00001.parquet say the split, as on the hub."""
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is of a kind that can't be read. Readable are: {', '.join(READERS)}")
    files = [path] if path.is_file() else sorted(
        file for file in path.rglob("*") if file.suffix.lower() in READERS and not NOT_STORIES.match(file.name)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )  # fmt: skip
    if not files:
        raise ValueError(f"{path} holds no file that can be read. Readable are: {', '.join(READERS)}")
    roles = defaultdict(list)
    for file in files:
        words = re.split(r"[^a-z]+", file.relative_to(path).as_posix().lower()) if path.is_dir() else []
        roles[next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "other")].append(file)
    others, note = roles.pop("other", []), ""
    if "train" not in roles:
        if not others:
            names = ", ".join(file.name for file in files[:5])
            raise ValueError(f"{path} has no file to train on, only {names}. Add a train.* file")
        roles["train"] = others
    elif others:
        note = f"{len(others)} files not used, as their names say no split (such as {others[0].name})"
    splits = {role: lambda files=files: itertools.chain.from_iterable(map(_read_file, files)) for role, files in roles.items()}

    def fingerprint(cache_dir: Path) -> str:
        return digest("local", *(f"{role} {_file_digest(file, cache_dir)}" for role in sorted(roles) for file in roles[role]))

    return Source(path.resolve().name, splits, fingerprint, note=note)


def _read_file(path: Path) -> Iterator[str | None]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Delete it, or put stories into it")
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
    """Stories end at SEPARATOR if the file has one, else at blank lines. Reads line by line, to bound memory."""
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
        before, separator, after = line.rpartition(SEPARATOR)
        if separator or (not has_separator and not line.strip()):
            if text := "".join([*story, before]).strip():
                yield text
            story = []
        story.append(after)


NOT_STORIES = re.compile(r"(readme|licen[cs]e).*\.txt$|(dataset_infos?|state)\.json$", re.IGNORECASE)
READERS = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl, ".json": _read_jsonl, ".txt": _read_txt}


def _text_column(columns: dict[str, bool], where: object) -> str:
    """The column of the stories: `text`, or the only column of strings. columns: whether each holds strings."""
    strings = [name for name, is_string in columns.items() if is_string]
    if "text" in columns or len(strings) == 1:
        return "text" if "text" in columns else strings[0]
    raise ValueError(f"{where} has no column called 'text', and {len(strings)} columns of strings. The columns are: "
                     f"{', '.join(columns)}. Rename the one with the stories to 'text'")


def _file_digest(path: Path, cache_dir: Path) -> str:
    """Digest of a file's bytes. Above 64 MB it is cached by path, size and modification time."""
    stat = path.stat()
    cached = cache_dir / "files" / digest(str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if stat.st_size > 64 * 2**20 and cached.exists():
        return cached.read_text(encoding="utf-8")
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    if stat.st_size > 64 * 2**20:
        keep(cached, content)
    return content
