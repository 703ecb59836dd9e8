"""Where a judge is reached: any endpoint that speaks OpenAI's chat completions, by the package openai.

Every usable answer is kept on disk the moment it comes, under a key of the endpoint, the model and all that it was asked. So a
run that was stopped goes on where it was, and nothing is paid for twice. Answers that cannot be used are not kept: they are asked
for again.
"""

import json
import os
import threading
from collections.abc import Hashable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

from tqdm import tqdm

from data.cache import default_cache_dir, digest, first_line, say
from evaluation.judge.prompts import Question

try:
    import openai
except ImportError as error:
    raise ImportError("judging needs the package openai: pip install openai") from error

FORMAT = 1  # raised whenever what is kept changes, so that older answers are not taken
OFFICIAL = "https://api.openai.com/v1"
CHARACTERS_A_TOKEN = 4  # of English, by which tokens are estimated
ANSWER_TOKENS = 120  # that an answer usually takes
REFUSABLE = {  # what a server may not know: the words by which its refusal tells, what is sent instead, and what that means
    "response_format": (("response_format", "json_schema", "structured output"), None, "answers are checked as before"),
    "seed": (("seed",), None, "what is asked twice differs by chance alone"),
    "max_completion_tokens": (("max_completion_tokens",), "max_tokens", "it is told max_tokens instead"),
}


class Call(NamedTuple):
    """A question with the seed that it is asked with."""

    question: Question
    seed: int


class CallFailed(Exception):
    """A call that gave no answer that can be used, and why, in a few words."""


class Endpoint:
    """A judge, behind a URL.

    base_url: of an OpenAI-compatible server; None is $OPENAI_BASE_URL, or OpenAI's own, which needs $OPENAI_API_KEY.
    timeout: seconds to wait for an answer.  retries: after a time-out, a lost connection, or a status of 408, 409, 429 and from
    500 on, with growing pauses.  parallel: calls at a time.  temperature: None leaves it to the server.  max_answer_tokens: each.
    What was answered before is there without a key and without the server. Raises OSError where the cache folder cannot be made.
    """

    def __init__(
        self, model: str, base_url: str | None = None, *, timeout: float = 60.0, retries: int = 4, parallel: int = 4,
        temperature: float | None = None, max_answer_tokens: int = 1000,
    ):  # fmt: skip
        self.model, self.temperature, self.max_answer_tokens, self.parallel = model, temperature, max_answer_tokens, parallel
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OFFICIAL).rstrip("/")
        key = os.environ.get("OPENAI_API_KEY")
        self._needs_a_key = not key and self.base_url == OFFICIAL
        self._client = openai.OpenAI(api_key=key or "none", base_url=self.base_url, timeout=timeout, max_retries=retries)
        self._timeout = timeout
        self._folder = default_cache_dir() / "judge"
        self._folder.mkdir(parents=True, exist_ok=True)  # or nothing can be kept, which is better known before
        self._refused: dict[str, str | None] = {}  # of REFUSABLE, what this server has refused, and what is sent instead
        self._lock = threading.Lock()
        self.tokens_read = self.tokens_written = 0  # as the server counts them, in the calls of this object

    def check(self):
        """Asks the server for its models, which costs nothing.

        Raises PermissionError where it wants a key and there is none, or refuses it, ConnectionError where it cannot be reached.
        """
        if self._needs_a_key:
            raise PermissionError("OPENAI_API_KEY is not set: set it, or name a server by --base_url (a local one needs no key)")
        try:
            self._client.with_options(timeout=min(self._timeout, 20.0), max_retries=1).models.with_raw_response.list()
        except openai.APIConnectionError as error:
            reason = first_line(error.__cause__ or error)
            problem = f"no judge answers at {self.base_url} ({reason})"
            raise ConnectionError(f"{problem}: start it, or give another --base_url") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._no_entry(error) from error
        except openai.APIStatusError:
            return  # it is there, but has no list of models, which not every server has

    def has_kept(self) -> bool:
        """Whether any answer of any judge is kept. If not, no question can do without the server."""
        return any(self._folder.glob("*.json"))

    def kept(self, call: Call) -> dict | None:
        """The answer of an earlier call, or None. A damaged one is told, and is none."""
        path = self._path(call)
        if not path.is_file():
            return None
        try:
            return call.question.parse(json.loads(path.read_text(encoding="utf-8"))["answer"])
        except (ValueError, KeyError, TypeError) as error:
            say(f"the kept answer {path} is damaged ({first_line(error)}): it is asked for again")
            return None

    def missing(self, calls: dict[Hashable, Call]) -> list[Call]:
        return [call for call in calls.values() if self.kept(call) is None]

    def expected_tokens(self, calls: list[Call]) -> tuple[int, int, int]:
        """About how many tokens the server reads for these calls and writes, and how many it writes at most."""
        characters = sum(len(json.dumps([call.question.messages, call.question.schema])) for call in calls)
        return characters // CHARACTERS_A_TOKEN, len(calls) * ANSWER_TOKENS, len(calls) * self.max_answer_tokens

    def ask_all(self, calls: dict[Hashable, Call], progress: bool = True) -> tuple[dict[Hashable, dict], dict[Hashable, str]]:
        """The answers, kept ones included, and why there is none to the others.

        Raises OSError where all further calls would fail too. Then, and at Ctrl-C, calls under way are awaited and kept.
        """
        answers = {key: answer for key, call in calls.items() if (answer := self.kept(call)) is not None}
        failed = {}
        with ThreadPoolExecutor(self.parallel) as pool:
            waiting = {pool.submit(self.ask, call): key for key, call in calls.items() if key not in answers}
            try:
                for done in tqdm(as_completed(waiting), "asking the judge", len(waiting), disable=not (progress and waiting)):
                    try:
                        answers[waiting[done]] = done.result()
                    except CallFailed as failure:
                        failed[waiting[done]] = str(failure)
            finally:
                pool.shutdown(cancel_futures=True)
        return answers, failed

    def ask(self, call: Call) -> dict:
        """The answer to one call, which is then kept. Raises CallFailed, or OSError where all further calls would fail too."""
        try:
            reply = self._complete(call)
        except openai.APITimeoutError as error:
            raise CallFailed("no answer in time") from error
        except openai.APIConnectionError as error:
            raise CallFailed(f"the connection broke ({first_line(error)})") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise self._no_entry(error) from error
        except openai.NotFoundError as error:
            raise FileNotFoundError(f"{self.base_url} has no model {self.model!r} ({first_line(error)}): check both") from error
        except openai.APIStatusError as error:
            if error.code == "insufficient_quota":
                raise self._no_entry(error) from error
            raise CallFailed(f"the server answered {error.status_code} ({first_line(error)})") from error
        text = self._text_of(reply)
        try:
            answer = call.question.parse(text)
        except ValueError as error:
            raise CallFailed(f"an answer of another form: {error}") from error
        self._keep(call, text, reply.get("model"))
        return answer

    def _complete(self, call: Call) -> Any:
        """The JSON that the server sends, None where it is none.

        What the server refuses to know is left out from then on, which is said once.
        """
        while True:
            options = self._options(call)
            try:
                reply = self._client.chat.completions.with_raw_response.create(
                    model=self.model, messages=call.question.messages, **options
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                told = str(error).lower()
                refused = [name for name in REFUSABLE if name in options and any(word in told for word in REFUSABLE[name][0])]
                if not refused:
                    raise
                _, instead, meaning = REFUSABLE[refused[0]]
                with self._lock:
                    if refused[0] not in self._refused:
                        self._refused[refused[0]] = instead
                        say(f"{self.base_url} refuses {refused[0]}, so it is asked without: {meaning}")
                continue
            try:
                return reply.http_response.json()
            except ValueError:
                return None

    def _options(self, call: Call) -> dict:
        form = {"name": call.question.name, "schema": call.question.schema, "strict": True}
        options = {
            "response_format": {"type": "json_schema", "json_schema": form},
            "seed": call.seed,
            "max_completion_tokens": self.max_answer_tokens,
        }
        for refused, instead in self._refused.copy().items():
            value = options.pop(refused)
            if instead is not None:
                options[instead] = value
        return options if self.temperature is None else options | {"temperature": self.temperature}

    def _text_of(self, reply: Any) -> str:
        """What the judge has written. Raises CallFailed where it has not, or where this is no chat completion."""
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
        raise CallFailed("what the server sent is no chat completion")

    def _no_entry(self, error: openai.APIStatusError) -> PermissionError:
        return PermissionError(f"{self.base_url} refuses the key ({first_line(error)}): check OPENAI_API_KEY and what it may do")

    def _path(self, call: Call):
        asked = [FORMAT, self.base_url, self.model, self.temperature, call.seed, call.question.messages, call.question.schema]
        return self._folder / f"{digest(json.dumps(asked))}.json"

    def _keep(self, call: Call, text: str, model: Any):
        """Written beside its place and moved there, so that it is whole or not there at all."""
        path = self._path(call)
        unfinished = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        kept = {"endpoint": self.base_url, "model": model, "seed": call.seed, "asked": call.question.text, "answer": text}
        unfinished.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        os.replace(unfinished, path)
