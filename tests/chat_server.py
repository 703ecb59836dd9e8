"""A server for the tests of the judge: OpenAI's chat completions and list of models, over HTTP on 127.0.0.1.

What it answers is a function of the request, so that a test can script a judge. What does not keep to the protocol is told by a
status of 400.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from jsonschema import Draft202012Validator

MODELS = {"object": "list", "data": [{"id": "judge", "object": "model", "created": 0, "owned_by": "us"}]}


@dataclass(frozen=True)
class Reply:
    """What the server says to a request for a completion."""

    content: str | None = None
    status: int = 200
    error: str = ""  # the message that goes with another status than 200
    code: str | None = None  # and its code
    refusal: str | None = None
    finish_reason: str = "stop"
    seconds: float = 0.0  # before it comes
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None  # sent as it is, in place of a completion
    hangs_up: bool = False  # without a word


class ChatServer(ThreadingHTTPServer):
    """Answers by `judge(request, number)`, the request being the JSON that was sent, and number how many came before.

    requests: all that came for a completion.  key: the only one that is let in, if any.  models: what it answers when asked for
    its list of models, None if it has no such page.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, judge: Callable[[dict, int], Reply], key: str | None = None, models: dict | str | None = MODELS):
        super().__init__(("127.0.0.1", 0), Handler)
        self.judge, self.key, self.models, self.requests, self.lock = judge, key, models, [], threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        """A client that has stopped waiting is no error of the server's."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """The tests' own output is enough."""

    def do_GET(self):
        if self.is_let_in():
            known = self.path == "/v1/models" and self.server.models is not None
            self.send(200 if known else 404, self.server.models if known else told("no such page"))

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.is_let_in():
            return
        if problem := problem_of(self.path, request):
            self.send(400, told(problem))
            return
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(request)
        reply = self.server.judge(request, number)
        time.sleep(reply.seconds)
        if reply.hangs_up:
            self.close_connection = True
        elif reply.status != 200:
            self.send(reply.status, told(reply.error, reply.code), reply.headers)
        elif reply.body is not None:
            self.send(200, reply.body, reply.headers)
        else:
            self.send(200, completion(request, reply), reply.headers)

    def is_let_in(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.send(401, told("Incorrect API key provided", "invalid_api_key"))
        return False

    def send(self, status: int, content: dict | str, headers: dict[str, str] | None = None):
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def problem_of(path: str, request: dict) -> str | None:
    """What in a request does not keep to the protocol."""
    if path != "/v1/chat/completions":
        return f"no such page: {path}"
    if not isinstance(request.get("model"), str):
        return "you must provide a model"
    messages = request.get("messages")
    if not messages or any(set(message) != {"role", "content"} for message in messages):
        return "messages must have a role and a content"
    if form := request.get("response_format"):
        wanted = form.get("json_schema", {})
        if form["type"] != "json_schema" or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", wanted.get("name", "")):
            return "response_format must have the type json_schema and a name"
        Draft202012Validator.check_schema(wanted["schema"])
        schema = wanted["schema"]
        if wanted.get("strict") and (schema["additionalProperties"] or schema["required"] != list(schema["properties"])):
            return "a strict schema requires all properties, and allows no others"
    return None


def completion(request: dict, reply: Reply) -> dict:
    message = {"role": "assistant", "content": reply.content, "refusal": reply.refusal}
    read = sum(len(message["content"]) for message in request["messages"]) // 4
    written = len(reply.content or "") // 4
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": f"{request['model']}-2026",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": reply.finish_reason}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def told(message: str, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@contextmanager
def serving(judge: Callable[[dict, int], Reply], **options):
    """A ChatServer that is up, in threads of its own, as long as the context is."""
    server = ChatServer(judge, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stories_in(request: dict) -> list[str]:
    """What the pupils wrote, in the order in which a request shows it."""
    return re.findall(r"<(story\w*)>\n.*?\*\*\*(.*?)\n</\1>", request["messages"][-1]["content"], re.DOTALL)


def answer_by(score: Callable[[str], float]) -> Callable[[dict, int], Reply]:
    """A judge that grades a story by its score, a whole number from 1 to 10, and prefers the one with the higher score."""

    def judge(request: dict, number: int = 0) -> Reply:
        scores = [score(story) for _, story in stories_in(request)]
        if len(scores) == 2:
            better = "tie" if scores[0] == scores[1] else "1" if scores[0] > scores[1] else "2"
            return Reply(json.dumps({"assessment": "I read both.", "better": better}))
        criteria = re.findall(r'"(\w+)": 1 to 10', request["messages"][-1]["content"])
        return Reply(json.dumps({"assessment": "I read it."} | dict.fromkeys(criteria, scores[0])))

    return judge
