"""Ask a judge: any server with OpenAI's chat completions API, through the openai client, with a cache on disk.

Every valid answer is cached at once, keyed by server, model and everything that was sent: a stopped run continues where it was,
and no answer is paid for twice. Invalid answers are not cached.
"""

import json
import os
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.cache import default_cache_dir, digest, first_line, say, writing_into
from evaluation.judge.prompts import Question
from runs.files import write_atomically

try:
    import openai
except ImportError as error:
    raise ImportError("judging needs the package openai: pip install openai") from error

FORMAT = 1  # part of the cache key: raise it to invalidate cached answers
OFFICIAL = "https://api.openai.com/v1"
CHARACTERS_PER_TOKEN = 4  # of English, to estimate tokens
ANSWER_TOKENS = 120  # of a typical answer
OPTIONAL = {  # options that a server may refuse: words of its error message, what is sent instead, and the consequence
    "response_format": (("response_format", "json_schema", "structured output"), None, "answers are checked all the same"),
    "seed": (("seed",), None, "repeated questions differ by chance alone"),
    "max_completion_tokens": (("max_completion_tokens",), "max_tokens", "max_tokens is sent instead"),
}


class Call(NamedTuple):
    """A question and the seed to ask it with."""

    question: Question
    seed: int


class CallFailed(Exception):
    """A call without a valid answer; the message says why in a few words."""


class Endpoint:
    """A judge at a URL. Calls that are in the cache need neither the server nor a key.

    base_url: an OpenAI-compatible server; by default $OPENAI_BASE_URL, or OpenAI's own, which needs $OPENAI_API_KEY.
    timeout (seconds) and retries: passed to the client.  parallel: concurrent calls.  temperature: None is the server's default.
    max_answer_tokens: limit per answer. Raises OSError if the cache folder cannot be created.
    """

    def __init__(
        self, model: str, base_url: str | None = None, *, timeout: float = 60.0, retries: int = 4, parallel: int = 4,
        temperature: float | None = None, max_answer_tokens: int = 1000,
    ):  # fmt: skip
        self.model, self.temperature, self.max_answer_tokens, self.parallel = model, temperature, max_answer_tokens, parallel
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL).rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._needs_key = not key and self.base_url == OFFICIAL
        self._client = openai.OpenAI(api_key=key or "none", base_url=self.base_url, timeout=timeout, max_retries=retries)
        self.folder = default_cache_dir() / "judge"
        with writing_into(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refused: dict[str, str | None] = {}  # options that this server refused, and what is sent instead
        self._lock = threading.Lock()
        self.tokens_read = self.tokens_written = 0  # as counted by the server

    def check(self):
        """Ask the server for its list of models, which is free. Raises PermissionError or ConnectionError with the cure."""
        if self._needs_key:
            raise PermissionError("OPENAI_API_KEY is not set: set it, or name a server by --base_url (a local one needs no key)")
        try:
            self._client.with_options(max_retries=0).models.with_raw_response.list()
        except openai.APIConnectionError as error:
            problem = f"no judge answers at {self.base_url} ({first_line(error.__cause__ or error)})"
            raise ConnectionError(f"{problem}: start it, or give another --base_url") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._explain(error) from error
        except openai.APIStatusError:
            return  # not every server has a list of models

    def cached(self, call: Call) -> dict | None:
        """The cached answer to a call, if any. A damaged one is reported and ignored."""
        path = self._path(call)
        if not path.is_file():
            return None
        try:
            return call.question.parse(json.loads(path.read_text(encoding="utf-8"))["answer"])
        except (ValueError, KeyError, TypeError) as error:
            say(f"the cached answer {path} is damaged ({first_line(error)}): asking again")
            return None

    def missing(self, calls: dict[Hashable, Call]) -> list[Call]:
        return [call for call in calls.values() if self.cached(call) is None]

    def estimate_tokens(self, calls: list[Call]) -> tuple[int, int, int]:
        """Estimate the tokens that the server reads and writes for these calls, and the limit of what it writes."""
        characters = sum(len(json.dumps([call.question.messages, call.question.schema])) for call in calls)
        return characters // CHARACTERS_PER_TOKEN, len(calls) * ANSWER_TOKENS, len(calls) * self.max_answer_tokens

    def ask_all(self, calls: dict[Hashable, Call], progress: bool = True) -> tuple[dict[Hashable, dict], dict[Hashable, str]]:
        """Return the answers, from the cache or the server, and the reasons of the calls that failed.

        Raises OSError if all further calls would fail too. Then, and at Ctrl-C, calls in progress are completed and cached.
        """
        answers = {key: answer for key, call in calls.items() if (answer := self.cached(call)) is not None}
        failed = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            pending = {pool.submit(self.ask, call): key for key, call in calls.items() if key not in answers}
            try:
                for done in tqdm(as_completed(pending), "asking the judge", len(pending), disable=not (progress and pending)):
                    try:
                        answers[pending[done]] = done.result()
                    except CallFailed as failure:
                        failed[pending[done]] = str(failure)
            finally:
                pool.shutdown(cancel_futures=True)
        return answers, failed

    def ask(self, call: Call) -> dict:
        """Ask the server and cache its answer. Raises CallFailed, or OSError if all further calls would fail too."""
        try:
            reply = self._complete(call)
        except openai.APIError as error:
            raise self._explain(error) from error
        text = self._text_of(reply)
        try:
            answer = call.question.parse(text)
        except ValueError as error:
            raise CallFailed(f"invalid answer: {error}") from error
        path = self._path(call)
        entry = {"endpoint": self.base_url, "model": reply.get("model"), "seed": call.seed, "asked": call.question.text}
        with writing_into(self.folder):
            write_atomically(path, json.dumps(entry | {"answer": text}, indent=1).encode())
        return answer

    def _complete(self, call: Call) -> Any:
        """The JSON that the server sends, or None if it is not JSON. Options that it refuses are not sent again."""
        form = {"name": call.question.name, "schema": call.question.schema, "strict": True}
        requested = {"response_format": {"type": "json_schema", "json_schema": form}, "seed": call.seed,
                     "max_completion_tokens": self.max_answer_tokens}  # fmt: skip
        if self.temperature is not None:
            requested["temperature"] = self.temperature
        while True:
            refused = self._refused.copy()
            options = {name: value for name, value in requested.items() if name not in refused}
            options |= {instead: requested[name] for name, instead in refused.items() if instead}
            try:
                create = self._client.chat.completions.with_raw_response.create
                return create(model=self.model, messages=call.question.messages, **options).http_response.json()
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                self._drop_option(options, error)
            except ValueError:
                return None

    def _drop_option(self, options: dict, error: openai.APIStatusError):
        """Stop sending the option that the server refuses, and report it once. Raises the error if it refuses none of them."""
        message = str(error).lower()
        for name, (words, instead, consequence) in OPTIONAL.items():
            if name in options and any(word in message for word in words):
                with self._lock:
                    if name not in self._refused:
                        self._refused[name] = instead
                        say(f"{self.base_url} refuses {name}: {consequence}")
                return
        raise error

    def _text_of(self, reply: Any) -> str:
        """The text of a chat completion; its tokens are counted. Raises CallFailed if there is none."""
        match reply:
            case {"usage": {"prompt_tokens": int(read), "completion_tokens": int(written)}}:
                with self._lock:
                    self.tokens_read += read
                    self.tokens_written += written
        match reply:
            case {"choices": [{"message": {"refusal": str()}}, *_]} | {"choices": [{"finish_reason": "content_filter"}, *_]}:
                raise CallFailed("the judge refused to answer")
            case {"choices": [{"finish_reason": "length"}, *_]}:
                raise CallFailed(f"an answer of more than {self.max_answer_tokens} tokens was cut off")
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return text
            case {"choices": [{"message": {}}, *_]}:
                raise CallFailed("an empty answer")
        raise CallFailed("the reply is not a chat completion")

    def _explain(self, error: openai.APIError) -> Exception:
        """CallFailed, or an OSError with the cure if all further calls would fail too."""
        match error:
            case openai.APITimeoutError():
                return CallFailed("no answer in time")
            case openai.APIConnectionError():
                return CallFailed(f"the connection broke ({first_line(error)})")
            case openai.AuthenticationError() | openai.PermissionDeniedError() | openai.APIError(code="insufficient_quota"):
                return PermissionError(f"{self.base_url} refuses the key ({first_line(error)}): check OPENAI_API_KEY and quota")
            case openai.NotFoundError():
                return FileNotFoundError(f"{self.base_url} has no model {self.model!r} ({first_line(error)}): check both")
        return CallFailed(f"the server answered {getattr(error, 'status_code', 'nonsense')} ({first_line(error)})")

    def _path(self, call: Call) -> Path:
        key = [FORMAT, self.base_url, self.model, self.temperature, call.seed, call.question.messages, call.question.schema]
        return self.folder / f"{digest(json.dumps(key))}.json"
